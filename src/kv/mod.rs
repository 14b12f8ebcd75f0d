//! Owns the accounting of KV blocks: who refers to which block, which prompt prefixes are cached,
//! which tier has room. It must not know sequences, plans or the blocks' bytes: it hands out ids.
//! The scheduler calls it; the executor performs the copies that the scheduler begins here.

mod lru;
mod pool;
mod prefix;
mod tiers;

pub use pool::{BlockPool, PoolCounts};
pub use prefix::{BlockHash, ChainHasher};
pub use tiers::{Place, TierBlocks, Tiers};

/// Blocks that `tokens` tokens need.
pub fn blocks_for(tokens: usize, block_tokens: usize) -> usize {
    tokens.div_ceil(block_tokens)
}
