//! Where the keys and values of one chunk of positions lie in the paged store.

use super::scratch::CHUNK;
use super::{TOKEN_GROUP, Tile};
use std::ops::Range;

/// Groups of 16 tokens, each within one block, of a chunk.
const GROUPS: usize = CHUNK / TOKEN_GROUP;

/// A chunk of positions and where its groups of tokens lie. Groups that no row sees repeat one that
/// is seen: their scores are masked, and their blocks may not exist.
#[derive(Clone, Copy)]
pub(super) struct Chunk {
    /// Its first position, a multiple of [`CHUNK`].
    pub start: usize,
    /// Element 0 of the first token's key; element `d` follows `d · block_tokens` elements later.
    pub keys: [*const u8; GROUPS],
    /// Element 0 of the first token's value; the next token follows `head_dim` elements later.
    pub values: [*const u8; GROUPS],
    /// f16 scale 0 of the first token's key; scale `g` follows at `g · block_tokens`. Null in a
    /// store without scales.
    pub key_scales: [*const u16; GROUPS],
    /// The same of its value.
    pub value_scales: [*const u16; GROUPS],
}

impl Chunk {
    /// The chunk at `start`, of which some row sees, now or later, the positions `seen`.
    #[inline(always)]
    pub fn new(tile: &Tile<'_>, start: usize, seen: Range<usize>) -> Chunk {
        let (call, store) = (tile.call, &tile.call.store);
        let first = seen.start.max(start) / TOKEN_GROUP;
        let last = (seen.end.min(start + CHUNK) - 1) / TOKEN_GROUP;
        let (bytes, scales) = ([std::ptr::null(); GROUPS], [std::ptr::null(); GROUPS]);
        let (keys, values) = (bytes, bytes);
        let mut chunk = Chunk { start, keys, values, key_scales: scales, value_scales: scales };
        for index in 0..GROUPS {
            let group = (start / TOKEN_GROUP + index).clamp(first, last);
            let position = group * TOKEN_GROUP;
            let token = position % store.layout().block_tokens();
            let block = call.block_of(position);
            chunk.keys[index] = store.key_at(block, tile.kv_head, token);
            chunk.values[index] = store.value_at(block, tile.kv_head, token);
            if store.layout().is_eight_bits() {
                let [key, value] = store.scales_at(block, tile.kv_head, token);
                (chunk.key_scales[index], chunk.value_scales[index]) = (key, value);
            }
        }
        chunk
    }
}

/// Asks for the cache line at `p`. Blocks are a few pages, too short for the hardware to learn the
/// stream: without this a decode over DRAM runs at less than half the speed.
#[inline(always)]
pub(super) fn prefetch(p: *const u8) {
    // SAFETY: a hint that never faults, and part of every x86-64.
    unsafe { std::arch::x86_64::_mm_prefetch::<HINT>(p.cast()) }
}

const HINT: i32 = std::arch::x86_64::_MM_HINT_T0;
