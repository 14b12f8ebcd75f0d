//! Puts a stream's events together for a client that wants the answer whole.

use super::protocol::{GenerationResult, WholeAnswer, WireEvent, WireToken};
use crate::request::{DoneEvent, Event, FinishReason};

/// What has come so far.
#[derive(Debug, Default)]
pub(super) struct Whole {
    answers: Vec<WholeAnswer>,
    prompt_logprobs: Option<Vec<WireToken>>,
}

impl Whole {
    /// Takes an event; gives back the one that ends a healthy stream.
    pub(super) fn add(&mut self, event: Event) -> Option<DoneEvent> {
        let event = match event {
            Event::Done(done) => return Some(done),
            other => other,
        };
        match WireEvent::from_engine(event, &[]) {
            WireEvent::Delta { index, text, token_ids, tokens } => {
                let answer = self.answer(index);
                answer.text.push_str(&text);
                answer.token_ids.extend(token_ids);
                if let Some(tokens) = tokens {
                    answer.tokens.get_or_insert_default().extend(tokens);
                }
            }
            WireEvent::PromptLogprobs { tokens } => self.prompt_logprobs = Some(tokens),
            _ => {}
        }
        None
    }

    fn answer(&mut self, index: usize) -> &mut WholeAnswer {
        while self.answers.len() <= index {
            self.answers.push(WholeAnswer {
                index: self.answers.len(),
                text: String::new(),
                finish_reason: FinishReason::Stop,
                token_ids: Vec::new(),
                tokens: None,
            });
        }
        &mut self.answers[index]
    }

    /// The result. `warnings` are about the request's fields.
    pub(super) fn finish(mut self, done: DoneEvent, warnings: &[String]) -> GenerationResult {
        for (index, reason) in done.finish_reasons.iter().enumerate() {
            self.answer(index).finish_reason = *reason;
        }
        let first = self.answer(0).clone();
        let several = self.answers.len() > 1;
        GenerationResult {
            answer: first,
            answers: if several { self.answers } else { Vec::new() },
            prompt_logprobs: self.prompt_logprobs,
            usage: done.usage,
            timings: done.timings,
            warnings: [warnings, &done.warnings].concat(),
        }
    }
}
