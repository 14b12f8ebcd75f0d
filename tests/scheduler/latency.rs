//! Inter-token time of running streams beside prompts, on simulated machines.

use crate::rig::{Rig, device, options, prompt, sequence};
use tandem::scheduler::{ChunkLimits, SchedulerOptions};
use tandem::step::StepPlan;

/// Microseconds of a step: a part that is always there, one per decoding sequence, one per prompt
/// token, and attention that grows with each prompt token's position.
struct Costs {
    base: f64,
    decode: f64,
    prefill: f64,
    attention: f64,
}

/// SmolLM2-135M on two cores, about: 7 ms to decode one, 700 prompt tokens per second at first.
const TWO_CORES: Costs =
    Costs { base: 6_000.0, decode: 1_000.0, prefill: 1_400.0, attention: 0.15 };

impl Costs {
    fn of(&self, plan: &StepPlan) -> u64 {
        let mut us = self.base;
        for planned in &plan.sequences {
            match planned.tokens.len() {
                1 => us += self.decode,
                tokens => {
                    let position = planned.position_start as f64;
                    us += tokens as f64 * (self.prefill + self.attention * position);
                }
            }
        }
        us as u64
    }
}

fn rig() -> Rig {
    Rig::new(SchedulerOptions {
        blocks: device(4_000),
        context_tokens: 9_000,
        sequences_max: 128,
        chunks: ChunkLimits { slowdown_max: 2.0, tokens_min: 1, step_tokens_max: 512 },
        ..options()
    })
}

/// One step on a machine with these costs; its duration.
fn timed_step(rig: &mut Rig, costs: &Costs) -> u64 {
    rig.plan_only();
    rig.machine.run(&rig.plan, &mut rig.output);
    rig.output.duration_us = costs.of(&rig.plan);
    rig.now_us += rig.output.duration_us;
    rig.apply();
    rig.output.duration_us
}

/// Starts streams that decode for ever; their inter-token time.
fn decode(rig: &mut Rig, streams: u64, costs: &Costs) -> f64 {
    for id in 0..streams {
        rig.add(sequence(1_000 + id, prompt(id as u32, 20), 8_000));
    }
    while (0..streams).any(|id| rig.said(1_000 + id) < 10) {
        timed_step(rig, costs);
    }
    timed_step(rig, costs) as f64
}

#[test]
fn streams_beside_a_long_prompt_stay_under_three_times_their_time() {
    for streams in [1, 4, 32] {
        let mut rig = rig();
        let alone_us = decode(&mut rig, streams, &TWO_CORES);
        rig.add(sequence(1, prompt(99, 8_000), 5));
        let started_us = rig.now_us;
        let mut steps: Vec<u64> = Vec::new();
        while rig.said(1) == 0 {
            steps.push(timed_step(&mut rig, &TWO_CORES));
        }
        let worst = *steps.iter().max().unwrap() as f64 / alone_us;
        assert!(worst < 2.3, "{streams} streams: a step took {worst:.2} times as long");
        // With a slowdown of 2 about half of the time is the prompt's.
        let elapsed_us = (rig.now_us - started_us) as f64;
        let prefill_us = elapsed_us - alone_us * steps.len() as f64;
        let part = prefill_us / elapsed_us;
        assert!(part > 0.42, "{streams} streams: the prompt got {part:.2} of the time");
    }
}

#[test]
fn prompts_that_never_stop_coming_do_not_shrink_their_own_chunks() {
    // The number of decoding streams grows from 1 to 40 and no step is ever without a prompt.
    let mut rig = rig();
    decode(&mut rig, 1, &TWO_CORES);
    let (mut id, mut tokens, mut prefilled_us) = (1, 0, 0.0);
    let started_us = rig.now_us;
    for _ in 0..2_000 {
        if rig.scheduler.stats().waiting == 0 {
            let streams = rig.scheduler.stats().running;
            let max_tokens = if streams < 40 { 4_000 } else { 1 };
            rig.add(sequence(id, prompt(id as u32, 300), max_tokens));
            id += 1;
        }
        timed_step(&mut rig, &TWO_CORES);
        let prompts = rig.plan.sequences.iter().filter(|planned| planned.tokens.len() > 1);
        let count: usize = prompts.map(|planned| planned.tokens.len()).sum();
        tokens += count;
        prefilled_us += count as f64 * TWO_CORES.prefill;
    }
    let part = prefilled_us / (rig.now_us - started_us) as f64;
    assert!(part > 0.4, "prompts got {part:.2} of the time, {tokens} tokens");
}

#[test]
fn a_prompt_alone_fills_the_step() {
    let mut rig = rig();
    rig.add(sequence(1, prompt(1, 2_000), 1));
    assert_eq!(rig.step(), 512);
}
