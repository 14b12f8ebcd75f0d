//! Names of full blocks by content: a keyed 128-bit hash chain over a sequence's tokens, so that a
//! block's name stands for everything before it as well. The key keeps clients from constructing
//! collisions; a hit is verified against the tokens all the same.

use crate::units::TokenId;
use siphasher::sip128::{Hasher128, SipHasher13};
use std::hash::{BuildHasherDefault, Hasher};

/// Name of a full block: its tokens and all tokens before them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockHash(pub u128);

/// Hashes the names of blocks for a map of them: they are random bits already, which nobody outside
/// can choose.
pub(super) type NameState = BuildHasherDefault<NameHasher>;

/// The low half of a name.
#[derive(Clone, Debug, Default)]
pub(super) struct NameHasher(u64);

impl Hasher for NameHasher {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u128(&mut self, name: u128) {
        self.0 = name as u64;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// Hashes blocks of one engine. SipHash-1-3 with a 128-bit result (Aumasson and Bernstein, 2012).
#[derive(Clone, Debug)]
pub struct ChainHasher {
    key: [u8; 16],
}

impl ChainHasher {
    /// A hasher with the engine's secret key.
    pub fn new(key: [u8; 16]) -> Self {
        Self { key }
    }

    /// The name of the block with these tokens that follows the block named `parent`.
    pub fn block(&self, parent: Option<BlockHash>, tokens: &[TokenId]) -> BlockHash {
        let mut hasher = SipHasher13::new_with_key(&self.key);
        hasher.write_u8(u8::from(parent.is_some()));
        hasher.write_u128(parent.map_or(0, |hash| hash.0));
        for token in tokens {
            hasher.write_u32(token.0);
        }
        BlockHash(hasher.finish128().as_u128())
    }

    /// Extends `hashes` to all full blocks of `tokens`.
    pub fn extend(&self, hashes: &mut Vec<BlockHash>, tokens: &[TokenId], block_tokens: usize) {
        for block in tokens.chunks_exact(block_tokens).skip(hashes.len()) {
            hashes.push(self.block(hashes.last().copied(), block));
        }
    }
}
