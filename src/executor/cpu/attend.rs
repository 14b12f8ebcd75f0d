//! The op that reads the KV store. Items that several workers compute leave unmerged segments in
//! the partials; after one more barrier one worker merges them in ascending order.

use super::Step;
use crate::executor::attention_split::{AttentionShape, DividedItem};
use crate::executor::cpu_pool::Worker;
use crate::executor::program::{HeadShape, KvLayerId};
use std::ops::Range;
use std::sync::PoisonError;
use tandem_cpu_kernels::OutputColumns;
use tandem_cpu_kernels::attention::{
    AttentionCall, AttentionParams, AttentionPart, AttentionScratch, TokenRows,
};
use tandem_cpu_kernels::blocks::GROUP;

/// One attention op of a step.
struct Attention<'s> {
    step: &'s Step<'s>,
    heads: HeadShape,
    layer: KvLayerId,
    params: AttentionParams,
}

/// A query tile and KV head: what the kernel is called with.
struct Item<'s> {
    call: AttentionCall<'s>,
    part: AttentionPart,
    /// Rows of the step.
    tokens: Range<usize>,
}

impl Step<'_> {
    pub(super) fn attend(
        &self,
        worker: &Worker<'_>,
        heads: HeadShape,
        layer: KvLayerId,
        params: AttentionParams,
    ) {
        let split = self.batch.attention(AttentionShape { heads, window: params.window });
        let attention = Attention { step: self, heads, layer, params };
        let mut scratch = self.scratch[worker.index].lock().unwrap_or_else(PoisonError::into_inner);
        for piece in split.pieces(worker.index) {
            match piece.part {
                None => attention.whole(piece.item, &mut scratch),
                Some((segments, divided)) => attention.segments(segments, divided, &mut scratch),
            }
        }
        if !split.divided().is_empty() {
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

    fn item(&self, item: usize) -> Item<'s> {
        let (step, heads) = (self.step, self.heads);
        let tile = &step.batch.tiles[item / heads.n_kv_heads];
        // SAFETY: heads are only read in this op.
        let rows = unsafe { step.buffers.heads.block(tile.tokens.clone()) };
        let (n_tokens, stride) = (tile.tokens.len(), step.buffers.heads.width);
        let call = AttentionCall {
            params: self.params,
            store: step.kv.layer(self.layer),
            blocks: step.batch.block_table(tile.sequence),
            first_position: tile.position_start,
            queries: TokenRows::new(rows, n_tokens, heads.query_dim(), stride),
        };
        let part = AttentionPart { kv_head: item % heads.n_kv_heads, queries: 0..n_tokens };
        Item { call, part, tokens: tile.tokens.clone() }
    }

    /// # Safety
    /// The item is this worker's alone until the next barrier, and so are its tokens' columns of
    /// the head.
    unsafe fn output(&self, item: &Item<'_>) -> OutputColumns<'s> {
        // SAFETY: the kernels write these columns only; passed on.
        unsafe { self.step.buffers.attended.values.cut(item.tokens.clone()).output() }
    }

    fn whole(&self, item: usize, scratch: &mut AttentionScratch) {
        let item = self.item(item);
        // SAFETY: items belong to one worker unless they are divided.
        let output = unsafe { self.output(&item) };
        self.step.kernels.attend(&item.call, &item.part, output, scratch);
        self.quantize(&item);
    }

    /// Leaves this worker's segments of an item in the partials.
    fn segments(&self, own: Range<usize>, divided: &DividedItem, scratch: &mut AttentionScratch) {
        let Item { call, part, .. } = self.item(divided.item);
        let (all, len) = (call.segments(&part.queries), call.partial_len(part.queries.len()));
        let own = own.start..own.end.min(all.len());
        let start = divided.partials.start;
        let place = start + own.start * len..start + own.end * len;
        assert!(place.end <= divided.partials.end, "{place:?} of {:?}", divided.partials);
        // SAFETY: items have places of their own, and so have segments, each of one worker.
        let partials = unsafe { self.step.partials.part_mut(0, place) };
        let own = all.start + own.start..all.start + own.end;
        self.step.kernels.attend_segments(&call, &part, own, partials, scratch);
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
            for token in item.tokens.clone() {
                self.step.quantize(self.step.buffers.attended, token, columns.clone());
            }
        }
    }
}
