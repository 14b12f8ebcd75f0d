//! The model's own distribution: best token, log of the sum of exponentials, the most likely few.
//! Plain loops over independent lanes, which the compiler turns into SIMD for whatever machine.

use super::NonFinite;
use crate::step::TokenLogprob;
use crate::units::TokenId;

/// Independent partial results; more than the widest SIMD register has lanes of f32.
const LANES: usize = 16;

/// What one pass over a row finds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Row {
    /// The token with the largest logit, the first of equals.
    pub best: TokenId,
    /// ln Σ exp(logit).
    pub log_sum: f32,
}

/// exp for `x <= 0`, with a relative error below 2e-7; 0 below -87, where f32's normal range ends.
/// exp(x) = 2^n · exp(r), n = round(x / ln 2), |r| <= ln 2 / 2, and Taylor's series to r^7.
#[inline(always)]
pub(super) fn exp_nonpositive(x: f32) -> f32 {
    /// Adding it leaves an integer in the low bits: 1.5 · 2^23.
    const ROUND: f32 = 12_582_912.0;
    /// ln 2 in two parts; the first has few bits, so that n times it is exact.
    const LN2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    let clamped = x.max(-87.0);
    let rounded = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = (clamped - n * LN2[0]) - n * LN2[1];
    let series = 1.0 / 5040.0;
    let series = series * r + 1.0 / 720.0;
    let series = series * r + 1.0 / 120.0;
    let series = series * r + 1.0 / 24.0;
    let series = series * r + 1.0 / 6.0;
    let series = series * r + 0.5;
    let series = (series * r + 1.0) * r + 1.0;
    // The low bits of `rounded` are n in two's complement; moved up, they add to the exponent.
    let power = f32::from_bits(series.to_bits().wrapping_add(rounded.to_bits() << 23));
    if x < -87.0 { 0.0 } else { power }
}

/// The largest value and whether all are finite, in one pass.
fn largest(values: &[f32]) -> (f32, bool) {
    let mut largest = [f32::NEG_INFINITY; LANES];
    // A finite value times 0 is ±0; NaN and infinities leave NaN.
    let mut spoiled = [0.0f32; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            largest[lane] = largest[lane].max(chunk[lane]);
            spoiled[lane] += chunk[lane] * 0.0;
        }
    }
    for (lane, value) in rest.iter().enumerate() {
        largest[lane] = largest[lane].max(*value);
        spoiled[lane] += value * 0.0;
    }
    let all = largest.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    (all, spoiled.iter().all(|lane| *lane == 0.0))
}

fn first_equal(values: &[f32], wanted: f32) -> TokenId {
    let at = values.iter().position(|value| *value == wanted);
    TokenId(at.unwrap_or(0) as u32)
}

/// The token with the largest value, the first of equals.
pub(super) fn best(logits: &[f32]) -> TokenId {
    first_equal(logits, largest(logits).0)
}

/// Best token and log-sum of a row.
pub(super) fn measure(logits: &[f32]) -> Result<Row, NonFinite> {
    let (largest, finite) = largest(logits);
    if !finite || logits.is_empty() {
        let at = logits.iter().position(|logit| !logit.is_finite()).unwrap_or(0);
        let value = logits.get(at).copied().unwrap_or(f32::NAN);
        return Err(NonFinite { token: TokenId(at as u32), value });
    }
    let sum = sum_of_weights(logits, |logit| exp_nonpositive(logit - largest));
    let log_sum = (f64::from(largest) + sum.ln()) as f32;
    Ok(Row { best: first_equal(logits, largest), log_sum })
}

/// Logits whose weights are summed in f32 before they go into an f64: few enough to keep f32's
/// precision.
pub(super) const SUM_BLOCK: usize = 64 * LANES;

/// Σ weight(logit).
#[inline(always)]
pub(super) fn sum_of_weights(logits: &[f32], weight: impl Fn(f32) -> f32) -> f64 {
    let mut sum = 0.0f64;
    for block in logits.chunks(SUM_BLOCK) {
        let mut lanes = [0.0f32; LANES];
        let (chunks, rest) = block.as_chunks::<LANES>();
        for chunk in chunks {
            for lane in 0..LANES {
                lanes[lane] += weight(chunk[lane]);
            }
        }
        for (lane, logit) in rest.iter().enumerate() {
            lanes[lane] += weight(*logit);
        }
        sum += lanes.iter().map(|lane| f64::from(*lane)).sum::<f64>();
    }
    sum
}

/// The `count` most likely tokens, best first, the lower id first of equals; they come ascending by
/// id. One pass; an insertion only for a logit that beats the worst kept.
pub(super) fn top(
    logits: impl ExactSizeIterator<Item = (TokenId, f32)>,
    count: usize,
    log_sum: f32,
) -> Vec<TokenLogprob> {
    let count = count.min(logits.len());
    let mut kept: Vec<TokenLogprob> = Vec::with_capacity(count);
    if count == 0 {
        return kept;
    }
    let mut worst = f32::NEG_INFINITY;
    for (id, logit) in logits {
        if logit <= worst {
            continue;
        }
        if kept.len() == count {
            kept.pop();
        }
        let at = kept.partition_point(|token| token.logprob >= logit);
        kept.insert(at, TokenLogprob { id, logprob: logit });
        if kept.len() == count {
            worst = kept[count - 1].logprob;
        }
    }
    for token in &mut kept {
        token.logprob -= log_sum;
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fast_exponential_is_within_its_error() {
        for step in 0..=870_000 {
            let x = -(step as f32) * 1e-4;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp_nonpositive(x)) - exact).abs() / exact;
            assert!(error < 2e-7, "exp({x}) is off by {error}");
        }
        assert_eq!((exp_nonpositive(0.0), exp_nonpositive(-1e9)), (1.0, 0.0));
    }
}
