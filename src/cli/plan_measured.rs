//! `tandem plan --measured`: what was predicted, run by the engine as `tandem serve` would run it.

use super::bench::made_up;
use super::connection;
use super::output::Output;
use anyhow::{Context, Result};
use futures_util::future::try_join_all;
use serde::Serialize;
use std::time::{Duration, Instant};
use tandem::actors::Engine;
use tandem::config::Config;
use tandem::placement::Prediction;
use tandem::request::{Event, Input, Request, SamplingParams};
use tandem::units::TokenId;

/// Tokens that each stream generates, or half its context if that is less.
const GENERATED: usize = 32;

/// Tokens per second of what was predicted, in the same order.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Measured {
    /// By number of streams, of all of them together.
    pub decode: Vec<f64>,
    /// By length of the prompt.
    pub prompt: Vec<f64>,
}

/// Loads the model and runs each prediction once, after one that warms up.
///
/// # Errors
/// The engine can't be started, or a request fails.
pub async fn run(prediction: &Prediction, config: &Config, output: Output) -> Result<Measured> {
    let mut config = config.clone();
    config.kv.prefix_cache = true;
    let block_tokens = config.kv.block_tokens;
    let engine = connection::load(config, output).await?;
    let info = engine.model_info().context("a loaded model")?;
    let bench = Bench { engine, vocab: info.vocab_tokens, block_tokens };
    let context = prediction.context_tokens;
    bench.decode(1, context, 0).await?;
    let mut measured = Measured { decode: Vec::new(), prompt: Vec::new() };
    for (index, decode) in prediction.decode.iter().enumerate() {
        output.notice(&format!("measuring {} of {context} tokens", decode.streams))?;
        measured.decode.push(bench.decode(decode.streams, context, index + 1).await?);
    }
    for (index, prompt) in prediction.prompt.iter().enumerate() {
        output.notice(&format!("measuring a prompt of {}", prompt.tokens))?;
        // Its answer has to have room as well.
        let tokens = prompt.tokens.min(info.context_tokens - 1);
        let text = text(tokens, 1_000_000 + index, bench.vocab);
        let (started, times) = (Instant::now(), bench.generate(text, 1).await?);
        let first = times.first().context("a prompt without an answer")?;
        measured.prompt.push(tokens as f64 / (*first - started).as_secs_f64());
    }
    bench.engine.shutdown(Duration::ZERO).await;
    Ok(measured)
}

struct Bench {
    engine: Engine,
    vocab: usize,
    block_tokens: usize,
}

impl Bench {
    /// Tokens per second of some streams while all of them generate. `round` makes their prompts
    /// unlike those before, which are cached.
    async fn decode(&self, streams: usize, context_tokens: usize, round: usize) -> Result<f64> {
        let generated = GENERATED.min(context_tokens / 2);
        // Of whole blocks and one token nothing but that is computed a second time.
        let prompt = (context_tokens - generated) / self.block_tokens * self.block_tokens + 1;
        let prompts = (0..streams).map(|stream| text(prompt, 1_000 * round + stream, self.vocab));
        let prompts: Vec<_> = prompts.collect();
        let ask = |tokens| prompts.iter().map(move |prompt| self.generate(prompt.clone(), tokens));
        // Else the first streams would end before the last prompt is read.
        try_join_all(ask(1)).await?;
        let answers = try_join_all(ask(generated)).await?;
        rate(&answers).context("streams that never ran at the same time")
    }

    /// When each token of an answer came.
    async fn generate(&self, prompt: Vec<TokenId>, tokens: usize) -> Result<Vec<Instant>> {
        let mut request = Request::new(Input::Tokens(prompt)).max_tokens(tokens);
        request.ignore_eos = true;
        let mut events = self.engine.generate(request.sampling(SamplingParams::greedy()));
        let mut times = Vec::with_capacity(tokens);
        while let Some(event) = events.next().await {
            match event {
                Event::Delta(delta) => {
                    times.extend(delta.token_ids.iter().map(|_| Instant::now()));
                }
                Event::Failed(error) => return Err(error.into()),
                _ => {}
            }
        }
        Ok(times)
    }
}

/// Tokens per second of all answers from when the last of them has begun to when the first ends.
fn rate(answers: &[Vec<Instant>]) -> Option<f64> {
    let start = answers.iter().map(|times| times.first()).max()??;
    let end = answers.iter().map(|times| times.last()).min()??;
    let seconds = end.checked_duration_since(*start)?.as_secs_f64();
    let inside = |times: &Vec<Instant>| times.iter().filter(|at| *at > start && *at <= end).count();
    let tokens: usize = answers.iter().map(inside).sum();
    (seconds > 0.0).then(|| tokens as f64 / seconds)
}

/// A text unlike any of another number.
fn text(tokens: usize, number: usize, vocab: usize) -> Vec<TokenId> {
    (0..tokens).map(|position| made_up(number, position, vocab)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_tokens_count_that_come_while_all_streams_run() {
        let zero = Instant::now();
        let at = |tenths: u64| zero + Duration::from_millis(100 * tenths);
        let first: Vec<_> = (0..10).map(at).collect();
        let second: Vec<_> = (4..14).map(at).collect();
        // Both run from 0.4 s to 0.9 s, and have five tokens each after the start.
        assert!((rate(&[first, second]).unwrap() - 20.0).abs() < 1e-6);
        assert_eq!(rate(&[vec![at(0), at(1)], vec![at(2), at(3)]]), None);
        assert_eq!(rate(&[vec![], vec![at(1)]]), None);
    }

    #[test]
    fn texts_differ_from_their_first_token_on() {
        let texts: Vec<_> = (0..40).map(|number| text(3, number, 32_000)).collect();
        let first: std::collections::HashSet<_> = texts.iter().map(|text| text[0]).collect();
        assert_eq!(first.len(), texts.len());
        assert!(texts.iter().flatten().all(|token| token.0 < 32_000));
    }
}
