//! An executor that computes no model but keeps real books: a block slot holds a digest of its own
//! token and of the slot before it, read back through the block table. A stale, wrong or missing
//! block, a wrong position or a lost copy changes the digest, and with it the next token.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::collections::HashMap;
use tandem::step::{
    BlockCopy, CopyOutcome, CopyResult, LogitsTask, RowOutput, StepOutput, StepPlan, Tier,
    TokenLogprob,
};
use tandem::units::{BlockId, SequenceId, TokenId};

/// Small, so that end tokens and repeated blocks come up.
pub const VOCABULARY: u64 = 97;

/// Digest of a sequence's first tokens.
pub fn digest(before: u64, token: TokenId) -> u64 {
    let mut mixed = before ^ (u64::from(token.0) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed ^ (mixed >> 32)
}

/// The token that follows `last`: mostly the one that always does, so that text repeats itself, and
/// sometimes any.
pub fn next_token(digest: u64, last: TokenId) -> TokenId {
    let usual = 5 * u64::from(last.0) + 11;
    let next = if (digest >> 40).is_multiple_of(5) { digest } else { usual };
    TokenId((next % VOCABULARY) as u32)
}

/// What a sequence that starts with these tokens says next, all alone.
pub fn continuation(prompt: &[TokenId], count: usize) -> Vec<TokenId> {
    let mut state = prompt.iter().fold(0, |state, token| digest(state, *token));
    let mut last = prompt.last().copied().unwrap_or_default();
    let mut said = Vec::new();
    for _ in 0..count {
        last = next_token(state, last);
        said.push(last);
        state = digest(state, last);
    }
    said
}

/// The fake executor.
#[derive(Default)]
pub struct Machine {
    /// Digest per (tier, block, slot).
    slots: HashMap<(Tier, BlockId, usize), u64>,
    block_tokens: usize,
}

impl Machine {
    pub fn new(block_tokens: usize) -> Self {
        Self { slots: HashMap::new(), block_tokens }
    }

    /// Forgets all KV, as a restarted executor does.
    pub fn lose(&mut self) {
        self.slots.clear();
    }

    /// Runs a plan.
    pub fn run(&mut self, plan: &StepPlan, output: &mut StepOutput) {
        output.clear();
        output.step = plan.step;
        assert!(plan.copies.is_empty(), "a step copies nothing");
        let mut digests = vec![0; plan.tokens.len()];
        for planned in &plan.sequences {
            let table = &plan.block_tables[planned.block_table.clone()];
            for (offset, row) in planned.tokens.clone().enumerate() {
                let position = planned.position_start + offset;
                let before = match position.checked_sub(1) {
                    Some(before) => self.slot(table, before),
                    None => 0,
                };
                digests[row] = digest(before, plan.tokens[row]);
                let block = table[position / self.block_tokens];
                let slot = (Tier::Device, block, position % self.block_tokens);
                self.slots.insert(slot, digests[row]);
            }
        }
        for wanted in &plan.logits {
            let token = match &wanted.task {
                LogitsTask::Sample { .. } => {
                    next_token(digests[wanted.row], plan.tokens[wanted.row])
                }
                LogitsTask::Score { target, .. } => *target,
            };
            output.rows.push(RowOutput {
                sequence: wanted.sequence,
                position: wanted.position,
                token: TokenLogprob { id: token, logprob: -1.0 },
                top: Vec::new(),
            });
        }
        output.duration_us = 1_000 + 50 * plan.tokens.len() as u64;
    }

    /// Copies a block; one that fails leaves rubbish behind.
    pub fn copy(&mut self, copy: BlockCopy, outcome: CopyOutcome) -> CopyResult {
        for slot in 0..self.block_tokens {
            let value = self.slots.get(&(copy.from.0, copy.from.1, slot)).copied();
            let value = value.filter(|_| outcome == CopyOutcome::Done);
            match value {
                Some(value) => self.slots.insert((copy.to.0, copy.to.1, slot), value),
                None => self.slots.remove(&(copy.to.0, copy.to.1, slot)),
            };
        }
        CopyResult { copy, outcome }
    }

    /// Forgets what lies below the device.
    pub fn lose_tiers(&mut self) {
        self.slots.retain(|(tier, _, _), _| *tier == Tier::Device);
    }

    fn slot(&self, table: &[BlockId], position: usize) -> u64 {
        let (block, slot) = (position / self.block_tokens, position % self.block_tokens);
        // An empty slot gives a digest that no sequence has.
        self.slots.get(&(Tier::Device, table[block], slot)).copied().unwrap_or(u64::MAX)
    }
}

/// A block that is written in this step is in one table only.
pub fn check_owners(plan: &StepPlan, block_tokens: usize) {
    let mut written: HashMap<BlockId, SequenceId> = HashMap::new();
    for planned in &plan.sequences {
        let table = &plan.block_tables[planned.block_table.clone()];
        for block in &table[planned.position_start / block_tokens..] {
            assert_eq!(written.insert(*block, planned.id), None, "{block:?} has two writers");
        }
    }
    for planned in &plan.sequences {
        let table = &plan.block_tables[planned.block_table.clone()];
        for block in table.iter().filter(|block| written.contains_key(block)) {
            assert_eq!(written[block], planned.id, "{block:?} is read while it is written");
        }
    }
}
