//! What the parts of a model do in a step: bytes of weights that are read, and
//! multiply-accumulates.

use super::claims::{claimed_units, dealt_rows};
use crate::model::{AttentionSpec, FfnSpec, LinearSpec, ModelSpec, TensorRef};
use crate::tensor::DType;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Mul};

/// What a part of a model does in a step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Work {
    /// Of weights, each read once.
    pub bytes: f64,
    /// Multiply-accumulates of all tokens together: one for each weight that a token meets.
    pub macs: f64,
    /// Seconds that the CPU's workers take for them where memory is no limit.
    pub cpu_seconds: f64,
    /// Seconds that a GPU takes for them with weights in its memory.
    pub gpu_seconds: f64,
    /// Bytes and the CPU's seconds of the smallest piece that a worker takes of each product.
    pub pieces: [f64; 2],
}

/// Seconds for a weight of a type in a product with so many tokens: of the CPU's workers where
/// memory is no limit, and of a GPU.
pub(super) type SecondsPerWeight<'a> = &'a dyn Fn(DType, f64) -> [f64; 2];

impl Add for Work {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            bytes: self.bytes + other.bytes,
            macs: self.macs + other.macs,
            cpu_seconds: self.cpu_seconds + other.cpu_seconds,
            gpu_seconds: self.gpu_seconds + other.gpu_seconds,
            pieces: [0, 1].map(|at| self.pieces[at] + other.pieces[at]),
        }
    }
}

impl Mul<f64> for Work {
    type Output = Self;

    fn mul(self, times: f64) -> Self {
        Self {
            bytes: self.bytes * times,
            macs: self.macs * times,
            cpu_seconds: self.cpu_seconds * times,
            gpu_seconds: self.gpu_seconds * times,
            pieces: self.pieces.map(|piece| piece * times),
        }
    }
}

impl Sum for Work {
    fn sum<I: Iterator<Item = Self>>(parts: I) -> Self {
        parts.fold(Self::default(), Add::add)
    }
}

/// The part of a matrix that the smallest piece is which a worker takes.
fn smallest_piece(tensor: &TensorRef, tokens: usize) -> f64 {
    let unit = dealt_rows(tokens);
    let unit_bytes = unit * tensor.bytes() as usize / tensor.rows.max(1);
    let units = claimed_units(unit_bytes, tokens).max(1);
    (units * unit).min(tensor.rows) as f64 / tensor.rows.max(1) as f64
}

/// A tensor that all of `tokens` tokens meet.
fn met(tensor: &TensorRef, tokens: usize, seconds: SecondsPerWeight<'_>) -> Work {
    let (weights, bytes) = (tensor.elements() as f64, tensor.bytes() as f64);
    let [cpu_seconds, gpu_seconds] =
        seconds(tensor.dtype, tokens as f64).map(|seconds| seconds * weights);
    let piece = smallest_piece(tensor, tokens);
    let pieces = [bytes, cpu_seconds].map(|all| piece * all);
    Work { bytes, macs: weights * tokens as f64, cpu_seconds, gpu_seconds, pieces }
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
pub(super) fn network_parts(ffn: &FfnSpec, tokens: usize, seconds: SecondsPerWeight<'_>) -> Parts {
    match ffn {
        FfnSpec::Dense(ffn) => {
            let matrices = [&ffn.gate, &ffn.up, &ffn.down].map(|linear| &linear.weight);
            let dense = matrices.into_iter().map(|matrix| met(matrix, tokens, seconds)).sum();
            Parts { dense, ..Parts::default() }
        }
        FfnSpec::Experts(experts) => {
            let used = experts.n_used as f64 / experts.n_experts as f64;
            let touched = 1.0 - (1.0 - used).powf(tokens as f64);
            let of_each = used * tokens as f64;
            // Those of an expert that has some.
            let columns = of_each / touched.max(f64::MIN_POSITIVE);
            let matrices = [&experts.gate, &experts.up, &experts.down].into_iter().map(|matrix| {
                let weights = matrix.elements() as f64;
                let [cpu_seconds, gpu_seconds] =
                    seconds(matrix.dtype, columns).map(|seconds| seconds * weights * touched);
                let (bytes, macs) = (matrix.bytes() as f64 * touched, weights * of_each);
                Work { bytes, macs, cpu_seconds, gpu_seconds, ..Work::default() }
            });
            let router = met(&experts.router, tokens, seconds);
            Parts { experts: matrices.sum::<Work>() + router, ..Parts::default() }
        }
    }
}

/// Of the weights of an attention.
pub(super) fn attention_parts(
    spec: &AttentionSpec,
    tokens: usize,
    seconds: SecondsPerWeight<'_>,
) -> Parts {
    let of = |linear: &LinearSpec| met(&linear.weight, tokens, seconds);
    let query = of(&spec.query);
    let mut heads = query + of(&spec.key) + of(&spec.value);
    // They are one product.
    heads.pieces = query.pieces;
    if spec.wants_sixteen_bits() {
        // As two rows of 8.
        let twice = |linear: &LinearSpec| met(&linear.weight, 2 * tokens, seconds).cpu_seconds;
        heads.cpu_seconds = [&spec.query, &spec.key, &spec.value].into_iter().map(twice).sum();
    }
    Parts { dense: heads + of(&spec.output), ..Parts::default() }
}

/// Of the output for the `logits` tokens that get logits.
pub(super) fn output_parts(
    spec: &ModelSpec,
    logits: usize,
    seconds: SecondsPerWeight<'_>,
) -> Parts {
    let dense = match logits {
        0 => Work::default(),
        _ => met(&spec.output, logits, seconds),
    };
    Parts { dense, ..Parts::default() }
}
