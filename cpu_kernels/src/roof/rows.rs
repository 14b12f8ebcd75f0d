//! Work on made-up rows beside products, for measures of what it takes.

use super::product::made_up;
use crate::activations::ActivationBuffer;
use crate::dispatch::Kernels;
use std::ops::Range;

/// Elements of a row that is normalised, and of the piece that is gated at once.
const COLS: usize = 2048;
/// Rows of the residual stream: more than a core's own caches hold, as in a wide step.
const ROWS: usize = 256;
const GATED: usize = 128;
/// Entries of a row of logits.
const LOGITS: usize = 64 << 10;

/// Rows of a residual stream, of a network and of logits.
pub struct TrialRows {
    kernels: &'static Kernels,
    /// `[ROWS, COLS]`
    values: Vec<f32>,
    /// `[COLS]`
    addend: Vec<f32>,
    /// `[ROWS, COLS]`
    normed: Vec<f32>,
    /// The row that is next.
    next: usize,
    rounded: ActivationBuffer,
    /// `[LOGITS]`
    logits: Vec<f32>,
}

impl TrialRows {
    /// Rows in the caches of whoever makes them.
    pub fn new(kernels: &'static Kernels) -> Self {
        Self {
            kernels,
            values: made_up(ROWS * COLS),
            addend: made_up(COLS),
            normed: vec![0.0; ROWS * COLS],
            next: 0,
            rounded: ActivationBuffer::new(kernels.activation_form(), 1, COLS),
            logits: made_up(LOGITS),
        }
    }

    /// Rounds a part of a row that was normalised.
    fn round(&mut self, row: usize, part: Range<usize>) {
        // SAFETY: this thread alone fills it, and nothing looks at it here.
        let target = unsafe { self.rounded.writer(1, COLS) };
        let values = &self.normed[row * COLS..][part.clone()];
        self.kernels.quantize_activations(values, target, 0, part);
    }

    /// Adds to a row of the residual stream, normalises and rounds it; returns how many elements.
    pub fn norm(&mut self) -> usize {
        let (row, all) = (self.next, self.next * COLS..(self.next + 1) * COLS);
        self.next = (row + 1) % ROWS;
        self.kernels.add(&mut self.values[all.clone()], &self.addend);
        let normed = &mut self.normed[all.clone()];
        self.kernels.rms_norm(&self.values[all], &self.addend, 1e-5, normed);
        self.round(row, 0..COLS);
        COLS
    }

    /// Activates, multiplies and rounds a row, piece by piece; returns how many elements.
    pub fn gate(&mut self) -> usize {
        for start in (0..COLS).step_by(GATED) {
            let part = start..start + GATED;
            // Else numbers would shrink to those that processors are slow with.
            self.normed[part.clone()].copy_from_slice(&self.addend[part.clone()]);
            self.kernels.swiglu(&mut self.normed[part.clone()], &self.addend[part.clone()]);
            self.round(0, part);
        }
        COLS
    }

    /// Does what every choice of a token begins with; returns of how many logits.
    pub fn measure_logits(&mut self) -> usize {
        let largest = self.kernels.largest_finite(&self.logits).unwrap_or_default();
        std::hint::black_box(self.kernels.sum_exp_below(&self.logits, largest));
        std::hint::black_box(Kernels::first_equal(&self.logits, largest));
        LOGITS
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;

    #[test]
    fn rows_stay_finite_however_often_they_are_worked_on() {
        for isa in Isa::available() {
            let mut rows = TrialRows::new(Kernels::for_isa(isa).unwrap());
            for _ in 0..50 {
                assert_eq!((rows.norm(), rows.gate(), rows.measure_logits()), (COLS, COLS, LOGITS));
            }
            let all = rows.values.iter().chain(&rows.normed);
            assert!(all.into_iter().all(|value| value.is_finite()), "{isa}");
            // A gated row is not what it was made from.
            assert!(rows.normed[..COLS] != rows.addend[..], "{isa}");
        }
    }
}
