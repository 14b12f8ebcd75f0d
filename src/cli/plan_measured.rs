//! `tandem plan --measured`: what was predicted, run by the engine as `tandem serve` would run it.

use super::bench::made_up;
use super::connection;
use super::output::Output;
use super::plan_stages::{self, StageTime, Untimed};
use anyhow::{Context, Result, bail};
use futures_util::future::try_join_all;
use serde::Serialize;
use std::time::{Duration, Instant};
use tandem::actors::Engine;
use tandem::config::Config;
use tandem::placement::{Placement, Prediction, StepSeconds};
use tandem::request::{Event, Input, Request, SamplingParams};
use tandem::units::TokenId;

/// Tokens that each stream generates, or half its context if that is less.
const GENERATED: usize = 32;
/// How often streams may fail to run together.
const ATTEMPTS: usize = 5;

/// Tokens per second of what was predicted, in the same order.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Measured {
    /// By number of streams, of all of them together.
    pub decode: Vec<f64>,
    /// By length of the prompt.
    pub prompt: Vec<f64>,
    /// Where the time of a step, or of a prompt's steps, went, in the same order.
    pub stages: Vec<StageTime>,
}

/// Loads the model and runs each prediction once, after one that warms up.
///
/// # Errors
/// The engine can't be started, or a request fails.
pub async fn run(prediction: &Prediction, config: &Config, output: Output) -> Result<Measured> {
    let mut config = config.clone();
    config.kv.prefix_cache = true;
    // What is predicted has one token of each stream in a step.
    config.speculative.method = "off".into();
    let block_tokens = config.kv.block_tokens;
    let engine = connection::load(config, output).await?;
    let info = engine.model_info().context("a loaded model")?;
    let placement = engine.plan().context("a placed model")?;
    let (vocab, round) = (info.vocab_tokens, 0);
    let mut bench = Bench { engine, placement, vocab, block_tokens, round };
    let context = prediction.context_tokens;
    bench.decode(1, context).await?;
    let mut measured = Measured { decode: Vec::new(), prompt: Vec::new(), stages: Vec::new() };
    for decode in &prediction.decode {
        let streams = decode.streams;
        output.notice(&format!("measuring {streams} of {context} tokens"))?;
        let start_us = bench.now_us();
        measured.decode.push(bench.decode_rate(streams, context).await?);
        let untimed = Untimed::of(&bench.engine, start_us, Some(streams));
        bench.engine.start_op_times();
        bench.decode(streams, context).await?;
        let of = format!("{streams} stream{}", if streams == 1 { "" } else { "s" });
        measured.stages.extend(bench.stages(&of, decode.step, untimed, Some(streams)));
    }
    for (index, prompt) in prediction.prompt.iter().enumerate() {
        output.notice(&format!("measuring a prompt of {}", prompt.tokens))?;
        // Its answer has to have room as well.
        let tokens = prompt.tokens.min(info.context_tokens - 1);
        let start_us = bench.now_us();
        let seconds = bench.prompt(tokens, 2 * index).await?;
        measured.prompt.push(tokens as f64 / seconds);
        let Untimed { run, steps, .. } = Untimed::of(&bench.engine, start_us, None);
        bench.engine.start_op_times();
        bench.prompt(tokens, 2 * index + 1).await?;
        let run = run * steps as f64;
        let untimed = Untimed { run, between: Some(seconds - run), steps: 1 };
        let of = format!("a prompt of {}", prompt.tokens);
        measured.stages.extend(bench.stages(&of, prompt.steps, untimed, None));
    }
    bench.engine.shutdown(Duration::ZERO).await;
    Ok(measured)
}

struct Bench {
    engine: Engine,
    placement: Placement,
    vocab: usize,
    block_tokens: usize,
    /// Makes the prompts of each round of streams unlike those before, which are cached.
    round: usize,
}

impl Bench {
    /// When the last step ended, by the engine's own clock.
    fn now_us(&self) -> u64 {
        self.engine.step_traces().last().map_or(0, |step| step.apply_end_us)
    }

    /// The rows of steps whose ops were counted since: of those with as many tokens, or of all of
    /// them as one.
    fn stages(
        &self,
        of: &str,
        predicted: StepSeconds,
        untimed: Untimed,
        tokens: Option<usize>,
    ) -> Vec<StageTime> {
        let mut ops = self.engine.take_op_times();
        match tokens {
            Some(tokens) => ops.retain(|ops| ops.tokens == tokens),
            None => {
                for (index, ops) in ops.iter_mut().enumerate() {
                    ops.steps = u64::from(index == 0);
                }
            }
        }
        plan_stages::rows(of, (&self.placement, predicted), untimed, &ops)
    }

    /// Seconds until the first answer token of a prompt.
    async fn prompt(&self, tokens: usize, number: usize) -> Result<f64> {
        let text = text(tokens, 1_000_000 + number, self.vocab);
        let (started, times) = (Instant::now(), self.generate(text, 1).await?);
        let first = times.first().context("a prompt without an answer")?;
        Ok((*first - started).as_secs_f64())
    }

    /// Tokens per second of some streams while all of them generate.
    async fn decode_rate(&mut self, streams: usize, context_tokens: usize) -> Result<f64> {
        // A small model is done with one stream before a busy machine begins with the next.
        for _ in 0..ATTEMPTS {
            if let Some(rate) = self.decode(streams, context_tokens).await? {
                return Ok(rate);
            }
        }
        bail!("{streams} streams never ran at the same time in {ATTEMPTS} attempts")
    }

    /// The same, if they ever did.
    async fn decode(&mut self, streams: usize, context_tokens: usize) -> Result<Option<f64>> {
        self.round += 1;
        let round = self.round;
        let generated = GENERATED.min(context_tokens / 2);
        // Of whole blocks and one token nothing but that is computed a second time.
        let prompt = (context_tokens - generated) / self.block_tokens * self.block_tokens + 1;
        let prompts = (0..streams).map(|stream| text(prompt, 1_000 * round + stream, self.vocab));
        let prompts: Vec<_> = prompts.collect();
        let all = &*self;
        let ask = |tokens| prompts.iter().map(move |prompt| all.generate(prompt.clone(), tokens));
        // Else the first streams would end before the last prompt is read.
        try_join_all(ask(1)).await?;
        let answers = try_join_all(ask(generated)).await?;
        Ok(rate(&answers))
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
