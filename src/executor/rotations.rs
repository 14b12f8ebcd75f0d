//! The rotary angles of a step: cosines and sines of every token, computed once and used by all
//! layers. A model has one or two rotations (Gemma turns local and global layers differently).

use super::program::RopeId;
use crate::model::RopeSpec;
use tandem_cpu_kernels::rope::{RopeFrequencies, RopeRow, RopeStyle};

/// One rotation and where its angles lie in a token's row.
#[derive(Clone, Debug)]
struct Rotation {
    frequencies: RopeFrequencies,
    style: RopeStyle,
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
    pub fn push(&mut self, frequencies: RopeFrequencies, style: RopeStyle) {
        let offset = self.width;
        self.width += 2 * frequencies.pairs();
        self.rotations.push(Rotation { frequencies, style, offset });
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
            rest = others;
        }
    }

    /// A rotation's part of a token's row of angles.
    pub fn row<'a>(&self, rope: RopeId, row: &'a [f32]) -> (RopeRow<'a>, RopeStyle) {
        let rotation = &self.rotations[rope.0 as usize];
        let pairs = rotation.frequencies.pairs();
        let (cos, sin) = row[rotation.offset..][..2 * pairs].split_at(pairs);
        (RopeRow { cos, sin }, rotation.style)
    }
}
