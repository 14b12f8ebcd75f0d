//! Memory of one worker alone. In a narrow step every worker keeps the rows that all workers read
//! in memory of its own and computes them itself: they have the same bits everywhere, since each
//! does the same arithmetic, and nobody waits for them. The rest is scratch of single rows.

use super::buffers::{Memory, QuantizedMemory, StepBuffers};
use super::passes::StepPasses;
use super::program::{Buffer, Op, ProgramDims};
use super::weights::Weights;
use std::sync::Mutex;
use tandem_cpu_kernels::ActivationForm;

/// Hidden rows whose products with gate and up a worker keeps at a time: twice as many as kernels
/// on tiles take at once. A quarter of these took a prompt's gate and up 8 % longer.
pub(super) const GATED_ROWS: usize = 256;
/// Elements from token to token there: an odd number of cache lines, so that one row of many tokens
/// does not fall into few sets of a cache.
const GATED_WIDTH: usize = GATED_ROWS + 16;

/// How much a worker computes for itself.
#[derive(Clone, Copy, Debug)]
pub(super) struct OwnRows {
    /// Tokens of the widest narrow step.
    pub tokens: usize,
    /// Tokens of the longest tile whose heads it rotates.
    pub rotated_tokens: usize,
    /// Tokens of the widest step whose products with gate and up it keeps.
    pub gated_tokens: usize,
}

impl OwnRows {
    /// For so many workers, steps of up to so many tokens, and query tiles of so many.
    pub fn new(
        weights: &Weights,
        passes: StepPasses,
        (workers, tokens, query_tile): (usize, usize, usize),
    ) -> Self {
        let embedding_dim = weights.program().dims.embedding;
        Self {
            tokens: passes.own_rows_max(workers, embedding_dim, tokens),
            rotated_tokens: passes.rotated_tokens_max(workers, query_tile),
            gated_tokens: if keeps_gated_rows(weights) { tokens } else { 0 },
        }
    }
}

/// Whether workers keep what gate and up give in wide steps: kernels are on tiles, and nobody reads
/// hidden rows in f32.
fn keeps_gated_rows(weights: &Weights) -> bool {
    let reads_floats = |op: &Op| match op {
        Op::Project { input: Buffer::Hidden, parts, .. } => {
            parts.iter().any(|part| !weights.dtype(part.matrix).is_quantized())
        }
        _ => false,
    };
    let ops = &weights.program().ops;
    weights.kernels().activation_form() == ActivationForm::Bf16
        && ops.iter().any(|op| matches!(op, Op::Gate { .. }))
        && !ops.iter().any(reads_floats)
}

/// What one worker computes for itself.
pub(super) struct OwnBuffers {
    residual: Memory,
    normed: QuantizedMemory,
    routes: Memory,
    selected: QuantizedMemory,
    addend: Memory,
    expert_logits: Memory,
    gated: Memory,
    rotated: Memory,
    dims: ProgramDims,
    rows: OwnRows,
}

impl OwnBuffers {
    /// One per worker.
    pub fn of_workers(
        form: ActivationForm,
        dims: ProgramDims,
        rows: OwnRows,
        workers: usize,
    ) -> Vec<Mutex<Self>> {
        (0..workers).map(|_| Mutex::new(Self::new(form, dims, rows))).collect()
    }

    fn new(form: ActivationForm, dims: ProgramDims, rows: OwnRows) -> Self {
        let selected = if dims.vocab > 0 { rows.tokens } else { 0 };
        Self {
            residual: Memory::new(rows.tokens * dims.embedding),
            normed: QuantizedMemory::new(form, 2 * rows.tokens, dims.embedding),
            routes: Memory::new(rows.tokens * dims.routes()),
            selected: QuantizedMemory::new(form, selected, dims.embedding),
            addend: Memory::new(dims.embedding),
            expert_logits: Memory::new(dims.experts),
            gated: Memory::new(2 * rows.gated_tokens * GATED_WIDTH),
            rotated: Memory::new(rows.rotated_tokens * dims.heads),
            dims,
            rows,
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        let plain = [
            &self.residual,
            &self.routes,
            &self.addend,
            &self.expert_logits,
            &self.gated,
            &self.rotated,
        ];
        plain.iter().map(|memory| memory.bytes()).sum::<usize>()
            + self.normed.bytes()
            + self.selected.bytes()
    }

    /// What this worker uses in a step with these buffers: its scratch, and in a narrow step rows
    /// of its own in place of the shared ones.
    pub fn views<'a>(&'a mut self, shared: StepBuffers<'a>) -> StepBuffers<'a> {
        let (tokens, selected, dims) =
            (shared.residual.rows, shared.selected.values.rows, self.dims);
        let shared = StepBuffers {
            addend: self.addend.rows(1, dims.embedding),
            expert_logits: self.expert_logits.rows(1, dims.experts),
            gated: self.gated.rows(2 * tokens.min(self.rows.gated_tokens), GATED_WIDTH),
            rotated: self.rotated.rows(self.rows.rotated_tokens, dims.heads),
            ..shared
        };
        if tokens > self.rows.tokens {
            return shared;
        }
        StepBuffers {
            residual: self.residual.rows(tokens, dims.embedding),
            normed: self.normed.rows(2 * tokens, dims.embedding),
            routes: self.routes.rows(tokens, dims.routes()),
            selected: self.selected.rows(selected, dims.embedding),
            has_own_rows: true,
            ..shared
        }
    }
}
