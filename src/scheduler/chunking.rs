//! How large a prefill chunk may be beside decoding streams. A chunk stretches the step that it
//! rides in, and with it every stream's inter-token time; this controller keeps the stretch within
//! a factor, whatever the machine.
//!
//! ```text
//! step       = decode(n) + Σ token(position)          over the prompt tokens in the step
//! decode(n)  = moving mean of steps without prompts, by power of two of the n sequences
//! token(p)   = moving mean of (step − decode(n)) / Σ predicted, by power of two of the position:
//!              attention makes a token dearer the deeper it lies
//! earned     = (slowdown − 1) · decode(n) per step, into an account
//! spent      = step − decode(n), as measured, out of the account
//! chunk      = min(account, earned) / token(p), at most twice the last one at such positions;
//!              if that is below the minimum: the minimum once the account holds it, else nothing
//! ```
//! The account is charged what chunks really took, so the mean stretch is the factor even where the
//! prediction errs. Deep in a prompt one token may cost more than a step earns: then it rides only
//! in every second or third step. When prompts never stop coming there is no step without them,
//! so after [`PROBE_STEPS`] two are kept free of them: `decode(n)` is measured, never
//! extrapolated. Only the second counts: the first still pays for the weights that a chunk's keys
//! and values pushed out of the caches, which the account is charged for too.
//!
//! Where weights stream to a GPU a chunk has a fixed part, from some width on: 40 tokens take as
//! long as 500, and more than a step earns. So what wide steps took is kept apart, of prompts alone
//! as well, or what they are expected to take where none was. Where they give four times the tokens
//! for the time, chunks are as wide as can be and come when the account holds what one costs.

use super::budget::ChunkBudget;

/// Weight of the newest measurement in a moving mean.
const NEWEST: f64 = 0.4;
/// Tokens from which a measurement has its whole weight: a prompt's last crumb says little.
const WHOLE_TOKENS: f64 = 4.0;
/// First chunk at a position, in minimal chunks.
const FIRST_CHUNKS: usize = 4;
/// Steps with prompts after which two without them measure the streams again: costs at most 1/16 of
/// the prompts' time.
const PROBE_STEPS: usize = 32;
/// A measurement beyond these factors of the mean counts as them: somebody else had the cores.
const OUTLIER: std::ops::RangeInclusive<f64> = 0.25..=2.0;
/// What tokens beside streams may cost, as a multiple of their cost in steps of their own, until
/// that was measured: large chunks are cheaper per token than small ones.
const BESIDE_FACTOR: f64 = 2.0;

/// A wide chunk, which is at least half of the widest, has to give so many times the tokens of
/// narrow ones for the same time.
const WIDE_GAIN: f64 = 4.0;
/// Earnings of so many steps are the most that a wide chunk may cost: no stream waits longer.
const WIDE_STEPS_MAX: f64 = 4.0;
/// Earnings of so many steps are the deepest debt: a stall of the machine is forgotten after that.
const DEBT_STEPS: f64 = 16.0;
/// Least part of a decode step that is earned, so that prompts always get on.
const EARNED_PART_MIN: f64 = 0.1;

const BUCKETS: usize = 16;
/// Positions that are not told apart: log2.
const POSITION_GRAIN: u32 = 6;
/// The same for wide chunks, the next of which begins no further than in the next bucket.
const WIDE_GRAIN: u32 = 10;

/// What a step consisted of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepMix {
    decodes: usize,
    /// Prompt tokens by the power of two of their position.
    prompt_tokens: [usize; BUCKETS],
}

impl StepMix {
    /// A step in which so many sequences decode one token each.
    pub fn of_decodes(decodes: usize) -> Self {
        Self { decodes, ..Self::default() }
    }

    /// Adds a chunk of a prompt that starts at `position`.
    pub fn add_chunk(&mut self, position: usize, tokens: usize) {
        self.prompt_tokens[position_bucket(position)] += tokens;
    }

    /// Sequences that decode.
    pub fn decodes(&self) -> usize {
        self.decodes
    }

    fn chunks(&self) -> impl Iterator<Item = (usize, usize)> {
        self.prompt_tokens.into_iter().enumerate().filter(|(_, tokens)| *tokens > 0)
    }
}

/// Bounds of a chunk.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ChunkLimits {
    /// Factor by which a chunk may stretch a step.
    pub slowdown_max: f64,
    /// Tokens of the smallest chunk.
    pub tokens_min: usize,
    /// Tokens of a whole step.
    pub step_tokens_max: usize,
}

/// Where a token's cost was measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// In steps of prompts only.
    Alone,
    /// In steps that decoded too.
    Beside,
}

/// What a prompt token costs at some positions.
#[derive(Clone, Copy, Debug)]
struct TokenCost {
    us: f64,
    source: Source,
    /// Largest chunk that the measurement speaks for.
    chunk_max: usize,
}

/// A step whose prompt tokens were at least half of the widest.
#[derive(Clone, Copy, Debug)]
struct WideStep {
    /// Moving mean of such steps, with the streams in them.
    us: f64,
    /// Prompt tokens of the last one.
    tokens: usize,
    /// Whether none was measured yet.
    is_guess: bool,
}

/// The controller. Pure: durations come in, chunk sizes go out.
#[derive(Clone, Debug)]
pub struct ChunkController {
    limits: ChunkLimits,
    /// Mean duration of decode-only steps in microseconds, by `ilog2` of their sequences.
    decode_us: [Option<f64>; BUCKETS],
    token_costs: [Option<TokenCost>; BUCKETS],
    /// By power of two of the position.
    wide: [Option<WideStep>; BUCKETS],
    /// Whether the last narrow chunk cost less than half of what it was thought to: such chunks
    /// have not shown yet what they can do.
    is_growing: bool,
    /// Steps with prompts and streams since the streams alone were measured.
    mixed_steps: usize,
    /// Whether the last step had streams only, so that the caches are theirs.
    warm: bool,
    /// Earned and not spent, in microseconds; below zero where a chunk took longer than predicted.
    account_us: f64,
}

impl ChunkController {
    /// A controller that has measured nothing yet.
    pub fn new(limits: ChunkLimits) -> Self {
        Self {
            limits,
            decode_us: [None; BUCKETS],
            token_costs: [None; BUCKETS],
            wide: [None; BUCKETS],
            is_growing: true,
            mixed_steps: 1,
            warm: false,
            account_us: 0.0,
        }
    }

    /// Knows how many tokens of prompts alone the machine is expected to compute per second, until
    /// that is measured.
    pub fn expecting(mut self, tokens_per_second: f64) -> Self {
        let tokens = self.limits.step_tokens_max;
        let us = 1e6 * tokens as f64 / tokens_per_second;
        self.wide[0] = Some(WideStep { us, tokens, is_guess: true });
        self
    }

    /// What the next step may spend on prompts beside `decodes` decoding sequences.
    pub fn budget(&self, decodes: usize) -> ChunkBudget {
        let tokens = self.limits.step_tokens_max.saturating_sub(decodes);
        if decodes == 0 {
            return ChunkBudget::prompts_only(tokens);
        }
        let measured = self.decode_us[decode_bucket(decodes)];
        let patience = if measured.is_some() { PROBE_STEPS } else { 1 };
        if self.mixed_steps >= patience {
            return ChunkBudget::default();
        }
        let decode_us = measured.or_else(|| self.nearest_decode_us(decodes)).unwrap_or(0.0);
        let earned_us = self.earned_us(decode_us);
        let account_us = self.account_us + earned_us;
        let step_us = account_us.min(earned_us);
        let tokens_min = self.limits.tokens_min.min(tokens);
        ChunkBudget { tokens, tokens_min, account_us, step_us, decode_us }
    }

    /// How many tokens from `position` on a budget pays for.
    pub fn affordable(&self, budget: &ChunkBudget, position: usize) -> usize {
        if budget.step_us.is_infinite() {
            return budget.tokens;
        }
        if budget.tokens_min > 0
            && let Some(wide_us) = self.wide_us(position, budget.decode_us)
        {
            return if budget.account_us >= wide_us { budget.tokens } else { 0 };
        }
        let (token_us, chunk_max) = match self.token_cost(position) {
            Some(cost) => (cost.us, cost.chunk_max),
            // Unknown ground is entered with the smallest chunk.
            None => (0.0, budget.tokens_min),
        };
        let paid = ((budget.step_us / token_us.max(1e-3)) as usize).min(chunk_max);
        let saved = budget.account_us >= token_us * budget.tokens_min as f64;
        match () {
            _ if paid >= budget.tokens_min => paid.min(budget.tokens),
            _ if saved => budget.tokens_min,
            _ => 0,
        }
    }

    /// What a wide chunk makes a step longer that takes `decode_us` without, where wide ones are to
    /// be preferred.
    fn wide_us(&self, position: usize, decode_us: f64) -> Option<f64> {
        let bucket = bucket_of(position, WIDE_GRAIN);
        let deeper = self.wide[bucket..].iter().find_map(|wide| *wide);
        let wide = deeper.or_else(|| self.wide[bucket.checked_sub(1)?])?;
        let earned_us = self.earned_us(decode_us);
        let wide_us = (wide.us - decode_us).max(0.0);
        let narrow_tokens = earned_us / self.token_cost(position)?.us;
        let gains = wide.tokens as f64 * earned_us >= WIDE_GAIN * wide_us * narrow_tokens;
        let pays = gains && wide_us <= WIDE_STEPS_MAX * earned_us && !self.is_growing;
        pays.then_some(wide_us)
    }

    /// Pays for tokens from `position` on.
    pub fn spend(&self, budget: &mut ChunkBudget, position: usize, tokens: usize) {
        let token_us = self.token_cost(position).map_or(0.0, |cost| cost.us);
        budget.spend(tokens, token_us);
    }

    /// Learns from a step that took `duration_us`.
    pub fn learn(&mut self, mix: &StepMix, duration_us: u64) {
        let tokens: usize = mix.prompt_tokens.iter().sum();
        let warm = std::mem::replace(&mut self.warm, mix.decodes > 0 && tokens == 0);
        if mix.decodes > 0 && tokens > 0 {
            self.mixed_steps += 1;
        }
        let duration_us = (duration_us as f64).max(1.0);
        let was_wide = self.learn_wide(mix, tokens, duration_us);
        match (mix.decodes, tokens) {
            (0, 0) => {}
            (0, tokens) => self.learn_alone(mix, duration_us / tokens as f64),
            (decodes, 0) => self.learn_decodes(decodes, duration_us, warm),
            (decodes, _) => {
                let Some(decode_us) = self.nearest_decode_us(decodes) else { return };
                let extra_us = duration_us - decode_us;
                if !was_wide {
                    let thought = |(bucket, tokens): (usize, usize)| {
                        self.token_costs[bucket].map_or(0.0, |cost| cost.us * tokens as f64)
                    };
                    self.is_growing = extra_us < mix.chunks().map(thought).sum::<f64>() / 2.0;
                    // One that was free proves only that twice as much may be tried.
                    self.learn_beside(mix, extra_us.max(self.earned_us(decode_us) / 2.0));
                }
                self.settle(decode_us, extra_us);
            }
        }
    }

    /// Learns what wide steps take; whether this was one that was wide by choice, and so says
    /// nothing of narrow ones.
    fn learn_wide(&mut self, mix: &StepMix, tokens: usize, duration_us: f64) -> bool {
        if 2 * tokens < self.limits.step_tokens_max {
            return false;
        }
        let decode_us = self.nearest_decode_us(mix.decodes).unwrap_or(0.0);
        let prefers_wide = |(bucket, _)| self.wide_us(first_position(bucket), decode_us).is_some();
        let was_wide = mix.chunks().all(prefers_wide);
        if let Some((deepest, _)) = mix.chunks().last() {
            let wide = &mut self.wide[bucket_of(first_position(deepest), WIDE_GRAIN)];
            let known = wide.filter(|wide| !wide.is_guess);
            let us = known.map_or(duration_us, |wide| moved(wide.us, duration_us, NEWEST));
            *wide = Some(WideStep { us, tokens, is_guess: false });
        }
        was_wide
    }

    /// The streams had the step to themselves.
    fn learn_decodes(&mut self, decodes: usize, duration_us: f64, warm: bool) {
        let mean = &mut self.decode_us[decode_bucket(decodes)];
        let mut late_us = 0.0;
        match mean {
            None => *mean = Some(duration_us),
            Some(mean) if warm => *mean = moved(*mean, duration_us, NEWEST),
            Some(mean) => late_us = (duration_us - *mean).max(0.0),
        }
        if warm || late_us == 0.0 {
            self.mixed_steps = 0;
        }
        self.settle(self.nearest_decode_us(decodes).unwrap_or(0.0), late_us);
    }

    /// Closes the account of a step. Savings never exceed what the dearest smallest chunk costs.
    fn settle(&mut self, decode_us: f64, spent_us: f64) {
        let earned_us = self.earned_us(decode_us);
        let dearest_us = self.token_costs.iter().flatten().map(|cost| cost.us).fold(0.0, f64::max);
        let wide_us = self.wide.iter().flatten().map(|wide| wide.us - decode_us);
        let wide_us = wide_us.filter(|us| *us <= WIDE_STEPS_MAX * earned_us).fold(0.0, f64::max);
        let saved_max_us = (dearest_us * self.limits.tokens_min as f64).max(wide_us);
        let account_us = self.account_us + earned_us - spent_us;
        self.account_us = account_us.min(saved_max_us).max(-DEBT_STEPS * earned_us);
    }

    fn earned_us(&self, decode_us: f64) -> f64 {
        (self.limits.slowdown_max - 1.0).max(EARNED_PART_MIN) * decode_us
    }

    /// Prompts had the step to themselves: their cost is a first guess for chunks beside streams.
    fn learn_alone(&mut self, mix: &StepMix, token_us: f64) {
        let chunk_max = self.limits.tokens_min * FIRST_CHUNKS;
        for (bucket, _) in mix.chunks() {
            let cost = &mut self.token_costs[bucket];
            if cost.is_none_or(|cost| cost.source == Source::Alone) {
                let us = BESIDE_FACTOR * token_us;
                *cost = Some(TokenCost { us, source: Source::Alone, chunk_max });
            }
        }
    }

    /// Chunks made a step `extra_us` longer: all their costs were wrong by the same factor.
    fn learn_beside(&mut self, mix: &StepMix, extra_us: f64) {
        let tokens: usize = mix.prompt_tokens.iter().sum();
        let mean_us = extra_us / tokens as f64;
        let measured = |cost: Option<TokenCost>| {
            cost.filter(|cost| cost.source == Source::Beside).map_or(mean_us, |cost| cost.us)
        };
        let predicted = |(bucket, tokens)| tokens as f64 * measured(self.token_costs[bucket]);
        let factor = extra_us / mix.chunks().map(predicted).sum::<f64>();
        for (bucket, tokens) in mix.chunks() {
            let us = measured(self.token_costs[bucket]);
            let weight = NEWEST * (tokens as f64 / WHOLE_TOKENS).min(1.0);
            let grown = match self.token_costs[bucket] {
                Some(cost) => cost.chunk_max - cost.chunk_max / 4,
                None => 0,
            };
            self.token_costs[bucket] = Some(TokenCost {
                us: moved(us, us * factor, weight),
                source: Source::Beside,
                chunk_max: grown.max(2 * tokens).max(self.limits.tokens_min),
            });
        }
    }

    /// Cost at a position: measured there; else deeper, which is dearer; else just before.
    fn token_cost(&self, position: usize) -> Option<TokenCost> {
        let bucket = position_bucket(position);
        let deeper = self.token_costs[bucket..].iter().find_map(|cost| *cost);
        deeper.or_else(|| self.token_costs[bucket.checked_sub(1)?])
    }

    /// Time of a step that only decodes so many sequences: measured, or of the nearest count.
    fn nearest_decode_us(&self, decodes: usize) -> Option<f64> {
        let wanted = decode_bucket(decodes);
        let measured = self.decode_us.iter().enumerate();
        let known = measured.filter_map(|(at, mean)| mean.map(|mean| (at, mean)));
        known.min_by_key(|(at, _)| at.abs_diff(wanted)).map(|(_, mean)| mean)
    }
}

fn decode_bucket(decodes: usize) -> usize {
    (decodes.max(1).ilog2() as usize).min(BUCKETS - 1)
}

fn position_bucket(position: usize) -> usize {
    bucket_of(position, POSITION_GRAIN)
}

fn bucket_of(position: usize, grain: u32) -> usize {
    (((position >> grain) + 1).ilog2() as usize).min(BUCKETS - 1)
}

/// The first position of a bucket.
fn first_position(bucket: usize) -> usize {
    ((1 << bucket) - 1) << POSITION_GRAIN
}

/// A moving mean after one more measurement.
fn moved(mean: f64, newest: f64, weight: f64) -> f64 {
    let newest = newest.clamp(OUTLIER.start() * mean, OUTLIER.end() * mean);
    mean + weight * (newest - mean)
}

#[cfg(test)]
#[path = "chunking_tests.rs"]
mod tests;
