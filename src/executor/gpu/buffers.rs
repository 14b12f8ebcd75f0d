//! The activations of a step in a GPU's memory, and what the host prepares for it.

use super::LOGITS_TILE_ROWS;
use super::experts::ExpertBuffers;
use super::inputs::Inputs;
use super::sampling::HostSampling;
use super::weights::{GpuWeights, width_of};
use crate::executor::ExecutorError;
use crate::executor::program::{Buffer, Op, Precision, Program};
use std::ops::Range;
use tandem_cpu_kernels::blocks::GROUP;
use tandem_kernels::{
    Attend, Columns, DeviceMatrix, DeviceMemory, EightBits, Gated, Gpu, HeadCounts, RowDraws,
    RowMeasures, Span, half_bytes,
};

/// Bytes of unmerged segments of attention that exist at once, if one token needs no more.
const PARTIAL_BYTES: usize = 64 << 20;
const F32: usize = size_of::<f32>();

/// Rows in f32 and, where products read them, in 8 bits for narrow steps and f16 for wide ones.
pub(super) struct RowMemory {
    values: DeviceMemory,
    eight_bits: Option<(DeviceMemory, DeviceMemory)>,
    halves: Option<DeviceMemory>,
    /// Most rows of a narrow step.
    narrow_max: usize,
    pub cols: usize,
}

/// All activations.
pub(super) struct GpuBuffers {
    pub residual: RowMemory,
    /// `[embedding_dim]` f32: the second place for that of a single token.
    pub residual_sum: DeviceMemory,
    pub normed: RowMemory,
    pub heads: RowMemory,
    pub attended: RowMemory,
    pub projected: RowMemory,
    pub hidden: RowMemory,
    pub up: RowMemory,
    pub experts: Option<ExpertBuffers>,
    pub selected: RowMemory,
    pub logits: RowMemory,
    pub measures: RowMeasures,
    pub draws: RowDraws,
    pub partials: DeviceMemory,
    /// Of gated products: zeros between them.
    pub gate_counters: DeviceMemory,
    pub inputs: Inputs,
    /// Rows of the embedding, where it lies in host memory.
    pub looked_up: Option<DeviceMatrix>,
    pub host: HostBuffers,
}

/// What the host knows of a step; reused from step to step.
pub(super) struct HostBuffers {
    pub runs: Vec<[u32; 2]>,
    /// Most blocks that divide the positions of a tile of these.
    pub run_blocks: usize,
    pub single: Vec<u32>,
    /// Whether each token is its sequence's only one.
    pub is_each_alone: bool,
    pub sampling: HostSampling,
}

/// Which form of rows a buffer keeps beside f32.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Plain,
    EightBits,
    /// The same, with a second row for what the first misses.
    Twice,
}

impl RowMemory {
    /// `of_token` rows for each of some tokens.
    fn new(
        gpu: &Gpu,
        (tokens, of_token): (usize, usize),
        cols: usize,
        form: Form,
    ) -> Result<Self, ExecutorError> {
        let (rows, narrow_max) = (tokens * of_token, gpu.narrow_max() * of_token);
        let narrow = rows.min(narrow_max);
        let passes = if form == Form::Twice { 2 } else { 1 };
        let eight_bits = match form {
            Form::EightBits | Form::Twice if cols.is_multiple_of(GROUP) => Some((
                gpu.alloc(EightBits::quant_bytes(narrow, cols, passes))?,
                gpu.alloc(EightBits::scale_bytes(narrow, cols, passes))?,
            )),
            _ => None,
        };
        let halves = match form {
            Form::EightBits | Form::Twice if rows > narrow_max => {
                Some(gpu.alloc(half_bytes(rows, cols))?)
            }
            _ => None,
        };
        Ok(Self { values: gpu.alloc(rows * cols * F32)?, eight_bits, halves, narrow_max, cols })
    }

    /// f32 rows.
    pub fn values(&self) -> Span<'_> {
        self.values.span()
    }

    /// The same of some tokens, of which each has one row.
    pub fn values_of(&self, tokens: Range<usize>) -> Span<'_> {
        let row_bytes = self.cols * F32;
        self.values().part(tokens.start * row_bytes, tokens.len() * row_bytes)
    }

    /// The 8-bit form of `rows` rows, if there are few and products of this width can be quantised
    /// ones.
    pub fn eight_bits(&self, rows: usize, precision: Precision) -> Option<EightBits<'_>> {
        let (quants, scales) = self.eight_bits.as_ref().filter(|_| rows <= self.narrow_max)?;
        let passes = if precision == Precision::Sixteen { 2 } else { 1 };
        Some(EightBits { quants: quants.span(), scales: scales.span(), passes })
    }

    /// The f16 form of `rows` rows, if there are many.
    pub fn halves(&self, rows: usize) -> Option<Span<'_>> {
        self.halves.as_ref().filter(|_| rows > self.narrow_max).map(DeviceMemory::span)
    }

    /// The first `rows` rows as the input of products.
    pub fn columns(&self, rows: usize, precision: Precision) -> Columns<'_> {
        Columns {
            columns: rows,
            cols: self.cols,
            values: Some(self.values()),
            eight_bits: self.eight_bits(rows, precision),
            halves: self.halves(rows),
        }
    }

    fn bytes(&self) -> usize {
        let eight_bits = self.eight_bits.as_ref();
        self.values.bytes()
            + self.halves.as_ref().map_or(0, DeviceMemory::bytes)
            + eight_bits.map_or(0, |(quants, scales)| quants.bytes() + scales.bytes())
    }
}

impl GpuBuffers {
    /// Buffers for steps of up to `tokens` tokens.
    ///
    /// # Errors
    /// The GPU's memory does not hold them.
    pub fn new(
        weights: &GpuWeights,
        tokens: usize,
        (device_blocks, block_tokens): (usize, usize),
    ) -> Result<Self, ExecutorError> {
        let (gpu, program) = (weights.gpu(), weights.program());
        let rows = |buffer: Buffer, form: Form| {
            RowMemory::new(gpu, (tokens, 1), width_of(program, buffer), form)
        };
        let is_twice = program
            .ops
            .iter()
            .any(|op| matches!(op, Op::Norm { precision: Precision::Sixteen, .. }));
        let normed = if is_twice { Form::Twice } else { Form::EightBits };
        let dims = program.dims;
        let logits_rows = if dims.vocab > 0 { LOGITS_TILE_ROWS.min(tokens) } else { 0 };
        let pairs = (tokens, dims.hidden_rows);
        let angles = weights.rotations().width();
        let (looked_up, row_bytes) = match (weights.embedding(), weights.embedding_shape()) {
            (None, Some((dtype, cols))) => (
                Some(DeviceMatrix::empty(gpu, dtype, (tokens, cols))?),
                dtype.row_bytes(cols).expect("whole blocks"),
            ),
            _ => (None, 0),
        };
        Ok(Self {
            residual: rows(Buffer::Residual, Form::Plain)?,
            residual_sum: gpu.alloc(dims.embedding * F32)?,
            normed: rows(Buffer::Normed, normed)?,
            heads: rows(Buffer::Heads, Form::Plain)?,
            attended: rows(Buffer::Attended, Form::EightBits)?,
            projected: rows(Buffer::Projected, Form::Plain)?,
            hidden: RowMemory::new(gpu, pairs, dims.hidden, Form::EightBits)?,
            up: rows(Buffer::Up, Form::Plain)?,
            experts: ExpertBuffers::new(gpu, dims, tokens)?,
            selected: RowMemory::new(gpu, (logits_rows, 1), dims.embedding, Form::EightBits)?,
            logits: RowMemory::new(gpu, (logits_rows, 1), dims.vocab, Form::Plain)?,
            measures: RowMeasures::new(gpu, logits_rows)?,
            draws: RowDraws::new(gpu, (logits_rows, dims.vocab))?,
            partials: gpu.alloc(partial_bytes(program, block_tokens * device_blocks))?,
            gate_counters: gpu.alloc(Gated::counter_bytes(dims.hidden))?,
            inputs: Inputs::new(gpu, (tokens, device_blocks), (angles, row_bytes))?,
            looked_up,
            host: HostBuffers {
                runs: Vec::new(),
                run_blocks: 1,
                single: Vec::new(),
                is_each_alone: false,
                sampling: HostSampling::new(gpu, dims.vocab)?,
            },
        })
    }

    /// Memory of a buffer that products read or write.
    pub fn rows(&self, buffer: Buffer) -> &RowMemory {
        match buffer {
            Buffer::Residual => &self.residual,
            Buffer::Normed => &self.normed,
            Buffer::Heads => &self.heads,
            Buffer::Attended => &self.attended,
            Buffer::Projected => &self.projected,
            Buffer::Hidden => &self.hidden,
            Buffer::Up => &self.up,
            Buffer::Selected => &self.selected,
            Buffer::Routes => unreachable!("routes are no rows"),
        }
    }

    /// Tokens whose attention over `positions_max` positions can run at once.
    pub fn attended_at_once(&self, heads: HeadCounts, positions_max: usize) -> usize {
        let one = Attend::partial_bytes(heads, 1, positions_max);
        self.partials.bytes().checked_div(one).unwrap_or(usize::MAX)
    }

    /// Bytes held on the GPU.
    pub fn bytes(&self) -> usize {
        let rows = [
            &self.residual,
            &self.normed,
            &self.heads,
            &self.attended,
            &self.projected,
            &self.hidden,
            &self.up,
            &self.selected,
            &self.logits,
        ];
        rows.iter().map(|rows| rows.bytes()).sum::<usize>()
            + self.experts.as_ref().map_or(0, ExpertBuffers::bytes)
            + self.measures.bytes()
            + self.draws.bytes()
            + self.partials.bytes()
            + self.residual_sum.bytes()
            + self.gate_counters.bytes()
            + self.inputs.bytes()
            + self.looked_up.as_ref().map_or(0, DeviceMatrix::bytes)
    }
}

/// Room for unmerged segments of attention: at least those of one token that sees a full store.
fn partial_bytes(program: &Program, positions_max: usize) -> usize {
    let of = |op: &Op| match op {
        Op::Attend { shape, .. } => {
            let (n_heads, n_kv_heads) = (shape.n_heads, shape.n_kv_heads);
            let heads = HeadCounts { n_heads, n_kv_heads, head_dim: shape.head_dim };
            Attend::partial_bytes(heads, 1, positions_max)
        }
        _ => 0,
    };
    program.ops.iter().map(of).max().unwrap_or(0).max(PARTIAL_BYTES)
}
