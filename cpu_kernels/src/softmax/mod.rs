//! Owns what turns a row of logits into probabilities or a choice. It must not know vocabularies
//! or sampling rules. Called by the sampler, one row at a time.

pub(crate) mod scalar;
#[cfg(target_arch = "x86_64")]
pub(crate) mod simd;

use crate::dispatch::Kernels;

impl Kernels {
    /// `row[i] = e^row[i] / Σ e^row[j]`, computed around the largest entry. Entries of −∞ become 0.
    /// Probabilities below e^−80 of the largest may be flushed to 0.
    ///
    /// # Errors
    /// A row without a finite largest entry (empty, NaN, +∞, or only −∞) is left as it is.
    pub fn softmax_in_place(&self, row: &mut [f32]) -> Result<(), NotFinite> {
        // SAFETY: the table came from `for_isa`.
        let max = unsafe { (self.vector.max)(row) };
        if !max.is_finite() {
            return Err(NotFinite { max });
        }
        // SAFETY: as above; no entry exceeds `max`.
        let sum = unsafe { (self.vector.exp_minus)(row, max) };
        self.scale(row, (1.0 / sum) as f32);
        Ok(())
    }

    /// `ln Σ e^row[i]`, computed around the largest entry. NaN if any entry is NaN, +∞ if any is
    /// +∞, −∞ for an empty row or only −∞.
    pub fn log_sum_exp(&self, row: &[f32]) -> f32 {
        // SAFETY: the table came from `for_isa`.
        unsafe {
            let max = (self.vector.max)(row);
            if !max.is_finite() {
                return max;
            }
            max + (self.vector.sum_exp_minus)(row, max).ln() as f32
        }
    }

    /// Index of the largest entry, the first of equals; `None` when the row is empty or has a NaN.
    pub fn argmax(&self, row: &[f32]) -> Option<usize> {
        // SAFETY: the table came from `for_isa`.
        let max = unsafe { (self.vector.max)(row) };
        row.iter().position(|value| *value == max)
    }
}

/// A row of logits that has no probabilities.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("logits have no probabilities: the largest is {max}")]
pub struct NotFinite {
    /// NaN, +∞, or −∞ when no entry is above it.
    pub max: f32,
}
