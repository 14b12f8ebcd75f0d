//! The activations of a step in a GPU's memory, and what the host prepares for it.

use super::experts::ExpertBuffers;
use super::inputs::Inputs;
use super::sampling::HostSampling;
use super::vram::ACTIVATIONS;
use super::weights::GpuWeights;
use crate::executor::ExecutorError;
use crate::executor::program::{Buffer, MatrixUse, Op, Precision, Program};
use crate::memory::Commitment;
use crate::placement::{BufferDims, BufferSize, RowBytes};
use std::ops::Range;
use tandem_kernels::{
    Attend, Columns, DeviceMatrix, DeviceMemory, EightBits, Gpu, HeadCounts, RowDraws, RowMeasures,
    Span,
};

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
    _reserved: Commitment,
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

impl RowMemory {
    fn new(gpu: &Gpu, bytes: &RowBytes) -> Result<Self, ExecutorError> {
        let RowBytes { cols, narrow_max, values, eight_bits, halves } = *bytes;
        let eight_bits = eight_bits.map(|[quants, scales]| {
            Ok::<_, ExecutorError>((gpu.alloc(quants)?, gpu.alloc(scales)?))
        });
        Ok(Self {
            values: gpu.alloc(values)?,
            eight_bits: eight_bits.transpose()?,
            halves: halves.map(|bytes| gpu.alloc(bytes)).transpose()?,
            narrow_max,
            cols,
        })
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
    /// Buffers for steps of up to `tokens` tokens, reserved before they are allocated.
    ///
    /// # Errors
    /// The GPU's memory does not hold them, or they may not be taken.
    pub fn new(
        weights: &GpuWeights,
        tokens: usize,
        (blocks, block_tokens): (usize, usize),
    ) -> Result<Self, ExecutorError> {
        let (gpu, dims) = (weights.gpu(), buffer_dims(weights.program()));
        let size = BufferSize { tokens, narrow_max: gpu.narrow_max(), blocks, block_tokens };
        let bytes = dims.bytes(size);
        let reserved = weights.vram().row(ACTIVATIONS, bytes.total())?;
        let rows = |bytes: &RowBytes| RowMemory::new(gpu, bytes);
        let looked_up =
            dims.looked_up.map(|(dtype, cols)| DeviceMatrix::empty(gpu, dtype, (tokens, cols)));
        Ok(Self {
            residual: rows(&bytes.residual)?,
            residual_sum: gpu.alloc(bytes.residual_sum)?,
            normed: rows(&bytes.normed)?,
            heads: rows(&bytes.heads)?,
            attended: rows(&bytes.attended)?,
            projected: rows(&bytes.projected)?,
            hidden: rows(&bytes.hidden)?,
            up: rows(&bytes.up)?,
            experts: ExpertBuffers::new(gpu, &dims, (tokens, bytes.experts))?,
            selected: rows(&bytes.selected)?,
            logits: rows(&bytes.logits)?,
            measures: RowMeasures::new(gpu, bytes.logits_rows)?,
            draws: RowDraws::new(gpu, (bytes.logits_rows, dims.vocab))?,
            partials: gpu.alloc(bytes.partials)?,
            gate_counters: gpu.alloc(bytes.gate_counters)?,
            inputs: Inputs::new(gpu, (tokens, blocks), (dims.angles, dims.row_bytes()))?,
            looked_up: looked_up.transpose()?,
            host: HostBuffers {
                runs: Vec::new(),
                run_blocks: 1,
                single: Vec::new(),
                is_each_alone: false,
                sampling: HostSampling::new(gpu, dims.vocab)?,
            },
            _reserved: reserved.commit(),
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

/// What the sizes of a program's buffers follow from.
pub fn buffer_dims(program: &Program) -> BufferDims {
    let dims = program.dims;
    let is_twice = |op: &Op| matches!(op, Op::Norm { precision: Precision::Sixteen, .. });
    let heads = program.ops.iter().filter_map(|op| match op {
        Op::Attend { shape, .. } => Some((shape.n_heads, shape.head_dim)),
        _ => None,
    });
    let embeds = program.ops.iter().find_map(|op| match op {
        Op::Embed { table, .. } => Some(program.matrix(*table)),
        _ => None,
    });
    let looked_up = embeds.filter(|entry| entry.used_for == MatrixUse::Lookup);
    BufferDims {
        embedding: dims.embedding,
        heads: dims.heads,
        attended: dims.attended,
        hidden: dims.hidden,
        hidden_rows: dims.hidden_rows,
        experts: dims.experts,
        vocab: dims.vocab,
        angles: program.ropes.iter().map(|rope| rope.dims / 2 * 2).sum(),
        looked_up: looked_up.map(|entry| (entry.tensor.dtype, entry.tensor.cols)),
        is_twice: program.ops.iter().any(is_twice),
        attention: BufferDims::largest(heads),
    }
}
