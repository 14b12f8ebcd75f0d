//! What the parts of a model do in a step: bytes of weights that are read, and
//! multiply-accumulates.

use crate::model::{AttentionSpec, FfnSpec, ModelSpec, TensorRef};
use std::iter::Sum;
use std::ops::{Add, AddAssign, Mul};

/// What a part of a model does in a step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Work {
    /// Of weights, each read once.
    pub bytes: f64,
    /// Multiply-accumulates of all tokens together: one for each weight that a token meets.
    pub macs: f64,
}

impl Add for Work {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { bytes: self.bytes + other.bytes, macs: self.macs + other.macs }
    }
}

impl Mul<f64> for Work {
    type Output = Self;

    fn mul(self, times: f64) -> Self {
        Self { bytes: self.bytes * times, macs: self.macs * times }
    }
}

impl Sum for Work {
    fn sum<I: Iterator<Item = Self>>(parts: I) -> Self {
        parts.fold(Self::default(), Add::add)
    }
}

/// A tensor that all of `tokens` tokens meet.
fn met(tensor: &TensorRef, tokens: usize) -> Work {
    Work { bytes: tensor.bytes() as f64, macs: tensor.elements() as f64 * tokens as f64 }
}

/// Of parts that a GPU does at different shares of its roofs.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Parts {
    /// Of all that every token meets.
    pub dense: Work,
    /// Of a layer with experts, its feed-forward network.
    pub experts: Work,
}

impl AddAssign for Parts {
    fn add_assign(&mut self, other: Self) {
        self.dense = self.dense + other.dense;
        self.experts = self.experts + other.experts;
    }
}

impl Mul<f64> for Parts {
    type Output = Self;

    fn mul(self, times: f64) -> Self {
        Self { dense: self.dense * times, experts: self.experts * times }
    }
}

impl Parts {
    /// Of both together.
    pub fn all(self) -> Work {
        self.dense + self.experts
    }
}

/// Of a layer's network. Of n experts of which each token goes through k, m tokens read
/// n·(1 − (1 − k/n)^m).
pub(super) fn network_parts(ffn: &FfnSpec, tokens: usize) -> Parts {
    match ffn {
        FfnSpec::Dense(ffn) => {
            let matrices = [&ffn.gate, &ffn.up, &ffn.down].map(|linear| &linear.weight);
            let dense = matrices.into_iter().map(|matrix| met(matrix, tokens)).sum();
            Parts { dense, ..Parts::default() }
        }
        FfnSpec::Experts(experts) => {
            let used = experts.n_used as f64 / experts.n_experts as f64;
            let touched = 1.0 - (1.0 - used).powf(tokens as f64);
            let macs = experts.parameters() as f64 * used * tokens as f64;
            let work = Work { bytes: experts.bytes() as f64 * touched, macs };
            Parts { experts: work + met(&experts.router, tokens), ..Parts::default() }
        }
    }
}

/// Of the weights of an attention.
pub(super) fn attention_parts(spec: &AttentionSpec, tokens: usize) -> Parts {
    let linears = [&spec.query, &spec.key, &spec.value, &spec.output];
    let dense = linears.into_iter().map(|linear| met(&linear.weight, tokens)).sum();
    Parts { dense, ..Parts::default() }
}

/// Of the output for the `logits` tokens that get logits.
pub(super) fn output_parts(spec: &ModelSpec, logits: usize) -> Parts {
    let dense = if logits > 0 { met(&spec.output, logits) } else { Work::default() };
    Parts { dense, ..Parts::default() }
}
