//! A reader that is slow, gone, or one too many troubles nobody else.

use crate::rig::hash_stage::continuation;
use crate::rig::{Rig, config, eventually, first_tokens, prompt, read, request};
use std::time::Duration;
use tandem::config::Config;
use tandem::request::{ErrorKind, Event, FinishReason, RequestError};
use tandem::units::ByteSize;

fn narrow() -> Config {
    let mut config = config();
    config.stream.window_bytes = ByteSize(4096);
    config
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_reader_pauses_itself_and_nobody_else() {
    let rig = Rig::with(narrow(), |_| {}).await;
    let slow = rig.engine.generate(request(&prompt(1, 41), 1500));
    let paused = || rig.engine.stats().sequences.paused == 1;
    eventually("the slow reader's sequence pauses", paused);
    let quick = read(rig.engine.generate(request(&prompt(2, 42), 1500))).await;
    assert_eq!(quick.tokens, continuation(&prompt(2, 42), 1500));
    assert!(paused(), "still paused: {:?}", rig.engine.stats().sequences);
    let slow = read(slow).await;
    assert_eq!(slow.tokens, continuation(&prompt(1, 41), 1500), "nothing lost while paused");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_stays_away_ends_as_slow_consumer() {
    let mut config = narrow();
    config.stream.slow_consumer_ms = 30;
    let rig = Rig::with(config, |_| {}).await;
    let away = rig.engine.generate(request(&prompt(1, 41), 1500));
    eventually("the request ends", || rig.engine.status().requests_live == 0);
    let read = read(away).await;
    match read.end {
        Some(Event::Failed(RequestError::SlowConsumer { waited_ms: 30 })) => {}
        other => panic!("{other:?}"),
    }
    let expected = continuation(&prompt(1, 41), 1500);
    assert_eq!(read.tokens, expected[..read.tokens.len()], "what was unread can be read");
    assert_free(&rig);
}

fn assert_free(rig: &Rig) {
    eventually("no sequence and no block is left", || {
        let stats = rig.engine.stats();
        let sequences = stats.sequences;
        stats.status.requests_live == 0
            && sequences.running + sequences.waiting + sequences.paused == 0
            && stats.blocks.used == 0
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn dropping_a_stream_cancels_it_and_frees_its_blocks() {
    let rig = Rig::new().await;
    let mut dropped = rig.engine.generate(request(&prompt(1, 41), 1900));
    first_tokens(&mut dropped).await;
    assert_eq!(rig.engine.status().requests_live, 1);
    drop(dropped);
    assert_free(&rig);
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelling_ends_a_stream_with_what_it_had() {
    let rig = Rig::new().await;
    rig.stages.gate.close();
    let mut cancelled = rig.engine.generate(request(&prompt(1, 41), 1900));
    rig.stages.gate.let_through(1);
    let mut tokens = first_tokens(&mut cancelled).await;
    cancelled.cancel();
    let rest = read(cancelled).await;
    tokens.extend(&rest.tokens);
    let Some(Event::Done(done)) = rest.end else { panic!("{:?}", rest.end) };
    assert_eq!(done.finish_reasons, [FinishReason::Cancelled]);
    assert_eq!(done.usage.completion_tokens, tokens.len());
    rig.stages.gate.open();
    assert_free(&rig);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_can_be_cancelled_before_its_first_step() {
    let rig = Rig::new().await;
    rig.stages.gate.close();
    let first = rig.engine.generate(request(&prompt(1, 41), 4));
    let second = rig.engine.generate(request(&prompt(2, 41), 4));
    second.cancel();
    let second = read(second).await;
    let Some(Event::Done(done)) = second.end else { panic!("{:?}", second.end) };
    assert_eq!(done.finish_reasons, [FinishReason::Cancelled]);
    rig.stages.gate.open();
    assert_eq!(read(first).await.tokens, continuation(&prompt(1, 41), 4));
    assert_free(&rig);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_engine_refuses_at_once_and_recovers() {
    let mut config = config();
    config.scheduler.sequences_max = 1;
    config.scheduler.queue_max = 1;
    let rig = Rig::with(config, |_| {}).await;
    rig.stages.gate.close();
    let accepted: Vec<_> =
        (0..2).map(|number| rig.engine.generate(request(&prompt(number, 41), 4))).collect();
    let refused = read(rig.engine.generate(request(&prompt(9, 41), 4))).await;
    match refused.end {
        Some(Event::Failed(error @ RequestError::Overloaded { queue_depth: 2, .. })) => {
            assert!(error.kind().retryable());
        }
        other => panic!("{other:?}"),
    }
    rig.stages.gate.open();
    for (number, generation) in accepted.into_iter().enumerate() {
        assert_eq!(read(generation).await.tokens, continuation(&prompt(number as u32, 41), 4));
    }
    assert_free(&rig);
    assert_eq!(read(rig.engine.generate(request(&prompt(9, 41), 4))).await.tokens.len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_streams_share_the_engine_and_each_gets_its_own_tokens() {
    let mut config = config();
    config.scheduler.queue_max = 128;
    let rig = Rig::with(config, |_| {}).await;
    let streams: Vec<_> = (0..100)
        .map(|number| tokio::spawn(read(rig.engine.generate(request(&prompt(number, 50), 20)))))
        .collect();
    for (number, stream) in streams.into_iter().enumerate() {
        let read = stream.await.unwrap();
        assert_eq!(read.tokens, continuation(&prompt(number as u32, 50), 20), "{number}");
    }
    assert_free(&rig);
    let metrics = rig.engine.stats().metrics;
    assert_eq!((metrics.requests_done, metrics.completion_tokens), (100, 2000));
    assert_eq!(metrics.prompt_tokens, 5000);
}

#[tokio::test(flavor = "multi_thread")]
async fn deadlines_that_have_passed_end_a_request_without_a_token() {
    let rig = Rig::new().await;
    let mut late = request(&prompt(1, 41), 8);
    late.deadline = Some(Duration::ZERO);
    let read_late = read(rig.engine.generate(late)).await;
    let Some(Event::Done(done)) = read_late.end else { panic!("{:?}", read_late.end) };
    assert_eq!(done.finish_reasons, [FinishReason::Deadline]);
    let mut late = request(&prompt(1, 41), 8);
    late.ttft_deadline = Some(Duration::ZERO);
    match read(rig.engine.generate(late)).await.end {
        Some(Event::Failed(error)) => assert_eq!(error.kind(), ErrorKind::DeadlineExceeded),
        other => panic!("{other:?}"),
    }
    assert_free(&rig);
}
