//! What a row of logits has in all: plain loops over independent lanes, which the compiler turns
//! into SIMD for each instruction set. None of them may fuse a multiplication and an addition, so
//! all have the same bits.

/// Independent partial results; as many as the widest register has lanes of f32.
const LANES: usize = 16;

/// Entries whose weights are summed in f32 before they go into an f64: few enough to keep f32's
/// precision.
pub const SUM_BLOCK: usize = 64 * LANES;

/// exp for `x <= 0`, with a relative error below 2e-7; 0 below -87, where f32's normal range ends.
/// exp(x) = 2^n · exp(r), n = round(x / ln 2), |r| <= ln 2 / 2, and Taylor's series to r^7.
#[inline(always)]
pub fn exp_nonpositive(x: f32) -> f32 {
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

/// Σ weight(entry).
#[inline(always)]
pub fn sum_of_weights(row: &[f32], weight: impl Fn(f32) -> f32) -> f64 {
    let mut sum = 0.0f64;
    for block in row.chunks(SUM_BLOCK) {
        let mut lanes = [0.0f32; LANES];
        let (chunks, rest) = block.as_chunks::<LANES>();
        for chunk in chunks {
            for lane in 0..LANES {
                lanes[lane] += weight(chunk[lane]);
            }
        }
        for (lane, entry) in rest.iter().enumerate() {
            lanes[lane] += weight(*entry);
        }
        sum += lanes.iter().map(|lane| f64::from(*lane)).sum::<f64>();
    }
    sum
}

/// The largest entry; NaN if any is NaN or infinite; −∞ for an empty row.
#[inline(always)]
pub(crate) fn largest_finite(row: &[f32]) -> f32 {
    let mut largest = [f32::NEG_INFINITY; LANES];
    // A finite value times 0 is ±0; NaN and infinities leave NaN.
    let mut spoiled = [0.0f32; LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            largest[lane] = largest[lane].max(chunk[lane]);
            spoiled[lane] += chunk[lane] * 0.0;
        }
    }
    for (lane, entry) in rest.iter().enumerate() {
        largest[lane] = largest[lane].max(*entry);
        spoiled[lane] += entry * 0.0;
    }
    let all = largest.into_iter().fold(f32::NEG_INFINITY, f32::max);
    if spoiled.iter().all(|lane| *lane == 0.0) { all } else { f32::NAN }
}

/// `Σ e^(row[i] − largest)`, where no entry is larger.
#[inline(always)]
pub(crate) fn sum_exp_below(row: &[f32], largest: f32) -> f64 {
    sum_of_weights(row, |entry| exp_nonpositive(entry - largest))
}

/// The specifications, and the same for an instruction set.
pub(crate) mod scalar {
    /// See [`super::largest_finite`].
    ///
    /// # Safety
    /// None is needed; the signature is the table's.
    pub(crate) unsafe fn largest_finite(row: &[f32]) -> f32 {
        super::largest_finite(row)
    }

    /// See [`super::sum_exp_below`].
    ///
    /// # Safety
    /// None is needed; the signature is the table's.
    pub(crate) unsafe fn sum_exp_below(row: &[f32], largest: f32) -> f64 {
        super::sum_exp_below(row, largest)
    }
}

/// The same, inlined into functions of an instruction set.
#[cfg(target_arch = "x86_64")]
pub(crate) mod simd {
    use crate::lanes::Lanes;

    /// See [`super::largest_finite`].
    ///
    /// # Safety
    /// None is needed; the signature is the table's.
    #[inline(always)]
    pub(crate) unsafe fn largest_finite<L: Lanes>(row: &[f32]) -> f32 {
        super::largest_finite(row)
    }

    /// See [`super::sum_exp_below`].
    ///
    /// # Safety
    /// None is needed; the signature is the table's.
    #[inline(always)]
    pub(crate) unsafe fn sum_exp_below<L: Lanes>(row: &[f32], largest: f32) -> f64 {
        super::sum_exp_below(row, largest)
    }
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
