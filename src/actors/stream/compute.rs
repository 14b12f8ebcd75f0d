//! What a pulled message means for a request: a function of the task that changes nothing.

use super::answer::{Answer, StreamMessage, TextState};
use super::opening::{self, Opened};
use super::task::Task;
use super::turn::Pulled;
use crate::actors::load::Loaded;
use crate::request::{Delta, Event, FinishReason, Phase, RequestError, TokenText};
use crate::scheduler::SequenceEventKind;
use crate::step::{RowOutput, TokenLogprob};
use crate::units::TokenId;

/// A token that an answer gains.
pub(super) struct SpokenUpdate {
    pub(super) index: usize,
    pub(super) token: TokenId,
    pub(super) at_us: u64,
    pub(super) text: TextState,
    pub(super) delta: Option<Delta>,
    pub(super) stopped: bool,
}

/// A change of a task, complete.
pub(super) enum Update {
    Nothing,
    Opened(Box<Opened>),
    Accepted(Event),
    Started {
        at_us: u64,
    },
    Progress {
        done: u64,
        cached_tokens: usize,
        event: Event,
    },
    Score {
        position: usize,
        score: TokenText,
    },
    Drafted {
        tokens: usize,
        accepted: usize,
    },
    Spoken(Box<SpokenUpdate>),
    Finished {
        index: usize,
        reason: FinishReason,
        delta: Option<Delta>,
        cached_tokens: Option<usize>,
    },
    Interrupted {
        crashes: u32,
    },
    LaneClosed {
        index: usize,
    },
    Cancelled {
        deltas: Vec<Delta>,
    },
    Failed(RequestError),
}

impl Task {
    /// What the pending message does.
    pub(super) fn compute(&self) -> Update {
        match &self.pending {
            None => Update::Nothing,
            Some(Pulled::Over(error)) => Update::Failed(error.clone()),
            Some(Pulled::Cancelled) => {
                let open = self.answers.iter().filter(|answer| answer.finish.is_none());
                Update::Cancelled { deltas: open.filter_map(|a| a.text.finish()).collect() }
            }
            Some(Pulled::Prepared(Err(error))) => Update::Failed(error.clone()),
            Some(Pulled::Prepared(Ok(done))) => match opening::open(self, done) {
                Ok(opened) => Update::Opened(Box::new(opened)),
                Err(error) => Update::Failed(error),
            },
            Some(Pulled::LaneClosed(index)) => self.compute_lane_closed(*index),
            Some(Pulled::Message(index, message)) => self.compute_message(*index, message),
        }
    }

    /// An answer whose last token is out but whose end was not told needs no new sequence.
    fn compute_lane_closed(&self, index: usize) -> Update {
        let answer = &self.answers[index];
        let full = self.job.as_ref().is_some_and(|job| answer.emitted.len() >= job.max_tokens);
        if full && !answer.emitted.is_empty() {
            return self.compute_finish(index, FinishReason::Length, None);
        }
        Update::LaneClosed { index }
    }

    fn compute_finish(
        &self,
        index: usize,
        reason: FinishReason,
        cached_tokens: Option<usize>,
    ) -> Update {
        let delta = self.answers[index].text.finish();
        Update::Finished { index, reason, delta, cached_tokens }
    }

    fn compute_message(&self, index: usize, message: &StreamMessage) -> Update {
        match message {
            StreamMessage::Accepted { queue_position } if !self.accepted => {
                Update::Accepted(Event::Accepted {
                    queue_position: *queue_position,
                    prompt_tokens: self.job.as_ref().map_or(0, |job| job.prompt.len()),
                })
            }
            StreamMessage::Accepted { .. } => Update::Nothing,
            StreamMessage::Refused(error) => Update::Failed(error.clone()),
            StreamMessage::Started { at_us } => Update::Started { at_us: *at_us },
            StreamMessage::Event { at_us, kind } => self.compute_event(index, *at_us, kind),
        }
    }

    fn compute_event(&self, index: usize, at_us: u64, kind: &SequenceEventKind) -> Update {
        match kind {
            SequenceEventKind::Prefill { done, total, cached_tokens } => {
                self.compute_progress(index, (*done, *total), *cached_tokens)
            }
            SequenceEventKind::Drafted { tokens, accepted } => {
                Update::Drafted { tokens: *tokens, accepted: *accepted }
            }
            SequenceEventKind::Token(row) => self.compute_token(index, at_us, row),
            SequenceEventKind::PromptScore(row) => match self.loaded() {
                Ok(loaded) => {
                    Update::Score { position: row.position, score: describe(loaded, row) }
                }
                Err(error) => Update::Failed(error),
            },
            SequenceEventKind::Interrupted { crashes } => Update::Interrupted { crashes: *crashes },
            SequenceEventKind::Finished { reason, cached_tokens } => {
                self.compute_finish(index, *reason, Some(*cached_tokens))
            }
            SequenceEventKind::Failed(error) => Update::Failed(error.clone()),
        }
    }

    /// Progress of the first answer's prefill, never backwards, never after a token.
    fn compute_progress(&self, index: usize, counts: (usize, usize), cached: usize) -> Update {
        let (done, total) = (counts.0 as u64, counts.1 as u64);
        let spoke = self.answers.iter().any(|answer: &Answer| !answer.emitted.is_empty());
        if index != 0 || spoke || done <= self.prefill_done {
            return Update::Nothing;
        }
        let event = Event::Progress { phase: Phase::Prefill, done, total, cached_tokens: cached };
        Update::Progress { done, cached_tokens: cached, event }
    }

    fn compute_token(&self, index: usize, at_us: u64, row: &RowOutput) -> Update {
        let (answer, loaded) = (&self.answers[index], self.loaded());
        let (Some(job), Ok(loaded)) = (&self.job, loaded) else { return Update::Nothing };
        let expected = job.prompt.len() + answer.emitted.len();
        if row.position != expected {
            let got = row.position;
            let message = format!("a token for position {got} came where {expected} follows");
            return Update::Failed(RequestError::Internal { message });
        }
        let token = row.token.id;
        let described = self.request.logprobs.is_some().then(|| describe(loaded, row));
        let spoken = answer.text.speak(token, described);
        let mut delta = spoken.delta;
        if spoken.stopped && delta.is_none() {
            delta = spoken.text.stop();
        }
        let (text, stopped) = (spoken.text, spoken.stopped);
        Update::Spoken(Box::new(SpokenUpdate { index, token, at_us, text, delta, stopped }))
    }
}

/// A row with the texts of its tokens.
fn describe(loaded: &Loaded, row: &RowOutput) -> TokenText {
    let text = |token: &TokenLogprob| loaded.tokenizer.token_text(token.id);
    TokenText {
        token: row.token,
        text: text(&row.token),
        top: row.top.iter().map(|token| (*token, text(token))).collect(),
    }
}
