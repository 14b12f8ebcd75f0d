//! The op that rotates queries and keys and writes the KV store.

use super::Step;
use crate::executor::cpu_pool::Worker;
use crate::executor::program::{HeadShape, KvLayerId, Norm, RopeId};
use tandem_cpu_kernels::attention::{KvWrite, TokenRows};

impl Step<'_> {
    pub(super) fn rotate(
        &self,
        worker: &Worker<'_>,
        shape: HeadShape,
        [query_norm, key_norm]: [Option<Norm>; 2],
        (rope, layer): (RopeId, KvLayerId),
    ) {
        let (query_end, key_end) = (shape.query_dim(), shape.query_dim() + shape.kv_dim());
        let runs = worker.share(self.batch.runs.len(), 1);
        for run in &self.batch.runs[runs] {
            for token in run.tokens.clone() {
                // SAFETY: runs are disjoint, so only this worker touches the token's heads.
                let row = unsafe { self.buffers.heads.part_mut(token, 0..key_end) };
                let (queries, keys) = row.split_at_mut(query_end);
                for (heads, norm) in [(&mut *queries, query_norm), (&mut *keys, key_norm)] {
                    if let Some(norm) = norm {
                        let weight = self.weights.vector(norm.weight);
                        self.kernels.rms_norm_in_place(heads, weight, norm.eps);
                    }
                }
                // SAFETY: angles are only read after the first op.
                let angles = unsafe { self.angles.part(token, 0..self.angles.width) };
                let (angles, style) = self.rotations.row(rope, angles);
                self.kernels.rope(row, shape.head_dim, angles, style);
            }
            // SAFETY: the run's rows are this worker's, and it has finished writing them.
            let rows = unsafe { self.buffers.heads.block(run.tokens.clone()) };
            let n_tokens = run.tokens.len();
            let part = |first: usize| {
                TokenRows::new(&rows[first..], n_tokens, shape.kv_dim(), shape.width())
            };
            let write = KvWrite {
                store: self.kv.layer(layer),
                blocks: self.batch.block_table(run.sequence),
                first_position: self.batch.positions[run.tokens.start],
                keys: part(query_end),
                values: part(key_end),
            };
            self.kernels.write_kv(&write, 0..shape.n_kv_heads);
        }
    }
}
