//! Rotating queries and keys, and writing the KV store: an op of its own, or part of the attention
//! that follows.
//!
//! The op shares out runs of tokens, and all workers read afterwards what each has stored. Where a
//! sequence has one tile of queries, only those who attend to its tile and KV head need that head
//! of its new tokens. Then they rotate copies of the queries themselves, and each new position is
//! stored by the one worker that attends to it: no barrier lies between, and `heads` is only read.

use super::Step;
use crate::executor::batch::QueryTile;
use crate::executor::cpu_pool::Worker;
use crate::executor::program::{HeadShape, KvLayerId, Norm, Op, RopeId};
use std::ops::Range;
use tandem_cpu_kernels::attention::{KvWrite, TokenRows};

/// What is done to queries, keys and values before an attention.
#[derive(Clone, Copy)]
pub(super) struct Rotation {
    shape: HeadShape,
    query_norm: Option<Norm>,
    key_norm: Option<Norm>,
    rope: RopeId,
    layer: KvLayerId,
}

impl Rotation {
    /// That of an op, if it is one.
    pub fn of(op: &Op) -> Option<Self> {
        let Op::Rotate { shape, query_norm, key_norm, rope, layer } = *op else { return None };
        Some(Self { shape, query_norm, key_norm, rope, layer })
    }
}

impl<'a> Step<'a> {
    pub(super) fn rotate(&self, worker: &Worker<'_>, rotation: Rotation) {
        let shape = rotation.shape;
        let (query_end, key_end) = (shape.query_dim(), shape.query_dim() + shape.kv_dim());
        let heads = self.buffers.heads;
        let runs = worker.deal(self.batch.runs.len(), 1, 1).flatten();
        for run in runs.map(|run| &self.batch.runs[run]) {
            for token in run.tokens.clone() {
                // SAFETY: runs are disjoint, so only this worker touches the token's heads.
                let row = unsafe { heads.part_mut(token, 0..key_end) };
                let (queries, keys) = row.split_at_mut(query_end);
                self.turn(rotation, token, (queries, rotation.query_norm));
                self.turn(rotation, token, (keys, rotation.key_norm));
            }
            // SAFETY: the run's rows are this worker's, and it has finished writing them.
            let rows = unsafe { heads.block(run.tokens.clone()) };
            let write = KvWrite {
                store: self.kv.layer(rotation.layer),
                blocks: self.batch.block_table(run.sequence),
                first_position: self.batch.positions[run.tokens.start],
                keys: self.token_rows(&rows[query_end..], run.tokens.len(), shape),
                values: self.token_rows(&rows[key_end..], run.tokens.len(), shape),
            };
            self.kernels.write_kv(&write, 0..shape.n_kv_heads);
        }
    }

    /// Normalises and rotates some heads of a token in place.
    fn turn(&self, rotation: Rotation, token: usize, (heads, norm): (&mut [f32], Option<Norm>)) {
        if let Some(norm) = norm {
            let weight = self.weights.vector(norm.weight);
            self.kernels.rms_norm_in_place(heads, weight, norm.eps);
        }
        // SAFETY: angles are only read after the first op.
        let angles = unsafe { self.angles.part(token, 0..self.angles.width) };
        let (angles, style) = self.rotations.row(rotation.rope, angles);
        self.kernels.rope(heads, rotation.shape.head_dim, angles, style);
    }

    /// Rows of keys, or values, that are as far apart as those of `heads`.
    fn token_rows<'r>(&self, rows: &'r [f32], n_tokens: usize, shape: HeadShape) -> TokenRows<'r> {
        TokenRows::new(rows, n_tokens, shape.kv_dim(), self.buffers.heads.width)
    }

    /// Rotates what a worker needs to attend to a tile and KV head: returns the tile's rows of
    /// `heads` with the queries of the head's group rotated, all else undefined. Of the tile's
    /// tokens, those at `positions` are stored.
    pub(super) fn rotate_own(
        &self,
        rotation: Rotation,
        (tile, kv_head): (&QueryTile, usize),
        positions: Range<usize>,
    ) -> &'a [f32] {
        let HeadShape { n_heads, n_kv_heads, head_dim } = rotation.shape;
        let group = n_heads / n_kv_heads * head_dim;
        let queries = kv_head * group..(kv_head + 1) * group;
        for (row, token) in tile.tokens.clone().enumerate() {
            self.turn_copy(rotation, (token, row), (queries.clone(), rotation.query_norm));
        }
        let (first, n_tokens) = (tile.position_start, tile.tokens.len());
        let stored = positions.start.clamp(first, first + n_tokens) - first
            ..positions.end.clamp(first, first + n_tokens) - first;
        if !stored.is_empty() {
            self.store_own(rotation, (tile, kv_head), stored);
        }
        // SAFETY: the copy is this worker's, and it is complete.
        unsafe { self.buffers.rotated.block(0..n_tokens) }
    }

    /// Copies some heads of a token to row `row` of this worker's own, and rotates them there.
    fn turn_copy(
        &self,
        rotation: Rotation,
        (token, row): (usize, usize),
        (columns, norm): (Range<usize>, Option<Norm>),
    ) {
        // SAFETY: `heads` is only read in this op; the copy is this worker's own.
        let (from, to) = unsafe {
            let to = self.buffers.rotated.part_mut(row, columns.clone());
            (self.buffers.heads.part(token, columns), to)
        };
        to.copy_from_slice(from);
        self.turn(rotation, token, (to, norm));
    }

    /// Rotates and stores the key, and stores the value, of one KV head of tokens `stored` of a
    /// tile.
    fn store_own(
        &self,
        rotation: Rotation,
        (tile, kv_head): (&QueryTile, usize),
        stored: Range<usize>,
    ) {
        let shape = rotation.shape;
        let (query_end, key_end) = (shape.query_dim(), shape.query_dim() + shape.kv_dim());
        let key = query_end + kv_head * shape.head_dim..query_end + (kv_head + 1) * shape.head_dim;
        let first = tile.tokens.start;
        for row in stored.clone() {
            let key = (key.clone(), rotation.key_norm);
            self.turn_copy(rotation, (first + row, row), key);
        }
        // SAFETY: the copy is this worker's and complete; `heads` is only read in this op.
        let (own, heads) = unsafe {
            let tokens = first + stored.start..first + stored.end;
            (self.buffers.rotated.block(stored.clone()), self.buffers.heads.block(tokens))
        };
        let write = KvWrite {
            store: self.kv.layer(rotation.layer),
            blocks: self.batch.block_table(tile.sequence),
            first_position: tile.position_start + stored.start,
            keys: self.token_rows(&own[query_end..], stored.len(), shape),
            values: self.token_rows(&heads[key_end..], stored.len(), shape),
        };
        self.kernels.write_kv(&write, kv_head..kv_head + 1);
    }
}
