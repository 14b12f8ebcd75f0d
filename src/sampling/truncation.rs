//! Which tokens stay in the draw, and the draw. Nothing here sorts the vocabulary: a truncation
//! that keeps a mass looks for the last token it keeps by halving, as quickselect does, which is
//! linear.

use super::shortlist::Shortlist;
use super::softmax::{SUM_BLOCK, exp_nonpositive, sum_of_weights};
use crate::request::SamplingParams;
use crate::units::TokenId;
use std::cmp::Ordering;

/// A token that may be drawn.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    id: u32,
    logit: f32,
    /// exp(logit - largest), later exp((logit - largest) / temperature).
    weight: f32,
    /// What a truncation by surprise sorts by.
    surprise: f32,
}

/// Scratch for the candidates of one row.
pub(super) struct Candidates {
    /// Those still in the draw; ascending by id but for top-k's own work.
    kept: Vec<Candidate>,
    /// Those that a truncation ranks.
    ranked: Vec<Candidate>,
}

/// Few enough to be sorted.
const SORTED_MAX: usize = 64;
/// Tokens of a block that a draw passes at once.
const FEW: usize = 32;

/// Best first; the lower id first of equals.
fn by_logit(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id))
}

/// Least surprising first; of equals the better, then the lower id.
fn by_surprise(a: &Candidate, b: &Candidate) -> Ordering {
    a.surprise.total_cmp(&b.surprise).then_with(|| by_logit(a, b))
}

impl Candidates {
    pub(super) fn new(vocab_size: usize) -> Self {
        Self { kept: Vec::with_capacity(vocab_size), ranked: Vec::with_capacity(vocab_size) }
    }

    /// Truncates, applies the temperature and draws with a number in `[0, 1)`: tokens in ascending
    /// order of id share the unit interval by their probabilities.
    pub(super) fn choose(
        &mut self,
        logits: &[f32],
        best: TokenId,
        params: &SamplingParams,
        draw: f64,
    ) -> TokenId {
        let largest = logits[best.index()];
        let all = (0u32..).zip(logits.iter().copied());
        if params.top_k > 0 && params.top_k < logits.len() {
            self.choose_of_top_k(all, largest, params, draw)
        } else if params.truncates() {
            self.take_all(all);
            self.weigh(largest);
            let sum = if params.typical_p < 1.0 {
                self.keep_typical(largest, params.typical_p);
                self.sum()
            } else {
                sum_of_weights(logits, |logit| exp_nonpositive(logit - largest))
            };
            self.keep_likely(params, sum, 0.0);
            self.draw(params.temperature, draw)
        } else {
            draw_from_all(logits, largest, params.temperature, draw)
        }
    }

    /// The same from a part of the row, if what is not in it cannot matter.
    pub(super) fn choose_listed(
        &mut self,
        list: &Shortlist<'_>,
        params: &SamplingParams,
        (vocab_size, draw): (usize, f64),
    ) -> Option<TokenId> {
        let largest = list.largest();
        let listed = list.tokens.iter().map(|(id, logit)| (id.0, *logit));
        if params.top_k > 0 && params.top_k < vocab_size {
            let suffices = list.tokens.len() >= params.top_k;
            return suffices.then(|| self.choose_of_top_k(listed, largest, params, draw));
        }
        if params.typical_p < 1.0 || !params.truncates() {
            return None;
        }
        self.take_all(listed);
        self.weigh(largest);
        let others = list.weight_of_others(vocab_size);
        let is_certain = self.keep_likely(params, list.total, others);
        is_certain.then(|| self.draw(params.temperature, draw))
    }

    fn choose_of_top_k(
        &mut self,
        tokens: impl Iterator<Item = (u32, f32)>,
        largest: f32,
        params: &SamplingParams,
        draw: f64,
    ) -> TokenId {
        self.take_top_k(tokens, params.top_k);
        if params.truncates() {
            self.weigh(largest);
            if params.typical_p < 1.0 {
                self.keep_typical(largest, params.typical_p);
            }
            let sum = self.sum();
            self.keep_likely(params, sum, 0.0);
        }
        self.draw(params.temperature, draw)
    }

    fn take_all(&mut self, tokens: impl Iterator<Item = (u32, f32)>) {
        self.kept.clear();
        self.kept.extend(tokens.map(|(id, logit)| candidate(id, logit)));
    }

    /// Keeps the best `count`: what beats the worst of the kept is collected, and cut back to
    /// `count` whenever there are twice as many.
    fn take_top_k(&mut self, tokens: impl Iterator<Item = (u32, f32)>, count: usize) {
        let kept = &mut self.kept;
        kept.clear();
        let mut threshold = f32::NEG_INFINITY;
        for (id, logit) in tokens {
            // Of equals the lower id stays, and ids ascend.
            if logit <= threshold {
                continue;
            }
            kept.push(candidate(id, logit));
            if kept.len() == 2 * count {
                let (_, worst, _) = kept.select_nth_unstable_by(count - 1, by_logit);
                threshold = worst.logit;
                kept.truncate(count);
            }
        }
        if kept.len() > count {
            kept.select_nth_unstable_by(count - 1, by_logit);
            kept.truncate(count);
        }
        kept.sort_unstable_by_key(|candidate| candidate.id);
    }

    /// Weights are relative to the best logit of the row; what one truncation keeps is renormalised
    /// by measuring the next one's mass against the sum of the kept weights.
    fn weigh(&mut self, largest: f32) {
        for candidate in &mut self.kept {
            candidate.weight = exp_nonpositive(candidate.logit - largest);
        }
    }

    fn keep_typical(&mut self, largest: f32, typical_p: f32) {
        let sum = self.sum();
        self.measure_surprise(largest, sum);
        self.keep_mass(f64::from(typical_p) * sum, 0.0, by_surprise);
    }

    /// Top-p, its mass measured against `sum`, and min-p. Whether they would keep the same if there
    /// were more tokens, none heavier than `others`, whose weights are part of the sum.
    ///
    /// Min-p keeps a beginning of the ranking, as top-p does, so it may come first, with top-p's
    /// mass still measured against the sum before it: fewer are left to rank.
    fn keep_likely(&mut self, params: &SamplingParams, sum: f64, others: f32) -> bool {
        let mut is_certain = others == 0.0;
        if params.min_p > 0.0 {
            // Typical sampling may have dropped the best token of the row.
            let best = self.kept.iter().map(|c| c.weight).fold(0.0, f32::max);
            let least = params.min_p * best;
            self.kept.retain(|candidate| candidate.weight >= least);
            is_certain |= others < least;
        }
        if params.top_p < 1.0 {
            // All tokens lighter than this together weigh less than what top-p leaves out, so the
            // others reach the mass without them.
            let mass = f64::from(params.top_p) * sum;
            let lightest = (self.sum() - mass).max(0.0) / self.kept.len() as f64;
            is_certain |= self.keep_mass(mass, lightest as f32, by_logit);
        }
        is_certain
    }

    fn sum(&self) -> f64 {
        self.kept.iter().map(|candidate| f64::from(candidate.weight)).sum()
    }

    /// Locally typical sampling: the distance of a token's information content from the expected
    /// one, |-ln p - H|, with ln p = logit - largest - ln Σ weights.
    fn measure_surprise(&mut self, largest: f32, sum: f64) {
        let log_sum = sum.ln();
        let logprob = |candidate: &Candidate| f64::from(candidate.logit - largest) - log_sum;
        let entropy: f64 = self
            .kept
            .iter()
            .map(|candidate| -logprob(candidate) * f64::from(candidate.weight) / sum)
            .sum();
        for candidate in &mut self.kept {
            candidate.surprise = (-logprob(candidate) - entropy).abs() as f32;
        }
    }

    /// Keeps the fewest candidates, first by `order`, whose weights reach `mass`; at least one.
    /// Those lighter than `lightest` can't be among them. Whether the mass is reached.
    fn keep_mass(
        &mut self,
        mass: f64,
        lightest: f32,
        order: impl Fn(&Candidate, &Candidate) -> Ordering,
    ) -> bool {
        self.ranked.clear();
        // A little less, so that rounding never leaves out one that is needed.
        let lightest = lightest * 0.999;
        self.ranked.extend(self.kept.iter().filter(|candidate| candidate.weight >= lightest));
        let Some(last) = last_of_mass(&mut self.ranked, mass, &order) else { return false };
        self.kept.retain(|candidate| order(candidate, &last) != Ordering::Greater);
        true
    }

    fn draw(&mut self, temperature: f32, draw: f64) -> TokenId {
        // Typical sampling may have dropped the best token of the row.
        let largest = self.kept.iter().map(|c| c.logit).fold(f32::NEG_INFINITY, f32::max);
        for candidate in &mut self.kept {
            candidate.weight = exp_nonpositive((candidate.logit - largest) / temperature);
        }
        let mut left = draw * self.sum();
        let mut last = 0;
        for candidate in self.kept.iter().filter(|candidate| candidate.weight > 0.0) {
            left -= f64::from(candidate.weight);
            last = candidate.id;
            if left < 0.0 {
                break;
            }
        }
        // Rounding may leave a last bit of the interval to the last token.
        TokenId(last)
    }
}

/// The candidate with which the weights, summed in order, reach a mass; `None` if they don't.
/// Quickselect on weights: split at the middle, go on in the half where the mass is reached.
fn last_of_mass(
    mut ranked: &mut [Candidate],
    mass: f64,
    order: impl Fn(&Candidate, &Candidate) -> Ordering,
) -> Option<Candidate> {
    let weight = |candidate: &Candidate| f64::from(candidate.weight);
    let mut reached = 0.0;
    // The last candidate of a first half that reaches the mass, should its sum in another order,
    // and so rounded otherwise, not quite reach it.
    let mut at_latest = None;
    while ranked.len() > SORTED_MAX {
        let middle = ranked.len() / 2;
        let (first, last, _) = ranked.select_nth_unstable_by(middle, &order);
        let half = first.iter().map(weight).sum::<f64>() + weight(last);
        if reached + half >= mass {
            at_latest = Some(*last);
            ranked = &mut ranked[..=middle];
        } else {
            reached += half;
            ranked = &mut ranked[middle + 1..];
        }
    }
    ranked.sort_unstable_by(&order);
    for candidate in &*ranked {
        reached += weight(candidate);
        if reached >= mass {
            return Some(*candidate);
        }
    }
    at_latest
}

fn candidate(id: u32, logit: f32) -> Candidate {
    Candidate { id, logit, weight: 0.0, surprise: 0.0 }
}

/// The draw when no truncation is on: two passes over the row, nothing stored. The first pass sums,
/// the second skips whole blocks up to the one that holds the bound, and in it a few tokens at a
/// time. `kernels/src/draw.cu` does the same with the same bits.
fn draw_from_all(logits: &[f32], largest: f32, temperature: f32, draw: f64) -> TokenId {
    let weight = |logit: f32| exp_nonpositive((logit - largest) / temperature);
    let mut left = draw * sum_of_weights(logits, weight);
    for (start, block) in (0..).step_by(SUM_BLOCK).zip(logits.chunks(SUM_BLOCK)) {
        let mass = sum_of_weights(block, weight);
        if left >= mass {
            left -= mass;
            continue;
        }
        for (start, few) in (start..).step_by(FEW).zip(block.chunks(FEW)) {
            let mass: f64 = few.iter().map(|logit| f64::from(weight(*logit))).sum();
            if left >= mass {
                left -= mass;
                continue;
            }
            for (id, logit) in (start..).zip(few) {
                left -= f64::from(weight(*logit));
                if left < 0.0 {
                    return TokenId(id);
                }
            }
        }
    }
    // Rounding may leave a last bit of the interval to the last token that can be drawn.
    let last = logits.iter().rposition(|logit| weight(*logit) > 0.0);
    TokenId(last.unwrap_or(0) as u32)
}
