//! Logit bias and the penalties on what was said already.

use crate::request::SamplingParams;
use crate::units::TokenId;

/// Applies bias and penalties and remembers the logits that it changed.
pub(super) struct Penalties {
    /// `[vocab_size]`: 0, or 1 + the place in `changed` of a token whose logit was changed.
    places: Vec<u32>,
    /// Tokens changed in this row with their logits before.
    changed: Vec<(TokenId, f32)>,
    /// `[vocab_size]`, all 0 between uses: occurrences, or lengths of repeats.
    counts: Vec<u32>,
    /// Tokens with a count.
    counted: Vec<TokenId>,
    /// The history backwards, for DRY.
    backwards: Vec<TokenId>,
    /// `[backwards.len()]`, how long the text before each place repeats the text's end.
    repeats: Vec<u32>,
}

/// Largest DRY penalty: enough to rule a token out, small enough to stay finite.
const DRY_PENALTY_MAX: f32 = 1e30;

impl Penalties {
    pub(super) fn new(vocab_size: usize) -> Self {
        Self {
            places: vec![0; vocab_size],
            changed: Vec::with_capacity(vocab_size),
            counts: vec![0; vocab_size],
            counted: Vec::with_capacity(vocab_size),
            backwards: Vec::new(),
            repeats: Vec::new(),
        }
    }

    /// The logit of a token before [`Penalties::apply`] changed it, if it did.
    pub(super) fn original(&self, id: TokenId) -> Option<f32> {
        let place = *self.places.get(id.index())?;
        Some(self.changed.get((place as usize).checked_sub(1)?)?.1)
    }

    /// Changes a row in place. `generated` is the end of `history` that isn't the prompt.
    pub(super) fn apply(
        &mut self,
        logits: &mut [f32],
        params: &SamplingParams,
        history: &[TokenId],
        generated: &[TokenId],
    ) {
        for (id, _) in self.changed.drain(..) {
            self.places[id.index()] = 0;
        }
        for (id, bias) in &params.logit_bias {
            self.change(logits, *id, |logit| logit + bias);
        }
        if params.repetition_penalty != 1.0 {
            self.punish_repetition(logits, params, history);
        }
        if params.frequency_penalty != 0.0 || params.presence_penalty != 0.0 {
            self.punish_frequency(logits, params, generated);
        }
        if params.dry.multiplier != 0.0 {
            self.punish_repeats(logits, params, history);
        }
    }

    /// Changes one logit; ids beyond the vocabulary are none of the model's tokens.
    fn change(&mut self, logits: &mut [f32], id: TokenId, new: impl FnOnce(f32) -> f32) {
        let Some(logit) = logits.get_mut(id.index()) else { return };
        if self.places[id.index()] == 0 {
            self.changed.push((id, *logit));
            self.places[id.index()] = self.changed.len() as u32;
        }
        *logit = new(*logit).clamp(f32::MIN, f32::MAX);
    }

    /// Counts tokens into `counts`.
    fn count(&mut self, tokens: &[TokenId]) {
        for id in tokens {
            let Some(count) = self.counts.get_mut(id.index()) else { continue };
            if *count == 0 {
                self.counted.push(*id);
            }
            *count += 1;
        }
    }

    /// Takes the counted tokens out, one by one, with their counts.
    fn next_counted(&mut self) -> Option<(TokenId, u32)> {
        let id = self.counted.pop()?;
        Some((id, std::mem::take(&mut self.counts[id.index()])))
    }

    /// CTRL's penalty (arXiv 1909.05858): a seen token's logit is divided if positive and
    /// multiplied if negative.
    fn punish_repetition(&mut self, logits: &mut [f32], params: &SamplingParams, all: &[TokenId]) {
        let last_n = params.penalty_last_n.unwrap_or(usize::MAX);
        self.count(&all[all.len().saturating_sub(last_n)..]);
        let penalty = params.repetition_penalty;
        while let Some((id, _)) = self.next_counted() {
            self.change(
                logits,
                id,
                |logit| {
                    if logit > 0.0 { logit / penalty } else { logit * penalty }
                },
            );
        }
    }

    fn punish_frequency(
        &mut self,
        logits: &mut [f32],
        params: &SamplingParams,
        generated: &[TokenId],
    ) {
        self.count(generated);
        while let Some((id, count)) = self.next_counted() {
            let penalty = count as f32 * params.frequency_penalty + params.presence_penalty;
            self.change(logits, id, |logit| logit - penalty);
        }
    }

    /// DRY: where the text's end has stood before, what followed there is punished, the more the
    /// longer the repeat. Linear in the history.
    fn punish_repeats(&mut self, logits: &mut [f32], params: &SamplingParams, all: &[TokenId]) {
        let dry = &params.dry;
        let last_n = dry.last_n.unwrap_or(usize::MAX);
        let window = &all[all.len().saturating_sub(last_n)..];
        self.backwards.clear();
        self.backwards.extend(window.iter().rev());
        let breaks = |id: &TokenId| params.dry_breaker_tokens.binary_search(id).is_ok();
        // No repeat reaches across a breaker, so none is longer than the text after the last one.
        let longest = self.backwards.iter().position(breaks).unwrap_or(self.backwards.len());
        let allowed = dry.allowed_length.max(1);
        if longest < allowed {
            return;
        }
        self.find_repeats();
        for at in 1..self.backwards.len() {
            let length = (self.repeats[at] as usize).min(longest);
            let followed_by = self.backwards[at - 1];
            let Some(count) = self.counts.get_mut(followed_by.index()) else { continue };
            if length >= allowed {
                if *count == 0 {
                    self.counted.push(followed_by);
                }
                *count = (*count).max(length as u32);
            }
        }
        while let Some((id, length)) = self.next_counted() {
            let power = dry.base.powf((length as usize - allowed) as f32);
            let penalty = (dry.multiplier * power).min(DRY_PENALTY_MAX);
            self.change(logits, id, |logit| logit - penalty);
        }
    }

    /// Z-algorithm: `repeats[i]` is the length of the longest common prefix of `backwards` and
    /// `backwards[i..]`.
    fn find_repeats(&mut self) {
        let text = &self.backwards;
        self.repeats.clear();
        self.repeats.resize(text.len(), 0);
        let (mut left, mut right) = (0, 0);
        for at in 1..text.len() {
            let known = if at < right { self.repeats[at - left] as usize } else { 0 };
            let mut length = known.min(right.saturating_sub(at));
            while at + length < text.len() && text[length] == text[at + length] {
                length += 1;
            }
            self.repeats[at] = length as u32;
            if at + length > right {
                (left, right) = (at, at + length);
            }
        }
    }
}
