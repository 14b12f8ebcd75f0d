//! What a GPU's failures do to requests: one that is gone ends them all with an error that may be
//! tried again, and the engine; a step for which there is no memory fails its own requests.

use crate::rig::hash_stage::{HashStages, SharedStages, continuation};
use crate::rig::tiny_model_file;
use crate::rig::{Read, Rig, config, eventually, first_tokens, prompt, read, request};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tandem::actors::{Engine, EngineError, EngineState, FaultPoint, StageFault};
use tandem::placement::Shortage;
use tandem::request::{ErrorKind, Event, RequestError};

fn error(read: Read) -> RequestError {
    match read.end {
        Some(Event::Failed(error)) => error,
        other => panic!("{other:?} where an error was expected"),
    }
}

/// Streams that run on a GPU that fails, after one stage has died in another way.
async fn fails(fault: StageFault, kind: ErrorKind) {
    let rig = Rig::with(config(), |faults| faults.arm(FaultPoint::ExecutorBeforeRun, 1)).await;
    let mut first = rig.engine.generate(request(&prompt(0, 9), 1900));
    first_tokens(&mut first).await;
    rig.stages.gate.close();
    let others: Vec<_> =
        (1..5).map(|number| rig.engine.generate(request(&prompt(number, 9), 1900))).collect();
    *rig.stages.fault.lock().unwrap() = Some(fault);
    rig.stages.gate.open();
    for generation in std::iter::once(first).chain(others) {
        let error = error(read(generation).await);
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.kind().retryable());
        let said = error.to_string();
        assert!(said.contains("GPU 3") && said.contains("a word"), "{said}");
        assert!(said.ends_with("restarts so far: 1"), "{said}");
    }
    let ended = rig.engine.ended().await;
    assert!(matches!(&ended, EngineError::Gpu(error) if error.kind() == kind), "{ended}");
    let status = rig.engine.status();
    assert_eq!(status.state, EngineState::Dead);
    assert!(status.reason.is_some_and(|reason| reason.contains("by a new process only")));
    assert_eq!(error(read(rig.engine.generate(request(&prompt(1, 9), 4))).await).kind(), kind);
    rig.engine.shutdown(Duration::ZERO).await;
    assert_eq!(rig.stages.starts.load(Ordering::SeqCst), 2, "no stage on a GPU that is gone");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_gpu_ends_all_streams_and_the_engine() {
    let fault = StageFault::GpuLost { device: "GPU 3".into(), class: "a word".into() };
    fails(fault, ErrorKind::GpuLost).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hung_gpu_ends_all_streams_and_the_engine() {
    let fault = StageFault::GpuHung { device: "GPU 3".into(), class: "a word".into() };
    fails(fault, ErrorKind::GpuHung).await;
}

/// A GPU that has 3 of 5 bytes.
fn out_of_memory() -> StageFault {
    StageFault::OutOfMemory(Shortage { gpu: Some(99), need_bytes: Some(5), free_bytes: Some(3) })
}

fn lacks_memory(error: &RequestError) {
    let RequestError::InsufficientMemory { device, need, free, suggest } = error else {
        panic!("{error}")
    };
    assert_eq!((device.as_str(), *need, *free), ("GPU 99", 5, 3));
    assert!(suggest.contains("another process may have taken it"), "{suggest}");
}

#[tokio::test(flavor = "multi_thread")]
async fn too_little_memory_for_the_first_stage_is_told_at_once() {
    let stages = Arc::new(HashStages::default());
    *stages.start_fault.lock().unwrap() = Some(out_of_memory());
    let builder = Engine::builder().model(tiny_model_file()).config(config());
    let built = builder.stages(Arc::new(SharedStages(Arc::clone(&stages)))).build().await;
    let Err(EngineError::Model(error)) = built.map(|_| ()) else { panic!("an engine") };
    lacks_memory(&error);
    assert_eq!(stages.starts.load(Ordering::SeqCst), 1, "no other try");
}

#[tokio::test(flavor = "multi_thread")]
async fn too_little_memory_for_the_next_stage_ends_requests_and_the_engine() {
    let rig = Rig::with(config(), |faults| faults.arm(FaultPoint::ExecutorBeforeRun, 3)).await;
    *rig.stages.start_fault.lock().unwrap() = Some(out_of_memory());
    lacks_memory(&error(read(rig.engine.generate(request(&prompt(1, 9), 1900))).await));
    assert!(matches!(rig.engine.ended().await, EngineError::Model(_)));
    assert_eq!(rig.engine.status().restarts.executor, 1);
    assert_eq!(rig.stages.starts.load(Ordering::SeqCst), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_without_memory_fails_its_own_requests_alone() {
    let mut config = config();
    config.scheduler.sequences_max = 1;
    let rig = Rig::with(config, |_| {}).await;
    let mut running = rig.engine.generate(request(&prompt(1, 41), 1900));
    first_tokens(&mut running).await;
    rig.stages.gate.close();
    let waiting = rig.engine.generate(request(&prompt(2, 42), 24));
    // Until the second has come that far the first goes on, slowly enough not to end.
    eventually("the second waits", || {
        std::thread::sleep(Duration::from_millis(5));
        rig.stages.gate.let_through(1);
        rig.engine.stats().sequences.waiting == 1
    });
    *rig.stages.refusal.lock().unwrap() = Some(RequestError::InsufficientMemory {
        device: "GPU 0".into(),
        need: 2,
        free: 1,
        suggest: "ask for less".into(),
    });
    rig.stages.gate.open();
    let error = error(read(running).await);
    assert_eq!(error.kind(), ErrorKind::InsufficientMemory, "{error}");
    assert_eq!(read(waiting).await.tokens, continuation(&prompt(2, 42), 24));
    assert_eq!(rig.engine.status().restarts.executor, 0);
    assert_eq!(rig.stages.starts.load(Ordering::SeqCst), 1);
}
