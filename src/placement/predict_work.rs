//! What the parts of a model do in a step: bytes of weights that are read, and
//! multiply-accumulates.

use super::spill::matrices;
use crate::model::{FfnSpec, ModelSpec, TensorRef};
use std::iter::Sum;
use std::ops::{Add, Mul};

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

/// Of a layer's network. Of n experts of which each token goes through k, m tokens read
/// n·(1 − (1 − k/n)^m).
pub(super) fn ffn_work(ffn: &FfnSpec, tokens: usize) -> Work {
    match ffn {
        FfnSpec::Dense(_) => matrices(ffn).into_iter().map(|matrix| met(matrix, tokens)).sum(),
        FfnSpec::Experts(experts) => {
            let used = experts.n_used as f64 / experts.n_experts as f64;
            let touched = 1.0 - (1.0 - used).powf(tokens as f64);
            let macs = experts.parameters() as f64 * used * tokens as f64;
            Work { bytes: experts.bytes() as f64 * touched, macs } + met(&experts.router, tokens)
        }
    }
}

/// Bytes of a layer's matrices, those of all experts included.
pub(super) fn network_bytes(ffn: &FfnSpec) -> f64 {
    matrices(ffn).into_iter().map(|matrix| matrix.bytes() as f64).sum()
}

/// Of all but the networks: attention, and the output for the `logits` tokens that get logits.
pub(super) fn rest_work(spec: &ModelSpec, tokens: usize, logits: usize) -> Work {
    let layers = spec.layers.iter().flat_map(|layer| {
        let attention = &layer.attention;
        [&attention.query, &attention.key, &attention.value, &attention.output]
    });
    let attention: Work = layers.map(|linear| met(&linear.weight, tokens)).sum();
    match logits {
        0 => attention,
        _ => attention + met(&spec.output, logits),
    }
}
