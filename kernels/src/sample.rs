//! What sampling the best token needs of rows of logits: a few bytes instead of a row.

use crate::gpu::{DeviceMemory, Gpu, GpuError, Span};
use crate::pinned::PinnedMemory;
use cudarc::driver::DeviceRepr;

const THREADS: usize = 256;
/// Blocks that share a row.
pub(crate) const PARTS: usize = 64;
/// Bytes of what one of them finds.
const PART_BYTES: usize = 16;

/// What a row of logits has.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowMeasure {
    /// The token with the largest logit, the first of equals.
    pub best: u32,
    /// Its natural-log probability.
    pub best_logprob: f32,
    /// ln Σ exp(logit).
    pub log_sum: f32,
}

/// Room for the measures of some rows.
pub struct RowMeasures {
    memory: DeviceMemory,
    /// The same here.
    found: PinnedMemory,
    rows: usize,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct MeasureArgs {
    logits: u64,
    parts: u64,
    vocab: u32,
    softcap: f32,
}

// SAFETY: plain numbers in the order of `MeasureArgs` in sample.cu.
unsafe impl DeviceRepr for MeasureArgs {}

impl RowMeasures {
    /// Room for up to `rows` rows.
    ///
    /// # Errors
    /// No memory.
    pub fn new(gpu: &Gpu, rows: usize) -> Result<Self, GpuError> {
        let bytes = Self::bytes_of(rows);
        Ok(Self { memory: gpu.alloc(bytes)?, found: gpu.alloc_pinned(bytes)?, rows })
    }

    /// Bytes that the measures of some rows take on a GPU.
    pub fn bytes_of(rows: usize) -> usize {
        rows * PARTS * PART_BYTES
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.memory.bytes()
    }

    /// Most rows.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Where the blocks' findings lie.
    pub(crate) fn parts(&self) -> u64 {
        self.memory.span().of(self.rows * PARTS, PART_BYTES)
    }

    /// Waits for the measures of the first `rows` rows; none for a row that is not finite.
    ///
    /// # Errors
    /// What any kernel before has failed with.
    ///
    /// # Panics
    /// When there is no room for so many.
    pub fn wait(
        &mut self,
        gpu: &Gpu,
        rows: usize,
    ) -> Result<impl Iterator<Item = Option<RowMeasure>>, GpuError> {
        let bytes = rows * PARTS * PART_BYTES;
        // SAFETY: the copy is waited for before the memory is read.
        unsafe { gpu.fetch(self.memory.span(), &mut self.found, bytes)? };
        gpu.synchronize()?;
        Ok(self.found[..bytes].chunks_exact(PARTS * PART_BYTES).map(joined))
    }
}

/// One row from what its blocks found.
fn joined(parts: &[u8]) -> Option<RowMeasure> {
    let word = |part: &[u8], at: usize| {
        u32::from_le_bytes([part[at], part[at + 1], part[at + 2], part[at + 3]])
    };
    let mut best = (f32::NEG_INFINITY, u32::MAX);
    for part in parts.chunks_exact(PART_BYTES) {
        let (largest, first) = (f32::from_bits(word(part, 0)), word(part, 4));
        if word(part, 12) != 0 {
            return None;
        }
        if largest > best.0 || (largest == best.0 && first < best.1) {
            best = (largest, first);
        }
    }
    let weight = |part: &[u8]| {
        let (largest, sum) = (f32::from_bits(word(part, 0)), f32::from_bits(word(part, 8)));
        if sum > 0.0 { f64::from(sum) * f64::from(largest - best.0).exp() } else { 0.0 }
    };
    let sum: f64 = parts.chunks_exact(PART_BYTES).map(weight).sum();
    let log_sum = (f64::from(best.0) + sum.ln()) as f32;
    Some(RowMeasure { best: best.1, best_logprob: best.0 - log_sum, log_sum })
}

impl Gpu {
    /// Measures `rows` rows of `vocab` logits, which first become
    /// `softcap · tanh(logit / softcap)`.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// When a span is too short.
    pub fn measure_rows(
        &self,
        logits: Span<'_>,
        (rows, vocab): (usize, usize),
        softcap: Option<f32>,
        to: &RowMeasures,
    ) -> Result<(), GpuError> {
        assert!(rows <= to.rows, "{rows} rows, room for {}", to.rows);
        let arguments = MeasureArgs {
            logits: logits.of(rows * vocab, size_of::<f32>()),
            parts: to.memory.span().of(rows * PARTS, PART_BYTES),
            vocab: vocab as u32,
            softcap: softcap.unwrap_or(0.0),
        };
        // SAFETY: all spans were checked against the shapes.
        unsafe { self.launch("measure_rows", ([PARTS, rows, 1], THREADS, 0), &arguments) }
    }
}
