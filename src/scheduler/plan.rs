//! One step: who computes which tokens in which blocks.

use super::Scheduler;
use super::budget::ChunkBudget;
use super::chunking::{ChunkController, StepMix};
use super::preemption::Room;
use super::sequence::{Sequence, State};
use crate::kv::blocks_for;
use crate::request::Priority;
use crate::step::{LogitsRow, LogitsTask, PlannedSequence, StepPlan};
use crate::units::{SequenceId, StepId};

impl Scheduler {
    /// Fills `plan` with the next step; empty if there is nothing to do. Whoever ended without a
    /// step (deadlines) is in [`Scheduler::drain_events`]. Allocates nothing once its buffers have
    /// their size.
    pub fn plan_step(&mut self, now_us: u64, plan: &mut StepPlan) {
        plan.clear();
        self.now_us = now_us;
        self.step += 1;
        plan.step = StepId(self.step);
        self.awaits_copies = false;
        self.expire();
        self.swap_ahead();
        self.admit();
        let decodes = self.plan_decodes(plan);
        self.mix = StepMix::of_decodes(decodes);
        self.share_budget(decodes);
        let mut shares = std::mem::take(&mut self.shares);
        for share in shares.drain(..) {
            // An earlier share may have cost this one its blocks.
            let tokens = self.reserve(share.id, share.tokens);
            if tokens > 0 {
                self.mix.add_chunk(share.position, tokens);
                self.push(share.id, tokens, plan);
            }
        }
        self.shares = shares;
        self.copy_ahead();
        if !plan.is_empty() {
            self.stats.steps += 1;
        }
    }

    /// One token for every sequence that decodes, best rank first, and what is drafted behind it.
    fn plan_decodes(&mut self, plan: &mut StepPlan) -> usize {
        let mut ids = std::mem::take(&mut self.ids);
        ids.clear();
        ids.extend(self.running.iter().filter(|id| self.sequences[*id].is_decoding()));
        ids.sort_unstable_by_key(|id| self.sequences[id].rank());
        self.plan_drafts(&ids);
        for id in ids.drain(..) {
            if plan.tokens.len() == self.options.chunks.step_tokens_max {
                break;
            }
            if self.reserve(id, 1) > 0 {
                let drafted = self.reserve_draft(id);
                self.push(id, 1 + drafted, plan);
            } else if let Some(sequence) = self.sequences.get_mut(&id) {
                sequence.draft.clear();
            }
        }
        self.ids = ids;
        plan.tokens.len()
    }

    /// Splits the chunk budget: half to the prompt of the best rank, the rest to the others, the
    /// more urgent first and then the one with the least to do.
    fn share_budget(&mut self, decodes: usize) {
        let mut shares = std::mem::take(&mut self.shares);
        shares.clear();
        for id in &self.running {
            let sequence = &self.sequences[id];
            if sequence.is_ready() && sequence.planned_step != self.step {
                shares.push(Share::of(sequence));
            }
        }
        if let Some(best) = (0..shares.len()).min_by_key(|at| shares[*at].rank) {
            shares.swap(0, best);
            shares[1..].sort_unstable_by_key(|share| (share.rank.0, share.wanted, share.rank.1));
            let mut purse = Purse {
                budget: self.chunks.budget(decodes),
                score_rows: self.options.logits_rows_max,
            };
            let halves = if shares.len() > 1 { 2 } else { 1 };
            purse.pay(&self.chunks, &mut shares[0], halves);
            for share in &mut shares[1..] {
                purse.pay(&self.chunks, share, 1);
            }
            purse.pay(&self.chunks, &mut shares[0], 1);
        }
        shares.retain(|share| share.tokens > 0);
        self.shares = shares;
    }

    /// Blocks for the next `tokens` tokens of a sequence, or for as many of them as there is room:
    /// how many. None for one that does not run any more.
    fn reserve(&mut self, id: SequenceId, tokens: usize) -> usize {
        let block_tokens = self.options.block_tokens;
        loop {
            let Some(sequence) = self.sequences.get_mut(&id) else { return 0 };
            if sequence.state != State::Running {
                return 0;
            }
            let wanted = blocks_for(sequence.computed + tokens, block_tokens);
            if sequence.blocks.len() >= wanted {
                return tokens;
            }
            if let Some(block) = self.tiers.device.allocate() {
                sequence.blocks.push(block);
                continue;
            }
            let room = (sequence.blocks.len() * block_tokens).saturating_sub(sequence.computed);
            match self.preempt_for(id) {
                Room::Made => {}
                Room::Coming => {
                    self.awaits_copies = true;
                    return room;
                }
                Room::None => return 0,
            }
        }
    }

    /// Writes the next `tokens` tokens of a sequence into the plan, drafted ones last.
    fn push(&mut self, id: SequenceId, tokens: usize, plan: &mut StepPlan) {
        let context_tokens = self.options.context_tokens;
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        sequence.planned_tokens = tokens;
        sequence.planned_step = self.step;
        sequence.queued_us = self.now_us;
        let (first, end) = (sequence.computed, sequence.computed + tokens);
        let row_start = plan.tokens.len();
        let known = end.min(sequence.new.tokens.len());
        plan.tokens.extend_from_slice(&sequence.new.tokens[first..known]);
        plan.tokens.extend_from_slice(&sequence.draft.planned()[..end - known]);
        let table_start = plan.block_tables.len();
        let blocks = blocks_for(end, self.options.block_tokens);
        plan.block_tables.extend_from_slice(&sequence.blocks[..blocks]);
        plan.sequences.push(PlannedSequence {
            id,
            tokens: row_start..plan.tokens.len(),
            position_start: first,
            block_table: table_start..plan.block_tables.len(),
        });
        push_scores(sequence, first..known, row_start, plan);
        if known == sequence.new.tokens.len() && !sequence.is_full(context_tokens) {
            push_samples(sequence, plan);
        }
    }
}

/// What a prompt gets of a step's budget.
#[derive(Clone, Copy, Debug)]
pub(super) struct Share {
    pub id: SequenceId,
    /// Where its chunk starts.
    position: usize,
    /// Tokens that it still has to compute.
    wanted: usize,
    /// Whether its tokens ask for rows of scores.
    is_scoring: bool,
    rank: (Priority, u64),
    tokens: usize,
}

impl Share {
    fn of(sequence: &Sequence) -> Self {
        Self {
            id: sequence.new.id,
            position: sequence.computed,
            wanted: sequence.remaining(),
            is_scoring: sequence.is_scoring(),
            rank: sequence.rank(),
            tokens: 0,
        }
    }
}

/// What is left of a step for prompts.
struct Purse {
    budget: ChunkBudget,
    score_rows: usize,
}

impl Purse {
    /// Gives a share what it wants and the budget, or a part of it, pays for.
    fn pay(&mut self, chunks: &ChunkController, share: &mut Share, part: usize) {
        let position = share.position + share.tokens;
        let affordable = chunks.affordable(&self.budget, position).div_ceil(part);
        let rows = if share.is_scoring { self.score_rows } else { usize::MAX };
        let tokens = (share.wanted - share.tokens).min(affordable).min(rows);
        chunks.spend(&mut self.budget, position, tokens);
        share.tokens += tokens;
        if share.is_scoring {
            self.score_rows -= tokens;
        }
    }
}

/// Rows whose next token is a prompt token that has to be scored.
fn push_scores(
    sequence: &Sequence,
    positions: std::ops::Range<usize>,
    row_start: usize,
    plan: &mut StepPlan,
) {
    let Some(top_logprobs) = sequence.new.prompt_logprobs else { return };
    let prompt_tokens = sequence.new.prompt_tokens;
    for (index, position) in positions.enumerate() {
        let next = position + 1;
        if next >= sequence.scored && next < prompt_tokens {
            let target = sequence.new.tokens[next];
            plan.logits.push(LogitsRow {
                sequence: sequence.new.id,
                row: row_start + index,
                position: next,
                task: LogitsTask::Score { target, top_logprobs },
            });
        }
    }
}

/// The rows of the last token and of those drafted behind it, from which the next ones are sampled.
/// Each has all tokens before it as its history: one stretch, of which every row sees one more.
fn push_samples(sequence: &Sequence, plan: &mut StepPlan) {
    let drafted = sequence.draft.planned();
    let history_start = plan.history.len();
    let needs_history = sequence.new.sampling.needs_history();
    if needs_history {
        plan.history.extend_from_slice(&sequence.new.tokens);
        plan.history.extend_from_slice(drafted);
    }
    let first_row = plan.tokens.len() - 1 - drafted.len();
    for index in 0..=drafted.len() {
        let position = sequence.new.tokens.len() + index;
        let history_tokens = if needs_history { position } else { 0 };
        plan.logits.push(LogitsRow {
            sequence: sequence.new.id,
            row: first_row + index,
            position,
            task: LogitsTask::Sample {
                params: sequence.new.sampling.clone(),
                history: history_start..history_start + history_tokens,
                prompt_tokens: sequence.new.prompt_tokens,
            },
        });
    }
}
