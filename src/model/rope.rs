//! Rotary position embedding (arXiv 2104.09864) as data, and the frequencies that follow from it.

use super::TensorRef;
use std::f64::consts::PI;

/// Which two elements of a head turn together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeStyle {
    /// Elements `2i` and `2i + 1`. Llama's GGUF files have their query and key rows permuted for
    /// it.
    Interleaved,
    /// Elements `i` and `i + dims / 2`.
    HalfSplit,
}

/// How positions beyond the original training length are squeezed into it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All frequencies divided by `factor` (arXiv 2306.15595).
    Linear {
        /// Context extension.
        factor: f32,
    },
    /// Low frequencies divided by `factor`, high ones kept, a ramp between (arXiv 2309.00071).
    Yarn {
        /// Context extension.
        factor: f32,
        /// Training length before the extension, in tokens.
        original_context_tokens: usize,
        /// Turns within the original context above which a frequency is kept.
        beta_fast: f32,
        /// Turns below which it is divided by `factor`.
        beta_slow: f32,
    },
}

/// Rotary position embedding of one layer: pair i of position p turns by `p * frequencies()[i]`,
/// and the result is multiplied by `magnitude()`. Elements from `dims` on stay as they are.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeSpec {
    /// Which elements form a pair.
    pub style: RopeStyle,
    /// How many leading elements of a head turn; even.
    pub dims: usize,
    /// Pair i has the frequency `base^(-2i / dims)` before scaling.
    pub base: f32,
    /// Context extension.
    pub scaling: RopeScaling,
    /// `[dims / 2]` divisors of the frequencies (Llama 3's own scaling).
    pub frequency_factors: Option<TensorRef>,
    /// Further factor on the rotated elements, usually 1.
    pub attention_factor: f32,
}

impl RopeSpec {
    /// `[dims / 2]` radians per position of each pair, with all scaling applied. `factors` are the
    /// values of `frequency_factors`; missing ones count as 1.
    pub fn frequencies(&self, factors: Option<&[f32]>) -> Vec<f32> {
        let base = f64::from(self.base);
        let frequency = |pair: usize| {
            let plain = base.powf(-2.0 * pair as f64 / self.dims as f64);
            let divisor =
                factors.and_then(|factors| factors.get(pair)).map_or(1.0, |f| f64::from(*f));
            let plain = plain / divisor;
            let scaled = match self.scaling {
                RopeScaling::None => plain,
                RopeScaling::Linear { factor } => plain / f64::from(factor),
                RopeScaling::Yarn { factor, .. } => {
                    let kept = self.kept_share(pair);
                    plain * kept + plain / f64::from(factor) * (1.0 - kept)
                }
            };
            scaled as f32
        };
        (0..self.dims / 2).map(frequency).collect()
    }

    /// What rotated elements are multiplied by: `attention_factor`, and under YaRN also
    /// `0.1 ln(factor) + 1` (section 3.4 of the paper).
    pub fn magnitude(&self) -> f32 {
        match self.scaling {
            RopeScaling::Yarn { factor, .. } if factor > 1.0 => {
                self.attention_factor * (0.1 * factor.ln() + 1.0)
            }
            _ => self.attention_factor,
        }
    }

    /// YaRN's ramp: 1 where a pair's frequency is kept, 0 where it is divided. The pair that makes
    /// n turns within the original context L is `dims * ln(L / (2 pi n)) / (2 ln base)`.
    fn kept_share(&self, pair: usize) -> f64 {
        let RopeScaling::Yarn { original_context_tokens, beta_fast, beta_slow, .. } = self.scaling
        else {
            return 1.0;
        };
        let pair_of = |turns: f32| {
            let periods = original_context_tokens as f64 / (2.0 * PI * f64::from(turns));
            self.dims as f64 * periods.ln() / (2.0 * f64::from(self.base).ln())
        };
        let low = pair_of(beta_fast).floor().max(0.0);
        let high = pair_of(beta_slow).ceil().min(self.dims as f64 - 1.0);
        1.0 - ((pair as f64 - low) / (high - low).max(0.001)).clamp(0.0, 1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(scaling: RopeScaling) -> RopeSpec {
        RopeSpec {
            style: RopeStyle::HalfSplit,
            dims: 128,
            base: 1e6,
            scaling,
            frequency_factors: None,
            attention_factor: 1.0,
        }
    }

    #[test]
    fn frequencies_fall_from_one_by_powers_of_the_base() {
        let frequencies = spec(RopeScaling::None).frequencies(None);
        assert_eq!((frequencies.len(), frequencies[0]), (64, 1.0));
        assert!((f64::from(frequencies[32]) - 1e-3).abs() < 1e-9);
        let halved = spec(RopeScaling::Linear { factor: 8.0 }).frequencies(Some(&[2.0; 64]));
        assert_eq!(halved[0], 1.0 / 16.0);
    }

    /// Qwen2.5's published YaRN settings: factor 4 over 32,768 tokens.
    #[test]
    fn yarn_keeps_fast_pairs_and_divides_slow_ones() {
        let original_context_tokens = 32_768;
        let (beta_fast, beta_slow) = (32.0, 1.0);
        let yarn = RopeScaling::Yarn { factor: 4.0, original_context_tokens, beta_fast, beta_slow };
        let (plain, scaled) = (spec(RopeScaling::None), spec(yarn));
        let (before, after) = (plain.frequencies(None), scaled.frequencies(None));
        assert_eq!(before[0], after[0]);
        // ln(32768 / (2 pi 32)) / (2 ln 1e6) * 128 = 23.6, ln(32768 / 2 pi) … = 39.7.
        assert_eq!(before[23], after[23]);
        assert!(after[24] < before[24] && after[24] > before[24] / 4.0);
        assert_eq!(after[40], before[40] / 4.0);
        assert!((scaled.magnitude() - 1.138_629_4).abs() < 1e-6);
    }
}
