//! One test in a process of its own, because it counts the process's threads and descriptors.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

#[path = "actors/rig.rs"]
mod rig;

use rig::{Rig, config, eventually, prompt, request, tiny_model_file};
use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;
use tandem::actors::{Engine, FaultPoint};
use tandem::blocking;

fn threads() -> BTreeMap<String, usize> {
    let mut names = BTreeMap::new();
    for task in fs::read_dir("/proc/self/task").unwrap().flatten() {
        // A thread may end between the two reads.
        let name = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        *names.entry(name).or_default() += 1;
    }
    names
}

fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

fn use_an_engine(number: u32) {
    let engine = Engine::builder().model(tiny_model_file()).config(config());
    let engine = blocking::Engine::build(engine).unwrap();
    let kept: Vec<_> =
        (0..4).map(|at| engine.generate(request(&prompt(number + at, 60), 8))).collect();
    for generation in kept {
        generation.collect_text().unwrap();
    }
    if number.is_multiple_of(2) {
        engine.shutdown(Duration::from_secs(10));
    }
    // Odd ones are ended by being dropped.
}

fn crash_an_engine() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async {
        let arm = |faults: &tandem::actors::Faults| {
            faults.arm(FaultPoint::ExecutorInRun, 3);
            faults.arm(FaultPoint::SchedulerBeforePlan, 6);
            faults.arm(FaultPoint::TokenizerIdle, 2);
        };
        let rig = Rig::with(config(), arm).await;
        let generation = rig.engine.generate(request(&prompt(1, 41), 20));
        let _ = rig::read(generation).await;
        rig.engine.shutdown(Duration::ZERO).await;
    });
}

#[test]
fn nothing_is_left_behind_when_engines_end() {
    // Once before counting: what the process keeps for good is made the first time.
    use_an_engine(0);
    crash_an_engine();
    let (threads_before, descriptors_before) = (threads(), descriptors());
    for number in 1..4 {
        use_an_engine(number);
        crash_an_engine();
    }
    eventually("all threads are gone", || threads() == threads_before);
    eventually("all descriptors are closed", || descriptors() == descriptors_before);
}
