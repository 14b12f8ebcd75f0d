//! Crashes: whatever dies at whatever moment, every stream ends with exactly the tokens it would
//! have had, or with the error that says why not. A test `x_that_dies` says: x is replaced, and no
//! stream notices.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

#[path = "actors/rig.rs"]
mod rig;

use rig::hash_stage::{HashStages, continuation};
use rig::{Read, Rig, config, first_tokens, prompt, read, request};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use tandem::actors::{EngineError, EngineState, FaultPoint, Faults, RestartCounts};
use tandem::config::Config;
use tandem::request::{ErrorKind, Event, FinishReason};
use tandem::units::ByteSize;
use tokio::time::{Duration, timeout};

const STREAMS: u32 = 8;
const PATIENCE: Duration = Duration::from_secs(60);

fn assert_complete(read: &Read, number: u32, tokens: usize, context: &str) {
    let expected = continuation(&prompt(number, 40 + number as usize), tokens);
    let Some(Event::Done(done)) = &read.end else {
        panic!("{context}, stream {number}: {:?}", read.end)
    };
    assert_eq!(read.tokens, expected, "{context}, stream {number}");
    assert_eq!(done.finish_reasons, [FinishReason::Length], "{context}, stream {number}");
    assert_eq!(done.usage.completion_tokens, tokens, "{context}, stream {number}");
}

/// A store of ten blocks, fewer than two of eight streams need, and lower tiers behind it.
fn crowded() -> Config {
    let mut config = config();
    config.model.context_tokens = 256;
    config.kv.cache_bytes = ByteSize(10 << 15);
    config.kv.swap_bytes = ByteSize(6 << 15);
    config.kv.disk_bytes = ByteSize(16 << 15);
    config
}

/// Runs eight streams with a fault armed and checks that none of them noticed.
async fn survive(point: FaultPoint, pass: u64) -> RestartCounts {
    let context = format!("{point:?} at pass {pass}");
    let rig = Rig::with(config(), |faults| {
        faults.arm(point, pass);
        if point == FaultPoint::SupervisorBeforeRestart {
            faults.arm(FaultPoint::ExecutorBeforeRun, 3);
        }
    })
    .await;
    let reads: Vec<_> = (0..STREAMS)
        .map(|number| {
            let request = request(&prompt(number, 40 + number as usize), 24);
            tokio::spawn(read(rig.engine.generate(request)))
        })
        .collect();
    for (number, task) in reads.into_iter().enumerate() {
        let read = timeout(PATIENCE, task).await.expect(&context).expect(&context);
        assert_complete(&read, number as u32, 24, &context);
    }
    let restarts = rig.engine.status().restarts;
    timeout(PATIENCE, rig.engine.shutdown(Duration::ZERO)).await.expect(&context);
    assert_eq!(rig.faults.left(), 0, "{context}: the fault never struck");
    restarts
}

macro_rules! survived {
    ($($name:ident: $point:ident $passes:expr, $actor:ident;)*) => { $(
        #[tokio::test(flavor = "multi_thread")]
        async fn $name() {
            for pass in $passes {
                let restarts = survive(FaultPoint::$point, pass).await;
                assert_eq!(restarts.$actor, 1, "pass {pass}: {restarts:?}");
            }
        }
    )* };
}

survived! {
    a_tokenizer_thread_that_dies: TokenizerIdle [1, 2, 5], tokenizer;
    a_scheduler_that_dies_of_a_new_sequence: SchedulerBeforeAdd [1, 4, 8], scheduler;
    a_scheduler_that_dies_planning: SchedulerBeforePlan [1, 2, 9, 20], scheduler;
    a_scheduler_that_dies_with_a_plan: SchedulerBeforeDispatch [1, 2, 9, 20], scheduler;
    a_scheduler_that_dies_with_an_output: SchedulerBeforeApply [1, 2, 9, 20], scheduler;
    a_scheduler_that_dies_after_applying: SchedulerAfterApply [1, 2, 9, 20], scheduler;
    a_scheduler_that_dies_delivering: SchedulerInDelivery [1, 2, 30, 100], scheduler;
    an_executor_that_dies_starting: ExecutorBeforeStart [1], executor;
    an_executor_that_dies_with_a_plan: ExecutorBeforeRun [1, 2, 9, 20], executor;
    an_executor_that_dies_in_a_step: ExecutorInRun [1, 2, 9, 20], executor;
    an_executor_that_dies_with_an_output: ExecutorAfterRun [1, 2, 9, 20], executor;
    a_stream_task_that_dies_computing: StreamBeforeCompute [1, 2, 9, 60], stream;
    a_stream_task_that_dies_committing: StreamBeforeCommit [1, 2, 9, 60], stream;
    a_supervisor_that_dies: SupervisorBeforeRestart [1], supervisor;
}

#[tokio::test(flavor = "multi_thread")]
async fn text_work_that_panics_is_tried_again() {
    for point in [FaultPoint::TokenizerBeforeWork, FaultPoint::TokenizerAfterWork] {
        survive(point, 3).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn text_work_that_panics_twice_is_poison_and_costs_nobody_else() {
    let rig = Rig::with(config(), |faults| {
        faults.arm(FaultPoint::TokenizerBeforeWork, 1);
        faults.arm(FaultPoint::TokenizerBeforeWork, 2);
    })
    .await;
    let poisoned = read(rig.engine.generate(request(&prompt(1, 9), 4))).await;
    assert_failed(&poisoned, ErrorKind::PoisonRequest);
    let healthy = read(rig.engine.generate(request(&prompt(1, 41), 4))).await;
    assert_complete(&healthy, 1, 4, "after a poisoned request");
    assert_eq!(rig.engine.status().restarts, RestartCounts::default());
}

fn assert_failed(read: &Read, kind: ErrorKind) {
    match &read.end {
        Some(Event::Failed(error)) => assert_eq!(error.kind(), kind, "{error}"),
        other => panic!("{other:?} where {kind:?} was expected"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_crashes_poison_who_was_in_flight_at_both_and_nobody_else() {
    let rig = Rig::new().await;
    rig.stages.gate.close();
    let mut first = rig.engine.generate(request(&prompt(1, 41), 200));
    rig.stages.gate.let_through(1);
    let mut spoken = first_tokens(&mut first).await;

    rig.faults.arm(FaultPoint::ExecutorInRun, 1);
    rig.stages.gate.let_through(2);
    spoken.extend(first_tokens(&mut first).await);
    assert_eq!(spoken, continuation(&prompt(1, 41), spoken.len()), "one crash is survived");

    let mut second = rig.engine.generate(request(&prompt(2, 42), 24));
    let mut heard = loop {
        // Step by step until the second request is in one.
        rig.stages.gate.let_through(1);
        match timeout(Duration::from_millis(20), first_tokens(&mut second)).await {
            Ok(tokens) => break tokens,
            Err(_) => continue,
        }
    };
    rig.faults.arm(FaultPoint::ExecutorInRun, rig.faults.passes(FaultPoint::ExecutorInRun) + 1);
    rig.stages.gate.open();
    let rest = timeout(PATIENCE, read(first)).await.unwrap();
    assert_failed(&rest, ErrorKind::PoisonRequest);
    let rest = timeout(PATIENCE, read(second)).await.unwrap();
    heard.extend(&rest.tokens);
    assert_eq!(heard, continuation(&prompt(2, 42), 24), "in flight at one crash only");
    assert_eq!(rig.engine.status().restarts.executor, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scheduler_that_dies_twice_poisons_who_was_in_flight() {
    let rig = Rig::with(config(), |faults| {
        faults.arm(FaultPoint::SchedulerBeforeApply, 3);
        faults.arm(FaultPoint::SchedulerBeforeApply, 6);
    })
    .await;
    let poisoned = timeout(PATIENCE, read(rig.engine.generate(request(&prompt(3, 43), 24)))).await;
    assert_failed(&poisoned.unwrap(), ErrorKind::PoisonRequest);
    let healthy = timeout(PATIENCE, read(rig.engine.generate(request(&prompt(4, 44), 24)))).await;
    assert_complete(&healthy.unwrap(), 4, 24, "after the second crash");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_task_that_panics_twice_is_poison() {
    let rig = Rig::with(config(), |faults| {
        faults.arm(FaultPoint::StreamBeforeCommit, 4);
        faults.arm(FaultPoint::StreamBeforeCommit, 5);
    })
    .await;
    let poisoned = timeout(PATIENCE, read(rig.engine.generate(request(&prompt(3, 43), 24)))).await;
    assert_failed(&poisoned.unwrap(), ErrorKind::PoisonRequest);
}

#[tokio::test(flavor = "multi_thread")]
async fn too_many_restarts_end_every_stream_and_kill_the_engine() {
    let mut config = config();
    config.supervision.crashes_per_request_max = 100;
    let rig = Rig::with(config, |faults| {
        (1..=4).for_each(|pass| faults.arm(FaultPoint::ExecutorBeforeRun, pass));
    })
    .await;
    let streams: Vec<_> = (0..STREAMS)
        .map(|number| tokio::spawn(read(rig.engine.generate(request(&prompt(number, 9), 24)))))
        .collect();
    for stream in streams {
        let read = timeout(PATIENCE, stream).await.unwrap().unwrap();
        assert_failed(&read, ErrorKind::ActorRestarted);
    }
    let ended = timeout(PATIENCE, rig.engine.ended()).await.unwrap();
    match ended {
        EngineError::Dead { actor, restarts, .. } => {
            assert_eq!((actor.as_str(), restarts), ("executor", 3));
        }
        other => panic!("{other}"),
    }
    assert_eq!(rig.engine.status().state, EngineState::Dead);
    let late = read(rig.engine.generate(request(&prompt(1, 9), 4))).await;
    assert_failed(&late, ErrorKind::ActorRestarted);
    timeout(PATIENCE, rig.engine.shutdown(Duration::ZERO)).await.unwrap();
    assert_eq!(rig.engine.status().state, EngineState::Dead);
}

/// Orders that no stage takes must not fill the lane: the engine loop could then not be stopped.
#[tokio::test(flavor = "multi_thread")]
async fn an_executor_that_can_not_start_again_ends_every_stream_and_the_engine() {
    let rig = Rig::with_stages(config(), 1, |faults| {
        faults.arm(FaultPoint::ExecutorBeforeRun, 1);
    })
    .await;
    let streams: Vec<_> = (0..STREAMS)
        .map(|number| tokio::spawn(read(rig.engine.generate(request(&prompt(number, 9), 24)))))
        .collect();
    for stream in streams {
        let read = timeout(PATIENCE, stream).await.unwrap().unwrap();
        assert_failed(&read, ErrorKind::ActorRestarted);
    }
    let ended = timeout(PATIENCE, rig.engine.ended()).await.unwrap();
    assert!(matches!(ended, EngineError::Dead { .. }), "{ended}");
    timeout(PATIENCE, rig.engine.shutdown(Duration::ZERO)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn several_actors_dying_one_after_the_other_are_all_survived() {
    let mut config = config();
    config.supervision.crashes_per_request_max = 10;
    let rig = Rig::with(config, |faults| {
        faults.arm(FaultPoint::SchedulerBeforePlan, 4);
        faults.arm(FaultPoint::ExecutorInRun, 5);
        faults.arm(FaultPoint::SchedulerInDelivery, 60);
        faults.arm(FaultPoint::StreamBeforeCompute, 50);
        faults.arm(FaultPoint::ExecutorAfterRun, 20);
        faults.arm(FaultPoint::SupervisorBeforeRestart, 2);
    })
    .await;
    let streams: Vec<_> = (0..STREAMS)
        .map(|number| {
            let request = request(&prompt(number, 40 + number as usize), 40);
            tokio::spawn(read(rig.engine.generate(request)))
        })
        .collect();
    for (number, stream) in streams.into_iter().enumerate() {
        let read = timeout(PATIENCE, stream).await.unwrap().unwrap();
        assert_complete(&read, number as u32, 40, "six faults");
    }
}

/// Eight streams through a store for fewer, by way of the lower tiers, while `arm`ed faults strike.
async fn crowd(context: &str, arm: impl FnOnce(&Faults), set: impl FnOnce(&HashStages)) -> Rig {
    let rig = Rig::with(crowded(), arm).await;
    set(&rig.stages);
    let streams: Vec<_> = (0..STREAMS)
        .map(|number| {
            let request = request(&prompt(number, 40 + number as usize), 60);
            tokio::spawn(read(rig.engine.generate(request)))
        })
        .collect();
    for (number, stream) in streams.into_iter().enumerate() {
        let read = timeout(PATIENCE, stream).await.expect(context).expect(context);
        assert_complete(&read, number as u32, 60, context);
    }
    rig
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_that_go_through_lower_tiers_lose_nothing() {
    let to_prepare = |stages: &HashStages| stages.to_prepare.store(1000, Ordering::SeqCst);
    let rig = crowd("no fault", |_| {}, to_prepare).await;
    let counted = |way: usize| rig.stages.copies[way].load(Ordering::SeqCst);
    assert!(counted(0) > 0 && counted(1) > 0, "nothing was swapped");
    rig::eventually("all copies are told", || {
        let metrics = rig.engine.stats().metrics;
        let told = [metrics.blocks_swapped_out, metrics.blocks_swapped_in];
        told == [counted(0), counted(1)] && metrics.blocks_moved_to_disk == counted(2)
    });
    rig::eventually("all is ready ahead of use", || {
        rig.stages.to_prepare.load(Ordering::SeqCst) == 0
    });
    let stats = rig.engine.stats();
    assert_eq!((stats.metrics.block_copies_failed, stats.blocks.copies_under_way), (0, 0));
    assert_eq!((stats.blocks.host_total, stats.blocks.disk_total), (6, 16));
    assert_eq!((stats.blocks.used, stats.blocks.host_used, stats.blocks.disk_used), (0, 0, 0));
    assert_eq!(stats.status.restarts, RestartCounts::default());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_swap_thread_that_dies_takes_the_lower_tiers_and_no_token() {
    for point in [FaultPoint::KvSwapBeforeCopy, FaultPoint::KvSwapAfterCopy] {
        for pass in [1, 2, 5, 9] {
            let context = format!("{point:?} at pass {pass}");
            let rig = crowd(&context, |faults| faults.arm(point, pass), |_| {}).await;
            assert_eq!(rig.faults.left(), 0, "{context}: the fault never struck");
            let restarts = rig.engine.status().restarts;
            assert_eq!((restarts.kv_swap, restarts.scheduler), (1, 0), "{context}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_else_dies_while_blocks_are_copied_no_token_is_lost() {
    let points = [
        FaultPoint::SchedulerBeforePlan,
        FaultPoint::SchedulerBeforeDispatch,
        FaultPoint::SchedulerAfterApply,
        FaultPoint::ExecutorInRun,
        FaultPoint::ExecutorAfterRun,
        FaultPoint::ExecutorBeforeRun,
    ];
    for point in points {
        for pass in [15, 40] {
            let context = format!("{point:?} at pass {pass}");
            let slow = |stages: &HashStages| {
                *stages.copy_time.lock().unwrap() = Duration::from_micros(300);
            };
            let rig = crowd(&context, |faults| faults.arm(point, pass), slow).await;
            assert_eq!(rig.faults.left(), 0, "{context}: the fault never struck");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn copies_that_fail_or_take_long_cost_time_only() {
    for (failing, time_us) in [(1, 0), (2, 100), (7, 0), (0, 2_000)] {
        let context = format!("every {failing}th copy fails, {time_us} us each");
        let rig = crowd(
            &context,
            |_| {},
            |stages| {
                stages.copies_failing.store(failing, Ordering::SeqCst);
                *stages.copy_time.lock().unwrap() = Duration::from_micros(time_us);
            },
        )
        .await;
        let failed = rig.engine.stats().metrics.block_copies_failed;
        assert_eq!(failed > 0, failing > 0, "{context}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_ends_the_copies_to_it_and_nothing_else() {
    let rig = crowd(
        "a full disk",
        |_| {},
        |stages| {
            stages.disk_writes_max.store(3, Ordering::SeqCst);
        },
    )
    .await;
    rig::eventually("the disk tier has stopped", || rig.engine.stats().blocks.disk_stopped);
}

/// KV for four of 64 clients, through both lower tiers.
#[tokio::test(flavor = "multi_thread")]
async fn sixty_four_clients_in_a_store_for_four_all_end_and_none_is_overtaken_for_long() {
    let mut config = crowded();
    config.kv.cache_bytes = ByteSize(16 << 15);
    config.scheduler.queue_max = 128;
    let rig = Rig::with(config, |_| {}).await;
    *rig.stages.copy_time.lock().unwrap() = Duration::from_micros(100);
    let order = Arc::new(Mutex::new(Vec::new()));
    let mut streams = Vec::new();
    for number in 0..64 {
        let mut answer = rig.engine.generate(request(&prompt(number, 40), 60));
        let order = Arc::clone(&order);
        // One after the other: then the order of their arrival is known.
        assert!(matches!(answer.next().await, Some(Event::Accepted { .. })));
        streams.push(tokio::spawn(async move {
            let read = read(answer).await;
            order.lock().unwrap().push(number);
            read
        }));
    }
    for (number, stream) in streams.into_iter().enumerate() {
        let read = timeout(PATIENCE, stream).await.unwrap().unwrap();
        assert_eq!(read.tokens, continuation(&prompt(number as u32, 40), 60), "{number}");
    }
    let order = order.lock().unwrap();
    for (at, number) in order.iter().enumerate() {
        assert!(at.abs_diff(*number as usize) <= 12, "{number} ends as number {at}: {order:?}");
    }
    assert!(rig.engine.stats().metrics.blocks_swapped_in > 0);
}
