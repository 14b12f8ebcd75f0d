//! Who goes first, and who yields when there is not room for all.

use crate::rig::{BLOCK_TOKENS, Rig, batch, device, options, prompt, sequence};
use tandem::kv::TierBlocks;
use tandem::scheduler::SchedulerOptions;
use tandem::units::SequenceId;

#[test]
fn a_batch_sequence_gets_on_under_interactive_load_without_end() {
    for host_blocks in [0, 64] {
        let options =
            SchedulerOptions { blocks: TierBlocks { host: host_blocks, ..device(8) }, ..options() };
        let mut rig = Rig::new(options);
        let tokens = prompt(1, 60);
        rig.add(batch(1, tokens.clone(), 20));
        // Two interactive sequences of four blocks each fill the store at every moment.
        for id in 2..3_000 {
            rig.add(sequence(id, prompt(id as u32, 40), 20));
            rig.until(200, |rig| rig.scheduler.stats().waiting < 4);
            if rig.ended.contains_key(&1) {
                break;
            }
        }
        rig.assert_whole(1, &tokens, 20);
    }
}

#[test]
fn a_running_batch_prompt_gets_on_beside_interactive_prompts_without_end() {
    let mut rig = Rig::new(SchedulerOptions { blocks: device(512), ..options() });
    let tokens = prompt(1, 200);
    rig.add(batch(1, tokens.clone(), 5));
    // Three long prompts at every moment: each step's tokens go to them.
    for id in 2..3_000 {
        rig.add(sequence(id, prompt(id as u32, 300), 1));
        rig.until(200, |rig| {
            let stats = rig.scheduler.stats();
            stats.running + stats.waiting < 5
        });
        if rig.ended.contains_key(&1) {
            break;
        }
    }
    rig.assert_whole(1, &tokens, 5);
}

#[test]
fn an_interactive_sequence_takes_a_slot_from_a_batch_sequence() {
    let mut rig = Rig::new(SchedulerOptions { sequences_max: 2, ..options() });
    rig.add(batch(1, prompt(1, 20), 300));
    rig.add(batch(2, prompt(2, 20), 300));
    rig.until(10, |rig| rig.said(1) > 0 && rig.said(2) > 0);
    rig.add(sequence(3, prompt(3, 20), 5));
    rig.until(20, |rig| rig.ended.contains_key(&3));
    rig.assert_whole(3, &prompt(3, 20), 5);
    rig.until(1_000, |rig| rig.ended.len() == 3);
    rig.assert_whole(2, &prompt(2, 20), 300);
}

#[test]
fn interactive_prompts_are_computed_before_batch_prompts() {
    let mut rig = Rig::new(options());
    for id in 1..4 {
        rig.add(batch(id, prompt(id as u32, 50), 5));
    }
    rig.add(sequence(9, prompt(9, 200), 5));
    rig.add(sequence(10, prompt(10, 200), 5));
    rig.step();
    assert_eq!(rig.planned(9) + rig.planned(10), 64, "batch prompts take what is left");
}

#[test]
fn a_paused_sequence_yields_its_blocks_to_one_that_waits() {
    for host_blocks in [0, 64] {
        let mut rig = Rig::new(SchedulerOptions {
            blocks: TierBlocks { host: host_blocks, ..device(8) },
            ..options()
        });
        let tokens = prompt(1, 100);
        rig.add(sequence(1, tokens.clone(), 20));
        rig.until(10, |rig| rig.said(1) > 2);
        rig.scheduler.pause(SequenceId(1));
        rig.add(sequence(2, prompt(2, 100), 20));
        rig.until(60, |rig| rig.ended.contains_key(&2));
        rig.scheduler.resume(SequenceId(1));
        rig.until(60, |rig| rig.ended.contains_key(&1));
        rig.assert_whole(1, &tokens, 20);
    }
}

#[test]
fn a_paused_sequence_yields_its_slot_to_one_that_waits() {
    let mut rig = Rig::new(SchedulerOptions { sequences_max: 1, ..options() });
    rig.add(sequence(1, prompt(1, 20), 20));
    rig.until(10, |rig| rig.said(1) > 2);
    rig.scheduler.pause(SequenceId(1));
    rig.add(sequence(2, prompt(2, 20), 5));
    rig.until(20, |rig| rig.ended.contains_key(&2));
    rig.scheduler.resume(SequenceId(1));
    rig.until(60, |rig| rig.ended.contains_key(&1));
    rig.assert_whole(1, &prompt(1, 20), 20);
}

#[test]
fn a_paused_sequence_keeps_its_blocks_while_nobody_needs_them() {
    let mut rig = Rig::new(options());
    rig.add(sequence(1, prompt(1, 100), 20));
    rig.until(10, |rig| rig.said(1) > 2);
    rig.scheduler.pause(SequenceId(1));
    let used = rig.scheduler.stats().device.used;
    rig.add(sequence(2, prompt(2, 100), 20));
    rig.until(60, |rig| rig.ended.contains_key(&2));
    let stats = rig.scheduler.stats();
    assert_eq!((stats.device.used, stats.paused, stats.preemptions), (used, 1, 0));
}

#[test]
fn the_youngest_yields_and_goes_on_from_where_it_was() {
    for host_blocks in [0, 64] {
        let mut rig = Rig::new(SchedulerOptions {
            blocks: TierBlocks { host: host_blocks, ..device(8) },
            ..options()
        });
        for id in 1..4 {
            rig.add(sequence(id, prompt(id as u32, 30), 60));
        }
        rig.until(400, |rig| rig.ended.len() == 3);
        for id in 1..4 {
            rig.assert_whole(id, &prompt(id as u32, 30), 60);
        }
        let stats = rig.scheduler.stats();
        assert!(stats.preemptions > 0, "{stats:?}");
        assert_eq!(stats.swapped_out > 0, host_blocks > 0, "{stats:?}");
        assert_eq!((stats.device.used, stats.host.used), (0, 0));
    }
}

#[test]
fn the_oldest_prompt_gets_half_of_a_chunk_whoever_else_comes() {
    let mut rig = Rig::new(options());
    rig.add(sequence(1, prompt(1, 400), 5));
    rig.step();
    for id in 2..6 {
        rig.add(sequence(id, prompt(id as u32, 2 * BLOCK_TOKENS), 5));
    }
    rig.step();
    assert_eq!(rig.planned(1), 32);
    assert_eq!(rig.planned(2), 32, "the other half goes to the shortest, one after the other");
}

#[test]
fn a_step_holds_no_more_tokens_than_it_may() {
    let chunks = tandem::scheduler::ChunkLimits { step_tokens_max: 8, ..options().chunks };
    let mut rig = Rig::new(SchedulerOptions { chunks, ..options() });
    for id in 1..13 {
        rig.add(sequence(id, prompt(id as u32, 20), 10));
    }
    for _ in 0..400 {
        assert!(rig.step() <= 8);
    }
    assert_eq!(rig.ended.len(), 12);
}
