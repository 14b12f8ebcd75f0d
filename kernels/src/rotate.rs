//! Rotary embedding of queries and keys, with their norms, and storing of keys and values.

use crate::attention::{HeadCounts, KvSpans, StoreArg, TokenTables, TokensArg};
use crate::gpu::{Gpu, GpuError, Span};
use cudarc::driver::DeviceRepr;

const F32: usize = size_of::<f32>();

/// What is done to heads before attention.
#[derive(Clone, Copy, Debug)]
pub struct RotateHeads<'a> {
    /// `[tokens, (n_heads + 2 n_kv_heads) · head_dim]` f32: queries, keys, values. Queries are
    /// rotated in place; for a store in q8_0 also as its keys are (`KvQ8` in kv_types.cuh).
    pub heads: Span<'a>,
    /// `[tokens, angle_stride]` f32: cosines of all pairs, then sines.
    pub angles: Span<'a>,
    /// Elements from one token's angles to the next's.
    pub angle_stride: usize,
    /// Pairs of elements that turn.
    pub pairs: usize,
    /// Whether elements 2i and 2i + 1 turn together, not i and i + pairs.
    pub interleaved: bool,
    /// Weight `[head_dim]` and eps of the norm of queries.
    pub query_norm: Option<(Span<'a>, f32)>,
    /// Weight `[head_dim]` and eps of the norm of keys.
    pub key_norm: Option<(Span<'a>, f32)>,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct RotateArgs {
    heads: u64,
    angles: u64,
    query_norm: u64,
    key_norm: u64,
    tokens: TokensArg,
    store: StoreArg,
    query_eps: f32,
    key_eps: f32,
    n_heads: u32,
    angle_stride: u32,
    pairs: u32,
    interleaved: u32,
}

// SAFETY: plain numbers in the order of `RotateArgs` in rotate.cuh.
unsafe impl DeviceRepr for RotateArgs {}

impl RotateHeads<'_> {
    pub(crate) fn arguments(
        &self,
        heads: HeadCounts,
        (tokens, store): (&TokenTables<'_>, &KvSpans<'_>),
    ) -> RotateArgs {
        assert!(2 * self.pairs <= heads.head_dim.min(self.angle_stride), "{} pairs", self.pairs);
        let norm = |norm: Option<(Span<'_>, f32)>| {
            norm.map_or((0, 0.0), |(weight, eps)| (weight.of(heads.head_dim, F32), eps))
        };
        let ((query_norm, query_eps), (key_norm, key_eps)) =
            (norm(self.query_norm), norm(self.key_norm));
        let angles = tokens.tokens.saturating_sub(1) * self.angle_stride + 2 * self.pairs;
        RotateArgs {
            heads: self.heads.of(tokens.tokens * heads.width(), F32),
            angles: self.angles.unaligned(angles, F32),
            query_norm,
            key_norm,
            tokens: tokens.argument(),
            store: store.argument(heads),
            query_eps,
            key_eps,
            n_heads: heads.n_heads as u32,
            angle_stride: self.angle_stride as u32,
            pairs: self.pairs as u32,
            interleaved: u32::from(self.interleaved),
        }
    }
}

impl Gpu {
    /// Norms and rotates queries and keys, and stores keys and values of all tokens.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// When a span is too short. That block tables name blocks of the store is the caller's
    /// promise.
    pub fn rotate_heads(
        &self,
        pass: &RotateHeads<'_>,
        heads: HeadCounts,
        (tokens, store): (&TokenTables<'_>, &KvSpans<'_>),
    ) -> Result<(), GpuError> {
        let arguments = pass.arguments(heads, (tokens, store));
        let grid = [heads.n_heads + 2 * heads.n_kv_heads, tokens.tokens, 1];
        // SAFETY: all spans were checked against the shapes.
        unsafe { self.launch(&format!("rotate_{}", store.dtype), (grid, 32, 0), &arguments) }
    }
}
