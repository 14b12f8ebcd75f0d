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
    Buffer, ExpertShape, HeadShape, Inlet, KvLayerId, KvShape, Linear, MatrixEntry, MatrixId,
    MatrixUse, Norm, Op, Outlet, PartWeights, Pending, Precision, Program, ProgramDims, RopeId,
    SpilledLayers, SpilledUnit, StagePart, VectorId,
};
use crate::executor::ExecutorError;
use crate::model::{
    AttentionSpec, DenseFfnSpec, ExpertsSpec, FfnSpec, LayerSpec, LinearSpec, ModelSpec, NormSpec,
    RopeSpec, TensorRef,
};
use std::collections::HashMap;

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
        if let PartWeights::Only(spilled) = &part.weights {
            for (index, layer) in spec.layers.iter().enumerate() {
                lowering.spilled_alone(layer, index, spilled)?;
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
            let sides = match &part.weights {
                PartWeights::Without(spilled) => Sides::of(spilled, index, Side::Elsewhere),
                _ => Sides::default(),
            };
            pending = lowering.layer(layer, sides, pending);
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

/// What queries, keys and values are computed from.
fn heads_precision(spec: &AttentionSpec) -> Precision {
    if spec.wants_sixteen_bits() { Precision::Sixteen } else { Precision::Eight }
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

/// Where the weights of a unit are.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Side {
    /// On the device that runs the model.
    #[default]
    Resident,
    /// With the program that has nothing but what is spilled; this is the other.
    Elsewhere,
    /// Spilled, and this program is the one that has them.
    Here,
}

/// Where those of a layer are.
#[derive(Clone, Copy, Default)]
struct Sides {
    attention: Side,
    feed_forward: Side,
}

impl Sides {
    /// Of a layer; what is spilled of it is on `side`.
    fn of(spilled: &SpilledLayers, layer: usize, side: Side) -> Self {
        let of = |layers: &[usize]| if layers.contains(&layer) { side } else { Side::Resident };
        Self { attention: of(&spilled.attention), feed_forward: of(&spilled.feed_forward) }
    }
}

struct Lowering {
    program: Program,
    matrices: HashMap<String, MatrixId>,
    vectors: HashMap<String, VectorId>,
    /// Spilled units so far, and layers that have any.
    n_units: usize,
    n_spilled_layers: usize,
    /// The unit whose ops are emitted, if its matrices lie elsewhere.
    spilled: Option<SpilledUnit>,
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
            n_units: 0,
            n_spilled_layers: 0,
            spilled: None,
        }
    }

    /// Sets the widths of the buffers, or checks that this layer has the same.
    fn widths(&mut self, layer: usize, spec: &LayerSpec) -> Result<(), ExecutorError> {
        self.head_widths(layer, spec)?;
        self.hidden_widths(layer, spec)
    }

    /// The same of the attention alone.
    fn head_widths(&mut self, layer: usize, spec: &LayerSpec) -> Result<(), ExecutorError> {
        let shape = head_shape(&spec.attention);
        let dims = &mut self.program.dims;
        let heads = ("heads", &mut dims.heads, shape.width());
        let attended = ("attended", &mut dims.attended, shape.query_dim());
        same_or_first(layer, [heads, attended])
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
    fn layer(&mut self, layer: &LayerSpec, sides: Sides, pending: Pending) -> Pending {
        let units_before = self.n_units;
        let norm = self.norm(&layer.attention_norm);
        let precision = heads_precision(&layer.attention);
        self.program.ops.push(Op::Norm { pending, norm, precision });
        self.attention(&layer.attention, sides.attention);
        let pending = self.pending(layer.attention_post_norm.as_ref());
        let norm = self.norm(&layer.ffn_norm);
        self.program.ops.push(Op::Norm { pending, norm, precision: Precision::Eight });
        self.feed_forward(&layer.ffn, sides.feed_forward);
        self.n_spilled_layers += usize::from(self.n_units > units_before);
        self.pending(layer.ffn_post_norm.as_ref())
    }

    /// Emits the spilled units of a layer, and nothing else of it.
    fn spilled_alone(
        &mut self,
        layer: &LayerSpec,
        index: usize,
        spilled: &SpilledLayers,
    ) -> Result<(), ExecutorError> {
        let (units_before, sides) = (self.n_units, Sides::of(spilled, index, Side::Here));
        if sides.attention == Side::Here {
            self.head_widths(index, layer)?;
            self.heads(&layer.attention, Side::Here);
            self.attended(&layer.attention, Side::Here);
        }
        if sides.feed_forward == Side::Here {
            self.hidden_widths(index, layer)?;
            self.feed_forward(&layer.ffn, Side::Here);
        }
        self.n_spilled_layers += usize::from(self.n_units > units_before);
        Ok(())
    }

    /// A unit from one buffer to another: between two marks where it is spilled.
    fn unit(
        &mut self,
        side: Side,
        ([input, output], precision): ([Buffer; 2], Precision),
        emit: impl FnOnce(&mut Self),
    ) {
        if side == Side::Resident {
            return emit(self);
        }
        let unit = SpilledUnit { index: self.n_units, layer: self.n_spilled_layers };
        self.n_units += 1;
        self.program.ops.push(Op::SpillStart { unit, input, precision });
        self.spilled = (side == Side::Elsewhere).then_some(unit);
        emit(self);
        self.spilled = None;
        self.program.ops.push(Op::SpillEnd { unit, output });
    }

    fn feed_forward(&mut self, spec: &FfnSpec, side: Side) {
        self.unit(side, ([Normed, Projected], Precision::Eight), |lowering| match spec {
            FfnSpec::Dense(dense) => lowering.gated(dense),
            FfnSpec::Experts(experts) => lowering.experts(experts),
        });
    }

    /// Queries, keys and values.
    fn heads(&mut self, spec: &AttentionSpec, side: Side) {
        let precision = heads_precision(spec);
        self.unit(side, ([Normed, Heads], precision), |lowering| {
            let parts = [&spec.query, &spec.key, &spec.value].map(|linear| lowering.linear(linear));
            lowering.project([Normed, Heads], parts.to_vec(), precision);
        });
    }

    /// The output of an attention.
    fn attended(&mut self, spec: &AttentionSpec, side: Side) {
        self.unit(side, ([Attended, Projected], Precision::Eight), |lowering| {
            let parts = vec![lowering.linear(&spec.output)];
            lowering.project([Attended, Projected], parts, Precision::Eight);
        });
    }

    fn project(&mut self, [input, output]: [Buffer; 2], parts: Vec<Linear>, precision: Precision) {
        self.program.ops.push(Op::Project { input, output, parts, precision });
    }

    fn attention(&mut self, spec: &AttentionSpec, side: Side) {
        let shape = head_shape(spec);
        let layer = KvLayerId(self.program.kv_layers.len() as u32);
        let (n_kv_heads, head_dim) = (shape.n_kv_heads, shape.head_dim);
        self.program.kv_layers.push(KvShape { n_kv_heads, head_dim });

        self.heads(spec, side);
        let query_norm = spec.query_norm.as_ref().map(|norm| self.norm(norm));
        let key_norm = spec.key_norm.as_ref().map(|norm| self.norm(norm));
        let rope = self.rope(&spec.rope);
        let (window, scale, softcap) = (spec.window, spec.scale, spec.softcap);
        self.program.ops.extend([
            Op::Rotate { shape, query_norm, key_norm, rope, layer },
            Op::Attend { shape, layer, window, scale, softcap },
        ]);
        self.attended(spec, side);
    }

    fn gated(&mut self, spec: &DenseFfnSpec) {
        let (gate, up) = (self.linear(&spec.gate), self.linear(&spec.up));
        let down = vec![self.linear(&spec.down)];
        self.program.ops.push(Op::Gate { gate, up, activation: spec.activation });
        self.project([Hidden, Projected], down, Precision::Eight);
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
