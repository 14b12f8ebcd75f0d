//! The controller on simulated machines.

use super::*;

const LIMITS: ChunkLimits = ChunkLimits { slowdown_max: 2.0, tokens_min: 4, step_tokens_max: 512 };

/// Microseconds of a step with `streams` and `tokens` prompt tokens from `position` on.
type Machine = fn(streams: usize, tokens: usize, position: usize) -> f64;

/// Every token costs: a small CPU.
fn steep(streams: usize, tokens: usize, position: usize) -> f64 {
    7_000.0 + 200.0 * streams as f64 + tokens as f64 * (900.0 + 0.15 * position as f64)
}

/// Tokens are free until arithmetic takes longer than reading the weights: a GPU.
fn flat(streams: usize, tokens: usize, position: usize) -> f64 {
    let arithmetic = 20.0 * (streams + tokens) as f64 + 0.01 * (tokens * position) as f64;
    arithmetic.max(3_000.0)
}

/// Small chunks pay for a whole tile of eight.
fn tiled(streams: usize, tokens: usize, position: usize) -> f64 {
    steep(streams, tokens.next_multiple_of(8), position) - if tokens == 0 { 0.0 } else { 500.0 }
}

/// Weights stream to a GPU, once for whatever is wider than 32 tokens; the CPU computes the rest.
fn spilled(streams: usize, tokens: usize, position: usize) -> f64 {
    match streams + tokens {
        0..=8 => 20_000.0,
        9..=32 => 24_000.0 + 100.0 * tokens as f64,
        _ => 34_000.0 + 0.0002 * (tokens * position) as f64,
    }
}

/// The same with four times the weights in host memory: one stream of them is dear.
fn mostly_spilled(streams: usize, tokens: usize, position: usize) -> f64 {
    let on_gpu = if streams + tokens > 32 { 26_000.0 } else { 0.0 };
    on_gpu + 2.0 * spilled(streams, tokens, position)
}

/// How a prefill went.
#[derive(Debug)]
struct Outcome {
    /// The longest step, in undisturbed ones.
    worst: f64,
    /// The mean step, in undisturbed ones.
    mean: f64,
    tokens_per_step: f64,
}

/// Prefills a prompt.
fn prefill(
    controller: &mut ChunkController,
    machine: Machine,
    streams: usize,
    positions: std::ops::Range<usize>,
) -> Outcome {
    let (mut position, mut steps, mut worst, mut total) = (positions.start, 0, 0.0_f64, 0.0);
    let alone_us = machine(streams, 0, 0);
    while position < positions.end {
        let budget = controller.budget(streams);
        let tokens = controller.affordable(&budget, position).min(positions.end - position);
        let mut mix = StepMix::of_decodes(streams);
        mix.add_chunk(position, tokens);
        // Noise of up to a tenth, the same in every run.
        let noise = 1.0 + 0.1 * ((steps * 7919 % 21) as f64 / 10.0 - 1.0);
        let duration_us = machine(streams, tokens, position + tokens / 2) * noise;
        worst = worst.max(duration_us / alone_us);
        total += duration_us / alone_us;
        controller.learn(&mix, duration_us as u64);
        position += tokens;
        steps += 1;
        assert!(steps < 100_000, "prefill stands still at {position}");
    }
    let tokens_per_step = positions.len() as f64 / steps as f64;
    Outcome { worst, mean: total / steps as f64, tokens_per_step }
}

fn decode(controller: &mut ChunkController, machine: Machine, streams: usize) {
    for _ in 0..10 {
        let duration_us = machine(streams, 0, 0) as u64;
        controller.learn(&StepMix::of_decodes(streams), duration_us);
    }
}

#[test]
fn the_stretch_stays_within_bounds_on_every_machine() {
    for (name, machine) in [("steep", steep as Machine), ("flat", flat), ("tiled", tiled)] {
        for streams in [1, 5, 64] {
            let mut controller = ChunkController::new(LIMITS);
            decode(&mut controller, machine, streams);
            let outcome = prefill(&mut controller, machine, streams, 0..8_000);
            assert!(outcome.mean < 2.15, "{name}, {streams} streams: {outcome:?}");
            // Deep in the prompt one tile alone takes longer than two steps.
            let worst = if name == "tiled" { 3.7 } else { 2.7 };
            assert!(outcome.worst < worst, "{name}, {streams} streams: {outcome:?}");
            if name != "flat" {
                assert!(outcome.mean > 1.7, "{name}, {streams} streams: {outcome:?}");
            }
        }
    }
}

#[test]
fn a_machine_with_room_is_used() {
    let mut controller = ChunkController::new(LIMITS);
    decode(&mut controller, flat, 4);
    let outcome = prefill(&mut controller, flat, 4, 0..8_000);
    // 6 ms at 20 to 100 microseconds a token: from 300 down to 60.
    assert!(outcome.tokens_per_step > 70.0, "{outcome:?}");
}

#[test]
fn a_prompt_that_begins_after_a_deep_one_is_not_held_to_its_cost() {
    let mut controller = ChunkController::new(LIMITS);
    decode(&mut controller, flat, 4);
    prefill(&mut controller, flat, 4, 0..8_000);
    let outcome = prefill(&mut controller, flat, 4, 0..1_000);
    assert!(outcome.tokens_per_step > 80.0 && outcome.worst < 2.7, "{outcome:?}");
}

#[test]
fn a_prompt_that_begins_deep_is_entered_carefully() {
    let mut controller = ChunkController::new(LIMITS);
    decode(&mut controller, steep, 8);
    prefill(&mut controller, steep, 8, 0..500);
    let budget = controller.budget(8);
    assert!(controller.affordable(&budget, 200) > 4);
    assert_eq!(controller.affordable(&budget, 30_000), 4);
}

#[test]
fn steps_in_a_row_are_kept_free_of_prompts_now_and_then() {
    let mut controller = ChunkController::new(LIMITS);
    decode(&mut controller, steep, 4);
    let mut free = 0;
    for _ in 0..660 {
        let tokens = controller.affordable(&controller.budget(4), 0);
        let mut mix = StepMix::of_decodes(4);
        mix.add_chunk(0, tokens);
        controller.learn(&mix, steep(4, tokens, 0) as u64);
        free += usize::from(tokens == 0);
    }
    assert_eq!(free, 20);
}

#[test]
fn without_streams_a_chunk_fills_the_step() {
    let controller = ChunkController::new(LIMITS);
    assert_eq!(controller.affordable(&controller.budget(0), 5_000), 512);
}

#[test]
fn a_dear_chunk_is_the_smallest_and_comes_as_often_as_it_was_earned() {
    let mut controller = ChunkController::new(LIMITS);
    controller.learn(&StepMix::of_decodes(1), 1_000);
    let (mut chunks, mut tokens) = (0, 0);
    for _ in 0..20_000 {
        let chunk = controller.affordable(&controller.budget(1), 0);
        let mut mix = StepMix::of_decodes(1);
        mix.add_chunk(0, chunk);
        controller.learn(&mix, 1_000 + 50_000 * chunk as u64);
        chunks += usize::from(chunk > 0);
        tokens += chunk;
    }
    assert_eq!(tokens, 4 * chunks, "each is the smallest");
    assert!((90..=110).contains(&chunks), "{chunks} chunks of 200 ms in 20 s of decoding");
    assert!(controller.affordable(&controller.budget(510), 0) <= 2);
    assert_eq!(controller.affordable(&controller.budget(512), 0), 0);
}

#[test]
fn cold_caches_after_a_chunk_are_charged_and_not_learnt() {
    let mut controller = ChunkController::new(LIMITS);
    decode(&mut controller, steep, 4);
    let alone_us = steep(4, 0, 0);
    let (mut total_us, mut cold, steps) = (0.0, false, 4_000);
    for _ in 0..steps {
        let tokens = controller.affordable(&controller.budget(4), 0);
        let mut mix = StepMix::of_decodes(4);
        mix.add_chunk(0, tokens);
        let late_us = if cold && tokens == 0 { 0.8 * alone_us } else { 0.0 };
        let duration_us = steep(4, tokens, 0) + late_us;
        controller.learn(&mix, duration_us as u64);
        cold = tokens > 0;
        total_us += duration_us;
    }
    let stretch = total_us / steps as f64 / alone_us;
    assert!((1.7..2.1).contains(&stretch), "{stretch}");
}

#[test]
fn where_width_is_free_chunks_grow_to_the_widest() {
    let mut controller = ChunkController::new(LIMITS);
    decode(&mut controller, spilled, 8);
    let outcome = prefill(&mut controller, spilled, 8, 0..40_000);
    assert!(outcome.mean < 2.0 && outcome.tokens_per_step > 350.0, "{outcome:?}");
}

/// After a prompt that had the steps to itself.
fn after_a_prompt(machine: Machine, streams: usize) -> Outcome {
    let mut controller = ChunkController::new(LIMITS);
    let mut alone = StepMix::default();
    alone.add_chunk(0, 512);
    controller.learn(&alone, machine(0, 512, 0) as u64);
    decode(&mut controller, machine, streams);
    prefill(&mut controller, machine, streams, 0..8_000)
}

#[test]
fn a_chunk_that_costs_more_than_a_step_earns_is_wide_where_that_pays() {
    let outcome = after_a_prompt(mostly_spilled, 8);
    assert!(outcome.tokens_per_step > 250.0, "{outcome:?}");
    assert!(outcome.mean < 2.1 && outcome.worst < 2.9, "{outcome:?}");
}

#[test]
fn what_the_machine_is_expected_to_do_is_tried() {
    let expected = 512.0 / 0.1;
    let mut controller = ChunkController::new(LIMITS).expecting(expected);
    decode(&mut controller, mostly_spilled, 8);
    let outcome = prefill(&mut controller, mostly_spilled, 8, 0..8_000);
    assert!(outcome.tokens_per_step > 250.0, "{outcome:?}");
    assert!(outcome.mean < 2.1 && outcome.worst < 2.9, "{outcome:?}");
    // Twice as slow as expected: it is found out with the first.
    let mut controller = ChunkController::new(LIMITS).expecting(2.0 * expected);
    decode(&mut controller, mostly_spilled, 8);
    let outcome = prefill(&mut controller, mostly_spilled, 8, 0..8_000);
    assert!(outcome.mean < 2.1 && outcome.worst < 2.9, "{outcome:?}");
}

#[test]
fn wide_chunks_are_left_alone_where_they_do_not_pay() {
    for (name, machine) in [("steep", steep as Machine), ("flat", flat), ("tiled", tiled)] {
        for streams in [1, 5, 64] {
            let outcome = after_a_prompt(machine, streams);
            assert!(outcome.mean < 2.15, "{name}, {streams} streams: {outcome:?}");
            let worst = if name == "tiled" { 3.7 } else { 2.7 };
            assert!(outcome.worst < worst, "{name}, {streams} streams: {outcome:?}");
        }
    }
}
