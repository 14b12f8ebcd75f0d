//! Owns what turns a row of logits into probabilities or a choice. It must not know vocabularies
//! or sampling rules. Called by the sampler, one row at a time.

pub(crate) mod scalar;
#[cfg(target_arch = "x86_64")]
pub(crate) mod simd;
pub(crate) mod weights;

use crate::dispatch::Kernels;
pub use weights::{SUM_BLOCK, exp_nonpositive, sum_of_weights};

/// Entries that are compared before anybody looks whether one was equal.
const EQUAL_BLOCK: usize = 128;

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

    /// The largest entry of a row of which all are finite; `None` where one is not, or none is
    /// there.
    pub fn largest_finite(&self, row: &[f32]) -> Option<f32> {
        // SAFETY: the table came from `for_isa`.
        let largest = unsafe { (self.vector.largest_finite)(row) };
        largest.is_finite().then_some(largest)
    }

    /// `Σ e^(row[i] − largest)`, where no entry is larger: the same bits with all instruction sets.
    /// Terms below e^−87 are 0, and each is within 2e-7 of itself.
    pub fn sum_exp_below(&self, row: &[f32], largest: f32) -> f64 {
        // SAFETY: the table came from `for_isa`.
        unsafe { (self.vector.sum_exp_below)(row, largest) }
    }

    /// Where an entry first equals `wanted`; `None` where none does.
    pub fn first_equal(row: &[f32], wanted: f32) -> Option<usize> {
        // Whole blocks are compared at once.
        let has = |block: &&[f32]| block.iter().fold(false, |has, entry| has | (*entry == wanted));
        let block = row.chunks(EQUAL_BLOCK).position(|block| has(&block))?;
        let first = block * EQUAL_BLOCK;
        let at = row[first..].iter().position(|entry| *entry == wanted)?;
        Some(first + at)
    }

    /// Index of the largest entry, the first of equals; `None` when the row is empty or has a NaN.
    pub fn argmax(&self, row: &[f32]) -> Option<usize> {
        // SAFETY: the table came from `for_isa`.
        let max = unsafe { (self.vector.max)(row) };
        Self::first_equal(row, max)
    }
}

/// A row of logits that has no probabilities.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("logits have no probabilities: the largest is {max}")]
pub struct NotFinite {
    /// NaN, +∞, or −∞ when no entry is above it.
    pub max: f32,
}
