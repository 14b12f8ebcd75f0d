//! The frequencies of rotary embedding and their context extensions, in f64.

use std::f64::consts::PI;

/// How a model stretches its frequencies to a context longer than the one it was trained on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// The frequencies as trained.
    None,
    /// Every frequency divided by `factor` (position interpolation, arXiv 2306.15595).
    Linear {
        /// How many times longer the context is.
        factor: f64,
    },
    /// Slow pairs interpolated, fast pairs kept, a ramp between them (YaRN, arXiv 2309.00071).
    Yarn {
        /// How many times longer the context is.
        factor: f64,
        /// Context of the original training, in tokens.
        original_context_tokens: f64,
        /// Pairs that turn more often than this within the original context are kept (paper: 32).
        beta_fast: f64,
        /// Pairs that turn less often than this are interpolated (paper: 1).
        beta_slow: f64,
        /// Multiplier of cosines and sines; `None` for the paper's `0.1·ln(factor) + 1`.
        attention_factor: Option<f64>,
    },
}

/// What the angles of a model depend on.
#[derive(Clone, Copy, Debug)]
pub struct RopeParams<'a> {
    /// Elements of a head row that turn; even.
    pub dims: usize,
    /// `θ` of `f_i = θ^(−2i/dims)`.
    pub base: f64,
    /// Context extension.
    pub scaling: RopeScaling,
    /// `[dims / 2]` divisors of the frequencies, the `rope_freqs.weight` of Llama 3.1 files.
    pub frequency_factors: Option<&'a [f32]>,
}

/// Rotary parameters from which no angle can be computed.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum RopeError {
    /// Pairs need an even number of elements.
    #[error("rotary dimensions must be even, got {got}")]
    OddDims {
        /// Dimensions given.
        got: usize,
    },
    /// One divisor per pair.
    #[error("want one frequency factor per pair ({wanted}), got {got}")]
    FactorCount {
        /// Pairs.
        wanted: usize,
        /// Factors given.
        got: usize,
    },
    /// A number that must be positive and finite is not.
    #[error("{field} must be a positive number, got {got}")]
    NotPositive {
        /// Which parameter.
        field: &'static str,
        /// Its value.
        got: f64,
    },
}

/// The angle per position of every pair.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeFrequencies {
    /// `[dims / 2]` radians per position.
    radians: Vec<f64>,
    attention_factor: f64,
}

impl RopeFrequencies {
    /// The frequencies of a model.
    ///
    /// # Errors
    /// [`RopeError`] when a parameter is out of its range.
    pub fn new(params: &RopeParams<'_>) -> Result<RopeFrequencies, RopeError> {
        let pairs = params.dims / 2;
        if !params.dims.is_multiple_of(2) {
            return Err(RopeError::OddDims { got: params.dims });
        }
        positive("base", params.base)?;
        let exponent = |i: usize| -2.0 * i as f64 / params.dims as f64;
        let mut radians: Vec<f64> = (0..pairs).map(|i| params.base.powf(exponent(i))).collect();
        if let Some(factors) = params.frequency_factors {
            if factors.len() != pairs {
                return Err(RopeError::FactorCount { wanted: pairs, got: factors.len() });
            }
            for (frequency, factor) in radians.iter_mut().zip(factors) {
                *frequency /= positive("frequency factor", f64::from(*factor))?;
            }
        }
        let attention_factor = stretch(&mut radians, params)?;
        Ok(RopeFrequencies { radians, attention_factor })
    }

    /// Pairs of a row: the length of `cos` and `sin` per position.
    pub fn pairs(&self) -> usize {
        self.radians.len()
    }

    /// Radians that each pair turns per position, `[dims / 2]`.
    pub fn radians(&self) -> &[f64] {
        &self.radians
    }

    /// Fills the rows of consecutive positions from `first_position`: `cos` and `sin` are
    /// `[positions, dims / 2]`. Angles are f64; cosines and sines are rounded once.
    ///
    /// # Panics
    /// When `cos` and `sin` differ in length or are no whole number of rows.
    pub fn fill(&self, first_position: usize, cos: &mut [f32], sin: &mut [f32]) {
        assert_eq!(cos.len(), sin.len(), "cosines and sines");
        crate::norm::assert_whole_rows(cos.len(), self.pairs());
        if self.radians.is_empty() {
            return;
        }
        let rows = cos.chunks_exact_mut(self.pairs()).zip(sin.chunks_exact_mut(self.pairs()));
        for (offset, (cos, sin)) in rows.enumerate() {
            let position = (first_position + offset) as f64;
            for ((frequency, cos), sin) in self.radians.iter().zip(cos).zip(sin) {
                let (s, c) = (position * frequency).sin_cos();
                *cos = (c * self.attention_factor) as f32;
                *sin = (s * self.attention_factor) as f32;
            }
        }
    }
}

fn positive(field: &'static str, got: f64) -> Result<f64, RopeError> {
    if got > 0.0 && got.is_finite() { Ok(got) } else { Err(RopeError::NotPositive { field, got }) }
}

/// Applies the scaling to the frequencies; returns the multiplier of cosines and sines.
fn stretch(radians: &mut [f64], params: &RopeParams<'_>) -> Result<f64, RopeError> {
    match params.scaling {
        RopeScaling::None => Ok(1.0),
        RopeScaling::Linear { factor } => {
            let factor = positive("linear scaling factor", factor)?;
            radians.iter_mut().for_each(|frequency| *frequency /= factor);
            Ok(1.0)
        }
        RopeScaling::Yarn {
            factor,
            original_context_tokens,
            beta_fast,
            beta_slow,
            attention_factor,
        } => {
            let factor = positive("yarn factor", factor)?;
            let context = positive("yarn original context", original_context_tokens)?;
            let turns = |beta: f64| pair_of_turns(params, context, beta);
            let low = turns(positive("yarn beta fast", beta_fast)?).floor().max(0.0);
            let last = (params.dims as f64 - 1.0).max(0.0);
            let high = turns(positive("yarn beta slow", beta_slow)?).ceil().min(last);
            for (i, frequency) in radians.iter_mut().enumerate() {
                let ramp = ((i as f64 - low) / (high - low).max(0.001)).clamp(0.0, 1.0);
                *frequency *= (1.0 - ramp) + ramp / factor;
            }
            let default = if factor > 1.0 { 0.1 * factor.ln() + 1.0 } else { 1.0 };
            positive("yarn attention factor", attention_factor.unwrap_or(default))
        }
    }
}

/// The (fractional) pair that turns `turns` times within `context` tokens: solves
/// `context · base^(−2i/dims) = 2π·turns` for `i`. The authors' code, and all that follows it,
/// ramps over this index rather than over the number of turns that the paper's formula shows.
fn pair_of_turns(params: &RopeParams<'_>, context: f64, turns: f64) -> f64 {
    params.dims as f64 * (context / (turns * 2.0 * PI)).ln() / (2.0 * params.base.ln())
}
