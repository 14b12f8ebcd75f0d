//! Owns the two loops whose speed is a processor's roof, multiply-accumulates in registers and
//! reads of memory, with the same instructions that the matmul kernels use, and products of made-up
//! weights and work on made-up rows, which show what these kernels reach. It must not know clocks,
//! threads or what a rate is for. Whoever measures a machine calls it, once per thread.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
mod product;
mod rows;
pub(crate) mod scalar;

pub use product::TrialProduct;
pub use rows::TrialRows;

use crate::dispatch::Kernels;

/// The roof loops of one instruction set.
pub(crate) struct RoofTable {
    /// What is multiplied.
    pub numbers: &'static str,
    /// Multiply-accumulates of one round.
    pub macs_per_round: usize,
    /// That many rounds; returns a sum of results.
    pub multiply: unsafe fn(rounds: usize) -> i32,
    /// Reads all 8-byte words; returns their exclusive or.
    pub read: unsafe fn(words: &[u64]) -> u64,
}

impl Kernels {
    /// The numbers that [`Kernels::macs`] multiplies, and matmuls of quantised weights: `int8`, or
    /// `bf16`.
    pub fn mac_numbers(&self) -> &'static str {
        self.roof.numbers
    }

    /// Multiplies u8 with i8 and accumulates in i32, or bf16 in f32, in registers only, for
    /// `rounds` rounds of about a hundred cycles or less. Returns how many multiply-accumulates
    /// that were; each is two operations.
    pub fn macs(&self, rounds: usize) -> u64 {
        // SAFETY: this table was reached through `for_isa`, so the CPU can run its functions.
        std::hint::black_box(unsafe { (self.roof.multiply)(rounds) });
        rounds as u64 * self.roof.macs_per_round as u64
    }

    /// Reads all of `words` in order and returns their exclusive or, which proves that it did.
    pub fn read_words(&self, words: &[u64]) -> u64 {
        // SAFETY: this table was reached through `for_isa`, so the CPU can run its functions.
        unsafe { (self.roof.read)(words) }
    }
}

/// Exclusive or of the words that a vector loop leaves over.
#[cfg(target_arch = "x86_64")]
fn fold(words: &[u64]) -> u64 {
    words.iter().fold(0, |all, word| all ^ word)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;

    #[test]
    fn every_word_is_read() {
        let words: Vec<u64> =
            (0..1000_u64).map(|at| at.wrapping_mul(0x9e37_79b9_7f4a_7c15)).collect();
        for isa in Isa::available() {
            let kernels = Kernels::for_isa(isa).unwrap();
            for range in [0..0, 0..1, 3..70, 0..64, 1..1000, 0..1000] {
                let words = &words[range.clone()];
                let wanted = words.iter().fold(0, |all, word| all ^ word);
                assert_eq!(kernels.read_words(words), wanted, "{isa} {range:?}");
            }
        }
    }

    #[test]
    fn multiply_accumulates_are_counted_by_rounds() {
        for isa in Isa::available() {
            let kernels = Kernels::for_isa(isa).unwrap();
            let one = kernels.macs(1);
            assert!(one > 0 && kernels.macs(0) == 0, "{isa}");
            assert_eq!(kernels.macs(1000), 1000 * one, "{isa}");
        }
    }
}
