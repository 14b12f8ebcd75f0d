//! Speculation changes when tokens come and nothing else: with and without drafts an answer has the
//! same tokens, texts, log-probabilities and end.

use super::rig::{Read, config, read, tiny_model_file};
use super::{deltas, greedy};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tandem::actors::{Engine, FaultPoint, Faults};
use tandem::config::Config;
use tandem::request::{DoneEvent, Event, Request, SamplingParams};

/// Text that asks to be repeated.
const CODE: &str = "fn add(a: i32, b: i32) -> i32 {\n    a + b\n}\n\n\
    fn sub(a: i32, b: i32) -> i32 {\n    a - b\n}\n\n\
    The same functions once more:\n\nfn add(a: i32, b: i32) -> i32 {\n";

fn with_method(config: &Config, method: &str) -> Config {
    let mut config = config.clone();
    config.speculative.method = method.into();
    config.speculative.ngram_min = 1;
    config
}

async fn engine(path: &Path, config: &Config, method: &str) -> Engine {
    let builder = Engine::builder().model(path).config(with_method(config, method));
    builder.build().await.unwrap()
}

fn sampled(prompt: &str, seed: u64) -> Request {
    greedy(prompt, 60).sampling(SamplingParams {
        seed: Some(seed),
        temperature: 0.7,
        top_p: 0.9,
        ..SamplingParams::default()
    })
}

/// Requests of all kinds that a row's meaning depends on.
fn requests() -> Vec<Request> {
    let mut penalised = sampled(CODE, 3);
    penalised.sampling.repetition_penalty = 1.1;
    penalised.sampling.frequency_penalty = 0.3;
    penalised.sampling.presence_penalty = 0.1;
    let mut dry = greedy(CODE, 60);
    dry.sampling.dry.multiplier = 0.8;
    let mut told = greedy(CODE, 40);
    told.logprobs = Some(4);
    let mut scored = sampled(CODE, 9);
    scored.prompt_logprobs = Some(1);
    let mut several = sampled(CODE, 5);
    several.n = 3;
    let short = (1..9).map(|tokens| greedy(CODE, tokens));
    let whole = [greedy(CODE, 100), sampled(CODE, 1), penalised, dry, told, scored, several];
    whole.into_iter().chain(short).collect()
}

/// How a healthy answer ended.
fn done(read: &Read) -> &DoneEvent {
    match &read.end {
        Some(Event::Done(done)) => done,
        other => panic!("{other:?}"),
    }
}

fn assert_same(with: &Read, without: &Read, name: &str) {
    for index in 0..done(without).finish_reasons.len() {
        let of = |read| deltas(read).into_iter().filter(move |delta| delta.index == index);
        let mut pairs = of(with).zip(of(without));
        let other = pairs.find(|(with, without)| with != without);
        assert_eq!(other, None, "{name}, answer {index}");
        assert_eq!(of(with).count(), of(without).count(), "{name}, answer {index}");
    }
    let (with, without) = (done(with), done(without));
    assert_eq!(with.finish_reasons, without.finish_reasons, "{name}");
    assert_eq!(with.usage.completion_tokens, without.usage.completion_tokens, "{name}");
    assert_eq!(without.usage.draft_tokens, 0, "{name}");
    assert!(with.usage.draft_tokens_accepted <= with.usage.draft_tokens, "{name}");
}

/// Every request alone, then all together: the same with drafts and without.
async fn assert_drafts_change_nothing(path: PathBuf, config: Config) {
    let plain = engine(&path, &config, "off").await;
    let speculating = engine(&path, &config, "ngram").await;
    let mut wanted = Vec::new();
    let mut accepted = 0;
    for (number, request) in requests().into_iter().enumerate() {
        let without = read(plain.generate(request.clone())).await;
        let with = read(speculating.generate(request)).await;
        assert_same(&with, &without, &format!("request {number}"));
        accepted += done(&with).usage.draft_tokens_accepted;
        wanted.push(without);
    }
    assert!(accepted > 20, "{accepted} drafted tokens were accepted");
    let together: Vec<_> = requests()
        .into_iter()
        .map(|request| tokio::spawn(read(speculating.generate(request))))
        .collect();
    for (number, task) in together.into_iter().enumerate() {
        assert_same(&task.await.unwrap(), &wanted[number], &format!("request {number}, together"));
    }
    let metrics = speculating.stats().metrics;
    assert!(metrics.draft_tokens_accepted >= accepted as u64, "{metrics:?}");
    assert!(metrics.draft_tokens >= metrics.draft_tokens_accepted, "{metrics:?}");
    assert_eq!(plain.stats().metrics.draft_tokens, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn drafts_change_no_answer_of_a_tiny_model() {
    assert_drafts_change_nothing(tiny_model_file(), config()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn drafts_change_no_answer_of_smollm2() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(".cache/models");
    let path = folder.join("SmolLM2-135M-Instruct.Q4_1.gguf");
    if !path.exists() {
        let required = std::env::var_os("TANDEM_REQUIRE_MODELS").is_some();
        assert!(!required, "{} is missing", path.display());
        eprintln!("skipped: {} is missing", path.display());
        return;
    }
    assert_drafts_change_nothing(path, Config::default()).await;
}

/// Wherever the stop string stands, in a draft or not, the answer ends before it.
#[tokio::test(flavor = "multi_thread")]
async fn stop_strings_end_answers_inside_drafts() {
    let plain = engine(&tiny_model_file(), &config(), "off").await;
    let speculating = engine(&tiny_model_file(), &config(), "ngram").await;
    let whole = read(plain.generate(greedy(CODE, 80))).await;
    let characters: Vec<char> = whole.text.chars().collect();
    for start in (0..characters.len().saturating_sub(4)).step_by(7) {
        let stop: String = characters[start..start + 3].iter().collect();
        let mut request = greedy(CODE, 80);
        request.stop = vec![stop.clone()];
        let without = read(plain.generate(request.clone())).await;
        assert_same(&read(speculating.generate(request)).await, &without, &stop);
    }
}

/// A stage and an engine loop that die around steps with drafts lose no token and repeat none.
#[tokio::test(flavor = "multi_thread")]
async fn crashes_around_drafts_change_nothing() {
    let mut config = config();
    config.supervision.crashes_per_request_max = 3;
    let mut request = sampled(CODE, 11);
    request.logprobs = Some(2);
    let plain = engine(&tiny_model_file(), &config, "off").await;
    let undisturbed = read(plain.generate(request.clone())).await;
    for (point, visit) in [
        (FaultPoint::ExecutorBeforeRun, 6),
        (FaultPoint::ExecutorAfterRun, 9),
        (FaultPoint::SchedulerBeforeApply, 8),
        (FaultPoint::SchedulerAfterApply, 10),
        (FaultPoint::SchedulerInDelivery, 21),
    ] {
        let faults = Arc::new(Faults::default());
        faults.arm(point, visit);
        let builder = Engine::builder().model(tiny_model_file());
        let builder = builder.config(with_method(&config, "ngram")).faults(Arc::clone(&faults));
        let engine = builder.build().await.unwrap();
        let disturbed = read(engine.generate(request.clone())).await;
        assert_eq!(faults.left(), 0, "{point:?} struck");
        assert_eq!(deltas(&disturbed), deltas(&undisturbed), "{point:?}");
        assert!(engine.stats().metrics.draft_tokens > 0, "{point:?}");
    }
}
