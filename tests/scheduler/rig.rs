//! A scheduler with the fake executor behind it, and everything it said, by sequence.

#![allow(dead_code, reason = "each test binary uses its part")]

use crate::machine::{Machine, continuation};
use std::collections::HashMap;
use std::sync::Arc;
use tandem::kv::TierBlocks;
use tandem::request::{FinishReason, Priority, RequestError, SamplingParams};
use tandem::scheduler::{
    ChunkLimits, NewSequence, Scheduler, SchedulerOptions, SequenceEvent, SequenceEventKind,
    TierRates,
};
use tandem::step::{BlockCopy, CopyOutcome, CopyResult, StepOutput, StepPlan};
use tandem::units::{SequenceId, TokenId};

pub const BLOCK_TOKENS: usize = 16;

/// Room for everything; tests narrow what they are about.
pub fn options() -> SchedulerOptions {
    SchedulerOptions {
        block_tokens: BLOCK_TOKENS,
        block_bytes: 1_000,
        blocks: device(64),
        rates: TierRates::default(),
        context_tokens: 512,
        sequences_max: 16,
        queue_max: 64,
        chunks: ChunkLimits { slowdown_max: 2.0, tokens_min: 4, step_tokens_max: 64 },
        logits_rows_max: 8,
        crashes_max: 2,
        prefix_key: Some([1; 16]),
        batch_wait_us_max: 1_000_000,
        speculation: None,
    }
}

/// A store of so many blocks and no lower tiers.
pub fn device(blocks: usize) -> TierBlocks {
    TierBlocks { device: blocks, ..TierBlocks::default() }
}

/// A prompt that shares nothing with those of other names.
pub fn prompt(name: u32, tokens: usize) -> Vec<TokenId> {
    (0..tokens as u32).map(|at| TokenId(4 + (name * 31 + at * 7) % 90)).collect()
}

/// An interactive sequence that says `max_tokens` tokens; no end token is ever said.
pub fn sequence(id: u64, tokens: Vec<TokenId>, max_tokens: usize) -> NewSequence {
    NewSequence {
        id: SequenceId(id),
        prompt_tokens: tokens.len(),
        tokens,
        sampling: Arc::new(SamplingParams::greedy()),
        max_tokens,
        end_tokens: Arc::from([]),
        priority: Priority::Interactive,
        deadline_us: None,
        ttft_deadline_us: None,
        prompt_logprobs: None,
        crashes: 0,
    }
}

pub fn batch(id: u64, tokens: Vec<TokenId>, max_tokens: usize) -> NewSequence {
    NewSequence { priority: Priority::Batch, ..sequence(id, tokens, max_tokens) }
}

pub struct Rig {
    pub scheduler: Scheduler,
    pub machine: Machine,
    pub plan: StepPlan,
    pub output: StepOutput,
    /// Copies of the step, and what becomes of each.
    pub copies: Vec<BlockCopy>,
    pub results: Vec<CopyResult>,
    pub copy_outcome: CopyOutcome,
    pub now_us: u64,
    pub events: Vec<SequenceEvent>,
    pub said: HashMap<u64, Vec<TokenId>>,
    pub scored: HashMap<u64, Vec<usize>>,
    /// Drafted tokens of each sequence, and how many of them were accepted.
    pub drafted: HashMap<u64, (usize, usize)>,
    pub ended: HashMap<u64, Result<FinishReason, RequestError>>,
}

impl Rig {
    pub fn new(options: SchedulerOptions) -> Self {
        Self {
            machine: Machine::new(options.block_tokens),
            scheduler: Scheduler::new(options),
            plan: StepPlan::default(),
            output: StepOutput::default(),
            copies: Vec::new(),
            results: Vec::new(),
            copy_outcome: CopyOutcome::Done,
            now_us: 0,
            events: Vec::new(),
            said: HashMap::new(),
            scored: HashMap::new(),
            drafted: HashMap::new(),
            ended: HashMap::new(),
        }
    }

    pub fn add(&mut self, new: NewSequence) {
        self.try_add(new).unwrap();
    }

    pub fn try_add(&mut self, new: NewSequence) -> Result<usize, RequestError> {
        self.scheduler.add(self.now_us, new)
    }

    /// Plans, runs and applies one step; how many tokens it computed.
    pub fn step(&mut self) -> usize {
        self.plan_only();
        if !self.plan.is_empty() {
            self.machine.run(&self.plan, &mut self.output);
            self.now_us += self.output.duration_us;
            self.apply();
        }
        self.copy();
        self.plan.tokens.len()
    }

    pub fn plan_only(&mut self) {
        self.scheduler.plan_step(self.now_us, &mut self.plan);
        self.scheduler.drain_events(&mut self.events);
        self.hear();
    }

    pub fn apply(&mut self) {
        self.scheduler.apply(self.now_us, &self.plan, &self.output, &mut self.events);
        self.scheduler.check_invariants();
        self.hear();
    }

    /// Performs the copies that were begun, all as `copy_outcome` says, after the step that was
    /// planned with them.
    pub fn copy(&mut self) {
        self.copies.clear();
        self.results.clear();
        self.scheduler.take_copies(&mut self.copies);
        for copy in &self.copies {
            self.results.push(self.machine.copy(*copy, self.copy_outcome));
        }
        self.scheduler.copied(self.now_us, &self.results, 100 * self.copies.len() as u64);
        self.scheduler.check_invariants();
    }

    /// Steps until a condition holds; fails after `steps_max`.
    pub fn until(&mut self, steps_max: usize, done: impl Fn(&Self) -> bool) -> usize {
        for steps in 0..steps_max {
            if done(self) {
                return steps;
            }
            self.step();
        }
        assert!(done(self), "not within {steps_max} steps; {:?}", self.scheduler.stats());
        steps_max
    }

    /// Tokens of a sequence in the plan.
    pub fn planned(&self, id: u64) -> usize {
        let of = self.plan.sequences.iter().filter(|planned| planned.id == SequenceId(id));
        of.map(|planned| planned.tokens.len()).sum()
    }

    pub fn said(&self, id: u64) -> usize {
        self.said.get(&id).map_or(0, Vec::len)
    }

    /// That a sequence ended with all the tokens that it would have said alone.
    pub fn assert_whole(&self, id: u64, prompt: &[TokenId], tokens: usize) {
        assert_eq!(self.ended.get(&id), Some(&Ok(FinishReason::Length)), "the end of {id}");
        assert_eq!(self.said[&id], continuation(prompt, tokens), "the tokens of {id}");
    }

    fn hear(&mut self) {
        for event in self.events.drain(..) {
            let id = event.sequence.0;
            assert!(!self.ended.contains_key(&id), "{event:?} after the end");
            match event.kind {
                SequenceEventKind::Token(row) => {
                    self.said.entry(id).or_default().push(row.token.id)
                }
                SequenceEventKind::PromptScore(row) => {
                    self.scored.entry(id).or_default().push(row.position);
                }
                SequenceEventKind::Finished { reason, .. } => {
                    self.ended.insert(id, Ok(reason));
                }
                SequenceEventKind::Failed(error) => {
                    self.ended.insert(id, Err(error));
                }
                SequenceEventKind::Drafted { tokens, accepted } => {
                    let drafted = self.drafted.entry(id).or_default();
                    *drafted = (drafted.0 + tokens, drafted.1 + accepted);
                }
                SequenceEventKind::Prefill { .. } | SequenceEventKind::Interrupted { .. } => {}
            }
        }
    }
}
