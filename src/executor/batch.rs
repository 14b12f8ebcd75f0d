//! What a step's ops need beside the plan: positions, block addresses and attention's work items.
//! Also the one place where a plan is checked: after it, every index of the plan is in bounds.
//! Buffers are reused from step to step.

use super::ExecutorError;
use super::attention_split::{AttentionShape, AttentionSplit};
use crate::step::{PlannedSequence, StepPlan};
use std::ops::Range;

/// What a plan may not exceed.
#[derive(Clone, Copy, Debug)]
pub(super) struct PlanLimits {
    pub tokens_max: usize,
    pub vocab_size: usize,
    pub block_tokens: usize,
    pub blocks: usize,
    /// Query tokens of one attention item: they share each key and value that is read.
    pub query_tile: usize,
}

/// Consecutive tokens of one sequence inside one KV block: who writes them writes the block alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BlockRun {
    /// Index into the plan's sequences.
    pub sequence: usize,
    /// Rows of the step.
    pub tokens: Range<usize>,
}

/// Consecutive tokens of one sequence whose attention is computed together, per KV head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct QueryTile {
    /// Index into the plan's sequences.
    pub sequence: usize,
    /// Rows of the step.
    pub tokens: Range<usize>,
    /// Position of the first of them.
    pub position_start: usize,
}

/// The step's index structures.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// `[n_tokens]`: position of each token in its sequence.
    pub positions: Vec<usize>,
    /// Ascending by token.
    pub runs: Vec<BlockRun>,
    /// Ascending by token.
    pub tiles: Vec<QueryTile>,
    /// The plan's block tables as plain numbers.
    blocks: Vec<u32>,
    /// Per sequence: its part of `blocks`.
    tables: Vec<Range<usize>>,
    /// Shares of each different attention of the program.
    splits: Vec<AttentionSplit>,
}

impl Batch {
    /// Buffers that hold any step of up to `tokens_max` tokens without growing, as long as its
    /// block tables have no more than `blocks` entries, for a program with attentions of `splits`.
    pub fn new(tokens_max: usize, blocks: usize, splits: Vec<AttentionSplit>) -> Self {
        Self {
            positions: Vec::with_capacity(tokens_max),
            runs: Vec::with_capacity(tokens_max),
            tiles: Vec::with_capacity(tokens_max),
            blocks: Vec::with_capacity(blocks),
            tables: Vec::with_capacity(tokens_max),
            splits,
        }
    }

    /// The shares of attentions of one shape, which is one of the program's.
    pub fn attention(&self, shape: AttentionShape) -> &AttentionSplit {
        let split = self.splits.iter().find(|split| split.shape == shape);
        split.expect("a split for every attention of the program")
    }

    /// f32 elements of the largest partials that a step can ask for.
    pub fn partials_max(&self) -> usize {
        self.splits.iter().map(AttentionSplit::partials_max).max().unwrap_or(0)
    }

    /// Whether every sequence has one tile, of up to `tokens_max` tokens.
    pub fn has_short_sequences_only(&self, tokens_max: usize) -> bool {
        self.tiles.iter().all(|tile| tile.tokens.len() <= tokens_max)
            && self.tiles.windows(2).all(|pair| pair[0].sequence != pair[1].sequence)
    }

    /// Checks a plan and derives its structures.
    ///
    /// # Errors
    /// [`ExecutorError::InvalidPlan`]: a bug of the scheduler, found before it does harm.
    pub fn prepare(&mut self, plan: &StepPlan, limits: PlanLimits) -> Result<(), ExecutorError> {
        self.positions.clear();
        self.runs.clear();
        self.tiles.clear();
        self.tables.clear();
        self.blocks.clear();
        self.blocks.extend(plan.block_tables.iter().map(|block| block.0));
        ensure(plan.tokens.len() <= limits.tokens_max, "tokens", || {
            format!("{} tokens, at most {}", plan.tokens.len(), limits.tokens_max)
        })?;
        if let Some(token) = plan.tokens.iter().find(|token| token.index() >= limits.vocab_size) {
            return refuse("tokens", format!("token {token} of {}", limits.vocab_size));
        }
        for (index, sequence) in plan.sequences.iter().enumerate() {
            self.add_sequence(plan, index, sequence, limits)?;
        }
        ensure(self.positions.len() == plan.tokens.len(), "sequences", || {
            format!("they own {} of {} tokens", self.positions.len(), plan.tokens.len())
        })?;
        for split in &mut self.splits {
            split.deal(&self.tiles);
        }
        check_logits(plan)
    }

    fn add_sequence(
        &mut self,
        plan: &StepPlan,
        index: usize,
        sequence: &PlannedSequence,
        limits: PlanLimits,
    ) -> Result<(), ExecutorError> {
        let Range { start, end } = sequence.tokens;
        ensure(
            start == self.positions.len() && start <= end && end <= plan.tokens.len(),
            "sequences",
            || format!("tokens {start}..{end} of sequence {} leave a gap", sequence.id.0),
        )?;
        let Some(table) = plan.block_tables.get(sequence.block_table.clone()) else {
            return refuse("block_tables", format!("no range {:?}", sequence.block_table));
        };
        let position_end = sequence.position_start + (end - start);
        ensure(position_end <= table.len() * limits.block_tokens, "block_tables", || {
            format!("{} blocks for {position_end} positions", table.len())
        })?;
        if let Some(block) = table.iter().find(|block| block.index() >= limits.blocks) {
            return refuse("block_tables", format!("block {} of {}", block.0, limits.blocks));
        }
        self.positions.extend(sequence.position_start..position_end);
        self.tables.push(sequence.block_table.clone());
        self.add_runs(index, sequence, limits.block_tokens);
        self.add_tiles(index, sequence, limits.query_tile);
        Ok(())
    }

    /// The block table of a sequence of the plan.
    pub fn block_table(&self, sequence: usize) -> &[u32] {
        &self.blocks[self.tables[sequence].clone()]
    }

    fn add_runs(&mut self, index: usize, sequence: &PlannedSequence, block_tokens: usize) {
        let mut start = sequence.tokens.start;
        while start < sequence.tokens.end {
            let left = block_tokens - self.positions[start] % block_tokens;
            let end = (start + left).min(sequence.tokens.end);
            self.runs.push(BlockRun { sequence: index, tokens: start..end });
            start = end;
        }
    }

    fn add_tiles(&mut self, index: usize, sequence: &PlannedSequence, query_tile: usize) {
        let mut start = sequence.tokens.start;
        while start < sequence.tokens.end {
            let end = (start + query_tile).min(sequence.tokens.end);
            let position_start = sequence.position_start + (start - sequence.tokens.start);
            self.tiles.push(QueryTile { sequence: index, tokens: start..end, position_start });
            start = end;
        }
    }
}

fn check_logits(plan: &StepPlan) -> Result<(), ExecutorError> {
    let mut next = 0;
    for row in &plan.logits {
        ensure(row.row >= next && row.row < plan.tokens.len(), "logits", || {
            format!("row {} after row {next} of {} tokens", row.row, plan.tokens.len())
        })?;
        next = row.row + 1;
        if let crate::step::LogitsTask::Sample { history, prompt_tokens, .. } = &row.task {
            let known = plan.history.get(history.clone()).map(<[_]>::len);
            ensure(
                known.is_some_and(|tokens| tokens == 0 || *prompt_tokens <= tokens),
                "history",
                || format!("{history:?} of {}, prompt {prompt_tokens}", plan.history.len()),
            )?;
        }
    }
    Ok(())
}

fn ensure(
    holds: bool,
    field: &'static str,
    message: impl FnOnce() -> String,
) -> Result<(), ExecutorError> {
    if holds { Ok(()) } else { refuse(field, message()) }
}

fn refuse(field: &'static str, message: String) -> Result<(), ExecutorError> {
    Err(ExecutorError::InvalidPlan { field, message })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{BlockId, SequenceId, TokenId};

    fn plan(lengths: &[(usize, usize)]) -> StepPlan {
        let mut plan = StepPlan::default();
        for (id, (position_start, tokens)) in lengths.iter().enumerate() {
            let (first, table) = (plan.tokens.len(), plan.block_tables.len());
            plan.tokens.extend((0..*tokens).map(|token| TokenId(token as u32)));
            let blocks = (position_start + tokens).div_ceil(16);
            plan.block_tables.extend((0..blocks).map(|block| BlockId((table + block) as u32)));
            plan.sequences.push(PlannedSequence {
                id: SequenceId(id as u64),
                tokens: first..plan.tokens.len(),
                position_start: *position_start,
                block_table: table..plan.block_tables.len(),
            });
        }
        plan
    }

    const LIMITS: PlanLimits =
        PlanLimits { tokens_max: 64, vocab_size: 100, block_tokens: 16, blocks: 64, query_tile: 8 };

    #[test]
    fn runs_stay_inside_one_block() {
        let mut batch = Batch::default();
        batch.prepare(&plan(&[(14, 20), (3, 1)]), LIMITS).unwrap();
        let runs: Vec<_> =
            batch.runs.iter().map(|run| (run.sequence, run.tokens.clone())).collect();
        assert_eq!(runs, [(0, 0..2), (0, 2..18), (0, 18..20), (1, 20..21)]);
        assert_eq!(batch.block_table(1), [3]);
    }

    #[test]
    fn a_plan_that_does_not_add_up_is_refused_with_its_field() {
        type Spoil = fn(&mut StepPlan);
        let spoilt: [(&str, Spoil); 6] = [
            ("tokens", |plan| plan.tokens[0] = TokenId(100)),
            ("sequences", |plan| plan.sequences[0].tokens.end -= 1),
            ("sequences", |plan| plan.tokens.push(TokenId(1))),
            ("block_tables", |plan| plan.block_tables[0] = BlockId(64)),
            ("block_tables", |plan| plan.sequences[1].block_table.end -= 1),
            ("block_tables", |plan| plan.sequences[1].block_table.end += 1),
        ];
        let mut batch = Batch::default();
        for (wanted, spoil) in spoilt {
            let mut plan = plan(&[(0, 5), (30, 2)]);
            batch.prepare(&plan, LIMITS).unwrap();
            spoil(&mut plan);
            match batch.prepare(&plan, LIMITS) {
                Err(ExecutorError::InvalidPlan { field, .. }) => assert_eq!(field, wanted),
                other => panic!("{wanted}: {other:?}"),
            }
        }
    }
}
