//! A request's task: its state, and how a computed update is committed to it.

use super::answer::{Answer, Attempt};
use super::compute::Update;
use super::opening::Opened;
use super::prompt_scores::PromptScores;
use super::turn::Pulled;
use crate::actors::lanes::Command;
use crate::actors::load::Loaded;
use crate::actors::shared::{Life, Shared};
use crate::actors::window::Window;
use crate::request::{DoneEvent, Event, FinishReason, Request, RequestError, Timings, Usage};
use crate::units::{SequenceId, TokenId};
use std::sync::Arc;
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio_util::sync::CancellationToken;

/// What all answers of a request share once its prompt is known.
pub(super) struct Job {
    pub(super) prompt: Vec<TokenId>,
    pub(super) max_tokens: usize,
    pub(super) end_tokens: Arc<[TokenId]>,
    pub(super) deadline_us: Option<u64>,
    pub(super) ttft_deadline_us: Option<u64>,
}

/// When things happened, in the engine's microseconds.
#[derive(Clone, Copy, Default)]
struct Marks {
    started_us: Option<u64>,
    first_token_us: Option<u64>,
    last_token_us: u64,
}

/// A request's task. All of it lies outside of the part of a turn that may unwind.
pub(super) struct Task {
    pub(super) shared: Arc<Shared>,
    pub(super) window: Arc<Window>,
    pub(super) cancelled: CancellationToken,
    pub(super) life: watch::Receiver<Life>,
    pub(super) request: Request,
    pub(super) submitted_us: u64,
    _credits: OwnedSemaphorePermit,
    pub(super) job: Option<Job>,
    pub(super) answers: Vec<Answer>,
    pub(super) scores: Option<PromptScores>,
    pub(super) pending: Option<Pulled>,
    /// Sequences that the engine loop should forget.
    pub(super) aborts: Vec<SequenceId>,
    /// Crashes that the request was in flight at.
    pub(super) crashes: u32,
    /// The latest engine loop whose death was counted.
    counted_loop_life: u64,
    pub(super) accepted: bool,
    pub(super) prefill_done: u64,
    cached_tokens: usize,
    draft_tokens: usize,
    draft_tokens_accepted: usize,
    warnings: Vec<String>,
    marks: Marks,
}

impl Task {
    pub(super) fn new(
        shared: &Arc<Shared>,
        request: Request,
        credits: OwnedSemaphorePermit,
        reader: (&Arc<Window>, &CancellationToken),
    ) -> Self {
        shared.metrics.requests_started.add(1);
        shared.metrics.requests_live.add(1);
        Self {
            window: Arc::clone(reader.0),
            cancelled: reader.1.clone(),
            life: shared.life.subscribe(),
            submitted_us: shared.now_us(),
            shared: Arc::clone(shared),
            request,
            _credits: credits,
            job: None,
            answers: Vec::new(),
            scores: None,
            pending: None,
            aborts: Vec::new(),
            crashes: 0,
            counted_loop_life: 0,
            accepted: false,
            prefill_done: 0,
            cached_tokens: 0,
            draft_tokens: 0,
            draft_tokens_accepted: 0,
            warnings: Vec::new(),
            marks: Marks::default(),
        }
    }

    pub(super) fn loaded(&self) -> Result<&Loaded, RequestError> {
        self.shared.loaded.get().ok_or(RequestError::ShuttingDown)
    }

    /// Counts a crash that this request was in flight at; the error if it was one too many.
    pub(super) fn crash(&mut self) -> Option<RequestError> {
        self.crashes += 1;
        let crashes_max = self.shared.config.supervision.crashes_per_request_max;
        (self.crashes >= crashes_max)
            .then_some(RequestError::PoisonRequest { crashes: self.crashes })
    }

    pub(super) fn fail(&mut self, error: RequestError) {
        if !self.window.has_ended() {
            self.shared.metrics.requests_failed.add(1);
            self.window.push(Event::Failed(error));
        }
    }

    /// Makes an update part of the task and tells the reader. Only moves and pushes: nothing here
    /// can panic halfway.
    pub(super) fn commit(&mut self, update: Update) {
        match update {
            Update::Nothing => {}
            Update::Opened(opened) => self.commit_opened(*opened),
            Update::Accepted(event) => {
                self.accepted = true;
                self.window.push(event);
            }
            Update::Started { at_us } => {
                if self.marks.started_us.is_none() {
                    self.marks.started_us = Some(at_us);
                    let waited_us = at_us.saturating_sub(self.submitted_us);
                    self.shared.metrics.queue_time.record(waited_us);
                }
            }
            Update::Progress { done, cached_tokens, event } => {
                self.prefill_done = done;
                self.cached_tokens = self.cached_tokens.max(cached_tokens);
                self.window.push(event);
            }
            Update::Score { position, score } => self.commit_score(position, score),
            Update::Drafted { tokens, accepted } => {
                self.draft_tokens += tokens;
                self.draft_tokens_accepted += accepted;
            }
            Update::Spoken(spoken) => self.commit_spoken(*spoken),
            Update::Finished { index, reason, delta, cached_tokens } => {
                self.cached_tokens = self.cached_tokens.max(cached_tokens.unwrap_or(0));
                self.window_delta(delta);
                self.answers[index].attempt = None;
                self.answers[index].finish = Some(reason);
            }
            Update::Interrupted { crashes } => self.crashes = self.crashes.max(crashes),
            Update::LaneClosed { index } => self.commit_lane_closed(index),
            Update::Cancelled { deltas } => {
                deltas.into_iter().for_each(|delta| self.window_delta(Some(delta)));
                for answer in &mut self.answers {
                    answer.finish.get_or_insert(FinishReason::Cancelled);
                }
                if self.answers.is_empty() {
                    self.push_done(vec![FinishReason::Cancelled; self.request.n]);
                }
            }
            Update::Failed(error) => self.fail(error),
        }
        self.end_if_all_answers_have();
    }

    fn commit_opened(&mut self, opened: Opened) {
        self.shared.metrics.prompt_tokens.add(opened.job.prompt.len() as u64);
        self.job = Some(opened.job);
        self.answers = opened.answers;
        self.scores = opened.scores;
        self.warnings = opened.warnings;
    }

    fn commit_score(&mut self, position: usize, score: crate::request::TokenText) {
        let Some(scores) = &mut self.scores else { return };
        scores.put(position, score);
        if let Some(all) = scores.take() {
            self.scores = None;
            self.window.push(Event::PromptLogprobs(all));
        }
    }

    fn commit_spoken(&mut self, update: super::compute::SpokenUpdate) {
        let metrics = &self.shared.metrics;
        metrics.completion_tokens.add(1);
        let at_us = update.at_us;
        if self.marks.first_token_us.is_none() {
            self.marks.first_token_us = Some(at_us);
            metrics.first_token_time.record(at_us.saturating_sub(self.submitted_us));
        }
        self.marks.last_token_us = at_us;
        let answer = &mut self.answers[update.index];
        // Tokens of one step come together: the first of them is what was waited for.
        if !answer.emitted.is_empty() && at_us > answer.last_token_us {
            metrics.inter_token_time.record(at_us.saturating_sub(answer.last_token_us));
        }
        answer.last_token_us = at_us;
        answer.emitted.push(update.token);
        answer.text = update.text;
        if update.stopped {
            answer.finish = Some(FinishReason::Stop);
            self.aborts.extend(answer.attempt.take().map(|attempt| attempt.sequence));
        }
        self.window_delta(update.delta);
    }

    fn window_delta(&mut self, delta: Option<crate::request::Delta>) {
        if let Some(delta) = delta {
            self.window.push(Event::Delta(delta));
        }
    }

    /// The engine loop died: the answer is to be submitted again. The death counts once per
    /// request, however many of its answers were in flight.
    fn commit_lane_closed(&mut self, index: usize) {
        let Some(attempt) = self.answers[index].attempt.take() else { return };
        self.shared.metrics.resubmissions.add(1);
        let loop_life = attempt.flow.loop_life();
        if attempt.flow.is_in_flight() && loop_life > self.counted_loop_life {
            self.counted_loop_life = loop_life;
            if let Some(poison) = self.crash() {
                self.fail(poison);
            }
        }
    }

    fn end_if_all_answers_have(&mut self) {
        if self.answers.is_empty() || self.window.has_ended() {
            return;
        }
        let reasons: Option<Vec<_>> = self.answers.iter().map(|answer| answer.finish).collect();
        if let Some(reasons) = reasons {
            self.push_done(reasons);
        }
    }

    fn push_done(&mut self, finish_reasons: Vec<FinishReason>) {
        let metrics = &self.shared.metrics;
        metrics.requests_done.add(1);
        metrics.cached_tokens.add(self.cached_tokens as u64);
        let usage = Usage {
            prompt_tokens: self.job.as_ref().map_or(0, |job| job.prompt.len()),
            completion_tokens: self.answers.iter().map(|answer| answer.emitted.len()).sum(),
            cached_tokens: self.cached_tokens,
            draft_tokens: self.draft_tokens,
            draft_tokens_accepted: self.draft_tokens_accepted,
        };
        let done = DoneEvent {
            finish_reasons,
            usage,
            timings: self.timings(),
            warnings: std::mem::take(&mut self.warnings),
        };
        self.window.push(Event::Done(done));
    }

    fn timings(&self) -> Timings {
        let now_us = self.shared.now_us();
        let started_us = self.marks.started_us.unwrap_or(now_us);
        let first_us = self.marks.first_token_us.unwrap_or(now_us).max(started_us);
        let last_us = self.marks.last_token_us.max(first_us);
        let span_ms = |from: u64, to: u64| to.saturating_sub(from) as f64 / 1000.0;
        Timings {
            queue_ms: span_ms(self.submitted_us, started_us),
            prefill_ms: span_ms(started_us, first_us),
            decode_ms: span_ms(first_us, last_us),
            total_ms: span_ms(self.submitted_us, now_us),
        }
    }

    /// Where an answer's sequence runs.
    pub(super) fn attempts(&self) -> impl Iterator<Item = &Attempt> {
        self.answers.iter().filter_map(|answer| answer.attempt.as_ref())
    }
}

impl Drop for Task {
    /// However a task ends, its reader gets a terminal event and its sequences are aborted.
    fn drop(&mut self) {
        let running: Vec<SequenceId> = self.attempts().map(|attempt| attempt.sequence).collect();
        self.fail(RequestError::ShuttingDown);
        for id in running.into_iter().chain(self.aborts.drain(..)) {
            // Without room the engine loop notices the closed lane by itself.
            let _ = self.shared.commands.try_send(Command::Abort(id));
        }
        self.shared.request_ended();
        self.shared.metrics.requests_live.add(-1);
    }
}
