//! Blocks below the device: who goes down, what comes up, what happens meanwhile, and that nobody
//! who has to wait for room is forgotten.

use crate::rig::{Rig, device, options, prompt, sequence};
use tandem::kv::TierBlocks;
use tandem::request::FinishReason;
use tandem::scheduler::{SchedulerOptions, TierRates};
use tandem::step::{CopyOutcome, Tier};

fn with(device: usize, host: usize, disk: usize) -> SchedulerOptions {
    SchedulerOptions { blocks: TierBlocks { device, host, disk }, ..options() }
}

/// Three sequences of 30 tokens that say 60, in a store for two; run to their ends.
fn three(options: SchedulerOptions) -> Rig {
    let mut rig = Rig::new(options);
    for id in 1..4 {
        rig.add(sequence(id, prompt(id as u32, 30), 60));
    }
    rig.until(500, |rig| rig.ended.len() == 3);
    for id in 1..4 {
        rig.assert_whole(id, &prompt(id as u32, 30), 60);
    }
    rig
}

#[test]
fn one_that_is_swapped_out_comes_back_without_being_computed_again() {
    let mut rig = Rig::new(with(8, 64, 0));
    for id in 1..4 {
        rig.add(sequence(id, prompt(id as u32, 30), 60));
    }
    let mut computed = 0;
    while rig.ended.len() < 3 {
        computed += rig.step();
    }
    let stats = rig.scheduler.stats();
    assert!(stats.swapped_out > 0 && stats.blocks_up > 0, "{stats:?}");
    assert_eq!(computed, 3 * (30 + 59), "each token is computed once");
}

#[test]
fn others_go_on_while_blocks_are_copied_and_nobody_gets_them_before() {
    let mut rig = Rig::new(with(8, 64, 0));
    for id in 1..4 {
        rig.add(sequence(id, prompt(id as u32, 30), 60));
    }
    // No copy ends: who was swapped out stays out, the others end in the room that is left.
    let mut swapped = Vec::new();
    let mut said = 0;
    for _ in 0..300 {
        rig.plan_only();
        if rig.plan.is_empty() {
            break;
        }
        rig.scheduler.take_copies(&mut swapped);
        let going = |block| swapped.iter().any(|copy| copy.from == (Tier::Device, block));
        assert!(!rig.plan.block_tables.iter().any(|block| going(*block)), "still its copy's");
        rig.machine.run(&rig.plan, &mut rig.output);
        rig.apply();
        if swapped.is_empty() {
            said = rig.said(1);
        }
    }
    assert!(!swapped.is_empty() && rig.scheduler.copies_under_way() == swapped.len());
    assert!(rig.ended.len() < 3 && rig.said(1) > said + 2, "{:?}", rig.scheduler.stats());
    let results: Vec<_> =
        swapped.iter().map(|copy| rig.machine.copy(*copy, CopyOutcome::Done)).collect();
    rig.scheduler.copied(rig.now_us, &results, 100);
    rig.until(300, |rig| rig.ended.len() == 3);
    for id in 1..4 {
        rig.assert_whole(id, &prompt(id as u32, 30), 60);
    }
}

#[test]
fn what_the_host_has_no_room_for_goes_to_disk_and_else_is_computed_again() {
    let host_and_disk = three(with(8, 1, 64)).scheduler.stats();
    assert!(host_and_disk.swapped_out > 0 && host_and_disk.swaps_lost == 0, "{host_and_disk:?}");
    let disk = three(with(8, 0, 64)).scheduler.stats();
    assert!(disk.swapped_out > 0 && disk.blocks_up > 0, "{disk:?}");
    let neither = three(with(8, 0, 0)).scheduler.stats();
    assert!(neither.preemptions > 0 && neither.swapped_out == 0, "{neither:?}");
}

#[test]
fn nothing_goes_to_a_disk_that_has_stopped() {
    let mut rig = Rig::new(with(8, 0, 64));
    rig.scheduler.stop_disk();
    rig.add(sequence(1, prompt(1, 30), 60));
    rig.add(sequence(2, prompt(2, 30), 60));
    rig.until(500, |rig| rig.ended.len() == 2);
    let stats = rig.scheduler.stats();
    assert_eq!((stats.blocks_down, stats.disk_stopped), (0, true));
}

#[test]
fn what_is_computed_sooner_than_copied_is_not_copied() {
    let slow = TierRates { host_bytes: 1e3, disk_bytes: 1e3, prompt_tokens: 1e6 };
    let stats = three(SchedulerOptions { rates: slow, ..with(8, 64, 64) }).scheduler.stats();
    assert!(stats.preemptions > 0, "{stats:?}");
    assert_eq!((stats.swapped_out, stats.blocks_down), (0, 0), "{stats:?}");
}

#[test]
fn copies_that_fail_are_computed_again() {
    let mut rig = Rig::new(with(8, 64, 0));
    rig.copy_outcome = CopyOutcome::Failed;
    for id in 1..4 {
        rig.add(sequence(id, prompt(id as u32, 30), 60));
    }
    rig.until(500, |rig| rig.ended.len() == 3);
    for id in 1..4 {
        rig.assert_whole(id, &prompt(id as u32, 30), 60);
    }
    let stats = rig.scheduler.stats();
    assert!(stats.swaps_lost > 0 && stats.blocks_up == 0, "{stats:?}");
}

#[test]
fn a_prefix_that_the_device_has_no_room_for_comes_up_from_where_it_went() {
    for (host, disk) in [(64, 0), (0, 64), (4, 64)] {
        let mut rig = Rig::new(with(16, host, disk));
        let tokens = prompt(1, 100);
        rig.add(sequence(1, tokens.clone(), 2));
        rig.until(20, |rig| rig.ended.len() == 1);
        // Others need the whole store, several times.
        for id in 2..6 {
            rig.add(sequence(id, prompt(id as u32, 230), 2));
        }
        rig.until(200, |rig| rig.ended.len() == 5);
        let before = rig.scheduler.stats();
        rig.add(sequence(9, tokens.clone(), 2));
        let mut computed = 0;
        while !rig.ended.contains_key(&9) {
            computed += rig.step();
        }
        rig.assert_whole(9, &tokens, 2);
        let stats = rig.scheduler.stats();
        assert_eq!(stats.prefix_hit_tokens - before.prefix_hit_tokens, 96, "{stats:?}");
        assert_eq!((stats.blocks_up - before.blocks_up, computed), (6, 5), "{stats:?}");
    }
}

#[test]
fn a_prefix_comes_up_once_for_all_who_want_it() {
    let mut rig = Rig::new(with(32, 256, 0));
    let tokens = prompt(1, 100);
    rig.add(sequence(1, tokens.clone(), 2));
    rig.until(20, |rig| rig.ended.len() == 1);
    for id in 2..6 {
        rig.add(sequence(id, prompt(id as u32, 450), 2));
    }
    rig.until(200, |rig| rig.ended.len() == 5);
    let before = rig.scheduler.stats().blocks_up;
    for id in 10..14 {
        rig.add(sequence(id, tokens.clone(), 2));
    }
    rig.until(50, |rig| rig.ended.len() == 9);
    assert_eq!(rig.scheduler.stats().blocks_up - before, 6);
}

#[test]
fn whoever_needs_a_block_rarely_waits_for_one() {
    let mut rig = Rig::new(with(64, 256, 0));
    for id in 0..12 {
        rig.add(sequence(id, prompt(id as u32, 60), 200));
    }
    let (mut steps, mut short) = (0, 0);
    while !rig.scheduler.is_empty() {
        let decoding = rig.scheduler.stats().running;
        let planned = rig.step();
        steps += 1;
        short += usize::from(planned < decoding.saturating_sub(1));
    }
    let stats = rig.scheduler.stats();
    assert!(stats.swapped_out > 4, "{stats:?}");
    assert!(short * 20 < steps, "{short} of {steps} steps were short of blocks");
}

/// KV for four of 64 clients.
#[test]
fn sixty_four_clients_in_a_store_for_four_all_end_in_the_order_of_their_arrival() {
    for (host, disk) in [(0, 0), (16, 0), (8, 64), (0, 400)] {
        let blocks = TierBlocks { host, disk, ..device(24) };
        let mut rig = Rig::new(SchedulerOptions { blocks, ..options() });
        let mut order = Vec::new();
        for id in 0..64 {
            rig.add(sequence(id, prompt(id as u32, 50), 40));
        }
        while !rig.scheduler.is_empty() {
            rig.step();
            let mut ended: Vec<u64> =
                rig.ended.keys().copied().filter(|id| !order.contains(id)).collect();
            ended.sort_unstable();
            order.extend(ended);
        }
        for (at, id) in order.iter().enumerate() {
            assert!(at.abs_diff(*id as usize) <= 4, "{id} ends as number {at}: {order:?}");
            assert_eq!(rig.ended[id], Ok(FinishReason::Length));
            rig.assert_whole(*id, &prompt(*id as u32, 50), 40);
        }
    }
}

/// Plans without work to do, and performs the copies that begin; how many until none does.
fn copies_until_quiet(rig: &mut Rig, outcome: CopyOutcome) -> usize {
    let mut count = 0;
    for _ in 0..300 {
        rig.plan_only();
        assert!(rig.plan.is_empty());
        let mut copies = Vec::new();
        rig.scheduler.take_copies(&mut copies);
        if copies.is_empty() {
            return count;
        }
        count += copies.len();
        let results: Vec<_> = copies.iter().map(|copy| rig.machine.copy(*copy, outcome)).collect();
        rig.scheduler.copied(rig.now_us, &results, 100);
    }
    panic!("{count} copies and no end: {:?}", rig.scheduler.stats());
}

#[test]
fn who_has_nothing_to_do_comes_to_rest_whatever_lower_tiers_hold() {
    let sizes = [0, 1, 2, 3, 5, 7, 8, 9, 20, 40];
    for (host, disk) in sizes.iter().flat_map(|host| sizes.map(|disk| (*host, disk))) {
        for outcome in [CopyOutcome::Done, CopyOutcome::Failed] {
            let mut rig = Rig::new(with(32, host, disk));
            rig.copy_outcome = outcome;
            // Whole blocks of prefixes, more than the device holds.
            for id in 1..13 {
                rig.add(sequence(id, prompt(id as u32, 60), 5));
            }
            rig.until(500, |rig| rig.ended.len() == 12);
            assert!(rig.scheduler.stats().device.free < 4, "{:?}", rig.scheduler.stats());
            let count = copies_until_quiet(&mut rig, outcome);
            assert!(count <= 100, "{count} copies, {host} and {disk} blocks, {outcome:?}");
            assert_eq!(copies_until_quiet(&mut rig, outcome), 0, "it stays at rest");
        }
    }
}
