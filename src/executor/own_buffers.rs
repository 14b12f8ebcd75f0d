//! Memory of one worker alone. In a narrow step every worker keeps the rows that all workers read
//! in memory of its own and computes them itself: they have the same bits everywhere, since each
//! does the same arithmetic, and nobody waits for them. The rest is scratch of single rows.

use super::buffers::{Memory, QuantizedMemory, StepBuffers};
use super::program::ProgramDims;
use std::sync::Mutex;
use tandem_cpu_kernels::ActivationForm;

/// How much a worker computes for itself.
#[derive(Clone, Copy, Debug)]
pub(super) struct OwnRows {
    /// Tokens of the widest narrow step.
    pub tokens: usize,
    /// Tokens of the longest tile whose heads it rotates.
    pub rotated_tokens: usize,
}

/// What one worker computes for itself.
pub(super) struct OwnBuffers {
    residual: Memory,
    normed: QuantizedMemory,
    routes: Memory,
    selected: QuantizedMemory,
    addend: Memory,
    expert_logits: Memory,
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
            rotated: Memory::new(rows.rotated_tokens * dims.heads),
            dims,
            rows,
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        let plain =
            [&self.residual, &self.routes, &self.addend, &self.expert_logits, &self.rotated];
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
