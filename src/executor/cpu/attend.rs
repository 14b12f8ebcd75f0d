//! The op that reads the KV store. Items that several workers compute leave unmerged segments in
//! the partials; after one more barrier one worker merges them in ascending order.

use super::Step;
use super::rotate::Rotation;
use crate::executor::attention_split::{AttentionShape, DividedItem};
use crate::executor::batch::QueryTile;
use crate::executor::cpu_pool::Worker;
use crate::executor::program::{HeadShape, KvLayerId};
use std::ops::Range;
use std::sync::PoisonError;
use tandem_cpu_kernels::OutputColumns;
use tandem_cpu_kernels::attention::{
    AttentionCall, AttentionParams, AttentionPart, AttentionScratch, SEGMENT_TOKENS, TokenRows,
};
use tandem_cpu_kernels::blocks::GROUP;

/// One attention op of a step.
struct Attention<'s> {
    step: &'s Step<'s>,
    heads: HeadShape,
    layer: KvLayerId,
    params: AttentionParams,
    /// What is done to the heads first, unless an op of its own did it.
    rotation: Option<Rotation>,
}

/// A query tile and KV head: what the kernel is called with.
struct Item<'s> {
    call: AttentionCall<'s>,
    part: AttentionPart,
    tile: &'s QueryTile,
}

impl Step<'_> {
    pub(super) fn attend(
        &self,
        worker: &Worker<'_>,
        (heads, layer): (HeadShape, KvLayerId),
        params: AttentionParams,
        rotation: Option<Rotation>,
    ) {
        let split = self.batch.attention(AttentionShape { heads, window: params.window });
        let attention = Attention { step: self, heads, layer, params, rotation };
        let mut scratch = self.scratch[worker.index].lock().unwrap_or_else(PoisonError::into_inner);
        if split.divided().is_empty() {
            // Those of a prompt that see most first: what is left for the end is short.
            let items = split.first_from_last(worker.count());
            for index in worker.deal_from(1, |worker| split.first_from_last(worker)).flatten() {
                attention.whole(items - 1 - index, &mut scratch);
            }
        } else {
            for piece in split.pieces(worker.index) {
                match piece.part {
                    None => attention.whole(piece.item, &mut scratch),
                    Some((segments, own)) => attention.segments(segments, own, &mut scratch),
                }
            }
            self.meet(worker);
            for index in worker.share(split.divided().len(), 1) {
                attention.merge(&split.divided()[index], &mut scratch);
            }
        }
        if !attention.heads_are_whole_groups() {
            self.meet(worker);
            for token in self.tokens(worker) {
                self.quantize(self.buffers.attended, token, 0..self.buffers.attended.values.width);
            }
        }
    }
}

impl<'s> Attention<'s> {
    /// Columns of the output that belong to one KV head.
    fn head_columns(&self) -> usize {
        self.params.n_heads / self.heads.n_kv_heads * self.heads.head_dim
    }

    /// Whether the 8-bit form of an item's output can be made without the neighbours'.
    fn heads_are_whole_groups(&self) -> bool {
        self.head_columns().is_multiple_of(GROUP)
    }

    /// An item as the op before has left it.
    fn item(&self, item: usize) -> Item<'s> {
        let (step, heads) = (self.step, self.heads);
        let tile = &step.batch.tiles[item / heads.n_kv_heads];
        // SAFETY: heads are only read in this op.
        let rows = unsafe { step.buffers.heads.block(tile.tokens.clone()) };
        let call = AttentionCall {
            params: self.params,
            store: step.kv.layer(self.layer),
            blocks: step.batch.block_table(tile.sequence),
            first_position: tile.position_start,
            queries: self.queries(rows, tile),
        };
        let queries = 0..tile.tokens.len();
        Item { call, part: AttentionPart { kv_head: item % heads.n_kv_heads, queries }, tile }
    }

    fn queries(&self, rows: &'s [f32], tile: &QueryTile) -> TokenRows<'s> {
        let (width, stride) = (self.heads.query_dim(), self.step.buffers.heads.width);
        TokenRows::new(rows, tile.tokens.len(), width, stride)
    }

    /// Makes an item ready to be computed by this worker at some positions, which then are stored
    /// by it, if they are new, and by no other.
    fn rotate(&self, item: &mut Item<'s>, positions: Range<usize>) {
        if let Some(rotation) = self.rotation {
            let head = (item.tile, item.part.kv_head);
            let rows = self.step.rotate_own(rotation, head, positions);
            item.call.queries = self.queries(rows, item.tile);
        }
    }

    /// # Safety
    /// The item is this worker's alone until the next barrier, and so are its tokens' columns of
    /// the head.
    unsafe fn output(&self, item: &Item<'_>) -> OutputColumns<'s> {
        // SAFETY: the kernels write these columns only; passed on.
        unsafe { self.step.buffers.attended.values.cut(item.tile.tokens.clone()).output() }
    }

    fn whole(&self, item: usize, scratch: &mut AttentionScratch) {
        let mut item = self.item(item);
        self.rotate(&mut item, 0..usize::MAX);
        // SAFETY: items belong to one worker unless they are divided.
        let output = unsafe { self.output(&item) };
        self.step.kernels.attend(&item.call, &item.part, output, scratch);
        self.quantize(&item);
    }

    /// Leaves this worker's segments of an item in the partials.
    fn segments(&self, own: Range<usize>, divided: &DividedItem, scratch: &mut AttentionScratch) {
        let mut item = self.item(divided.item);
        let queries = item.part.queries.clone();
        let (all, len) = (item.call.segments(&queries), item.call.partial_len(queries.len()));
        let own = own.start..own.end.min(all.len());
        let start = divided.partials.start;
        let place = start + own.start * len..start + own.end * len;
        assert!(place.end <= divided.partials.end, "{place:?} of {:?}", divided.partials);
        // SAFETY: items have places of their own, and so have segments, each of one worker.
        let partials = unsafe { self.step.partials.part_mut(0, place) };
        let own = all.start + own.start..all.start + own.end;
        self.rotate(&mut item, own.start * SEGMENT_TOKENS..own.end * SEGMENT_TOKENS);
        self.step.kernels.attend_segments(&item.call, &item.part, own, partials, scratch);
    }

    fn merge(&self, divided: &DividedItem, scratch: &mut AttentionScratch) {
        let item = self.item(divided.item);
        // SAFETY: the partials are behind a barrier, and one worker merges a divided item.
        let (partials, output) =
            unsafe { (self.step.partials.part(0, divided.partials.clone()), self.output(&item)) };
        self.step.kernels.merge_segments(&item.call, &item.part, partials, output, scratch);
        self.quantize(&item);
    }

    /// Fills the 8-bit form of an item's output.
    fn quantize(&self, item: &Item<'_>) {
        if self.heads_are_whole_groups() {
            let head = item.part.kv_head;
            let columns = head * self.head_columns()..(head + 1) * self.head_columns();
            for token in item.tile.tokens.clone() {
                self.step.quantize(self.step.buffers.attended, token, columns.clone());
            }
        }
    }
}
