//! Norms of the residual stream, and those that products make on the way: of a single token each
//! block of a product normalises the row for itself, which takes less than a kernel that others
//! wait for. Since all of them read the residual stream then, its sum is put elsewhere: two places
//! take turns.

use super::inputs::Part;
use super::ops::U32;
use super::{GpuStage, LastOps};
use crate::executor::ExecutorError;
use crate::executor::program::{Buffer, Norm, Op, Pending, Precision};
use tandem_kernels::{Added, NormBefore, NormRows, RowNorm, Span};

/// A norm that the product after it may make.
#[derive(Clone, Copy)]
pub(super) struct ComingNorm {
    pub pending: Pending,
    pub norm: Norm,
    pub precision: Precision,
    /// Whether the CPU reads what it gives.
    pub is_for_cpu: bool,
}

impl GpuStage {
    /// Where the residual stream is, and where its next sum may be put.
    pub(super) fn residual(&self) -> [Span<'_>; 2] {
        let places = [self.buffers.residual.values(), self.buffers.residual_sum.span()];
        if self.has_moved.get() { [places[1], places[0]] } else { places }
    }

    /// A product has put the residual stream where its sum was to go, or has not.
    pub(super) fn moved(&self, has_moved: bool) {
        self.has_moved.set(self.has_moved.get() ^ has_moved);
    }

    /// What reads the rows before `after`, in a step in which `streamed` layers are streamed: past
    /// a mark, the product of a unit that streams. A mark of the CPU's is returned as it is.
    pub(super) fn reader<'o>(&self, after: &'o [Op], streamed: usize) -> Option<&'o Op> {
        match after {
            [Op::SpillStart { unit, .. }, reader, ..] if !self.is_of_cpu(*unit, streamed) => {
                Some(reader)
            }
            _ => after.first(),
        }
    }

    fn row_norm(&self, norm: Norm) -> RowNorm<'_> {
        RowNorm { weight: self.weights.vector(norm.weight), eps: norm.eps }
    }

    fn added(&self, pending: Pending) -> Option<Added<'_>> {
        let values = self.buffers.projected.values();
        match pending {
            Pending::Nothing => None,
            Pending::Add => Some(Added { values, norm: None }),
            Pending::AddNormed(norm) => Some(Added { values, norm: Some(self.row_norm(norm)) }),
        }
    }

    fn norm_pass(&self, tokens: usize, coming: ComingNorm) -> NormRows<'_> {
        let normed = &self.buffers.normed;
        NormRows {
            residual: self.residual()[0],
            added: self.added(coming.pending),
            norm: self.row_norm(coming.norm),
            gather: None,
            values: (coming.is_for_cpu || self.weights.has_floats()).then(|| normed.values()),
            eight_bits: normed.eight_bits(tokens, coming.precision),
            halves: normed.halves(tokens),
            rows: tokens,
            cols: normed.cols,
        }
    }

    /// Normalises, unless what reads it is a product that may do so: then the norm is returned.
    pub(super) fn norm_now_or_later(
        &self,
        tokens: usize,
        coming: ComingNorm,
        reader: Option<&Op>,
    ) -> Result<Option<ComingNorm>, ExecutorError> {
        let is_for_cpu = matches!(reader, Some(Op::SpillStart { .. }));
        let coming = ComingNorm { is_for_cpu, ..coming };
        let is_read_once =
            matches!(reader, Some(Op::Gate { .. } | Op::Project { input: Buffer::Normed, .. }));
        if tokens == 1 && is_read_once {
            return Ok(Some(coming));
        }
        self.weights.gpu().norm_rows(&self.norm_pass(tokens, coming), tokens)?;
        Ok(None)
    }

    /// How a program with logits ends.
    pub(super) fn last_ops(&self) -> &LastOps {
        self.last.as_ref().expect("logits are the last stage's")
    }

    /// Adds what is pending to the residual stream, for the next stage.
    pub(super) fn add_pending(&self, tokens: usize, pending: Pending) -> Result<(), ExecutorError> {
        let Some(added) = self.added(pending) else { return Ok(()) };
        // Any norm will do, since what it makes goes nowhere.
        let norm = self.weights.program().ops.iter().find_map(|op| match op {
            Op::Norm { norm, .. } => Some(*norm),
            _ => None,
        });
        let pass = NormRows {
            residual: self.residual()[0],
            added: Some(added),
            norm: self.row_norm(norm.expect("what is pending comes from a layer, which has norms")),
            gather: None,
            values: None,
            eight_bits: None,
            halves: None,
            rows: tokens,
            cols: self.buffers.residual.cols,
        };
        Ok(self.weights.gpu().norm_rows(&pass, tokens)?)
    }

    /// A norm of one token for the product that comes after it.
    pub(super) fn norm_before(&self, coming: ComingNorm) -> NormBefore<'_> {
        NormBefore { pass: self.norm_pass(1, coming), sum: self.residual()[1] }
    }

    /// The last norm, of some wanted rows.
    pub(super) fn select(
        &self,
        (first, rows): (usize, usize),
        tokens: usize,
    ) -> Result<(), ExecutorError> {
        let (last, selected) = (self.last_ops(), &self.buffers.selected);
        let wanted = self.buffers.inputs.span(Part::Wanted);
        let pass = NormRows {
            residual: self.residual()[0],
            added: self.added(last.pending),
            norm: self.row_norm(last.norm),
            gather: Some(wanted.part(first * U32, rows * U32)),
            values: Some(selected.values()),
            eight_bits: selected.eight_bits(rows, Precision::Eight),
            halves: selected.halves(rows),
            rows: tokens,
            cols: selected.cols,
        };
        Ok(self.weights.gpu().norm_rows(&pass, rows)?)
    }
}
