//! How an engine ends: drained, at once, by being dropped, or before it began.

use crate::rig::hash_stage::continuation;
use crate::rig::{Rig, config, eventually, first_tokens, prompt, read, request, tiny_model_file};
use std::time::Duration;
use tandem::actors::{Engine, EngineError, EngineState};
use tandem::request::{ErrorKind, Event, RequestError};

#[tokio::test(flavor = "multi_thread")]
async fn draining_lets_running_streams_end_and_refuses_new_ones() {
    let rig = Rig::new().await;
    rig.stages.gate.close();
    let running = rig.engine.generate(request(&prompt(1, 41), 30));
    let engine = rig.engine.clone();
    let draining = tokio::spawn(async move { engine.shutdown(Duration::from_secs(60)).await });
    eventually("it drains", || rig.engine.status().state == EngineState::Draining);
    match read(rig.engine.generate(request(&prompt(2, 41), 3))).await.end {
        Some(Event::Failed(error)) => assert_eq!(error.kind(), ErrorKind::ShuttingDown),
        other => panic!("{other:?}"),
    }
    rig.stages.gate.open();
    assert_eq!(read(running).await.tokens, continuation(&prompt(1, 41), 30));
    draining.await.unwrap();
    assert_eq!(rig.engine.status().state, EngineState::Stopped);
}

#[tokio::test(flavor = "multi_thread")]
async fn stopping_at_once_gives_every_stream_its_terminal_event() {
    let rig = Rig::new().await;
    rig.stages.gate.close();
    let running: Vec<_> =
        (0..5).map(|number| rig.engine.generate(request(&prompt(number, 41), 1900))).collect();
    let engine = rig.engine.clone();
    let stopping = tokio::spawn(async move { engine.shutdown(Duration::ZERO).await });
    for generation in running {
        let end = read(generation).await.end;
        assert_eq!(end, Some(Event::Failed(RequestError::ShuttingDown)));
    }
    rig.stages.gate.open();
    stopping.await.unwrap();
    rig.engine.shutdown(Duration::ZERO).await;
    assert_eq!(rig.engine.ended().await, EngineError::Stopped);
    assert_eq!(rig.engine.stats().blocks.used, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_generation_keeps_its_engine_alive() {
    let rig = Rig::new().await;
    let mut generation = rig.engine.generate(request(&prompt(1, 41), 500));
    drop(rig.engine);
    let mut tokens = first_tokens(&mut generation).await;
    tokens.extend(read(generation).await.tokens);
    assert_eq!(tokens, continuation(&prompt(1, 41), 500));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_loading_engine_refuses_as_not_ready() {
    let (release, held) = std::sync::mpsc::sync_channel::<()>(0);
    let engine = Engine::builder()
        .model(tiny_model_file())
        .config(config())
        .on_progress(move |_| {
            // Holds the load until the test has looked; later calls find the sender gone.
            let _ = held.recv();
        })
        .start()
        .unwrap();
    assert_eq!(engine.status().state, EngineState::Loading);
    assert!(engine.model_info().is_none());
    match read(engine.generate(request(&prompt(1, 4), 1))).await.end {
        Some(Event::Failed(error)) => assert_eq!(error.kind(), ErrorKind::NotReady),
        other => panic!("{other:?}"),
    }
    drop(release);
    engine.ready().await.unwrap();
    let status = engine.status();
    assert_eq!(status.state, EngineState::Ready);
    assert_eq!(status.load.done_bytes, status.load.total_bytes);
    assert!(status.load.total_bytes > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_dropped_while_loading_ends() {
    let (release, held) = std::sync::mpsc::sync_channel::<()>(0);
    let (gone, ended) = tokio::sync::oneshot::channel::<()>();
    let engine = Engine::builder()
        .model(tiny_model_file())
        .config(config())
        .on_progress(move |_| {
            let _ = (held.recv(), &gone);
        })
        .start()
        .unwrap();
    drop(engine);
    drop(release);
    assert!(ended.await.is_err(), "the loader was dropped with what it held");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_model_or_configuration_is_an_error_of_build() {
    let absent = Engine::builder().model("/no/such/model.gguf").build().await.unwrap_err();
    assert!(matches!(absent, EngineError::Model(_)), "{absent}");
    let none = Engine::builder().build().await.unwrap_err();
    assert_eq!(none, EngineError::NoModel);
    let page = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("page.gguf");
    std::fs::write(&page, "<!DOCTYPE html><html><body>404</body></html>").unwrap();
    match Engine::builder().model(page).build().await.unwrap_err() {
        EngineError::Model(error) => assert_eq!(error.kind(), ErrorKind::ModelInvalid, "{error}"),
        other => panic!("{other}"),
    }
    let mut bad = config();
    bad.kv.block_tokens = 17;
    let refused = Engine::builder().model(tiny_model_file()).config(bad).build().await;
    assert!(matches!(refused.unwrap_err(), EngineError::Config(_)));
}
