//! One of a request's answers: its tokens so far, its text, and the lane to its sequence.

use crate::actors::flow::Flow;
use crate::request::{Delta, FinishReason, RequestError, SamplingParams, TokenText};
use crate::scheduler::SequenceEventKind;
use crate::tokenizer::{IncrementalDecoder, StopMatcher};
use crate::units::{SequenceId, TokenId};
use std::sync::Arc;
use tokio::sync::mpsc;

/// What the engine loop tells a stream task of one sequence.
#[derive(Debug)]
pub(in crate::actors) enum StreamMessage {
    Accepted { queue_position: usize },
    Refused(RequestError),
    Started { at_us: u64 },
    Event { at_us: u64, kind: SequenceEventKind },
}

/// A sequence that computes an answer's next tokens.
pub(super) struct Attempt {
    pub(super) sequence: SequenceId,
    pub(super) lane: mpsc::Receiver<StreamMessage>,
    pub(super) flow: Arc<Flow>,
}

/// Text that is decided and what is held back. Cloned for each computation and committed by
/// replacement.
#[derive(Clone)]
pub(super) struct TextState {
    decoder: IncrementalDecoder,
    stops: StopMatcher,
    /// Tokens whose text is not out.
    held_ids: Vec<TokenId>,
    held_texts: Vec<Arc<TokenText>>,
    index: usize,
    wants_texts: bool,
}

/// What one more token does to an answer.
pub(super) struct Spoken {
    pub(super) text: TextState,
    pub(super) delta: Option<Delta>,
    /// A stop string is complete.
    pub(super) stopped: bool,
}

impl TextState {
    pub(super) fn new(
        index: usize,
        decoder: IncrementalDecoder,
        stops: StopMatcher,
        wants_texts: bool,
    ) -> Self {
        Self { decoder, stops, held_ids: Vec::new(), held_texts: Vec::new(), index, wants_texts }
    }

    /// The state and the delta after one more token.
    pub(super) fn speak(&self, token: TokenId, described: Option<TokenText>) -> Spoken {
        let mut text = self.clone();
        text.held_ids.push(token);
        text.held_texts.extend(described.map(Arc::new));
        let decoded = text.decoder.push(token);
        let matched = text.stops.push(&decoded);
        let delta = text.delta(matched.text);
        Spoken { text, delta, stopped: matched.stopped.is_some() }
    }

    /// The last delta: everything held back, tokens included.
    pub(super) fn finish(&self) -> Option<Delta> {
        let mut text = self.clone();
        let rest = text.decoder.finish();
        let mut last = text.stops.push(&rest);
        if last.stopped.is_none() {
            last.text.push_str(&text.stops.finish());
        }
        text.last_delta(last.text)
    }

    /// What remains to be said after a stop string: its tokens, no text.
    pub(super) fn stop(&self) -> Option<Delta> {
        self.clone().last_delta(String::new())
    }

    fn delta(&mut self, text: String) -> Option<Delta> {
        if text.is_empty() { None } else { Some(self.take(text)) }
    }

    fn last_delta(&mut self, text: String) -> Option<Delta> {
        let nothing = text.is_empty() && self.held_ids.is_empty();
        if nothing { None } else { Some(self.take(text)) }
    }

    fn take(&mut self, text: String) -> Delta {
        let held = std::mem::take(&mut self.held_texts);
        let tokens = held.into_iter().map(Arc::unwrap_or_clone).collect();
        Delta {
            index: self.index,
            text,
            token_ids: std::mem::take(&mut self.held_ids),
            tokens: self.wants_texts.then_some(tokens),
        }
    }
}

/// One answer.
pub(super) struct Answer {
    /// Parameters with the answer's own seed.
    pub(super) sampling: Arc<SamplingParams>,
    pub(super) text: TextState,
    /// Tokens committed, in order.
    pub(super) emitted: Vec<TokenId>,
    pub(super) attempt: Option<Attempt>,
    pub(super) finish: Option<FinishReason>,
    pub(super) last_token_us: u64,
}
