//! The activations of a step: memory that all workers share, and the views through which each
//! writes its own part. All splitting of memory between workers is here and in `cpu.rs`.
//!
//! The rule that every user keeps: between two barriers an element is either written by one
//! worker, or read by any. What a worker writes are the pieces that [`Worker::deal`] gives to it
//! alone, or its [`Worker::share`]; `cpu.rs` has the table of who writes and reads what, and where
//! the barriers are. Some of the buffers may be a worker's own (`own_buffers.rs`): nobody else uses
//! those at all.
//!
//! Where activations are rounded to 8 bits, buffers that are read with 16-bit precision have two
//! rows per token: rows `0 .. n` are the values, rows `n .. 2n` what their 8-bit form misses. So
//! have the products of such rows, which are added up at once.
//!
//! [`Worker::deal`]: super::cpu_pool::Worker::deal
//! [`Worker::share`]: super::cpu_pool::Worker::share

use super::program::ProgramDims;
use crate::memory::ALIGNMENT;
use std::marker::PhantomData;
use std::ops::Range;
use tandem_cpu_kernels::blocks::GROUP;
use tandem_cpu_kernels::{
    ActivationBuffer, ActivationForm, Activations, ActivationsMut, OutputColumns,
};

/// f32 memory, allocated once, on a cache-line boundary: a group of 16 rows of a product is a line,
/// and a vector across two lines costs double. There are dozens for each worker, some of a hundred
/// bytes: as [`AlignedBytes`](crate::memory::AlignedBytes) each would have pages of its own, and
/// all would start at the same place of a page.
pub(super) struct Memory {
    allocated: Vec<f32>,
    /// Where the boundary is.
    start: usize,
    elements: usize,
}

impl Memory {
    pub fn new(elements: usize) -> Self {
        const LINE: usize = ALIGNMENT / size_of::<f32>();
        let allocated = vec![0.0; elements + LINE];
        let start = allocated.as_ptr().align_offset(ALIGNMENT).min(LINE);
        Self { allocated, start, elements }
    }

    pub fn bytes(&self) -> usize {
        self.elements * size_of::<f32>()
    }

    fn values(&mut self) -> &mut [f32] {
        &mut self.allocated[self.start..][..self.elements]
    }

    /// All of it, zero as long as no view was written to.
    pub fn as_bytes_mut(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(self.values())
    }

    /// A view as `[rows, width]` f32, row-major.
    pub fn rows(&mut self, rows: usize, width: usize) -> Rows<'_> {
        Rows::new(self.values(), rows, width)
    }
}

/// `[rows, width]` f32 that several workers hold a copy of.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    pointer: *mut f32,
    pub rows: usize,
    pub width: usize,
    lifetime: PhantomData<&'a mut [f32]>,
}

// SAFETY: every access goes through the unsafe functions below, whose callers keep the module's
// rule: no element is written by one thread while another uses it.
unsafe impl Send for Rows<'_> {}
// SAFETY: as above.
unsafe impl Sync for Rows<'_> {}

impl<'a> Rows<'a> {
    /// No rows at all.
    pub fn none() -> Self {
        Rows::new(&mut [], 0, 0)
    }

    /// The start of `values` as `[rows, width]` f32, row-major.
    pub fn new(values: &'a mut [f32], rows: usize, width: usize) -> Self {
        let (need, have) = (rows * width, values.len());
        assert!(need <= have, "[{rows}, {width}] exceeds a buffer of {have} elements");
        Rows { pointer: values.as_mut_ptr(), rows, width, lifetime: PhantomData }
    }

    /// `[rows, width]` f32 that others than this process's threads use as well.
    ///
    /// # Safety
    /// There are as many elements, which live for `'a` and are initialised.
    pub unsafe fn shared(pointer: *mut f32, rows: usize, width: usize) -> Self {
        Rows { pointer, rows, width, lifetime: PhantomData }
    }

    /// Columns `part` of row `row`, for reading.
    ///
    /// # Safety
    /// Nobody writes these elements before the next barrier.
    pub unsafe fn part(&self, row: usize, part: Range<usize>) -> &'a [f32] {
        let start = self.start(row, &part);
        // SAFETY: in bounds by `start`; nobody writes it, says the caller.
        unsafe { std::slice::from_raw_parts(self.pointer.add(start), part.len()) }
    }

    /// Columns `part` of row `row`, for writing.
    ///
    /// # Safety
    /// No other thread uses these elements before the next barrier, and the caller holds no other
    /// reference to them.
    #[allow(clippy::mut_from_ref, reason = "the view is shared on purpose; see Safety")]
    pub unsafe fn part_mut(&self, row: usize, part: Range<usize>) -> &'a mut [f32] {
        let start = self.start(row, &part);
        // SAFETY: in bounds by `start`; exclusive, says the caller.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.add(start), part.len()) }
    }

    /// Whole rows, for reading.
    ///
    /// # Safety
    /// Nobody writes these elements before the next barrier.
    pub unsafe fn block(&self, rows: Range<usize>) -> &'a [f32] {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        // SAFETY: in bounds as asserted; nobody writes it, says the caller.
        unsafe {
            let start = self.pointer.add(rows.start * self.width);
            std::slice::from_raw_parts(start, rows.len() * self.width)
        }
    }

    /// The view of the rows in `rows`.
    pub fn cut(&self, rows: Range<usize>) -> Rows<'a> {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        // SAFETY: the first row is inside the view, or one past its end when `rows` is empty.
        let pointer = unsafe { self.pointer.add(rows.start * self.width) };
        Rows { pointer, rows: rows.len(), ..*self }
    }

    /// All elements, for reading.
    ///
    /// # Safety
    /// Nobody writes any of them before the next barrier.
    pub unsafe fn all(&self) -> &'a [f32] {
        // SAFETY: passed on.
        unsafe { self.block(0..self.rows) }
    }

    /// The view as a matmul's output.
    ///
    /// # Safety
    /// Workers multiply disjoint ranges of matrix rows, and use nothing else of the view before
    /// the next barrier.
    pub unsafe fn output(&self) -> OutputColumns<'a> {
        // SAFETY: the memory is valid for 'a; the caller keeps uses apart.
        unsafe { OutputColumns::new(self.pointer, self.rows, self.width) }
    }

    fn start(&self, row: usize, part: &Range<usize>) -> usize {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        assert!(part.start <= part.end && part.end <= self.width, "{part:?} of {}", self.width);
        row * self.width + part.start
    }
}

/// f32 memory with a rounded twin, for what is multiplied with quantised weights.
pub(super) struct QuantizedMemory {
    values: Memory,
    rounded: ActivationBuffer,
}

impl QuantizedMemory {
    pub fn new(form: ActivationForm, rows_max: usize, width_max: usize) -> Self {
        let rounded = ActivationBuffer::new(form, rows_max, width_max);
        Self { values: Memory::new(rows_max * width_max), rounded }
    }

    pub fn bytes(&self) -> usize {
        self.values.bytes() + self.rounded.bytes()
    }

    /// As [`Memory::as_bytes_mut`], the values and their twin.
    pub fn as_bytes_mut(&mut self) -> [&mut [u8]; 2] {
        [self.values.as_bytes_mut(), self.rounded.as_bytes_mut()]
    }

    /// A view as `[rows, width]`. Widths that are no multiple of a group have no twin:
    /// quantised weights can't be so wide.
    pub fn rows(&mut self, rows: usize, width: usize) -> QuantizedRows<'_> {
        let rounded = width.is_multiple_of(GROUP).then(|| {
            // SAFETY: users of the view keep the module's rule, which is the writer's condition.
            unsafe { self.rounded.writer(rows, width) }
        });
        QuantizedRows { values: self.values.rows(rows, width), rounded }
    }
}

/// `[rows, width]` f32 with its rounded form.
#[derive(Clone, Copy)]
pub(super) struct QuantizedRows<'a> {
    pub values: Rows<'a>,
    pub rounded: Option<ActivationsMut<'a>>,
}

impl<'a> QuantizedRows<'a> {
    /// What matmuls read: the given rows.
    ///
    /// # Safety
    /// Nobody writes any of it before the next barrier.
    pub unsafe fn activations(&self, rows: Range<usize>) -> Activations<'a> {
        // SAFETY: passed on.
        let values = unsafe { self.values.all() };
        let all = match &self.rounded {
            Some(rounded) => rounded.view(values),
            None => Activations::float(values, self.values.rows, self.values.width),
        };
        all.slice(rows)
    }
}

/// Rows of logits that exist at a time: more wanted rows are multiplied tile by tile, so that the
/// logits' memory is bounded by `32 · vocab_size` f32.
pub(super) const LOGITS_TILE_ROWS: usize = 32;

/// All buffers of a stage: [`super::program::Buffer`] and the logits.
pub(super) struct Buffers {
    residual: Memory,
    normed: QuantizedMemory,
    heads: Memory,
    attended: QuantizedMemory,
    projected: Memory,
    hidden: QuantizedMemory,
    up: Memory,
    router_logits: Memory,
    routes: Memory,
    selected: QuantizedMemory,
    logits: Memory,
    dims: ProgramDims,
}

/// Views of a stage's buffers, shaped for one step; the rows are those of
/// [`super::program::Buffer`].
#[derive(Clone, Copy)]
pub(super) struct StepBuffers<'a> {
    pub residual: Rows<'a>,
    pub normed: QuantizedRows<'a>,
    pub heads: Rows<'a>,
    pub attended: QuantizedRows<'a>,
    pub projected: Rows<'a>,
    pub hidden: QuantizedRows<'a>,
    pub up: Rows<'a>,
    /// `[n_tokens, n_experts]`, inside the op that routes.
    pub router_logits: Rows<'a>,
    pub routes: Rows<'a>,
    pub selected: QuantizedRows<'a>,
    /// `[LOGITS_TILE_ROWS, vocab_size]`; 0 rows in a stage without logits.
    pub logits: Rows<'a>,
    /// Whether residual, normed, routes and selected are the worker's own.
    pub has_own_rows: bool,
    /// `[1, embedding_dim]`, a worker's own: what is to be added to the residual stream.
    pub addend: Rows<'a>,
    /// `[1, n_experts]`, a worker's own: a token's router logits while they are used up.
    pub expert_logits: Rows<'a>,
    /// `[2 · n_tokens, …]`, a worker's own: products of some hidden rows with gate, and below them
    /// with up, in wide steps on tiles; else 0 rows.
    pub gated: Rows<'a>,
    /// As wide as `heads`, a worker's own: copies of a tile's heads.
    pub rotated: Rows<'a>,
}

impl Buffers {
    /// Buffers for steps of up to `tokens_max` tokens.
    pub fn new(form: ActivationForm, dims: ProgramDims, tokens_max: usize) -> Self {
        let rows = |width: usize| Memory::new(tokens_max * width);
        let quantized = |rows: usize, width: usize| QuantizedMemory::new(form, rows, width);
        let selected_rows = if dims.vocab > 0 { tokens_max } else { 0 };
        Self {
            residual: rows(dims.embedding),
            normed: quantized(2 * tokens_max, dims.embedding),
            heads: Memory::new(2 * tokens_max * dims.heads),
            attended: quantized(tokens_max, dims.attended),
            projected: rows(dims.embedding),
            hidden: quantized(tokens_max * dims.hidden_rows, dims.hidden),
            up: rows(dims.up()),
            router_logits: rows(dims.experts),
            routes: rows(dims.routes()),
            selected: quantized(selected_rows, dims.embedding),
            logits: Memory::new(LOGITS_TILE_ROWS.min(tokens_max) * dims.vocab),
            dims,
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        let plain = [
            &self.residual,
            &self.heads,
            &self.projected,
            &self.up,
            &self.router_logits,
            &self.routes,
            &self.logits,
        ];
        let quantized = [&self.normed, &self.attended, &self.hidden, &self.selected];
        plain.iter().map(|memory| memory.bytes()).sum::<usize>()
            + quantized.iter().map(|memory| memory.bytes()).sum::<usize>()
    }

    /// As [`Memory::as_bytes_mut`], every buffer.
    pub fn as_bytes_mut(&mut self) -> Vec<&mut [u8]> {
        let plain = [
            &mut self.residual,
            &mut self.heads,
            &mut self.projected,
            &mut self.up,
            &mut self.router_logits,
            &mut self.routes,
            &mut self.logits,
        ];
        let quantized =
            [&mut self.normed, &mut self.attended, &mut self.hidden, &mut self.selected];
        let quantized = quantized.into_iter().flat_map(QuantizedMemory::as_bytes_mut);
        plain.into_iter().map(Memory::as_bytes_mut).chain(quantized).collect()
    }

    /// Views for a step of `tokens` tokens, of which `selected` rows' logits are wanted; without
    /// what is a worker's own.
    pub fn shaped(&mut self, tokens: usize, selected: usize) -> StepBuffers<'_> {
        let dims = self.dims;
        StepBuffers {
            residual: self.residual.rows(tokens, dims.embedding),
            normed: self.normed.rows(2 * tokens, dims.embedding),
            heads: self.heads.rows(2 * tokens, dims.heads),
            attended: self.attended.rows(tokens, dims.attended),
            projected: self.projected.rows(tokens, dims.embedding),
            hidden: self.hidden.rows(tokens * dims.hidden_rows, dims.hidden),
            up: self.up.rows(tokens, dims.up()),
            router_logits: self.router_logits.rows(tokens, dims.experts),
            routes: self.routes.rows(tokens, dims.routes()),
            selected: self.selected.rows(selected, dims.embedding),
            logits: self.logits.rows(selected.min(LOGITS_TILE_ROWS), dims.vocab),
            has_own_rows: false,
            addend: Rows::none(),
            expert_logits: Rows::none(),
            gated: Rows::none(),
            rotated: Rows::none(),
        }
    }
}
