//! Owns rotary position embedding: the angles of each position and the rotation of head rows. It
//! must not know models or positions of tokens: the caller gives one row of cosines and sines per
//! token. Called by the executor's workers, which fill the rows from [`RopeFrequencies`].
//!
//! A head row `x` of `head_dim` elements is seen as pairs, the first `dims / 2` of which turn by
//! `θ_i = position · f_i` (Su et al., arXiv 2104.09864); elements from `dims` on stay as they are:
//! ```text
//! (a, b) → (a·cos θ_i − b·sin θ_i,  b·cos θ_i + a·sin θ_i)
//! ```

mod frequencies;
pub(crate) mod scalar;
#[cfg(target_arch = "x86_64")]
pub(crate) mod simd;

use crate::dispatch::Kernels;
use crate::norm::assert_whole_rows;
pub use frequencies::{RopeError, RopeFrequencies, RopeParams, RopeScaling};

/// Which elements of a row make pair `i`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RopeStyle {
    /// `(2i, 2i + 1)`: GGUF files of the Llama family.
    Interleaved,
    /// `(i, i + dims/2)`: GPT-NeoX, Qwen, Gemma.
    HalfSplit,
}

/// The angles of one position, already multiplied by the attention factor.
#[derive(Clone, Copy, Debug)]
pub struct RopeRow<'a> {
    /// `[dims / 2]` cosines.
    pub cos: &'a [f32],
    /// `[dims / 2]` sines.
    pub sin: &'a [f32],
}

impl Kernels {
    /// Turns every head row of `heads` `[n_heads, head_dim]` of one token by the angles of `row`.
    ///
    /// # Panics
    /// When `heads` is no whole number of rows, `cos` and `sin` differ in length, or they have more
    /// pairs than a row.
    pub fn rope(&self, heads: &mut [f32], head_dim: usize, row: RopeRow<'_>, style: RopeStyle) {
        assert_whole_rows(heads.len(), head_dim);
        assert_eq!(row.cos.len(), row.sin.len(), "cosines and sines");
        assert!(2 * row.cos.len() <= head_dim, "{} pairs in a row of {head_dim}", row.cos.len());
        if head_dim == 0 {
            return;
        }
        let rotate = match style {
            RopeStyle::Interleaved => self.vector.rope_interleaved,
            RopeStyle::HalfSplit => self.vector.rope_half_split,
        };
        for head in heads.chunks_exact_mut(head_dim) {
            // SAFETY: the table came from `for_isa`; lengths were checked above.
            unsafe { rotate(head, row) }
        }
    }
}
