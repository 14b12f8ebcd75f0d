//! The scheduler's knobs and figures.

use super::chunking::ChunkLimits;
use super::rates::TierRates;
use crate::config::{Config, SpeculativeConfig, SpeculativeMethod};
use crate::kv::{PoolCounts, TierBlocks};
use crate::speculative::{Lookup, SpeculationOptions};
use crate::step::{BlockCopy, CopyOutcome, Tier};

/// What a scheduler is built from.
#[derive(Clone, Debug)]
pub struct SchedulerOptions {
    /// Tokens of one KV block.
    pub block_tokens: usize,
    /// Bytes of one KV block over all layers, for what clients are told.
    pub block_bytes: u64,
    /// Blocks of all tiers.
    pub blocks: TierBlocks,
    /// What copies between them and prompts take, as far as known.
    pub rates: TierRates,
    /// Longest sequence.
    pub context_tokens: usize,
    /// Sequences running at once.
    pub sequences_max: usize,
    /// Sequences waiting at once.
    pub queue_max: usize,
    /// Bounds of prefill chunks and steps.
    pub chunks: ChunkLimits,
    /// Rows of logits that all scored prompts together may ask for in one step.
    pub logits_rows_max: usize,
    /// A sequence in flight at so many crashes fails.
    pub crashes_max: u32,
    /// Key of the prefix cache; `None` switches it off.
    pub prefix_key: Option<[u8; 16]>,
    /// A batch sequence that was in the queue for so long, in all, is from then on treated like an
    /// interactive one: it keeps its place and never yields to a younger one again.
    pub batch_wait_us_max: u64,
    /// How sequences are speculated on; `None` switches it off.
    pub speculation: Option<SpeculationOptions>,
}

impl SchedulerOptions {
    /// Rows of logits for scored prompts in one step, unless said otherwise.
    pub const LOGITS_ROWS_MAX: usize = 256;
    /// How long batch sequences step back, unless said otherwise.
    pub const BATCH_WAIT_US_MAX: u64 = 30_000_000;

    /// Options from the configuration, for a KV store of so many blocks.
    pub fn from_config(config: &Config, kv: KvStore, prefix_key: [u8; 16]) -> Self {
        Self {
            block_tokens: config.kv.block_tokens,
            block_bytes: kv.block_bytes,
            blocks: kv.blocks,
            rates: kv.rates,
            context_tokens: kv.context_tokens,
            sequences_max: config.scheduler.sequences_max,
            queue_max: config.scheduler.queue_max,
            chunks: ChunkLimits {
                slowdown_max: config.scheduler.prefill_slowdown_max,
                tokens_min: config.scheduler.prefill_tokens_min,
                step_tokens_max: config.scheduler.step_tokens_max,
            },
            logits_rows_max: Self::LOGITS_ROWS_MAX,
            crashes_max: config.supervision.crashes_per_request_max,
            prefix_key: config.kv.prefix_cache.then_some(prefix_key),
            batch_wait_us_max: Self::BATCH_WAIT_US_MAX,
            speculation: speculation(&config.speculative),
        }
    }
}

/// How sequences are speculated on where a step's width changes no bits.
fn speculation(config: &SpeculativeConfig) -> Option<SpeculationOptions> {
    match config.method() {
        Ok(SpeculativeMethod::Ngram) => Some(SpeculationOptions {
            lookup: Lookup { ngram_min: config.ngram_min, ngram_max: config.ngram_max },
            draft_max: config.draft_max,
            width_borders: &[],
        }),
        Ok(SpeculativeMethod::Off) | Err(_) => None,
    }
}

/// The KV store that a placement gave.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KvStore {
    /// Blocks of all tiers.
    pub blocks: TierBlocks,
    /// What copies between them and prompts take, as far as known.
    pub rates: TierRates,
    /// Bytes of one block.
    pub block_bytes: u64,
    /// Longest sequence.
    pub context_tokens: usize,
}

/// The scheduler's figures at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SchedulerStats {
    /// Sequences without blocks.
    pub waiting: usize,
    /// Sequences with device blocks, or with blocks on their way there.
    pub running: usize,
    /// Sequences whose blocks are in lower tiers, or on their way there.
    pub swapped: usize,
    /// Sequences that flow control holds back, in any state.
    pub paused: usize,
    /// Bytes of a block over all layers.
    pub block_bytes: u64,
    /// Blocks of the device tier.
    pub device: PoolCounts,
    /// Blocks of the host tier.
    pub host: PoolCounts,
    /// Blocks of the disk tier.
    pub disk: PoolCounts,
    /// Whether nothing more goes to the disk tier.
    pub disk_stopped: bool,
    /// Copies between tiers that were begun and have not ended.
    pub copies_under_way: usize,
    /// Prompt tokens found in the prefix cache, in any tier, over the scheduler's life.
    pub prefix_hit_tokens: u64,
    /// Sequences that lost their device blocks to others, over the scheduler's life.
    pub preemptions: u64,
    /// Of these, sequences that went to lower tiers.
    pub swapped_out: u64,
    /// Sequences that are computed again because their blocks were lost between tiers, over the
    /// scheduler's life.
    pub swaps_lost: u64,
    /// Blocks copied from the device to a lower tier, over the scheduler's life.
    pub blocks_down: u64,
    /// Blocks copied from a lower tier to the device, over the scheduler's life.
    pub blocks_up: u64,
    /// Blocks copied from the host tier to the disk tier, over the scheduler's life.
    pub blocks_to_disk: u64,
    /// Copies that failed, over the scheduler's life.
    pub copies_failed: u64,
    /// Drafted tokens that were in steps, over the scheduler's life.
    pub draft_tokens: u64,
    /// Of these, tokens that were accepted.
    pub draft_tokens_accepted: u64,
    /// Tokens generated, over the scheduler's life.
    pub tokens_generated: u64,
    /// Steps planned that had something to do, over the scheduler's life.
    pub steps: u64,
}

impl SchedulerStats {
    /// Counts a copy that has ended.
    pub(super) fn count_copy(&mut self, copy: &BlockCopy, outcome: CopyOutcome) {
        let count = match (copy.from.0, copy.to.0, outcome) {
            (_, _, CopyOutcome::Failed) => &mut self.copies_failed,
            (Tier::Device, _, _) => &mut self.blocks_down,
            (_, Tier::Device, _) => &mut self.blocks_up,
            _ => &mut self.blocks_to_disk,
        };
        *count += 1;
    }
}
