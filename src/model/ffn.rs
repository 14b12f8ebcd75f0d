//! The second half of a layer: one gated network, or many of which each token goes through a few.

use super::{LinearSpec, TensorRef};

/// What gates a feed-forward network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)` (SwiGLU).
    Silu,
    /// `x / 2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))` (GeGLU).
    GeluTanh,
}

/// A layer's feed-forward network.
#[derive(Clone, Debug, PartialEq)]
pub enum FfnSpec {
    /// One that all tokens go through.
    Dense(DenseFfnSpec),
    /// A mixture of experts.
    Experts(ExpertsSpec),
}

/// Gated feed-forward network (arXiv 2002.05202): `down(activation(gate(x)) * up(x))`.
#[derive(Clone, Debug, PartialEq)]
pub struct DenseFfnSpec {
    /// `[n_ff, embedding_dim]`.
    pub gate: LinearSpec,
    /// `[n_ff, embedding_dim]`.
    pub up: LinearSpec,
    /// `[embedding_dim, n_ff]`.
    pub down: LinearSpec,
    /// Applied to the gate.
    pub activation: Activation,
}

/// A sparse mixture of gated networks (arXiv 2401.04088):
/// ```text
/// p = softmax(router · x)        over all experts
/// S = the n_used largest of p    equals: the lower index first
/// y = Σ_{e ∈ S} weight_scale · p_e / (Σ_S p) · down_e(activation(gate_e(x)) · up_e(x))
/// ```
/// Rows of all experts lie one after the other: expert e has rows `e * n .. (e + 1) * n`.
#[derive(Clone, Debug, PartialEq)]
pub struct ExpertsSpec {
    /// How many there are.
    pub n_experts: usize,
    /// Through how many a token goes; at most `n_experts`.
    pub n_used: usize,
    /// `[n_experts, embedding_dim]`.
    pub router: TensorRef,
    /// `[n_experts * n_ff, embedding_dim]`.
    pub gate: TensorRef,
    /// `[n_experts * n_ff, embedding_dim]`.
    pub up: TensorRef,
    /// `[n_experts * embedding_dim, n_ff]`.
    pub down: TensorRef,
    /// Applied to the gate.
    pub activation: Activation,
    /// Multiplies the normalised probabilities of the experts in use.
    pub weight_scale: f32,
}

impl ExpertsSpec {
    /// Bytes of all experts as stored.
    pub fn bytes(&self) -> u64 {
        [&self.gate, &self.up, &self.down].map(TensorRef::bytes).iter().sum()
    }

    /// Parameters of all experts.
    pub fn parameters(&self) -> u64 {
        [&self.gate, &self.up, &self.down].map(TensorRef::elements).iter().sum()
    }

    /// What part of `whole`, bytes or parameters of all experts, one token goes through.
    pub fn used_of(&self, whole: u64) -> u64 {
        whole / self.n_experts as u64 * self.n_used as u64
    }
}

impl FfnSpec {
    /// Rows of the gate: of one expert where there are several.
    pub fn hidden_dim(&self) -> usize {
        match self {
            Self::Dense(dense) => dense.gate.weight.rows,
            Self::Experts(experts) => experts.gate.rows / experts.n_experts,
        }
    }

    /// What is applied to the gate.
    pub fn activation(&self) -> Activation {
        match self {
            Self::Dense(dense) => dense.activation,
            Self::Experts(experts) => experts.activation,
        }
    }

    /// The one network, if it is that.
    pub fn dense(&self) -> Option<&DenseFfnSpec> {
        match self {
            Self::Dense(dense) => Some(dense),
            Self::Experts(_) => None,
        }
    }

    /// The mixture, if it is one.
    pub fn experts(&self) -> Option<&ExpertsSpec> {
        match self {
            Self::Dense(_) => None,
            Self::Experts(experts) => Some(experts),
        }
    }

    /// All tensors in the order of use.
    pub(super) fn tensors(&self) -> Vec<&TensorRef> {
        match self {
            Self::Dense(dense) => {
                let linears = [&dense.gate, &dense.up, &dense.down].into_iter();
                linears
                    .flat_map(|linear| [Some(&linear.weight), linear.bias.as_ref()])
                    .flatten()
                    .collect()
            }
            Self::Experts(experts) => {
                vec![&experts.router, &experts.gate, &experts.up, &experts.down]
            }
        }
    }
}
