//! Makes a new stage as fast for its first request as for later ones: pages of the activations are
//! touched by all workers, and one step is computed whose results nobody wants.

use super::cpu_pool::{CpuPool, WorkerPanic};
use crate::memory::{DisjointChunks, HugePages, prefer_huge_pages};
use crate::step::{LogitsRow, LogitsTask, PlannedSequence, StepPlan};
use crate::units::{BlockId, SequenceId, StepId, TokenId};

/// Tokens of the step: it takes the way of several tokens, and costs little more than one.
const TOKENS: usize = 2;
/// What a worker touches at a time, and the smallest page.
const CHUNK_BYTES: usize = 1 << 20;
const PAGE_BYTES: usize = 4096;

/// Writes to every page of memory that is zero and not yet in use. The system gives a page when it
/// is first written, at about a microsecond each.
pub(super) fn touch(
    pool: &mut CpuPool,
    mut memory: Vec<&mut [u8]>,
    huge_pages: HugePages,
) -> Result<(), WorkerPanic> {
    if huge_pages == HugePages::Advise {
        memory.iter_mut().for_each(|bytes| prefer_huge_pages(bytes));
    }
    let chunks: Vec<DisjointChunks<'_>> =
        memory.into_iter().map(|bytes| DisjointChunks::new(bytes, CHUNK_BYTES)).collect();
    pool.run(&|_| {
        for chunks in &chunks {
            while let Some((_, chunk)) = chunks.claim_next() {
                chunk.iter_mut().step_by(PAGE_BYTES).for_each(|byte| *byte = 0);
            }
        }
    })
}

/// A step of a sequence that does not exist, on the first KV block: whoever is given that block
/// writes it before reading it.
pub(super) fn plan(tokens_max: usize, has_logits: bool) -> StepPlan {
    let (id, tokens) = (SequenceId(0), TOKENS.min(tokens_max));
    let score = LogitsRow {
        sequence: id,
        row: tokens - 1,
        position: tokens,
        task: LogitsTask::Score { target: TokenId(0), top_logprobs: 0 },
    };
    StepPlan {
        step: StepId(0),
        tokens: vec![TokenId(0); tokens],
        sequences: vec![PlannedSequence {
            id,
            tokens: 0..tokens,
            position_start: 0,
            block_table: 0..1,
        }],
        block_tables: vec![BlockId(0)],
        logits: if has_logits { vec![score] } else { Vec::new() },
        ..StepPlan::default()
    }
}
