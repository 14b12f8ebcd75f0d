//! What a finished, or a lost, step changes.

use super::sequence::State;
use super::{Scheduler, SequenceEvent, SequenceEventKind};
use crate::request::{FinishReason, RequestError};
use crate::step::{RowFailure, RowOutput, StepOutput, StepPlan};
use crate::units::SequenceId;

impl Scheduler {
    /// Takes in the output of the plan that [`Scheduler::plan_step`] gave last.
    pub fn apply(
        &mut self,
        now_us: u64,
        plan: &StepPlan,
        output: &StepOutput,
        events: &mut Vec<SequenceEvent>,
    ) {
        if let Some(error) = &output.refusal {
            for planned in &plan.sequences {
                self.fail(now_us, planned.id, error.clone(), events);
            }
            return;
        }
        self.chunks.learn(&self.mix, output.duration_us);
        let waited_for = !plan.logits.is_empty();
        let before_too = std::mem::replace(&mut self.was_waited_for, waited_for);
        if self.mix.decodes() == 0 && waited_for && before_too {
            self.costs.learn_prompt(plan.tokens.len(), output.duration_us);
        }
        if self.mix.decodes() == plan.tokens.len() {
            self.learn_width(plan.tokens.len(), output.duration_us);
        }
        for planned in &plan.sequences {
            let sequence = self.sequences.get(&planned.id);
            let drafted = sequence.map_or(0, |sequence| sequence.draft.planned().len());
            self.advance(planned.id, planned.tokens.len() - drafted, events);
        }
        for failure in &output.failures {
            if self.is_certain(*failure) {
                self.fail_row(now_us, *failure, events);
            }
        }
        for rows in output.rows.chunk_by(|row, next| row.sequence == next.sequence) {
            self.take_rows(now_us, rows, events);
        }
        for planned in &plan.sequences {
            // Only the prompt was wanted.
            let done = self.sequences.get(&planned.id).is_some_and(|s| s.remaining() == 0);
            if done {
                events.push(self.finish(now_us, planned.id, FinishReason::Length));
            }
        }
    }

    /// No executor has taken the step that was planned last: nobody in it is to blame if the
    /// executor is lost now.
    pub fn step_not_run(&mut self) {
        for sequence in self.sequences.values_mut() {
            sequence.planned_tokens = 0;
        }
    }

    /// The executor died and all KV with it: every sequence is computed again, from the queue.
    /// Those in the step in flight are suspects; at the limit of crashes they fail.
    pub fn executor_lost(&mut self, now_us: u64, events: &mut Vec<SequenceEvent>) {
        self.tiers.clear();
        self.flights.clear();
        self.disk_stopped = false;
        self.running.clear();
        self.queue.clear();
        let mut suspects = Vec::new();
        for (id, sequence) in &mut self.sequences {
            sequence.blocks.clear();
            sequence.below.clear();
            sequence.copies = 0;
            if sequence.state == State::Running {
                sequence.queued_us = now_us;
            }
            sequence.requeue(sequence.queued_us);
            self.queue.push(*id);
            if std::mem::take(&mut sequence.planned_tokens) > 0 {
                suspects.push(*id);
            }
        }
        suspects.sort_unstable();
        for id in suspects {
            let Some(sequence) = self.sequences.get_mut(&id) else { continue };
            sequence.new.crashes += 1;
            let crashes = sequence.new.crashes;
            let kind = if crashes >= self.options.crashes_max {
                self.remove(id);
                self.note_end(now_us);
                SequenceEventKind::Failed(RequestError::PoisonRequest { crashes })
            } else {
                SequenceEventKind::Interrupted { crashes }
            };
            events.push(SequenceEvent { sequence: id, kind });
        }
    }

    /// Counts computed tokens and makes full blocks findable.
    pub(super) fn advance(
        &mut self,
        id: SequenceId,
        tokens: usize,
        events: &mut Vec<SequenceEvent>,
    ) {
        let block_tokens = self.options.block_tokens;
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        sequence.planned_tokens = 0;
        sequence.computed += tokens;
        if sequence.generated() == 0 {
            let total = sequence.new.prompt_tokens;
            let cached_tokens = sequence.cached_tokens.unwrap_or(0);
            let kind = SequenceEventKind::Prefill { done: sequence.computed, total, cached_tokens };
            events.push(SequenceEvent { sequence: id, kind });
        }
        let Some(hasher) = &self.hasher else { return };
        let full = sequence.computed / block_tokens;
        if full <= sequence.published {
            return;
        }
        hasher.extend(&mut sequence.hashes, &sequence.new.tokens, block_tokens);
        for index in sequence.published..full {
            let parent = index.checked_sub(1).map(|before| sequence.hashes[before]);
            let tokens = &sequence.new.tokens[index * block_tokens..][..block_tokens];
            self.tiers.device.publish(
                sequence.blocks[index],
                sequence.hashes[index],
                parent,
                tokens,
            );
        }
        sequence.published = full;
    }

    fn fail_row(&mut self, now_us: u64, failure: RowFailure, events: &mut Vec<SequenceEvent>) {
        let RowFailure { sequence, position } = failure;
        self.fail(now_us, sequence, RequestError::NumericError { position }, events);
    }

    pub(super) fn fail(
        &mut self,
        now_us: u64,
        sequence: SequenceId,
        error: RequestError,
        events: &mut Vec<SequenceEvent>,
    ) {
        if self.remove(sequence).is_some() {
            self.note_end(now_us);
            let kind = SequenceEventKind::Failed(error);
            events.push(SequenceEvent { sequence, kind });
        }
    }

    /// A scored prompt token or a new one.
    pub(super) fn take_row(
        &mut self,
        now_us: u64,
        row: &RowOutput,
        events: &mut Vec<SequenceEvent>,
    ) {
        let (id, token) = (row.sequence, row.token.id);
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        if row.position < sequence.new.tokens.len() {
            sequence.scored = row.position + 1;
            let kind = SequenceEventKind::PromptScore(row.clone());
            events.push(SequenceEvent { sequence: id, kind });
            return;
        }
        if sequence.new.end_tokens.contains(&token) {
            events.push(self.finish(now_us, id, FinishReason::Stop));
            return;
        }
        sequence.new.tokens.push(token);
        self.stats.tokens_generated += 1;
        let full = sequence.is_full(self.options.context_tokens);
        events.push(SequenceEvent { sequence: id, kind: SequenceEventKind::Token(row.clone()) });
        if full {
            events.push(self.finish(now_us, id, FinishReason::Length));
        }
    }
}
