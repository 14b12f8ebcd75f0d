//! Owns the accounting of KV blocks: who refers to which block, which prompt prefixes are cached,
//! which tier has room. It must not know sequences, plans or the blocks' bytes: it hands out ids.
//! The scheduler calls it; the executor performs the copies that the scheduler orders from it.

mod host;
mod lru;
mod pool;
mod prefix;

pub use host::HostPool;
pub use pool::{BlockPool, PoolCounts};
pub use prefix::{BlockHash, ChainHasher};

/// Blocks that `tokens` tokens need.
pub fn blocks_for(tokens: usize, block_tokens: usize) -> usize {
    tokens.div_ceil(block_tokens)
}
