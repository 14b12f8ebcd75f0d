//! The rotary angles of a step: cosines and sines of every token, computed once and used by all
//! layers. A model has one or two rotations (Gemma turns local and global layers differently).

use super::program::RopeId;
use crate::model::{self, RopeSpec};
use tandem_cpu_kernels::rope::{
    RopeError, RopeFrequencies, RopeParams, RopeRow, RopeScaling, RopeStyle,
};

/// One rotation and where its angles lie in a token's row.
#[derive(Clone, Debug)]
struct Rotation {
    frequencies: RopeFrequencies,
    style: RopeStyle,
    /// Factor of cosines and sines: the model says all of it, so the frequencies have none.
    magnitude: f32,
    /// First cosine; the sines follow the cosines.
    offset: usize,
}

/// All rotations of a program.
#[derive(Clone, Debug, Default)]
pub(super) struct Rotations {
    rotations: Vec<Rotation>,
    width: usize,
}

impl Rotations {
    /// Adds a rotation; its id counts up from 0.
    ///
    /// # Errors
    /// Parameters from which no angle can be computed.
    pub fn push(&mut self, spec: &RopeSpec, factors: Option<&[f32]>) -> Result<(), RopeError> {
        let scaling = match spec.scaling {
            model::RopeScaling::None => RopeScaling::None,
            model::RopeScaling::Linear { factor } => {
                RopeScaling::Linear { factor: f64::from(factor) }
            }
            model::RopeScaling::Yarn { factor, original_context_tokens, beta_fast, beta_slow } => {
                RopeScaling::Yarn {
                    factor: f64::from(factor),
                    original_context_tokens: original_context_tokens as f64,
                    beta_fast: f64::from(beta_fast),
                    beta_slow: f64::from(beta_slow),
                    attention_factor: Some(1.0),
                }
            }
        };
        let (dims, base) = (spec.dims, f64::from(spec.base));
        let params = RopeParams { dims, base, scaling, frequency_factors: factors };
        let frequencies = RopeFrequencies::new(&params)?;
        let style = match spec.style {
            model::RopeStyle::Interleaved => RopeStyle::Interleaved,
            model::RopeStyle::HalfSplit => RopeStyle::HalfSplit,
        };
        let offset = self.width;
        self.width += 2 * frequencies.pairs();
        self.rotations.push(Rotation { frequencies, style, magnitude: spec.magnitude(), offset });
        Ok(())
    }

    /// f32 elements of a token's angles, of all rotations.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Fills a token's row of angles, `[width]`.
    pub fn fill(&self, position: usize, row: &mut [f32]) {
        let mut rest = row;
        for rotation in &self.rotations {
            let pairs = rotation.frequencies.pairs();
            let (own, others) = rest.split_at_mut(2 * pairs);
            let (cos, sin) = own.split_at_mut(pairs);
            rotation.frequencies.fill(position, cos, sin);
            if rotation.magnitude != 1.0 {
                own.iter_mut().for_each(|value| *value *= rotation.magnitude);
            }
            rest = others;
        }
    }

    /// A rotation's pairs, which elements they are, and where its angles lie in a token's row.
    pub fn shape(&self, rope: RopeId) -> (usize, RopeStyle, usize) {
        let rotation = &self.rotations[rope.0 as usize];
        (rotation.frequencies.pairs(), rotation.style, rotation.offset)
    }

    /// A rotation's part of a token's row of angles.
    pub fn row<'a>(&self, rope: RopeId, row: &'a [f32]) -> (RopeRow<'a>, RopeStyle) {
        let rotation = &self.rotations[rope.0 as usize];
        let pairs = rotation.frequencies.pairs();
        let (cos, sin) = row[rotation.offset..][..2 * pairs].split_at(pairs);
        (RopeRow { cos, sin }, rotation.style)
    }
}
