//! Drafts in steps: a decoding sequence may have proposed tokens behind its last one in the step,
//! with a row to sample from for each. Rows count up to the first that gives another token than was
//! proposed. What was written behind it into the sequence's blocks is written again when these
//! positions come, so nothing else has to be undone.
//!
//! ```text
//! no drafts beside prompts, which are wide already; not more tokens than may still be said
//! no block for a draft that a running sequence will want soon: nobody yields to a draft
//! ```

use super::Scheduler;
use super::sequence::{Sequence, SequenceEvent, SequenceEventKind};
use crate::kv::blocks_for;
use crate::request::RequestError;
use crate::speculative::{DraftLengths, SpeculationOptions, agreeing};
use crate::step::{RowFailure, RowOutput};
use crate::units::SequenceId;

/// Tokens in which is looked up for all sequences of a step together: nothing else runs meanwhile,
/// and these take some tens of microseconds.
const LOOKUP_TOKENS: usize = 1 << 16;

/// What the scheduler needs to speculate.
pub(super) struct Speculation {
    options: SpeculationOptions,
    lengths: DraftLengths,
}

impl Speculation {
    pub fn new(options: SpeculationOptions) -> Self {
        Self { options, lengths: DraftLengths::new(options.draft_max) }
    }
}

impl Scheduler {
    /// Proposes tokens for the sequences that decode in this step, and plans as many as pay.
    pub(super) fn plan_drafts(&mut self, decoding: &[SequenceId]) {
        let Some(mut speculation) = self.speculation.take() else { return };
        let Speculation { options, lengths } = &mut speculation;
        let width_max = options.width_max(decoding.len()).min(self.options.chunks.step_tokens_max);
        let has_room = decoding.len() < width_max && !self.has_prompts();
        let window = LOOKUP_TOKENS / decoding.len().max(1);
        lengths.clear();
        for (index, id) in decoding.iter().enumerate() {
            let Some(sequence) = self.sequences.get_mut(id) else { continue };
            sequence.draft.clear();
            if has_room {
                let room = sequence.room(self.options.context_tokens).saturating_sub(1);
                let count = options.draft_max.min(room);
                let tokens = &sequence.new.tokens;
                let tokens = &tokens[tokens.len().saturating_sub(window)..];
                sequence.draft.propose(&options.lookup, tokens, count);
                sequence.draft.end_before(&sequence.new.end_tokens);
                lengths.offer(index, sequence.draft.chances());
            }
        }
        for index in lengths.choose(decoding.len(), width_max) {
            if let Some(sequence) = self.sequences.get_mut(&decoding[index]) {
                sequence.draft.plan(sequence.draft.planned().len() + 1);
            }
        }
        self.speculation = Some(speculation);
    }

    /// Whether prompts are in the running set.
    fn has_prompts(&self) -> bool {
        let mut running = self.running.iter().map(|id| &self.sequences[id]);
        running.any(|sequence| sequence.is_ready() && !sequence.is_decoding())
    }

    /// Blocks for a sequence's planned draft behind its next token, for which it has one; shortens
    /// the draft where these would be taken from somebody. How many tokens it has then.
    pub(super) fn reserve_draft(&mut self, id: SequenceId) -> usize {
        let block_tokens = self.options.block_tokens;
        loop {
            let Some(sequence) = self.sequences.get(&id) else { return 0 };
            let drafted = sequence.draft.planned().len();
            let covered = sequence.blocks.len() * block_tokens;
            let room = covered.saturating_sub(sequence.new.tokens.len());
            if drafted <= room {
                return drafted;
            }
            let block = (self.spare_blocks() > 0).then(|| self.tiers.device.allocate()).flatten();
            let Some(sequence) = self.sequences.get_mut(&id) else { return 0 };
            match block {
                Some(block) => sequence.blocks.push(block),
                None => sequence.draft.plan(room),
            }
        }
    }

    /// Device blocks that no running sequence wants soon.
    fn spare_blocks(&self) -> usize {
        let wanted: usize = self.running.iter().map(|id| self.lacking_soon(*id)).sum();
        self.tiers.device.available().saturating_sub(wanted)
    }

    /// Takes in the rows of one sequence, in the order of their positions.
    pub(super) fn take_rows(
        &mut self,
        now_us: u64,
        rows: &[RowOutput],
        events: &mut Vec<SequenceEvent>,
    ) {
        let Some(id) = rows.first().map(|row| row.sequence) else { return };
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        let first = sequence.new.tokens.len();
        let drafted = sequence.draft.planned().len();
        if drafted == 0 {
            // Rows of scores, a sampled one, or both.
            let sampled = rows.iter().filter(|row| row.position >= first).map(|row| row.token.id);
            sequence.draft.learn(sampled);
            sequence.draft.clear();
            rows.iter().for_each(|row| self.take_row(now_us, row, events));
            return;
        }
        // One that is missing has failed, and so have all behind it, as far as they matter.
        let whole = rows.iter().enumerate().take_while(|(at, row)| row.position == first + at);
        let whole = whole.count();
        let sampled = rows[..whole].iter().map(|row| row.token.id);
        let accepted = agreeing(sequence.draft.planned(), sampled.clone());
        sequence.draft.learn(sampled.take(accepted + 1));
        self.stats.draft_tokens += drafted as u64;
        self.stats.draft_tokens_accepted += accepted as u64;
        let kind = SequenceEventKind::Drafted { tokens: drafted, accepted };
        events.push(SequenceEvent { sequence: id, kind });
        for (index, row) in rows[..whole.min(accepted + 1)].iter().enumerate() {
            self.take_row(now_us, row, events);
            if index < accepted {
                // It is in the step already.
                self.advance(id, 1, events);
            }
        }
        if whole == accepted {
            let position = first + whole;
            self.fail(now_us, id, RequestError::NumericError { position }, events);
        }
        self.end_run(id);
    }

    /// Whether a failed row matters whatever the rows before it say: not if it is a drafted one's.
    pub(super) fn is_certain(&self, failure: RowFailure) -> bool {
        let RowFailure { sequence, position } = failure;
        let sequence = self.sequences.get(&sequence);
        sequence.is_none_or(|s| s.draft.planned().is_empty() || position <= s.new.tokens.len())
    }

    /// Gives back the blocks that only the draft was for.
    fn end_run(&mut self, id: SequenceId) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        sequence.draft.clear();
        let kept = blocks_for(sequence.new.tokens.len(), self.options.block_tokens);
        while sequence.blocks.len() > kept {
            let block = sequence.blocks.pop();
            block.into_iter().for_each(|block| self.tiers.device.release(block));
        }
    }

    /// Learns what a step took in which every token was of a sequence that decodes.
    pub(super) fn learn_width(&mut self, tokens: usize, duration_us: u64) {
        if let Some(speculation) = &mut self.speculation {
            speculation.lengths.times_mut().learn(tokens, duration_us);
        }
    }

    /// Tokens of the longest draft.
    pub(super) fn draft_max(&self) -> usize {
        self.speculation.as_ref().map_or(0, |speculation| speculation.options.draft_max)
    }
}

impl Sequence {
    /// Tokens that may still be said.
    fn room(&self, context_tokens: usize) -> usize {
        let longest = self.new.prompt_tokens.saturating_add(self.new.max_tokens);
        longest.min(context_tokens).saturating_sub(self.new.tokens.len())
    }
}
