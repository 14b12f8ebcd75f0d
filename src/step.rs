//! The narrow waist: all that the scheduler and the executor know of each other. A [`StepPlan`]
//! goes down, a [`StepOutput`] comes back; both are flat buffers that are cleared and reused, so
//! that a step allocates nothing. No logic beyond that clearing lives here.

use crate::request::{RequestError, SamplingParams};
use crate::units::{BlockId, SequenceId, StepId, TokenId};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// Where KV blocks live.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tier {
    /// The store that the executor's attention reads: VRAM on a GPU stage, host memory on a CPU
    /// stage.
    Device,
    /// Pinned host memory behind a device.
    Host,
    /// A file.
    Disk,
}

impl fmt::Display for Tier {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Device => "device",
            Self::Host => "host",
            Self::Disk => "disk",
        })
    }
}

/// An order to copy one KV block (all layers, K and V), possibly between tiers. Orders of one plan
/// are performed in sequence, before any token of that plan is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockCopy {
    /// Source tier and block.
    pub from: (Tier, BlockId),
    /// Destination tier and block.
    pub to: (Tier, BlockId),
}

/// How an order to copy a block ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CopyOutcome {
    /// The destination holds what the source held.
    Done,
    /// Nothing usable is at the destination.
    Failed,
}

/// An order to copy a block, and what came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CopyResult {
    /// The order.
    pub copy: BlockCopy,
    /// How it ended.
    pub outcome: CopyOutcome,
}

/// The tokens of one sequence in a step: consecutive positions. The last ones may be drafted: then
/// each from the last known token on has a row to sample from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedSequence {
    /// Whose tokens these are.
    pub id: SequenceId,
    /// Which entries of [`StepPlan::tokens`].
    pub tokens: Range<usize>,
    /// Position of the first of those tokens in the sequence, counted from 0.
    pub position_start: usize,
    /// Which entries of [`StepPlan::block_tables`]: the blocks of positions `0 ..`, at least up to
    /// the last planned token.
    pub block_table: Range<usize>,
}

/// What is to be done with the logits of one planned token.
#[derive(Clone, Debug)]
pub enum LogitsTask {
    /// Sample the next token.
    Sample {
        /// How. `params.top_logprobs` says how many alternatives are reported.
        params: Arc<SamplingParams>,
        /// Which entries of [`StepPlan::history`] are the sequence's tokens so far (prompt,
        /// generated, and drafted before this row), for penalties; empty when `params` needs none.
        history: Range<usize>,
        /// How many of the history's first tokens are the prompt.
        prompt_tokens: usize,
    },
    /// Report the log-probability of a given next token (prompt log-probabilities, perplexity).
    Score {
        /// The token that follows.
        target: TokenId,
        /// How many of the most likely tokens are reported beside it.
        top_logprobs: usize,
    },
}

/// A planned token whose logits are wanted.
#[derive(Clone, Debug)]
pub struct LogitsRow {
    /// Whose token.
    pub sequence: SequenceId,
    /// Index into [`StepPlan::tokens`].
    pub row: usize,
    /// Position of the token that the logits predict: the counter of counter-based sampling.
    pub position: usize,
    /// What to do.
    pub task: LogitsTask,
}

/// One batch pass, complete: the executor needs nothing else.
#[derive(Clone, Debug, Default)]
pub struct StepPlan {
    /// Which step.
    pub step: StepId,
    /// KV copies to perform first.
    pub copies: Vec<BlockCopy>,
    /// `[n_tokens]`, all sequences' tokens one after the other.
    pub tokens: Vec<TokenId>,
    /// Who owns which tokens.
    pub sequences: Vec<PlannedSequence>,
    /// Block tables of all sequences, one after the other.
    pub block_tables: Vec<BlockId>,
    /// Rows whose logits are wanted, ascending by `row`.
    pub logits: Vec<LogitsRow>,
    /// Token histories for penalties, one after the other.
    pub history: Vec<TokenId>,
}

impl StepPlan {
    /// Empties the plan and keeps its buffers.
    pub fn clear(&mut self) {
        self.copies.clear();
        self.tokens.clear();
        self.sequences.clear();
        self.block_tables.clear();
        self.logits.clear();
        self.history.clear();
    }

    /// Whether there is nothing to compute or copy.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty() && self.copies.is_empty()
    }
}

/// A token with its natural-log probability.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct TokenLogprob {
    /// The token.
    pub id: TokenId,
    /// Natural logarithm of its probability under the model's own distribution: the log-softmax of
    /// the logits before temperature, penalties and truncation.
    pub logprob: f32,
}

/// What one [`LogitsRow`] gave.
#[derive(Clone, Debug, PartialEq)]
pub struct RowOutput {
    /// Whose row.
    pub sequence: SequenceId,
    /// The row's `position`, as planned.
    pub position: usize,
    /// The sampled token ([`LogitsTask::Sample`]) or the target ([`LogitsTask::Score`]).
    pub token: TokenLogprob,
    /// The most likely tokens, best first, as many as were asked for.
    pub top: Vec<TokenLogprob>,
}

/// A row whose logits were not finite: the sequence fails, its neighbours do not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowFailure {
    /// Whose row.
    pub sequence: SequenceId,
    /// The row's `position`, as planned.
    pub position: usize,
}

/// What a step gave.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepOutput {
    /// Which step.
    pub step: StepId,
    /// One entry per healthy row of [`StepPlan::logits`], in the same order.
    pub rows: Vec<RowOutput>,
    /// Rows with NaN or infinite logits.
    pub failures: Vec<RowFailure>,
    /// Why nothing but the copies was done, if so: the plan's sequences fail with it, the executor
    /// and all others go on.
    pub refusal: Option<RequestError>,
    /// How long the executor worked on the step, in microseconds.
    pub duration_us: u64,
}

impl StepOutput {
    /// Empties the output and keeps its buffers.
    pub fn clear(&mut self) {
        self.rows.clear();
        self.failures.clear();
        self.refusal = None;
        self.duration_us = 0;
    }
}
