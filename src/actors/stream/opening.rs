//! Checks a request, takes its credits and starts its task; later, turns its prepared prompt into
//! answers that can be submitted.

use super::answer::{Answer, TextState};
use super::prompt_scores::PromptScores;
use super::task::{Job, Task};
use crate::actors::Generation;
use crate::actors::engine::Anchor;
use crate::actors::load::{Loaded, sequences_alive_max};
use crate::actors::shared::Shared;
use crate::actors::text::TextDone;
use crate::actors::window::Window;
use crate::request::{Event, Request, RequestError, SamplingParams};
use crate::tokenizer::{IncrementalDecoder, StopMatcher};
use crate::units::TokenId;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::CancellationToken;

/// Starts a request's task, or says in its stream why not.
pub(in crate::actors) fn start(anchor: &Arc<Anchor>, request: Request) -> Generation {
    let shared = &anchor.shared;
    let window = Window::new(shared.config.stream.window_bytes.0 as usize);
    let cancelled = CancellationToken::new();
    match admit(shared, &request) {
        Ok((runtime, credits)) => {
            let task = Task::new(shared, request, credits, (&window, &cancelled));
            drop(shared.streams.spawn_on(task.run(), &runtime));
        }
        Err(error) => window.push(Event::Failed(error)),
    }
    Generation { window, cancelled, _engine: Arc::clone(anchor) }
}

fn admit(
    shared: &Arc<Shared>,
    request: &Request,
) -> Result<(tokio::runtime::Handle, OwnedSemaphorePermit), RequestError> {
    if let Some(refusal) = shared.refusal() {
        return Err(refusal);
    }
    let (Some(loaded), Some(runtime)) = (shared.loaded.get(), shared.runtime.get()) else {
        return Err(RequestError::Internal { message: "a ready engine has no model".into() });
    };
    request.validate()?;
    check_against_model(loaded, request)?;
    let answers_max = sequences_alive_max(&shared.config);
    if request.n > answers_max {
        return Err(RequestError::InvalidParams {
            field: "n".into(),
            got: request.n.to_string(),
            allowed: format!("1 to {answers_max}, the sequences that this engine takes at once"),
        });
    }
    let credits = Arc::clone(&shared.credits);
    let credits =
        credits.try_acquire_many_owned(request.n as u32).map_err(|_| shared.overloaded())?;
    Ok((runtime.clone(), credits))
}

/// What can be refused only with the model at hand.
fn check_against_model(loaded: &Loaded, request: &Request) -> Result<(), RequestError> {
    if let Some(got) = request.model.as_ref().filter(|name| **name != loaded.info.name) {
        return Err(RequestError::ModelNotFound {
            got: got.clone(),
            loaded: vec![loaded.info.name.clone()],
        });
    }
    let biased: Vec<TokenId> = request.sampling.logit_bias.iter().map(|(id, _)| *id).collect();
    loaded.check_tokens("logit_bias", &biased)?;
    loaded.check_tokens("stop_token_ids", &request.stop_token_ids)
}

/// A request whose prompt is known.
pub(super) struct Opened {
    pub(super) job: Job,
    pub(super) answers: Vec<Answer>,
    pub(super) scores: Option<PromptScores>,
    pub(super) warnings: Vec<String>,
}

fn draw_seed() -> Result<u64, RequestError> {
    getrandom::u64().map_err(|error| RequestError::Internal {
        message: format!("the operating system gives no seed: {error}"),
    })
}

/// Fits a prepared prompt into the context and seeds the answers.
pub(super) fn open(task: &Task, done: &TextDone) -> Result<Opened, RequestError> {
    let loaded = task.loaded()?;
    let (prompt, context_tokens) = (done.tokens.clone(), loaded.info.context_tokens);
    let room = context_tokens.saturating_sub(prompt.len());
    let wanted = task.request.max_tokens;
    if room == 0 && wanted != Some(0) || prompt.len() > context_tokens {
        let prompt_tokens = prompt.len();
        return Err(RequestError::ContextExceeded { prompt_tokens, context_tokens });
    }
    let mut warnings = done.warnings.clone();
    if let Some(wanted) = wanted.filter(|wanted| *wanted > room) {
        warnings.push(format!(
            "max_tokens is {wanted}, the context of {context_tokens} tokens has room for {room}"
        ));
    }
    let seed = match task.request.sampling.seed {
        Some(seed) => seed,
        None => draw_seed()?,
    };
    let answers =
        (0..task.request.n).map(|index| answer(task, loaded, index, (seed, done))).collect();
    let job = Job {
        max_tokens: wanted.unwrap_or(room).min(room),
        end_tokens: end_tokens(loaded, &task.request),
        deadline_us: absolute_us(task, task.request.deadline),
        ttft_deadline_us: absolute_us(task, task.request.ttft_deadline),
        prompt,
    };
    let scores = task.request.prompt_logprobs.map(|_| PromptScores::new(job.prompt.len()));
    Ok(Opened { job, answers, scores, warnings })
}

fn absolute_us(task: &Task, relative: Option<Duration>) -> Option<u64> {
    let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    relative.map(|time| task.submitted_us.saturating_add(micros(time)))
}

fn end_tokens(loaded: &Loaded, request: &Request) -> Arc<[TokenId]> {
    let own = if request.ignore_eos { &[][..] } else { &loaded.end_tokens };
    own.iter().chain(&request.stop_token_ids).copied().collect()
}

/// An answer that has not begun. Answer `index` samples with the request's seed plus `index`.
fn answer(task: &Task, loaded: &Loaded, index: usize, drawn: (u64, &TextDone)) -> Answer {
    let (seed, done) = drawn;
    let sampling = SamplingParams {
        seed: Some(seed.wrapping_add(index as u64)),
        dry_breaker_tokens: done.dry_breaker_tokens.clone(),
        top_logprobs: task.request.logprobs.unwrap_or(0),
        ..task.request.sampling.clone()
    };
    let decoder = IncrementalDecoder::new(Arc::clone(&loaded.tokenizer));
    let stops = StopMatcher::new(&task.request.stop);
    Answer {
        sampling: Arc::new(sampling),
        text: TextState::new(index, decoder, stops, task.request.logprobs.is_some()),
        emitted: Vec::new(),
        attempt: None,
        finish: None,
        last_token_us: 0,
    }
}
