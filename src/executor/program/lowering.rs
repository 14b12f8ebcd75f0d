//! Lowers a model to a program: `ModelSpec` + the part that a stage runs → ops. Fusion happens
//! here: three weights over one input, an activation after two, additions into the norm that
//! follows.
//!
//! Where 16-bit activations pay: with 8 bits everywhere SmolLM2 is 0.0327 nats from exact. Of
//! that variance queries, keys and values bring 32 % for 16 % of the arithmetic (their errors go
//! through an exponential), gate and up 35 % for half of it, down 17 %, the logits 11 %, the
//! attention's output 5 %. So the first are worth it in a narrow model, where they are little of
//! the time. A wide one averages over more roundings: Qwen2.5 1.5B is 0.0082 nats off without a
//! second row and 0.0080 with it, and a step with eight streams was a tenth longer. The logits are
//! not: their matrix is a fifth of a small model, and with twice the columns they took a third of
//! a wide step's time.

use super::Buffer::{Attended, Heads, Hidden, Normed, Projected};
use super::{
    ExpertShape, FeedForwards, HeadShape, Inlet, KvLayerId, KvShape, Linear, MatrixEntry, MatrixId,
    MatrixUse, Norm, Op, Outlet, Pending, Precision, Program, ProgramDims, RopeId, StagePart,
    VectorId,
};
use crate::executor::ExecutorError;
use crate::model::{
    AttentionSpec, DenseFfnSpec, ExpertsSpec, FfnSpec, LayerSpec, LinearSpec, ModelSpec, NormSpec,
    RopeSpec, TensorRef,
};
use std::collections::HashMap;

/// Widest residual stream whose queries, keys and values read 16-bit activations.
const SIXTEEN_BITS_DIM_MAX: usize = 1024;

impl Program {
    /// The program of `part` of a model.
    ///
    /// # Errors
    /// [`ExecutorError::MixedLayers`] when layers need buffers of different widths.
    ///
    /// # Panics
    /// When `part.layers` are not layers of the model.
    pub fn lower(spec: &ModelSpec, part: &StagePart) -> Result<Program, ExecutorError> {
        let mut lowering = Lowering::new(spec);
        if let FeedForwards::SpilledAlone(layers) = &part.feed_forwards {
            for index in layers {
                let layer = &spec.layers[*index];
                lowering.hidden_widths(*index, layer)?;
                lowering.spilled_feed_forward(layer, false);
            }
            return Ok(lowering.program);
        }
        let mut pending = Pending::Nothing;
        let enter = match part.inlet {
            Inlet::Embedding => Op::Embed {
                table: lowering.matrix(&spec.embedding, MatrixUse::Lookup),
                scale: spec.embedding_scale.unwrap_or(1.0),
            },
            Inlet::Handoff => Op::Receive,
        };
        lowering.program.ops.push(enter);
        for index in part.layers.clone() {
            let layer = &spec.layers[index];
            lowering.widths(index, layer)?;
            let is_spilled = match &part.feed_forwards {
                FeedForwards::Spilled(layers) => layers.contains(&index),
                _ => false,
            };
            pending = lowering.layer(layer, is_spilled, pending);
        }
        match part.outlet {
            Outlet::Handoff => lowering.program.ops.push(Op::Send { pending }),
            Outlet::Logits => lowering.logits(spec, pending),
        }
        Ok(lowering.program)
    }

    /// The matrix of an id.
    pub fn matrix(&self, id: MatrixId) -> &MatrixEntry {
        &self.matrices[id.0 as usize]
    }
}

fn head_shape(spec: &AttentionSpec) -> HeadShape {
    let AttentionSpec { n_heads, n_kv_heads, head_dim, .. } = *spec;
    HeadShape { n_heads, n_kv_heads, head_dim }
}

/// Widths of buffers by name, each with what is known of it: the first layer's.
fn same_or_first<const N: usize>(
    layer: usize,
    widths: [(&'static str, &mut usize, usize); N],
) -> Result<(), ExecutorError> {
    for (field, known, got) in widths {
        if *known != 0 && *known != got {
            return Err(ExecutorError::MixedLayers { layer, field, wanted: *known, got });
        }
        *known = got;
    }
    Ok(())
}

struct Lowering {
    program: Program,
    matrices: HashMap<String, MatrixId>,
    vectors: HashMap<String, VectorId>,
    n_spilled: usize,
    /// The spilled network whose ops are emitted, if its matrices lie elsewhere.
    spilled: Option<usize>,
}

impl Lowering {
    fn new(spec: &ModelSpec) -> Self {
        let dims = ProgramDims { embedding: spec.embedding_dim, ..ProgramDims::default() };
        let program = Program {
            ops: Vec::new(),
            matrices: Vec::new(),
            vectors: Vec::new(),
            ropes: Vec::new(),
            kv_layers: Vec::new(),
            dims,
        };
        Self {
            program,
            matrices: HashMap::new(),
            vectors: HashMap::new(),
            n_spilled: 0,
            spilled: None,
        }
    }

    /// Sets the widths of the buffers, or checks that this layer has the same.
    fn widths(&mut self, layer: usize, spec: &LayerSpec) -> Result<(), ExecutorError> {
        let shape = head_shape(&spec.attention);
        let dims = &mut self.program.dims;
        let heads = ("heads", &mut dims.heads, shape.width());
        let attended = ("attended", &mut dims.attended, shape.query_dim());
        same_or_first(layer, [heads, attended])?;
        self.hidden_widths(layer, spec)
    }

    /// The same of the feed-forward network alone.
    fn hidden_widths(&mut self, layer: usize, spec: &LayerSpec) -> Result<(), ExecutorError> {
        let (dims, experts) = (&mut self.program.dims, spec.ffn.experts());
        let widths = [
            ("hidden", &mut dims.hidden, spec.ffn.hidden_dim()),
            ("experts", &mut dims.experts, experts.map_or(0, |experts| experts.n_experts)),
            ("experts used", &mut dims.hidden_rows, experts.map_or(1, |experts| experts.n_used)),
        ];
        same_or_first(layer, widths)
    }

    /// Emits one layer; returns what is left to be added to the residual stream.
    fn layer(&mut self, layer: &LayerSpec, is_spilled: bool, pending: Pending) -> Pending {
        let norm = self.norm(&layer.attention_norm);
        self.program.ops.push(Op::Norm { pending, norm, precision: self.heads_precision() });
        self.attention(&layer.attention);
        let pending = self.pending(layer.attention_post_norm.as_ref());
        let norm = self.norm(&layer.ffn_norm);
        self.program.ops.push(Op::Norm { pending, norm, precision: Precision::Eight });
        if is_spilled {
            self.spilled_feed_forward(layer, true);
        } else {
            self.feed_forward(&layer.ffn);
        }
        self.pending(layer.ffn_post_norm.as_ref())
    }

    fn feed_forward(&mut self, spec: &FfnSpec) {
        match spec {
            FfnSpec::Dense(dense) => self.gated(dense),
            FfnSpec::Experts(experts) => self.experts(experts),
        }
    }

    /// A feed-forward network between its two marks; `is_elsewhere` says that its matrices, but
    /// for a router, lie with the other program.
    fn spilled_feed_forward(&mut self, layer: &LayerSpec, is_elsewhere: bool) {
        let index = self.n_spilled;
        self.n_spilled += 1;
        self.program.ops.push(Op::SpillStart { index });
        self.spilled = is_elsewhere.then_some(index);
        self.feed_forward(&layer.ffn);
        self.spilled = None;
        self.program.ops.push(Op::SpillEnd { index });
    }

    /// What queries, keys and values are computed from.
    fn heads_precision(&self) -> Precision {
        let narrow = self.program.dims.embedding <= SIXTEEN_BITS_DIM_MAX;
        if narrow { Precision::Sixteen } else { Precision::Eight }
    }

    fn attention(&mut self, spec: &AttentionSpec) {
        let shape = head_shape(spec);
        let layer = KvLayerId(self.program.kv_layers.len() as u32);
        let (n_kv_heads, head_dim) = (shape.n_kv_heads, shape.head_dim);
        self.program.kv_layers.push(KvShape { n_kv_heads, head_dim });

        let parts = [&spec.query, &spec.key, &spec.value].map(|linear| self.linear(linear));
        let query_norm = spec.query_norm.as_ref().map(|norm| self.norm(norm));
        let key_norm = spec.key_norm.as_ref().map(|norm| self.norm(norm));
        let rope = self.rope(&spec.rope);
        let output = vec![self.linear(&spec.output)];
        let (window, scale, softcap) = (spec.window, spec.scale, spec.softcap);
        self.program.ops.extend([
            Op::Project {
                input: Normed,
                output: Heads,
                parts: parts.to_vec(),
                precision: self.heads_precision(),
            },
            Op::Rotate { shape, query_norm, key_norm, rope, layer },
            Op::Attend { shape, layer, window, scale, softcap },
            Op::Project {
                input: Attended,
                output: Projected,
                parts: output,
                precision: Precision::Eight,
            },
        ]);
    }

    fn gated(&mut self, spec: &DenseFfnSpec) {
        let (gate, up) = (self.linear(&spec.gate), self.linear(&spec.up));
        let down = vec![self.linear(&spec.down)];
        self.program.ops.extend([
            Op::Gate { gate, up, activation: spec.activation },
            Op::Project {
                input: Hidden,
                output: Projected,
                parts: down,
                precision: Precision::Eight,
            },
        ]);
    }

    fn experts(&mut self, spec: &ExpertsSpec) {
        let shape = ExpertShape { n_experts: spec.n_experts, n_used: spec.n_used };
        let spilled = self.spilled.take();
        let router = self.matrix(&spec.router, MatrixUse::Multiply);
        self.spilled = spilled;
        let [gate, up, down] = [&spec.gate, &spec.up, &spec.down]
            .map(|tensor| self.matrix(tensor, MatrixUse::Experts(shape)));
        self.program.ops.extend([
            Op::Route { shape, router, weight_scale: spec.weight_scale },
            Op::GateExperts { shape, gate, up, activation: spec.activation },
            Op::DownExperts { shape, down },
        ]);
    }

    fn logits(&mut self, spec: &ModelSpec, pending: Pending) {
        let norm = self.norm(&spec.output_norm);
        let matrix = self.matrix(&spec.output, MatrixUse::Multiply);
        let bias = spec.output_bias.as_ref().map(|bias| self.vector(bias));
        self.program.dims.vocab = spec.vocab_size;
        self.program.ops.extend([
            Op::Select { pending, norm },
            Op::Logits { output: Linear { matrix, bias }, softcap: spec.logit_softcap },
        ]);
    }

    fn pending(&mut self, post_norm: Option<&NormSpec>) -> Pending {
        post_norm.map_or(Pending::Add, |norm| Pending::AddNormed(self.norm(norm)))
    }

    fn norm(&mut self, spec: &NormSpec) -> Norm {
        Norm { weight: self.vector(&spec.weight), eps: spec.eps }
    }

    fn linear(&mut self, spec: &LinearSpec) -> Linear {
        let matrix = self.matrix(&spec.weight, MatrixUse::Multiply);
        Linear { matrix, bias: spec.bias.as_ref().map(|bias| self.vector(bias)) }
    }

    /// The id of a matrix; one that is also multiplied with gets the layout for that.
    fn matrix(&mut self, tensor: &TensorRef, used_for: MatrixUse) -> MatrixId {
        let next = MatrixId(self.program.matrices.len() as u32);
        let id = *self.matrices.entry(tensor.name.clone()).or_insert(next);
        match self.program.matrices.get_mut(id.0 as usize) {
            Some(entry) if used_for == MatrixUse::Multiply => entry.used_for = used_for,
            Some(_) => {}
            None => {
                let (tensor, spilled) = (tensor.clone(), self.spilled);
                self.program.matrices.push(MatrixEntry { tensor, used_for, spilled });
            }
        }
        id
    }

    fn vector(&mut self, tensor: &TensorRef) -> VectorId {
        let next = VectorId(self.program.vectors.len() as u32);
        let id = *self.vectors.entry(tensor.name.clone()).or_insert(next);
        if id == next {
            self.program.vectors.push(tensor.clone());
        }
        id
    }

    fn rope(&mut self, spec: &RopeSpec) -> RopeId {
        let ropes = &mut self.program.ropes;
        let known = ropes.iter().position(|known| known == spec);
        let index = known.unwrap_or_else(|| {
            ropes.push(spec.clone());
            ropes.len() - 1
        });
        RopeId(index as u32)
    }
}
