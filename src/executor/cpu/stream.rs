//! The ops on whole rows of the residual stream. In a narrow step every worker does all rows in
//! memory of its own; in others it does the rows of its tokens, in memory that all read later.

use super::{Step, whole_row_mut};
use crate::executor::buffers::QuantizedRows;
use crate::executor::cpu_pool::Worker;
use crate::executor::program::{Norm, Pending, Precision};
use std::ops::Range;
use tandem_cpu_kernels::ActivationForm;

impl Step<'_> {
    /// Tokens that fall to this worker.
    pub(super) fn tokens(&self, worker: &Worker<'_>) -> impl Iterator<Item = usize> {
        worker.deal(self.plan.tokens.len(), 1, 1).flatten()
    }

    /// Those of `rows` rows that this worker computes: all when it has memory of its own for them.
    pub(super) fn rows(&self, worker: &Worker<'_>, rows: usize) -> impl Iterator<Item = usize> {
        let has_own = self.buffers.has_own_rows;
        let own = if has_own { 0..rows } else { 0..0 };
        let dealt = (!has_own).then(|| worker.deal(rows, 1, 1).flatten());
        own.chain(dealt.into_iter().flatten())
    }

    /// Fills the residual stream, and the rotation angles of this worker's tokens.
    pub(super) fn enter(&self, worker: &Worker<'_>, fill: impl Fn(usize, &mut [f32])) {
        for token in self.rows(worker, self.plan.tokens.len()) {
            // SAFETY: the row is of this worker's own memory or fell to it.
            fill(token, unsafe { whole_row_mut(self.buffers.residual, token) });
        }
        for token in self.tokens(worker) {
            // SAFETY: workers' tokens are disjoint, and nobody reads angles before the barrier
            // that follows the first matmul.
            let angles = unsafe { whole_row_mut(self.angles, token) };
            self.rotations.fill(self.batch.positions[token], angles);
        }
    }

    /// Adds what is pending to the residual stream of a token, and returns it.
    fn settle(&self, token: usize, pending: Pending) -> &[f32] {
        let projected = self.buffers.projected;
        // SAFETY: the residual row is of this worker's own memory or fell to it, the addend is its
        // own, and `projected` is only read in this op, by any worker.
        let (residual, projected, addend) = unsafe {
            (
                whole_row_mut(self.buffers.residual, token),
                projected.part(token, 0..projected.width),
                whole_row_mut(self.buffers.addend, 0),
            )
        };
        match pending {
            Pending::Nothing => {}
            Pending::Add => self.kernels.add(residual, projected),
            Pending::AddNormed(norm) => {
                let weight = self.weights.vector(norm.weight);
                self.kernels.rms_norm(projected, weight, norm.eps, addend);
                self.kernels.add(residual, addend);
            }
        }
        residual
    }

    pub(super) fn norm(
        &self,
        worker: &Worker<'_>,
        pending: Pending,
        (norm, precision): (Norm, Precision),
    ) {
        let n_tokens = self.plan.tokens.len();
        for token in self.rows(worker, n_tokens) {
            let residual = self.settle(token, pending);
            self.norm_row(residual, norm, (self.buffers.normed, token));
            if self.has_second_rows(precision) {
                self.refine(self.buffers.normed, token, token + n_tokens);
            }
        }
    }

    /// Whether what the rounding of activations misses is kept in rows of its own: bf16 misses too
    /// little.
    pub(super) fn has_second_rows(&self, precision: Precision) -> bool {
        precision == Precision::Sixteen && self.kernels.activation_form() == ActivationForm::Int8
    }

    /// Normalises a row of the residual stream into row `row` of `target`, in both forms.
    fn norm_row(&self, residual: &[f32], norm: Norm, (target, row): (QuantizedRows<'_>, usize)) {
        // SAFETY: the caller owns the row of the target in this op.
        let normed = unsafe { whole_row_mut(target.values, row) };
        self.kernels.rms_norm(residual, self.weights.vector(norm.weight), norm.eps, normed);
        self.quantize(target, row, 0..normed.len());
    }

    /// Puts what the 8-bit form of row `row` misses into row `rest`, in both forms.
    pub(super) fn refine(&self, target: QuantizedRows<'_>, row: usize, rest: usize) {
        let Some(eight_bit) = target.rounded else { return };
        let all = 0..target.values.width;
        // SAFETY: the caller owns both rows of the target in this op.
        let (values, residual) = unsafe {
            (target.values.part(row, all.clone()), target.values.part_mut(rest, all.clone()))
        };
        self.kernels.activation_residual(values, (eight_bit, row), all.clone(), residual);
        self.quantize(target, rest, all);
    }

    /// Fills the rounded form of columns `part` of a row that this worker has written.
    pub(super) fn quantize(&self, target: QuantizedRows<'_>, row: usize, part: Range<usize>) {
        if let Some(rounded) = target.rounded {
            // SAFETY: the caller owns this part of the row in this op.
            let values = unsafe { target.values.part(row, part.clone()) };
            self.kernels.quantize_activations(values, rounded, row, part);
        }
    }

    pub(super) fn send(&self, worker: &Worker<'_>, pending: Pending) {
        let outlet = self.outlet.expect("a stage that sends was given a slot");
        for token in self.tokens(worker) {
            let residual = self.settle(token, pending);
            // SAFETY: workers' tokens are disjoint, and nobody reads the slot yet.
            unsafe { whole_row_mut(outlet, token) }.copy_from_slice(residual);
        }
    }

    pub(super) fn select(&self, worker: &Worker<'_>, pending: Pending, norm: Norm) {
        for wanted in self.rows(worker, self.plan.logits.len()) {
            // The plan's rows are strictly ascending, so a token is settled once.
            let residual = self.settle(self.plan.logits[wanted].row, pending);
            self.norm_row(residual, norm, (self.buffers.selected, wanted));
        }
    }
}
