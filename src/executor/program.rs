//! The program of a stage: one flat list of ops that any device can interpret. It is data only; a
//! split at any op is co-execution. Lowering a model to it is `lowering.rs`.
//!
//! A llama layer is eight ops (`+` is fused into the op that follows):
//! ```text
//! Norm     residual (+ last layer's projected) → normed, 8-bit
//! Project  normed → heads              three weights, one op; biases
//! Rotate   heads → heads, KV store     query and key norms, rotary embedding, f16 keys and values
//! Attend   heads, KV store → attended, 8-bit
//! Project  attended → projected
//! Norm     residual + projected → normed, 8-bit      (Gemma: post norm of what is added)
//! Gate     normed → hidden, 8-bit      two weights, activation after
//! Project  hidden → projected
//! ```
//! Where a layer has experts, three other ops take the place of the last two:
//! ```text
//! Route        normed → routes             experts of each token and their weights
//! GateExperts  normed, routes → hidden     a row per pair of token and expert, 8-bit
//! DownExperts  hidden, routes → projected  the weighted sum
//! ```
//! Weights of a layer may be *spilled*: they lie in host memory though a GPU runs the model. Both
//! programs then have the ops that multiply with them between two more, and whichever device
//! computes such a unit in a step, the other leaves it out. A layer has up to three:
//! ```text
//! SpillStart   normed comes from the GPU       normed          attended
//! Gate, Project, or Route, GateExperts, ...    Project         Project
//! SpillEnd     projected goes to the GPU       heads           projected
//! ```
//! Queries, keys and values read 16-bit activations ([`Precision`]), all else 8-bit ones, or on a
//! device that rounds to bf16 all of them that.
//! An interpreter on several workers needs a barrier where workers read what others have written:
//! after each op, unless it repeats the op on every worker (`cpu.rs`).

mod lowering;
mod part;

pub use part::{Inlet, Outlet, PartWeights, SpilledLayers, SpilledUnit, StagePart};

use crate::model::{Activation, RopeSpec, TensorRef};

/// An entry of [`Program::matrices`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MatrixId(pub u32);

/// An entry of [`Program::vectors`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct VectorId(pub u32);

/// An entry of [`Program::ropes`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RopeId(pub u32);

/// An entry of [`Program::kv_layers`]: a layer of this stage that keeps keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KvLayerId(pub u32);

/// The activations of a step. All are f32, row-major, one row per token of the step (or per
/// wanted row of logits), as wide as the op that writes them says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Buffer {
    /// `[n_tokens, embedding_dim]`: the residual stream.
    Residual,
    /// `[n_tokens, embedding_dim]`, also in 8 bits: the normalised residual stream.
    Normed,
    /// `[n_tokens, (n_heads + 2 · n_kv_heads) · head_dim]`: queries, keys, values.
    Heads,
    /// `[n_tokens, n_heads · head_dim]`, also in 8 bits: what attention gathered.
    Attended,
    /// `[n_tokens, embedding_dim]`: what is to be added to the residual stream.
    Projected,
    /// `[n_tokens, hidden_dim]`, also in 8 bits: the gate, then gate · up in its place. With
    /// experts `[n_tokens · n_used, hidden_dim]`, grouped by expert.
    Hidden,
    /// `[n_tokens, hidden_dim]`: the feed-forward up projection.
    Up,
    /// `[n_tokens, 2 · n_used]`: the experts of each token, ascending, as whole numbers; then
    /// their weights.
    Routes,
    /// `[n_rows, embedding_dim]`, also in 8 bits: normalised rows whose logits are wanted.
    Selected,
}

/// `out = matrix · in (+ bias)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Linear {
    /// `[rows, cols]`
    pub matrix: MatrixId,
    /// `[rows]`
    pub bias: Option<VectorId>,
}

/// Root-mean-square norm with a weight.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    /// `[cols]`
    pub weight: VectorId,
    /// Added to the mean square.
    pub eps: f32,
}

/// How finely a device that rounds activations keeps what a matmul reads. The choice is
/// `lowering.rs`'s; a device that computes in 16-bit floats or better may ignore it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// 8 bits with a scale per 32 elements.
    Eight,
    /// Twice that: what the first 8 bits miss is kept in 8 more, as rows of their own.
    Sixteen,
}

/// What an op does to the residual stream first.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pending {
    /// Nothing.
    Nothing,
    /// `residual += projected`.
    Add,
    /// `residual += norm(projected)`.
    AddNormed(Norm),
}

/// The heads of one attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadShape {
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; `n_heads` is a multiple.
    pub n_kv_heads: usize,
    /// Elements of one head.
    pub head_dim: usize,
}

impl HeadShape {
    /// Elements of a token's queries.
    pub fn query_dim(&self) -> usize {
        self.n_heads * self.head_dim
    }

    /// Elements of a token's keys; the values have as many.
    pub fn kv_dim(&self) -> usize {
        self.n_kv_heads * self.head_dim
    }

    /// Elements of a token's queries, keys and values.
    pub fn width(&self) -> usize {
        self.query_dim() + 2 * self.kv_dim()
    }
}

/// The experts of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertShape {
    /// How many there are.
    pub n_experts: usize,
    /// Through how many each token goes.
    pub n_used: usize,
}

/// One instruction. Ops run in order; each reads what the ones before have written.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    /// `residual[t] = scale · table[token[t]]`.
    Embed {
        /// `[vocab_size, embedding_dim]`
        table: MatrixId,
        /// 1 unless the family scales embeddings.
        scale: f32,
    },
    /// The residual stream comes from the stage before.
    Receive,
    /// Pending addition, then `normed = norm(residual)`.
    Norm {
        /// What is added to the residual stream first.
        pending: Pending,
        /// The norm of the sum.
        norm: Norm,
        /// The finest that a reader wants.
        precision: Precision,
    },
    /// `output = parts · input`, the parts' rows one after the other.
    Project {
        /// Which activations.
        input: Buffer,
        /// Where the products go.
        output: Buffer,
        /// One or more matrices over the same input.
        parts: Vec<Linear>,
        /// Of the input.
        precision: Precision,
    },
    /// Norms of queries and keys per head, rotary embedding in place; keys and values into the
    /// KV store.
    Rotate {
        /// Shape of `heads`.
        shape: HeadShape,
        /// Weight is `[head_dim]`.
        query_norm: Option<Norm>,
        /// Weight is `[head_dim]`.
        key_norm: Option<Norm>,
        /// Which rotation.
        rope: RopeId,
        /// Where keys and values go.
        layer: KvLayerId,
    },
    /// `attended = softmax(softcap(scale · q · Kᵀ) + causal mask) · V` per query head.
    Attend {
        /// Shape of `heads`.
        shape: HeadShape,
        /// Whose keys and values.
        layer: KvLayerId,
        /// A token sees itself and the `window − 1` tokens before; `None` sees all before.
        window: Option<usize>,
        /// Factor of the scores.
        scale: f32,
        /// `cap · tanh(score / cap)`.
        softcap: Option<f32>,
    },
    /// `hidden = activation(gate · normed) · (up · normed)`.
    Gate {
        /// `[hidden_dim, embedding_dim]`
        gate: Linear,
        /// `[hidden_dim, embedding_dim]`
        up: Linear,
        /// Of the gate.
        activation: Activation,
    },
    /// The `n_used` largest of `router · normed` per token, of equals those of lower index, and
    /// their softmax times `weight_scale`: `routes`.
    Route {
        /// How many of how many.
        shape: ExpertShape,
        /// `[n_experts, embedding_dim]`
        router: MatrixId,
        /// Factor of the weights.
        weight_scale: f32,
    },
    /// `hidden = activation(gate_e · normed) · (up_e · normed)` for each expert e of each token.
    GateExperts {
        /// How many of how many.
        shape: ExpertShape,
        /// `[n_experts · hidden_dim, embedding_dim]`
        gate: MatrixId,
        /// `[n_experts · hidden_dim, embedding_dim]`
        up: MatrixId,
        /// Of the gate.
        activation: Activation,
    },
    /// `projected = Σ_e weight_e · (down_e · hidden_e)` over the experts of each token, by
    /// ascending index.
    DownExperts {
        /// How many of how many.
        shape: ExpertShape,
        /// `[n_experts · embedding_dim, hidden_dim]`
        down: MatrixId,
    },
    /// A spilled unit begins: the ops up to its end are one device's.
    SpillStart {
        /// Which one.
        unit: SpilledUnit,
        /// What its products read.
        input: Buffer,
        /// Of the input.
        precision: Precision,
    },
    /// It ends.
    SpillEnd {
        /// Which one.
        unit: SpilledUnit,
        /// What it has made.
        output: Buffer,
    },
    /// Pending addition at the end of a stage, then the residual stream goes to the next one.
    Send {
        /// What is added to the residual stream first.
        pending: Pending,
    },
    /// Pending addition and norm of the rows whose logits are wanted: `selected = norm(residual)`.
    Select {
        /// What is added to the residual stream first.
        pending: Pending,
        /// The model's last norm.
        norm: Norm,
    },
    /// `logits = softcap(output · selected)`; each row is then sampled or scored as planned.
    Logits {
        /// `[vocab_size, embedding_dim]`
        output: Linear,
        /// `cap · tanh(logit / cap)`.
        softcap: Option<f32>,
    },
}

/// How a program uses a matrix: decides its layout in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MatrixUse {
    /// Rows are looked up; it may stay in the file.
    Lookup,
    /// It is multiplied with; rows may be looked up as well.
    Multiply,
    /// Its rows are shared out evenly to experts, of which a token is multiplied with a few.
    Experts(ExpertShape),
}

/// A matrix that the program's ops name.
#[derive(Clone, Debug, PartialEq)]
pub struct MatrixEntry {
    /// Which tensor.
    pub tensor: TensorRef,
    /// What for.
    pub used_for: MatrixUse,
    /// Of which unit it is, in the program of a stage that has spilled it.
    pub spilled: Option<SpilledUnit>,
}

/// Keys and values of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Key and value heads.
    pub n_kv_heads: usize,
    /// Elements of one head.
    pub head_dim: usize,
}

/// A stage's ops with all that they name, and the sizes that buffers are made from.
#[derive(Clone, Debug, PartialEq)]
pub struct Program {
    /// What to do, in order.
    pub ops: Vec<Op>,
    /// Matrices by [`MatrixId`].
    pub matrices: Vec<MatrixEntry>,
    /// Vectors by [`VectorId`]: `[1, cols]` tensors, needed in f32.
    pub vectors: Vec<TensorRef>,
    /// Rotations by [`RopeId`].
    pub ropes: Vec<RopeSpec>,
    /// KV shapes by [`KvLayerId`].
    pub kv_layers: Vec<KvShape>,
    /// Sizes.
    pub dims: ProgramDims,
}

/// The widest rows of each buffer of a program, in elements.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProgramDims {
    /// Residual, normed, projected and selected rows.
    pub embedding: usize,
    /// Rows of heads.
    pub heads: usize,
    /// Rows of attended.
    pub attended: usize,
    /// Rows of hidden and up.
    pub hidden: usize,
    /// Experts of a layer; 0 when layers are dense.
    pub experts: usize,
    /// Rows of hidden per token: experts that it goes through, 1 when layers are dense.
    pub hidden_rows: usize,
    /// Rows of logits; 0 when the stage has none.
    pub vocab: usize,
}

impl ProgramDims {
    /// Rows of up; experts keep theirs in a worker's scratch.
    pub(super) fn up(&self) -> usize {
        if self.experts > 0 { 0 } else { self.hidden }
    }

    /// Rows of routes.
    pub(super) fn routes(&self) -> usize {
        if self.experts > 0 { 2 * self.hidden_rows } else { 0 }
    }
}
