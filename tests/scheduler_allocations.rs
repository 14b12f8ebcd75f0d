//! Planning a step allocates nothing: while streams decode, prompts are computed, others wait, and
//! blocks are evicted and found again.

#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]

#[path = "support/counting_allocator.rs"]
mod counting_allocator;
#[path = "scheduler/machine.rs"]
mod machine;
#[path = "scheduler/rig.rs"]
mod rig;

use counting_allocator::{CountingAllocator, measure};
use rig::{Rig, batch, options, prompt, sequence};
use tandem::kv::TierBlocks;
use tandem::scheduler::SchedulerOptions;
use tandem::speculative::{Lookup, SpeculationOptions};
use tandem::step::CopyOutcome;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

/// Plans, runs and applies one step; how often planning allocated.
fn planned_step(rig: &mut Rig) -> usize {
    let ((), usage) = measure(|| rig.scheduler.plan_step(rig.now_us, &mut rig.plan));
    rig.machine.run(&rig.plan, &mut rig.output);
    rig.now_us += rig.output.duration_us;
    rig.apply();
    usage.allocations + copied(rig)
}

/// Performs the copies that were begun; how often ordering them and taking them in allocated.
fn copied(rig: &mut Rig) -> usize {
    rig.copies.clear();
    rig.results.clear();
    let ((), ordered) = measure(|| rig.scheduler.take_copies(&mut rig.copies));
    for copy in &rig.copies {
        rig.results.push(rig.machine.copy(*copy, CopyOutcome::Done));
    }
    let ((), ended) = measure(|| rig.scheduler.copied(rig.now_us, &rig.results, 100));
    ordered.allocations + ended.allocations
}

/// A day's work: streams, and more prompts than fit beside them. How often planning allocated.
fn day(rig: &mut Rig, first_id: u64) -> usize {
    for id in 0..8 {
        rig.add(sequence(first_id + id, prompt(id as u32, 20), 450));
    }
    for id in 0..100 {
        // Every fourth begins like another one.
        let tokens = prompt((id % 25) as u32, 60 + id);
        let id = first_id + 10 + id as u64;
        match id % 2 {
            0 => rig.add(sequence(id, tokens, 20)),
            _ => rig.add(batch(id, tokens, 20)),
        }
    }
    let mut allocations = 0;
    while !rig.scheduler.is_empty() {
        allocations += planned_step(rig);
    }
    allocations
}

#[test]
fn a_step_is_planned_without_allocating() {
    for (host, disk) in [(0, 0), (50, 0), (20, 60)] {
        let blocks = TierBlocks { device: 100, host, disk };
        let lookup = Lookup { ngram_min: 1, ngram_max: 4 };
        let speculation = SpeculationOptions { lookup, draft_max: 7, width_borders: &[] };
        let speculation = Some(speculation);
        let options = SchedulerOptions { blocks, queue_max: 200, speculation, ..options() };
        let mut rig = Rig::new(options);
        assert!(day(&mut rig, 0) > 0, "the buffers got their size");
        let allocations = day(&mut rig, 1_000);
        let stats = rig.scheduler.stats();
        assert!(stats.draft_tokens > 100, "{stats:?}");
        assert!(stats.steps > 1_000 && stats.prefix_hit_tokens > 0, "{stats:?}");
        assert!(stats.preemptions > 0 && (stats.swapped_out > 0) == (host > 0));
        assert_eq!(allocations, 0);
    }
}
