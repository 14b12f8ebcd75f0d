//! Where the keys and values of one chunk of positions lie in the paged store.

use super::scratch::CHUNK;
use super::{TOKEN_GROUP, Tile};
use std::ops::Range;

/// Groups of 16 tokens, each within one block, of a chunk.
const GROUPS: usize = CHUNK / TOKEN_GROUP;

/// A chunk of positions and where its groups lie. Groups that no row sees repeat one that is seen:
/// their scores are masked, and their blocks may not exist.
#[derive(Clone, Copy)]
pub(super) struct Chunk {
    /// Its first position, a multiple of [`CHUNK`].
    pub start: usize,
    /// Element 0 of the first token's key; element `d` follows at `d · block_tokens`.
    pub keys: [*const u16; GROUPS],
    /// Element 0 of the first token's value; the next token follows at `head_dim`.
    pub values: [*const u16; GROUPS],
}

impl Chunk {
    /// The chunk at `start`, of which some row sees, now or later, the positions `seen`.
    #[inline(always)]
    pub fn new(tile: &Tile<'_>, start: usize, seen: Range<usize>) -> Chunk {
        let (call, store) = (tile.call, &tile.call.store);
        let first = seen.start.max(start) / TOKEN_GROUP;
        let last = (seen.end.min(start + CHUNK) - 1) / TOKEN_GROUP;
        let (mut keys, mut values) = ([std::ptr::null(); GROUPS], [std::ptr::null(); GROUPS]);
        for index in 0..GROUPS {
            let group = (start / TOKEN_GROUP + index).clamp(first, last);
            let position = group * TOKEN_GROUP;
            let token = position % store.layout().block_tokens();
            let block = call.block_of(position);
            keys[index] = store.key_at(block, tile.kv_head, token);
            values[index] = store.value_at(block, tile.kv_head, token);
        }
        Chunk { start, keys, values }
    }
}

/// Asks for the cache line at `p`. Blocks are a few pages, too short for the hardware to learn the
/// stream: without this a decode over DRAM runs at less than half the speed.
#[inline(always)]
pub(super) fn prefetch(p: *const u16) {
    // SAFETY: a hint that never faults, and part of every x86-64.
    unsafe { std::arch::x86_64::_mm_prefetch::<HINT>(p.cast()) }
}

const HINT: i32 = std::arch::x86_64::_MM_HINT_T0;
