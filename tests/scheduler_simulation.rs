//! The scheduler against thousands of arrivals, aborts, pauses, deadlines, crashes and moments
//! without memory, on many seeds. After each step the books are checked, and at the end every
//! sequence has said exactly what it would have said alone. `TANDEM_SIM_SEED=N` runs one seed.

#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]

#[path = "scheduler/machine.rs"]
mod machine;
#[path = "scheduler/random.rs"]
mod random;

use machine::{Machine, check_owners, continuation};
use random::Random;
use std::collections::HashMap;
use std::sync::Arc;
use tandem::request::{FinishReason, Priority, RequestError, SamplingParams};
use tandem::scheduler::{
    ChunkLimits, NewSequence, Scheduler, SchedulerOptions, SequenceEvent, SequenceEventKind,
};
use tandem::step::{LogitsTask, RowFailure, StepOutput, StepPlan};
use tandem::units::{SequenceId, TokenId};

const BLOCK_TOKENS: usize = 16;
const CONTEXT_TOKENS: usize = 400;
const STEP_TOKENS_MAX: usize = 64;
const SCORE_ROWS_MAX: usize = 8;

/// What a client knows of its sequence.
struct Client {
    new: NewSequence,
    expected: Vec<TokenId>,
    said: Vec<TokenId>,
    scored: Vec<usize>,
    paused: bool,
}

/// One seed's world.
struct World {
    random: Random,
    scheduler: Scheduler,
    machine: Machine,
    clients: HashMap<SequenceId, Client>,
    prefixes: Vec<Vec<TokenId>>,
    next_id: u64,
    now_us: u64,
    ended: usize,
    poisoned: usize,
    spoiled: usize,
    refused: usize,
    /// Whether commands come in the middle of steps and numbers fail.
    turbulent: bool,
}

/// What all worlds have in common; a queue of one by default.
fn options() -> SchedulerOptions {
    SchedulerOptions {
        block_tokens: BLOCK_TOKENS,
        block_bytes: 1_000,
        device_blocks: 40,
        host_blocks: 0,
        context_tokens: CONTEXT_TOKENS,
        sequences_max: 8,
        queue_max: 1,
        chunks: ChunkLimits { slowdown_max: 2.0, tokens_min: 4, step_tokens_max: STEP_TOKENS_MAX },
        logits_rows_max: SCORE_ROWS_MAX,
        crashes_max: 2,
        prefix_key: None,
        batch_wait_us_max: 500_000,
    }
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let device_blocks = 30 + random.below(60);
        let options = SchedulerOptions {
            device_blocks,
            host_blocks: [0, 20, 200][random.below(3)],
            sequences_max: 1 + random.below(24),
            queue_max: 40,
            prefix_key: (random.below(4) > 0).then_some([7; 16]),
            ..options()
        };
        let prefixes = (0..4).map(|_| random.tokens(10 + 30 * 4)).collect();
        Self {
            random,
            scheduler: Scheduler::new(options),
            machine: Machine::new(BLOCK_TOKENS),
            clients: HashMap::new(),
            prefixes,
            next_id: 0,
            now_us: 0,
            ended: 0,
            poisoned: 0,
            spoiled: 0,
            refused: 0,
            turbulent: true,
        }
    }

    fn arrive(&mut self) {
        let random = &mut self.random;
        let mut tokens = match random.below(2) {
            0 => self.prefixes[random.below(4)][..random.below(120)].to_vec(),
            _ => Vec::new(),
        };
        let tail = 1 + random.below(60);
        tokens.extend(random.tokens(tail));
        self.next_id += 1;
        let scores = random.below(10) == 0;
        let max_tokens = if scores && random.below(2) == 0 { 0 } else { 1 + random.below(60) };
        let new = NewSequence {
            id: SequenceId(self.next_id),
            prompt_tokens: tokens.len(),
            sampling: Arc::new(SamplingParams::greedy()),
            max_tokens,
            end_tokens: Arc::from([TokenId(3)].as_slice()),
            priority: [Priority::Interactive, Priority::Batch][random.below(2)],
            deadline_us: (random.below(20) == 0).then(|| self.now_us + 100_000),
            ttft_deadline_us: (random.below(20) == 0).then(|| self.now_us + 60_000),
            prompt_logprobs: scores.then_some(2),
            crashes: 0,
            tokens,
        };
        self.submit(new, Vec::new());
    }

    fn submit(&mut self, new: NewSequence, said: Vec<TokenId>) {
        let room = (CONTEXT_TOKENS - new.prompt_tokens).min(new.max_tokens);
        let mut expected = continuation(&new.tokens[..new.prompt_tokens], room);
        if let Some(end) = expected.iter().position(|token| *token == TokenId(3)) {
            expected.truncate(end);
        }
        match self.scheduler.add(self.now_us, new.clone()) {
            Ok(_) => {
                let scored = Vec::new();
                let client = Client { expected, said, scored, paused: false, new };
                self.clients.insert(client.new.id, client);
            }
            Err(RequestError::Overloaded { retry_after_ms, .. }) => {
                assert!(retry_after_ms > 0);
                self.refused += 1;
            }
            Err(error) => panic!("{error}"),
        }
    }

    fn disturb(&mut self) {
        let mut ids: Vec<SequenceId> = self.clients.keys().copied().collect();
        ids.sort_unstable();
        if ids.is_empty() {
            return;
        }
        let id = ids[self.random.below(ids.len())];
        match self.random.below(12) {
            0 => {
                self.scheduler.abort(id);
                self.clients.remove(&id);
            }
            1..4 => self.set_paused(id, true),
            4..8 => self.set_paused(id, false),
            _ => {}
        }
    }

    fn set_paused(&mut self, id: SequenceId, paused: bool) {
        self.clients.get_mut(&id).unwrap().paused = paused;
        if paused { self.scheduler.pause(id) } else { self.scheduler.resume(id) }
    }

    /// One step; `crash` loses it half way.
    fn step(&mut self, crash: bool) -> bool {
        let (mut plan, mut output) = (StepPlan::default(), StepOutput::default());
        let mut events = Vec::new();
        self.scheduler.plan_step(self.now_us, &mut plan);
        self.scheduler.drain_events(&mut events);
        self.check_plan(&plan);
        for event in events.drain(..) {
            self.hear(event);
        }
        let worked = !plan.is_empty();
        if self.turbulent && self.random.below(4) == 0 {
            // The engine obeys while a step is in flight.
            self.arrive();
            self.disturb();
        }
        if crash && worked {
            self.machine.lose();
            self.scheduler.executor_lost(self.now_us, &mut events);
        } else if worked {
            self.machine.run(&plan, &mut output);
            self.spoil(&mut output);
            self.now_us += output.duration_us;
            self.scheduler.apply(self.now_us, &plan, &output, &mut events);
        } else {
            self.now_us += 1_000;
        }
        self.scheduler.check_invariants();
        for event in events {
            self.hear(event);
        }
        worked
    }

    /// Makes the numbers of one row infinite, now and then.
    fn spoil(&mut self, output: &mut StepOutput) {
        if self.turbulent && !output.rows.is_empty() && self.random.below(200) == 0 {
            let row = output.rows.remove(self.random.below(output.rows.len()));
            let failure = RowFailure { sequence: row.sequence, position: row.position };
            output.rows.retain(|other| other.sequence != row.sequence);
            output.failures.push(failure);
        }
    }

    fn check_plan(&self, plan: &StepPlan) {
        assert!(plan.tokens.len() <= STEP_TOKENS_MAX, "{} tokens", plan.tokens.len());
        let mut row = 0;
        for planned in &plan.sequences {
            assert_eq!(planned.tokens.start, row, "rows follow each other");
            row = planned.tokens.end;
            let end = planned.position_start + planned.tokens.len();
            assert!(planned.block_table.len() * BLOCK_TOKENS >= end, "blocks cover {end}");
            let client = &self.clients[&planned.id];
            assert!(!client.paused, "a paused sequence does not run");
            let known = client.new.tokens[..client.new.prompt_tokens].iter();
            let known: Vec<TokenId> = known.chain(&client.said).copied().collect();
            let tokens = &plan.tokens[planned.tokens.clone()];
            assert_eq!(&known[planned.position_start..end], tokens, "positions hold their tokens");
        }
        assert_eq!(row, plan.tokens.len());
        let scores = plan.logits.iter();
        let scores = scores.filter(|row| matches!(row.task, LogitsTask::Score { .. })).count();
        assert!(scores <= SCORE_ROWS_MAX, "{scores} rows of scores");
        check_owners(plan, BLOCK_TOKENS);
        assert!(plan.logits.windows(2).all(|pair| pair[0].row < pair[1].row), "rows ascend");
    }

    fn hear(&mut self, event: SequenceEvent) {
        let id = event.sequence;
        let client = self.clients.get_mut(&id).expect("an event of a live sequence");
        match event.kind {
            SequenceEventKind::Token(row) => {
                assert_eq!(row.position, client.new.prompt_tokens + client.said.len());
                client.said.push(row.token.id);
                assert!(client.expected.starts_with(&client.said), "{id:?} said a wrong token");
            }
            SequenceEventKind::PromptScore(row) => client.scored.push(row.position),
            SequenceEventKind::Prefill { done, total, cached_tokens } => {
                assert!(done <= total && cached_tokens < total);
            }
            SequenceEventKind::Interrupted { crashes } => client.new.crashes = crashes,
            SequenceEventKind::Finished { reason, .. } => {
                let client = self.clients.remove(&id).unwrap();
                self.ended += 1;
                if reason != FinishReason::Deadline {
                    assert_eq!(client.said, client.expected, "{id:?} ends as {reason:?}");
                    if client.new.prompt_logprobs.is_some() {
                        let all: Vec<usize> = (1..client.new.prompt_tokens).collect();
                        assert_eq!(client.scored, all, "each prompt token is scored once");
                    }
                }
            }
            SequenceEventKind::Failed(error) => {
                let client = self.clients.remove(&id).unwrap();
                self.ended += 1;
                match error {
                    RequestError::PoisonRequest { crashes } => {
                        assert_eq!(crashes, 2);
                        self.poisoned += 1;
                    }
                    RequestError::DeadlineExceeded { deadline_ms } => {
                        assert!((1..=60).contains(&deadline_ms), "{deadline_ms}");
                        assert!(client.said.is_empty());
                    }
                    RequestError::NumericError { .. } if self.turbulent => self.spoiled += 1,
                    other => panic!("{other}"),
                }
            }
        }
    }

    /// The scheduler dies: all streams come again with what they have, to a new one.
    fn resubmit_all(&mut self, options: SchedulerOptions) {
        self.scheduler = Scheduler::new(options);
        self.machine.lose();
        let mut clients: Vec<Client> = self.clients.drain().map(|(_, client)| client).collect();
        clients.sort_by_key(|client| client.new.id);
        for client in clients {
            let mut new = client.new;
            new.tokens.truncate(new.prompt_tokens);
            new.tokens.extend(&client.said);
            // Scores are asked for once; a stream that has them asks for none again.
            new.prompt_logprobs = None;
            if new.max_tokens > 0 {
                self.submit(new, client.said);
            }
        }
    }

    fn finish(&mut self) {
        self.turbulent = false;
        let mut ids: Vec<SequenceId> = self.clients.keys().copied().collect();
        ids.sort_unstable();
        for id in ids {
            self.set_paused(id, false);
        }
        let mut idle = 0;
        while !self.clients.is_empty() {
            idle = if self.step(false) { 0 } else { idle + 1 };
            assert!(idle < 1_000, "{} sequences starve", self.clients.len());
        }
        let stats = self.scheduler.stats();
        assert_eq!((stats.waiting, stats.running, stats.swapped), (0, 0, 0));
        assert_eq!((stats.blocks_used, stats.host_blocks_used), (0, 0), "blocks leak");
    }
}

fn run(seed: u64, totals: &mut [u64; 6]) {
    let mut world = World::new(seed);
    for _ in 0..400 {
        if world.random.below(3) == 0 {
            world.arrive();
        }
        if world.random.below(6) == 0 {
            world.disturb();
        }
        let crash = world.random.below(80) == 0;
        world.step(crash);
    }
    world.finish();
    let stats = world.scheduler.stats();
    totals[0] += world.ended as u64;
    totals[1] += stats.preemptions;
    totals[2] += stats.swapped_out;
    totals[3] += stats.prefix_hit_tokens;
    totals[4] += world.poisoned as u64;
    totals[5] += world.spoiled as u64;
}

#[test]
fn every_sequence_says_what_it_would_have_said_alone() {
    let only = std::env::var("TANDEM_SIM_SEED").ok().and_then(|seed| seed.parse().ok());
    let seeds = only.map_or(0..400, |seed: u64| seed..seed + 1);
    let mut totals = [0; 6];
    for seed in seeds {
        let outcome = std::panic::catch_unwind(move || {
            let mut totals = [0; 6];
            run(seed, &mut totals);
            totals
        });
        match outcome {
            Ok(some) => totals.iter_mut().zip(some).for_each(|(total, more)| *total += more),
            Err(_) => panic!("seed {seed} failed; TANDEM_SIM_SEED={seed} runs it alone"),
        }
    }
    if only.is_none() {
        // The simulation is worth its name only if everything rare happened.
        let [ended, preemptions, swapped, cached, poisoned, spoiled] = totals;
        assert!(ended > 20_000 && spoiled > 100, "{totals:?}");
        assert!(preemptions > swapped && swapped > 100, "{totals:?}");
        assert!(cached > 10_000 && poisoned > 10, "{totals:?}");
    }
}

#[test]
fn a_dead_scheduler_is_survived_by_resubmission() {
    for seed in 0..20 {
        let mut world = World::new(seed);
        for round in 0..6 {
            for _ in 0..40 {
                if world.random.below(4) == 0 {
                    world.arrive();
                }
                world.step(false);
            }
            let options = SchedulerOptions {
                device_blocks: 40 + round,
                prefix_key: Some([seed as u8; 16]),
                ..options()
            };
            for client in world.clients.values_mut() {
                // It comes back although the queue is full.
                client.new.crashes = 1;
            }
            world.resubmit_all(options);
        }
        world.finish();
    }
}
