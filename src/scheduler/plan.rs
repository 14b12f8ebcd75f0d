//! One step: who computes which tokens in which blocks.

use super::Scheduler;
use super::chunking::StepMix;
use super::sequence::{Flow, Sequence};
use crate::kv::blocks_for;
use crate::step::{LogitsRow, LogitsTask, PlannedSequence, StepPlan};
use crate::units::{SequenceId, StepId};

impl Scheduler {
    /// Fills `plan` with the next step; empty if there is nothing to do. Whoever ended without a
    /// step (deadlines) is in [`Scheduler::drain_events`].
    pub fn plan_step(&mut self, now_us: u64, plan: &mut StepPlan) {
        plan.clear();
        self.step += 1;
        plan.step = StepId(self.step);
        self.expire(now_us);
        let decodes = self.plan_decodes(plan);
        self.admit(now_us, plan);
        let budget = self.chunks.budget(decodes);
        let before = plan.tokens.len();
        self.share_budget(budget);
        let mut shares = std::mem::take(&mut self.shares);
        for (id, tokens) in shares.drain(..) {
            // An earlier share may have cost this one its blocks.
            if self.running.contains(&id) && self.reserve(id, tokens, plan) {
                self.push(id, tokens, plan);
            }
        }
        self.shares = shares;
        self.mix = StepMix { decodes, prefill_tokens: plan.tokens.len() - before };
        if !plan.is_empty() {
            self.stats.steps += 1;
        }
    }

    /// One token for every sequence that decodes, best rank first.
    fn plan_decodes(&mut self, plan: &mut StepPlan) -> usize {
        let mut ids = std::mem::take(&mut self.ids);
        ids.clear();
        ids.extend(self.running.iter().filter(|id| {
            let sequence = &self.sequences[*id];
            sequence.flow == Flow::Open && sequence.is_decoding()
        }));
        ids.sort_unstable_by_key(|id| self.sequences[id].rank());
        for id in ids.drain(..) {
            if plan.tokens.len() == self.options.chunks.step_tokens_max {
                break;
            }
            if self.running.contains(&id) && self.reserve(id, 1, plan) {
                self.push(id, 1, plan);
            }
        }
        self.ids = ids;
        plan.tokens.len()
    }

    /// Splits the chunk budget: half to the oldest prompt, then shortest remaining first.
    fn share_budget(&mut self, mut budget: usize) {
        let mut shares = std::mem::take(&mut self.shares);
        shares.clear();
        for id in &self.running {
            let sequence = &self.sequences[id];
            if sequence.flow == Flow::Open && sequence.planned_step != self.step {
                let rows_max = match sequence.new.prompt_logprobs {
                    Some(_) => self.options.logits_rows_max,
                    None => usize::MAX,
                };
                shares.push((*id, sequence.remaining().min(rows_max)));
            }
        }
        shares.sort_unstable_by_key(|(id, _)| self.sequences[id].rank());
        if shares.len() > 1 {
            let first = shares[0].1.min(budget.div_ceil(2));
            budget -= first;
            shares[1..].sort_by_key(|(_, remaining)| *remaining);
            let wanted = std::mem::replace(&mut shares[0].1, first) - first;
            for share in &mut shares[1..] {
                share.1 = share.1.min(budget);
                budget -= share.1;
            }
            shares[0].1 += wanted.min(budget);
        } else if let Some(only) = shares.first_mut() {
            only.1 = only.1.min(budget);
        }
        shares.retain(|(_, tokens)| *tokens > 0);
        self.shares = shares;
    }

    /// Blocks for the next `tokens` tokens of a running sequence; false if it lost its place.
    fn reserve(&mut self, id: SequenceId, tokens: usize, plan: &mut StepPlan) -> bool {
        loop {
            let Some(sequence) = self.sequences.get_mut(&id) else { return false };
            let wanted = blocks_for(sequence.computed + tokens, self.options.block_tokens);
            if sequence.blocks.len() >= wanted {
                return true;
            }
            if let Some(block) = self.pool.allocate() {
                sequence.blocks.push(block);
            } else if !self.preempt_for(id, plan) {
                return false;
            }
        }
    }

    /// Writes the next `tokens` tokens of a sequence into the plan.
    fn push(&mut self, id: SequenceId, tokens: usize, plan: &mut StepPlan) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        sequence.planned_tokens = tokens;
        sequence.planned_step = self.step;
        let (first, end) = (sequence.computed, sequence.computed + tokens);
        let row_start = plan.tokens.len();
        plan.tokens.extend_from_slice(&sequence.new.tokens[first..end]);
        let table_start = plan.block_tables.len();
        let blocks = blocks_for(end, self.options.block_tokens);
        plan.block_tables.extend_from_slice(&sequence.blocks[..blocks]);
        plan.sequences.push(PlannedSequence {
            id,
            tokens: row_start..plan.tokens.len(),
            position_start: first,
            block_table: table_start..plan.block_tables.len(),
        });
        push_scores(sequence, first..end, row_start, plan);
        if end == sequence.new.tokens.len() && sequence.generated() < sequence.new.max_tokens {
            push_sample(sequence, plan);
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

/// The row of the last token, from which the next one is sampled.
fn push_sample(sequence: &Sequence, plan: &mut StepPlan) {
    let history_start = plan.history.len();
    if sequence.new.sampling.needs_history() {
        plan.history.extend_from_slice(&sequence.new.tokens);
    }
    plan.logits.push(LogitsRow {
        sequence: sequence.new.id,
        row: plan.tokens.len() - 1,
        position: sequence.new.tokens.len(),
        task: LogitsTask::Sample {
            params: sequence.new.sampling.clone(),
            history: history_start..plan.history.len(),
            prompt_tokens: sequence.new.prompt_tokens,
        },
    });
}
