//! A task's turns: pull → compute → commit, and what is asked of the engine loop in between.

use super::answer::{Answer, Attempt, StreamMessage};
use super::task::Task;
use crate::actors::FaultPoint;
use crate::actors::flow::Flow;
use crate::actors::lanes::{Command, Submission};
use crate::actors::links::{LANE_MESSAGES, RESUME_AT};
use crate::actors::shared::Life;
use crate::actors::text::{Preparation, TextDone, TextWork};
use crate::request::RequestError;
use crate::scheduler::NewSequence;
use futures_util::FutureExt;
use std::future::poll_fn;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::{mpsc, watch};

/// Before a full command lane is tried again: some steps' time.
const FULL_LANE_PAUSE: Duration = Duration::from_millis(2);

/// What a turn works on.
pub(super) enum Pulled {
    Prepared(Result<TextDone, RequestError>),
    Message(usize, StreamMessage),
    /// The engine loop that had the answer's sequence is dead.
    LaneClosed(usize),
    Cancelled,
    /// The engine ends, or the reader is too slow.
    Over(RequestError),
}

impl Task {
    /// Runs turns until the terminal event is out. A turn that panics is repeated, and counts as a
    /// crash of its request.
    pub(super) async fn run(mut self) {
        while !self.window.has_ended() {
            let turn = AssertUnwindSafe(self.turn()).catch_unwind().await;
            if turn.is_err() {
                self.shared.restarts.stream.add(1);
                if let Some(poison) = self.crash() {
                    self.fail(poison);
                }
            }
        }
    }

    async fn turn(&mut self) {
        self.send_aborts().await;
        self.submit_due().await;
        if self.pending.is_none() {
            self.pending = Some(self.pull().await);
        }
        self.ask_to_resume().await;
        self.shared.faults.pass(FaultPoint::StreamBeforeCompute);
        let update = self.compute();
        self.shared.faults.pass(FaultPoint::StreamBeforeCommit);
        self.pending = None;
        self.commit(update);
    }

    /// Sends a command to the engine loop, unless there will be none any more.
    async fn send(&self, mut command: Command) {
        while let Err(back) = self.shared.commands.try_send(command) {
            if self.shared.is_ending() {
                return;
            }
            command = back;
            tokio::time::sleep(FULL_LANE_PAUSE).await;
        }
    }

    async fn send_aborts(&mut self) {
        while let Some(id) = self.aborts.pop() {
            self.send(Command::Abort(id)).await;
        }
    }

    /// Submits every answer that has no sequence. The others follow the first one's first token:
    /// then the prompt's blocks are in the prefix cache.
    async fn submit_due(&mut self) {
        let first_spoke = self
            .answers
            .first()
            .is_some_and(|answer| answer.finish.is_some() || !answer.emitted.is_empty());
        for index in 0..self.answers.len() {
            let answer = &self.answers[index];
            let due = answer.finish.is_none() && answer.attempt.is_none();
            if due && (index == 0 || first_spoke) {
                self.submit(index).await;
            }
        }
    }

    async fn submit(&mut self, index: usize) {
        let Some(sequence) = self.new_sequence(index) else { return };
        let id = sequence.id;
        let (sender, lane) = mpsc::channel(LANE_MESSAGES);
        let flow = Arc::new(Flow::default());
        let submission = Submission { sequence, lane: sender, flow: Arc::clone(&flow) };
        self.send(Command::Submit(Box::new(submission))).await;
        self.answers[index].attempt = Some(Attempt { sequence: id, lane, flow });
    }

    /// The sequence that goes on where an answer stands: prompt, then the tokens emitted.
    fn new_sequence(&self, index: usize) -> Option<NewSequence> {
        let (job, answer) = (self.job.as_ref()?, &self.answers[index]);
        let wants_scores = index == 0 && self.scores.is_some();
        Some(NewSequence {
            id: self.shared.next_sequence_id(),
            tokens: job.prompt.iter().chain(&answer.emitted).copied().collect(),
            prompt_tokens: job.prompt.len(),
            sampling: Arc::clone(&answer.sampling),
            max_tokens: job.max_tokens,
            end_tokens: Arc::clone(&job.end_tokens),
            priority: self.request.priority,
            deadline_us: job.deadline_us,
            ttft_deadline_us: job.ttft_deadline_us,
            prompt_logprobs: self.request.prompt_logprobs.filter(|_| wants_scores),
            crashes: self.crashes,
        })
    }

    /// Waits for the next thing to happen.
    async fn pull(&mut self) -> Pulled {
        if self.window.is_full()
            && let Some(over) = self.wait_for_the_reader().await
        {
            return over;
        }
        if self.job.is_none() {
            let work = self.preparation();
            let shared = Arc::clone(&self.shared);
            return tokio::select! {
                biased;
                over = over(&self.cancelled, &mut self.life) => over,
                done = shared.texts.submit(work, shared.now_us()) => Pulled::Prepared(done),
            };
        }
        let answers = &mut self.answers;
        tokio::select! {
            biased;
            over = over(&self.cancelled, &mut self.life) => over,
            pulled = poll_fn(|context| poll_lanes(answers, context)) => pulled,
        }
    }

    fn preparation(&self) -> TextWork {
        TextWork::Prepare(Preparation {
            input: self.request.input.clone(),
            add_special: self.request.add_special,
            parse_special: self.request.parse_special,
            sampling: self.request.sampling.clone(),
        })
    }

    /// The window is full: nothing is pulled, so the lanes fill and the sequences pause.
    async fn wait_for_the_reader(&mut self) -> Option<Pulled> {
        self.shared.metrics.streams_paused.add(1);
        let waited_ms = self.shared.config.stream.slow_consumer_ms;
        let patience = tokio::time::sleep(Duration::from_millis(waited_ms));
        tokio::select! {
            biased;
            over = over(&self.cancelled, &mut self.life) => Some(over),
            () = self.window.room() => None,
            () = patience => Some(Pulled::Over(RequestError::SlowConsumer { waited_ms })),
        }
    }

    async fn ask_to_resume(&self) {
        for attempt in self.attempts() {
            if attempt.lane.len() <= RESUME_AT && attempt.flow.take_paused() {
                self.send(Command::Resume(attempt.sequence)).await;
            }
        }
    }
}

/// Resolves when the reader cancels or the engine ends.
async fn over(
    cancelled: &tokio_util::sync::CancellationToken,
    life: &mut watch::Receiver<Life>,
) -> Pulled {
    tokio::select! {
        biased;
        () = cancelled.cancelled() => Pulled::Cancelled,
        ended = life.wait_for(Life::ends_streams) => Pulled::Over(match ended.as_deref() {
            Ok(Life::Dead(error)) => error.clone().into(),
            _ => RequestError::ShuttingDown,
        }),
    }
}

/// The next message of any answer, or the news that its lane is closed and read.
fn poll_lanes(answers: &mut [Answer], context: &mut Context<'_>) -> Poll<Pulled> {
    for (index, answer) in answers.iter_mut().enumerate() {
        let Some(attempt) = &mut answer.attempt else { continue };
        match attempt.lane.poll_recv(context) {
            Poll::Ready(Some(message)) => return Poll::Ready(Pulled::Message(index, message)),
            Poll::Ready(None) => return Poll::Ready(Pulled::LaneClosed(index)),
            Poll::Pending => {}
        }
    }
    Poll::Pending
}
