//! One seed's world: clients who come, pause and go, a scheduler, an executor that keeps real
//! books, and a thread that copies between tiers at moments of its own.

use crate::machine::{Machine, check_owners, continuation};
use crate::random::Random;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use tandem::kv::TierBlocks;
use tandem::request::{FinishReason, Priority, RequestError, SamplingParams};
use tandem::scheduler::{
    ChunkLimits, NewSequence, Scheduler, SchedulerOptions, SequenceEvent, SequenceEventKind,
    TierRates,
};
use tandem::speculative::{Lookup, SpeculationOptions};
use tandem::step::{BlockCopy, CopyOutcome, LogitsTask, RowFailure, StepOutput, StepPlan, Tier};
use tandem::units::{SequenceId, TokenId};

const BLOCK_TOKENS: usize = 16;
const CONTEXT_TOKENS: usize = 400;
const STEP_TOKENS_MAX: usize = 64;
const SCORE_ROWS_MAX: usize = 8;
const DRAFT_MAX: usize = 6;

/// What a client knows of its sequence.
pub struct Client {
    pub new: NewSequence,
    expected: Vec<TokenId>,
    said: Vec<TokenId>,
    scored: Vec<usize>,
    paused: bool,
}

/// One seed's world.
pub struct World {
    pub random: Random,
    pub scheduler: Scheduler,
    machine: Machine,
    /// Copies that were ordered and have not ended, oldest first.
    copies: VecDeque<BlockCopy>,
    disk_stopped: bool,
    pub clients: HashMap<SequenceId, Client>,
    prefixes: Vec<Vec<TokenId>>,
    next_id: u64,
    now_us: u64,
    pub ended: usize,
    pub poisoned: usize,
    pub spoiled: usize,
    pub drafted: usize,
    pub accepted: usize,
    refused: usize,
    /// Whether commands come in the middle of steps and numbers fail.
    turbulent: bool,
}

/// What all worlds have in common; a queue of one by default.
pub fn options() -> SchedulerOptions {
    SchedulerOptions {
        block_tokens: BLOCK_TOKENS,
        block_bytes: 1_000,
        blocks: TierBlocks { device: 40, host: 0, disk: 0 },
        rates: TierRates::default(),
        context_tokens: CONTEXT_TOKENS,
        sequences_max: 8,
        queue_max: 1,
        chunks: ChunkLimits { slowdown_max: 2.0, tokens_min: 4, step_tokens_max: STEP_TOKENS_MAX },
        logits_rows_max: SCORE_ROWS_MAX,
        crashes_max: 2,
        prefix_key: None,
        batch_wait_us_max: 500_000,
        speculation: None,
    }
}

/// Drafts, with and without classes of widths.
fn speculation(seed: u64) -> SpeculationOptions {
    SpeculationOptions {
        lookup: Lookup { ngram_min: 1 + seed as usize % 3, ngram_max: 4 },
        draft_max: DRAFT_MAX,
        width_borders: if seed.is_multiple_of(4) { &[] } else { &[4, 8] },
    }
}

impl World {
    pub fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let device = 30 + random.below(60);
        let [host, disk] = [0, 1].map(|_| [0, 20, 200][random.below(3)]);
        let options = SchedulerOptions {
            blocks: TierBlocks { device, host, disk },
            sequences_max: 1 + random.below(24),
            queue_max: 40,
            prefix_key: (random.below(4) > 0).then_some([7; 16]),
            speculation: seed.is_multiple_of(2).then(|| speculation(seed)),
            ..options()
        };
        let prefixes = (0..4).map(|_| random.tokens(10 + 30 * 4)).collect();
        Self {
            random,
            scheduler: Scheduler::new(options),
            machine: Machine::new(BLOCK_TOKENS),
            copies: VecDeque::new(),
            disk_stopped: false,
            clients: HashMap::new(),
            prefixes,
            next_id: 0,
            now_us: 0,
            ended: 0,
            poisoned: 0,
            spoiled: 0,
            drafted: 0,
            accepted: 0,
            refused: 0,
            turbulent: true,
        }
    }

    pub fn arrive(&mut self) {
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

    pub fn disturb(&mut self) {
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
    pub fn step(&mut self, crash: bool) -> bool {
        let (mut plan, mut output) = (StepPlan::default(), StepOutput::default());
        let mut events = Vec::new();
        self.scheduler.plan_step(self.now_us, &mut plan);
        self.scheduler.drain_events(&mut events);
        self.check_plan(&plan);
        for event in events.drain(..) {
            self.hear(event);
        }
        self.scheduler.take_copies(&mut self.copies);
        let worked = !plan.is_empty();
        // Some copies are performed beside the step, the others after later ones.
        let before = self.random.below(4);
        self.copy(before);
        if self.turbulent && self.random.below(4) == 0 {
            // The engine obeys while a step is in flight.
            self.arrive();
            self.disturb();
        }
        if crash && worked {
            self.machine.lose();
            self.copies.clear();
            self.disk_stopped = false;
            self.scheduler.executor_lost(self.now_us, &mut events);
        } else if worked {
            self.machine.run(&plan, &mut output);
            self.spoil(&mut output);
            self.now_us += output.duration_us;
            self.scheduler.apply(self.now_us, &plan, &output, &mut events);
        } else {
            self.now_us += 1_000;
        }
        if self.random.below(3) == 0 {
            let after = self.random.below(40);
            self.copy(after);
        }
        if self.turbulent && self.random.below(150) == 0 {
            self.lose_tiers();
        }
        self.scheduler.check_invariants();
        for event in events {
            self.hear(event);
        }
        worked
    }

    /// Performs the oldest copies; in turbulence some fail, and once the disk does for good.
    fn copy(&mut self, count: usize) {
        let mut results = Vec::new();
        for copy in self.copies.drain(..count.min(self.copies.len())) {
            let failed = self.turbulent && self.random.below(30) == 0;
            let full = self.disk_stopped && copy.to.0 == Tier::Disk;
            let outcome = if failed || full { CopyOutcome::Failed } else { CopyOutcome::Done };
            results.push(self.machine.copy(copy, outcome));
        }
        self.scheduler.copied(self.now_us, &results, 50 * results.len() as u64);
        if self.turbulent && self.random.below(600) == 0 {
            self.disk_stopped = true;
        }
        if self.disk_stopped {
            self.scheduler.stop_disk();
        }
    }

    /// The thread that copies dies.
    fn lose_tiers(&mut self) {
        self.copies.clear();
        self.disk_stopped = false;
        self.machine.lose_tiers();
        self.scheduler.tiers_lost(self.now_us);
    }

    /// Makes the numbers of one row infinite, now and then.
    fn spoil(&mut self, output: &mut StepOutput) {
        if self.turbulent && !output.rows.is_empty() && self.random.below(200) == 0 {
            let row = output.rows.remove(self.random.below(output.rows.len()));
            let failure = RowFailure { sequence: row.sequence, position: row.position };
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
            let certain = known.len().min(end) - planned.position_start;
            let (tokens, drafted) = tokens.split_at(certain);
            let wanted = &known[planned.position_start..][..certain];
            assert_eq!(wanted, tokens, "positions hold their tokens");
            if !drafted.is_empty() {
                assert!(certain == 1 && drafted.len() <= DRAFT_MAX, "{planned:?}");
                let rows = plan.logits.iter().filter(|row| row.sequence == planned.id);
                assert_eq!(rows.count(), 1 + drafted.len(), "each drafted token has its row");
                let said = client.said.len() + drafted.len();
                assert!(said < client.new.max_tokens && end < CONTEXT_TOKENS, "{planned:?}");
            }
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
            SequenceEventKind::Drafted { tokens, accepted } => {
                assert!(accepted <= tokens, "{accepted} of {tokens}");
                self.drafted += tokens;
                self.accepted += accepted;
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
                        // One that came again after its deadline has waited for nothing.
                        let least = u64::from(client.new.crashes == 0);
                        assert!((least..=60).contains(&deadline_ms), "{deadline_ms}");
                        assert!(client.said.is_empty());
                    }
                    RequestError::NumericError { .. } if self.turbulent => self.spoiled += 1,
                    other => panic!("{other}"),
                }
            }
        }
    }

    /// The scheduler dies: all streams come again with what they have, to a new one.
    pub fn resubmit_all(&mut self, options: SchedulerOptions) {
        self.scheduler = Scheduler::new(options);
        self.machine.lose();
        self.copies.clear();
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

    pub fn finish(&mut self) {
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
        self.scheduler.take_copies(&mut self.copies);
        self.copy(usize::MAX);
        let stats = self.scheduler.stats();
        assert_eq!((stats.waiting, stats.running, stats.swapped), (0, 0, 0));
        let used = [stats.device, stats.host, stats.disk].map(|blocks| blocks.used);
        assert_eq!((used, stats.copies_under_way), ([0; 3], 0), "blocks leak");
    }
}
