//! The CPU interpreter: one match arm per op. Every worker of the pool walks the whole program,
//! does its static share of each op and meets the others: one barrier per op, eight per layer
//! (`program.rs`), one more where tokens are routed or an attention is divided, two more per tile
//! of logits.
//!
//! What is shared how (the rule of `buffers.rs`):
//!
//! | op | share of a worker | reads what others wrote before the last barrier |
//! |---|---|---|
//! | Embed, Receive, Norm, Send | tokens | residual, projected |
//! | Project | rows of the matrices | the input |
//! | Rotate | runs of tokens inside one KV block | heads |
//! | Attend | (query tile, KV head) or segments of it, by cost | heads, KV store |
//! | Gate | hidden rows, whole 8-bit groups | normed |
//! | Route | experts, then tokens | normed, router logits |
//! | GateExperts | (expert, hidden rows), by cost | normed, routes |
//! | DownExperts | rows of the residual stream | hidden, routes |
//! | Select | wanted rows | residual, projected |
//! | Logits | vocabulary rows, then wanted rows | selected, logits |
//!
//! No result depends on the shares: each element is computed by one worker in one fixed order.

mod attend;
mod experts;
mod products;

use super::batch::Batch;
use super::buffers::{QuantizedRows, Rows, StepBuffers};
use super::cpu_pool::Worker;
use super::expert_groups::ExpertScratch;
use super::kv_store::KvLayers;
use super::op_times::OpClocks;
use super::program::{HeadShape, KvLayerId, Norm, Op, Pending, Precision, Program, RopeId};
use super::rotations::Rotations;
use super::sample::RowSamplers;
use super::weights::Weights;
use crate::step::StepPlan;
use std::ops::Range;
use std::sync::Mutex;
use std::time::Instant;
use tandem_cpu_kernels::attention::{AttentionParams, AttentionScratch, KvWrite, TokenRows};
use tandem_cpu_kernels::{Kernels, dequantize_packed_row};

/// Everything that the workers of one step share.
pub(super) struct Step<'a> {
    pub program: &'a Program,
    pub weights: &'a Weights,
    pub kernels: &'static Kernels,
    pub plan: &'a StepPlan,
    pub batch: &'a Batch,
    pub buffers: StepBuffers<'a>,
    pub rotations: &'a Rotations,
    /// `[n_tokens, rotations.width()]`
    pub angles: Rows<'a>,
    pub kv: KvLayers<'a>,
    /// `[n_tokens, embedding_dim]` from the stage before.
    pub inlet: Option<&'a [f32]>,
    /// `[n_tokens, embedding_dim]` for the next stage.
    pub outlet: Option<Rows<'a>>,
    /// One per worker.
    pub scratch: &'a [Mutex<AttentionScratch>],
    /// `[1, partials_max]`: unmerged segments of divided attentions.
    pub partials: Rows<'a>,
    /// One per worker; none when layers are dense.
    pub experts: &'a [Mutex<ExpertScratch>],
    pub samplers: &'a RowSamplers,
    /// Given while somebody wants to know each op's time.
    pub clocks: Option<&'a OpClocks>,
}

impl Step<'_> {
    /// Runs the program as one of the workers.
    pub fn execute(&self, worker: &Worker<'_>) {
        for (index, op) in self.program.ops.iter().enumerate() {
            let started = self.clocks.map(|_| Instant::now());
            self.interpret(worker, op);
            self.meet(worker);
            if let (Some(clocks), Some(started)) = (self.clocks, started) {
                clocks.ended(worker.index, index, started.elapsed());
            }
        }
    }

    /// Waits for all workers.
    fn meet(&self, worker: &Worker<'_>) {
        match self.clocks {
            None => worker.meet(),
            Some(clocks) => clocks.wait(worker.index, || worker.meet()),
        }
    }

    fn interpret(&self, worker: &Worker<'_>, op: &Op) {
        match op {
            Op::Embed { table, scale } => {
                let table = self.weights.matrix(*table);
                self.enter(worker, |token, row| {
                    dequantize_packed_row(&table, self.plan.tokens[token].index(), row);
                    if *scale != 1.0 {
                        self.kernels.scale(row, *scale);
                    }
                });
            }
            Op::Receive => {
                let inlet = self.inlet.expect("a stage that receives was given a slot");
                self.enter(worker, |token, row| {
                    row.copy_from_slice(&inlet[token * row.len()..][..row.len()]);
                });
            }
            Op::Norm { pending, norm, precision } => {
                self.norm(worker, *pending, (*norm, *precision));
            }
            Op::Project { input, output, parts, precision } => {
                self.project(worker, (*input, *output), parts, *precision);
            }
            Op::Rotate { shape, query_norm, key_norm, rope, layer } => {
                self.rotate(worker, *shape, [*query_norm, *key_norm], (*rope, *layer));
            }
            Op::Attend { shape, layer, window, scale, softcap } => {
                let n_heads = shape.n_heads;
                let params =
                    AttentionParams { n_heads, scale: *scale, window: *window, softcap: *softcap };
                self.attend(worker, *shape, *layer, params);
            }
            Op::Gate { gate, up, activation } => self.gate(worker, [*gate, *up], *activation),
            Op::Route { shape, router, weight_scale } => {
                self.route(worker, *shape, (*router, *weight_scale));
            }
            Op::GateExperts { shape, gate, up, activation } => {
                self.gate_experts(worker, *shape, [*gate, *up], *activation);
            }
            Op::DownExperts { shape, down } => self.down_experts(worker, *shape, *down),
            Op::Send { pending } => self.send(worker, *pending),
            Op::Select { pending, norm } => self.select(worker, *pending, *norm),
            Op::Logits { output, softcap } => self.logits(worker, *output, *softcap),
        }
    }

    /// Tokens that fall to this worker.
    fn tokens(&self, worker: &Worker<'_>) -> impl Iterator<Item = usize> {
        worker.deal(self.plan.tokens.len(), 1, 1).flatten()
    }

    /// Fills the residual stream of this worker's tokens, and their rotation angles.
    fn enter(&self, worker: &Worker<'_>, fill: impl Fn(usize, &mut [f32])) {
        for token in self.tokens(worker) {
            // SAFETY: workers' tokens are disjoint, and nobody reads these buffers in this op.
            let (row, angles) = unsafe {
                (whole_row_mut(self.buffers.residual, token), whole_row_mut(self.angles, token))
            };
            fill(token, row);
            self.rotations.fill(self.batch.positions[token], angles);
        }
    }

    /// Adds what is pending to the residual stream of a token of this worker, and returns it.
    fn settle(&self, token: usize, pending: Pending) -> &[f32] {
        // SAFETY: only the worker that owns the token touches its residual and projected rows in
        // this op.
        let (residual, projected) = unsafe {
            (
                whole_row_mut(self.buffers.residual, token),
                whole_row_mut(self.buffers.projected, token),
            )
        };
        match pending {
            Pending::Nothing => {}
            Pending::Add => self.kernels.add(residual, projected),
            Pending::AddNormed(norm) => {
                let weight = self.weights.vector(norm.weight);
                self.kernels.rms_norm_in_place(projected, weight, norm.eps);
                self.kernels.add(residual, projected);
            }
        }
        residual
    }

    fn norm(&self, worker: &Worker<'_>, pending: Pending, (norm, precision): (Norm, Precision)) {
        let n_tokens = self.plan.tokens.len();
        for token in self.tokens(worker) {
            let residual = self.settle(token, pending);
            self.norm_row(residual, norm, (self.buffers.normed, token));
            if precision == Precision::Sixteen {
                self.refine(self.buffers.normed, token, token + n_tokens);
            }
        }
    }

    /// Normalises a row of the residual stream into row `row` of `target`, in both forms.
    fn norm_row(&self, residual: &[f32], norm: Norm, (target, row): (QuantizedRows<'_>, usize)) {
        // SAFETY: the caller owns the row of the target in this op.
        let normed = unsafe { whole_row_mut(target.values, row) };
        self.kernels.rms_norm(residual, self.weights.vector(norm.weight), norm.eps, normed);
        self.quantize(target, row, 0..normed.len());
    }

    /// Puts what the 8-bit form of row `row` misses into row `rest`, in both forms.
    fn refine(&self, target: QuantizedRows<'_>, row: usize, rest: usize) {
        let Some(eight_bit) = target.eight_bit else { return };
        let all = 0..target.values.width;
        // SAFETY: the caller owns both rows of the target in this op.
        let (values, residual) = unsafe {
            (target.values.part(row, all.clone()), target.values.part_mut(rest, all.clone()))
        };
        eight_bit.residual(values, row, all.clone(), residual);
        self.quantize(target, rest, all);
    }

    /// Fills the 8-bit form of columns `part` of a row that this worker has written.
    fn quantize(&self, target: QuantizedRows<'_>, row: usize, part: Range<usize>) {
        if let Some(eight_bit) = target.eight_bit {
            // SAFETY: the caller owns this part of the row in this op.
            let values = unsafe { target.values.part(row, part.clone()) };
            self.kernels.quantize_activations(values, eight_bit, row, part);
        }
    }

    fn rotate(
        &self,
        worker: &Worker<'_>,
        shape: HeadShape,
        [query_norm, key_norm]: [Option<Norm>; 2],
        (rope, layer): (RopeId, KvLayerId),
    ) {
        let (query_end, key_end) = (shape.query_dim(), shape.query_dim() + shape.kv_dim());
        let runs = worker.deal(self.batch.runs.len(), 1, 1).flatten();
        for run in runs.map(|run| &self.batch.runs[run]) {
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

    fn send(&self, worker: &Worker<'_>, pending: Pending) {
        let outlet = self.outlet.expect("a stage that sends was given a slot");
        for token in self.tokens(worker) {
            let residual = self.settle(token, pending);
            // SAFETY: workers' tokens are disjoint, and nobody reads the slot yet.
            unsafe { whole_row_mut(outlet, token) }.copy_from_slice(residual);
        }
    }

    fn select(&self, worker: &Worker<'_>, pending: Pending, norm: Norm) {
        for wanted in worker.deal(self.plan.logits.len(), 1, 1).flatten() {
            // The plan's rows are strictly ascending, so a token is settled once.
            let residual = self.settle(self.plan.logits[wanted].row, pending);
            self.norm_row(residual, norm, (self.buffers.selected, wanted));
        }
    }
}

/// All of row `row`, for writing.
///
/// # Safety
/// As [`Rows::part_mut`].
unsafe fn whole_row_mut<'a>(rows: Rows<'a>, row: usize) -> &'a mut [f32] {
    // SAFETY: passed on.
    unsafe { rows.part_mut(row, 0..rows.width) }
}
