//! The public engine on real models: the tiny one that tests write, and SmolLM2 where it is.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

#[path = "actors/rig.rs"]
mod rig;
#[path = "engine/speculation.rs"]
mod speculation;
#[path = "engine/tiers.rs"]
mod tiers;
#[path = "engine/together.rs"]
mod together;

use futures_util::StreamExt;
use rig::{config, read, tiny_model_file};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tandem::actors::{Engine, FaultPoint, Faults, Generation, StatsSnapshot};
use tandem::blocking;
use tandem::request::{
    AddSpecial, ChatMessage, Delta, Event, ParseSpecial, Request, SamplingParams,
};
use tandem::units::TokenId;

async fn tiny_engine() -> Engine {
    Engine::builder().model(tiny_model_file()).config(config()).build().await.unwrap()
}

fn greedy(prompt: &str, tokens: usize) -> Request {
    let mut request = Request::text(prompt).max_tokens(tokens).sampling(SamplingParams::greedy());
    request.ignore_eos = true;
    request
}

fn needs_send_and_sync<T: Clone + Send + Sync>(_: &T) {}

#[tokio::test(flavor = "multi_thread")]
async fn a_generation_is_a_stream_of_events() {
    let engine = tiny_engine().await;
    needs_send_and_sync(&engine);
    let generation: Generation = engine.generate(greedy("the rain in", 10));
    let events: Vec<Event> = StreamExt::collect(generation).await;
    assert!(matches!(events.first(), Some(Event::Accepted { .. })));
    assert!(events.last().is_some_and(Event::is_terminal));
    assert_eq!(events.iter().filter(|event| event.is_terminal()).count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seed_decides_the_answer_and_none_is_drawn_anew() {
    let engine = tiny_engine().await;
    let sampled = |seed: Option<u64>| {
        let sampling = SamplingParams { seed, temperature: 1.5, ..SamplingParams::default() };
        let mut request = greedy("one two three", 24).sampling(sampling);
        request.ignore_eos = true;
        read(engine.generate(request))
    };
    let (first, again) = (sampled(Some(7)).await, sampled(Some(7)).await);
    assert_eq!(first.tokens, again.tokens);
    assert_ne!(first.tokens, sampled(Some(8)).await.tokens);
    assert_ne!(sampled(None).await.tokens, sampled(None).await.tokens);
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_of_one_request_have_seeds_of_their_own() {
    let engine = tiny_engine().await;
    let sampling =
        |seed| SamplingParams { seed: Some(seed), temperature: 1.5, ..SamplingParams::default() };
    let mut several = greedy("one two three", 16).sampling(sampling(40));
    several.n = 2;
    let several = engine.generate(several).collect().await.unwrap();
    assert_ne!(several.texts[0], several.texts[1]);
    for (index, text) in several.texts.iter().enumerate() {
        let alone = greedy("one two three", 16).sampling(sampling(40 + index as u64));
        assert_eq!(*text, engine.generate(alone).collect_text().await.unwrap(), "answer {index}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn texts_become_tokens_and_tokens_texts() {
    let engine = tiny_engine().await;
    let (add, parse) = (AddSpecial::No, ParseSpecial::No);
    let text = "héllo wörld <|im_end|> 🦀";
    let tokens = engine.tokenize(text, add, parse).await.unwrap();
    assert_eq!(engine.detokenize(tokens).await.unwrap(), text);
    let special = engine.tokenize("<|im_end|>", add, ParseSpecial::Yes).await.unwrap();
    assert_eq!(special, [TokenId(rig::tiny_model::tiny_tokenizer::TURN_END)]);
    assert!(engine.detokenize(vec![TokenId(320)]).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chat_is_rendered_by_the_models_template() {
    let engine = tiny_engine().await;
    let message =
        |role: &str, content: &str| ChatMessage { role: role.into(), content: content.into() };
    let messages = vec![message("user", "hi <|im_end|>")];
    let rendered = engine.apply_template(messages.clone()).await.unwrap();
    assert_eq!(rendered.text, "<|im_start|>user\nhi <|im_end|><|im_end|>\n<|im_start|>assistant\n");
    let parsed = engine.tokenize(rendered.text, AddSpecial::No, ParseSpecial::Yes).await.unwrap();
    let mut chat = Request::chat(messages).max_tokens(4);
    chat.ignore_eos = true;
    let read = read(engine.generate(chat)).await;
    let Some(Event::Accepted { prompt_tokens, .. }) = read.events.first() else {
        panic!("{:?}", read.events)
    };
    assert!(*prompt_tokens > parsed.len(), "what the user spells stays text");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_engine_describes_itself() {
    let engine = tiny_engine().await;
    let info = engine.model_info().unwrap();
    assert_eq!((info.name.as_str(), info.architecture.as_str()), ("tiny", "llama"));
    assert_eq!((info.vocab_tokens, info.context_tokens), (320, 2048));
    read(engine.generate(greedy("a", 5))).await;
    let stats = serde_json::to_value(engine.stats()).unwrap();
    assert_eq!(stats["metrics"]["completion_tokens"], 5);
    assert_eq!(stats["status"]["state"], "ready");
    assert!(stats["blocks"]["total"].as_u64().unwrap() > 0);
    assert!(serde_json::to_value(engine.plan().unwrap()).unwrap().is_object());
    let trace = engine.chrome_trace();
    assert!(trace["traceEvents"].as_array().unwrap().len() > 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_engine_reports_what_it_holds() {
    let engine = tiny_engine().await;
    // The loop of an idle engine wakes every 5 s; figures must not wait for that.
    let settled = async |wanted: fn(&StatsSnapshot) -> bool| {
        let soon = Instant::now() + Duration::from_secs(3);
        while !wanted(&engine.stats()) {
            assert!(Instant::now() < soon, "{:?}", engine.stats());
            tokio::task::yield_now().await;
        }
    };
    settled(|stats| stats.blocks.total > 0).await;
    let mut answer = engine.generate(greedy("the", 1000));
    while !matches!(answer.next().await.unwrap(), Event::Delta(_)) {}
    drop(answer);
    settled(|stats| stats.sequences.running == 0 && stats.blocks.used == 0).await;
}

#[test]
fn the_blocking_facade_works_without_a_runtime() {
    let builder = Engine::builder().model(tiny_model_file()).config(config());
    let engine = blocking::Engine::build(builder).unwrap();
    let events: Vec<Event> = engine.generate(greedy("the", 6)).collect();
    assert!(matches!(events.last(), Some(Event::Done(done)) if done.usage.completion_tokens == 6));
    let (add, parse) = (AddSpecial::No, ParseSpecial::No);
    let tokens = engine.tokenize("the rain", add, parse).unwrap();
    assert_eq!(engine.detokenize(tokens).unwrap(), "the rain");
    engine.shutdown(Duration::from_secs(5));
}

/// Even on a runtime with one thread, which the facade then occupies.
#[tokio::test(flavor = "current_thread")]
async fn the_blocking_facade_works_inside_a_runtime() {
    let builder = Engine::builder().model(tiny_model_file()).config(config());
    let engine = blocking::Engine::build(builder).unwrap();
    let inside = engine.generate(greedy("the rain", 6)).collect_text().unwrap();
    let outside = tiny_engine().await.generate(greedy("the rain", 6)).collect_text().await;
    assert_eq!(inside, outside.unwrap());
    drop(engine);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_engines_live_in_one_process_and_one_may_die() {
    let (one, two) = (tiny_engine().await, tiny_engine().await);
    let (first, second) = tokio::join!(
        one.generate(greedy("one", 16)).collect_text(),
        two.generate(greedy("one", 16)).collect_text()
    );
    assert_eq!(first.unwrap(), second.unwrap());
    one.shutdown(Duration::ZERO).await;
    assert!(one.generate(greedy("one", 4)).collect_text().await.is_err());
    assert!(two.generate(greedy("one", 4)).collect_text().await.is_ok());
}

/// Sampled with penalties: the random numbers and the history must be those of before the crash.
#[tokio::test(flavor = "multi_thread")]
async fn a_real_stage_and_the_scheduler_die_and_the_answer_is_the_same() {
    let sampling = SamplingParams {
        seed: Some(11),
        temperature: 1.2,
        top_p: 0.9,
        repetition_penalty: 1.3,
        frequency_penalty: 0.4,
        ..SamplingParams::default()
    };
    let mut request = greedy("in the beginning there was", 48).sampling(sampling);
    request.logprobs = Some(3);
    let undisturbed = read(tiny_engine().await.generate(request.clone())).await;
    for point in [FaultPoint::ExecutorBeforeRun, FaultPoint::ExecutorAfterRun] {
        let faults = Arc::new(Faults::default());
        faults.arm(point, 9);
        faults.arm(FaultPoint::SchedulerBeforePlan, 30);
        let mut config = config();
        config.supervision.crashes_per_request_max = 3;
        let builder = Engine::builder().model(tiny_model_file()).config(config);
        let engine = builder.faults(Arc::clone(&faults)).build().await.unwrap();
        let disturbed = read(engine.generate(request.clone())).await;
        assert_eq!(faults.left(), 0, "both faults struck");
        assert_eq!(deltas(&disturbed), deltas(&undisturbed), "{point:?}");
    }
}

/// Text, tokens and log-probabilities: all that an answer says.
fn deltas(read: &rig::Read) -> Vec<&Delta> {
    let deltas = read.events.iter().filter_map(|event| match event {
        Event::Delta(delta) => Some(delta),
        _ => None,
    });
    deltas.collect()
}
