//! One match arm per op.

use super::attend::Attention;
use super::graphs::StepShape;
use super::inputs::Part;
use super::norms::ComingNorm;
use super::spill::GpuSpill;
use super::weights::width_of;
use super::{GpuStage, LOGITS_TILE_ROWS};
use crate::executor::ExecutorError;
use crate::executor::program::{Buffer, HeadShape, KvLayerId, Linear, Norm, Op, Precision, RopeId};
use crate::model::Activation;
use crate::step::StepPlan;
use tandem_cpu_kernels::RopeStyle;
use tandem_kernels::{EmbedRows, Gate, Gated, HeadCounts, Product, RotateHeads, Span, TokenTables};

const F32: usize = size_of::<f32>();
pub(super) const U32: usize = size_of::<u32>();
/// Contexts are laid out by multiples of this: a segment of attention.
const POSITIONS_UNIT: usize = 256;
/// Widest step that is recorded.
const RECORDED_TOKENS_MAX: usize = 256;

/// What is done to heads before attention.
struct Rotation {
    shape: HeadShape,
    query_norm: Option<Norm>,
    key_norm: Option<Norm>,
    rope: RopeId,
    layer: KvLayerId,
}

impl GpuStage {
    /// Performs the copies and runs the program on a plan that was checked.
    pub(super) fn compute(&mut self, plan: &StepPlan) -> Result<(), ExecutorError> {
        self.kv.copy(&plan.copies)?;
        if plan.tokens.is_empty() {
            return Ok(());
        }
        let shape = self.begin(plan)?;
        let launched = self.start_shape(shape);
        let done = self.finish_spilled();
        // A GPU that failed is why the CPU was not answered.
        launched.and_then(|()| self.sample(plan)).and(done)
    }

    /// Sends what the host prepares for a step of a checked plan. What is to be started.
    pub(super) fn begin(&mut self, plan: &StepPlan) -> Result<StepShape, ExecutorError> {
        let streamed = self.spill.as_ref().map_or(0, |spill| spill.streamed(plan.tokens.len()));
        self.prepare(plan, streamed)?;
        self.mark_inputs()?;
        let rows = if self.last.is_some() { plan.logits.len() } else { 0 };
        Ok(StepShape {
            tokens: plan.tokens.len(),
            rows: rows.min(LOGITS_TILE_ROWS),
            positions_max: self.positions_max().next_multiple_of(POSITIONS_UNIT),
            is_each_alone: self.buffers.host.is_each_alone,
            streamed,
        })
    }

    /// Starts the host's side of a step that has begun, and its kernels.
    pub(super) fn start_shape(&mut self, shape: StepShape) -> Result<(), ExecutorError> {
        let host = self.spill.as_ref().map(|spill| spill.begin(shape.tokens, shape.streamed));
        let started = host.unwrap_or(Ok(())).and_then(|()| self.run_shape(shape));
        if started.is_err() {
            self.spill.iter().for_each(GpuSpill::abandon);
        }
        started
    }

    /// Waits for the host's side of a step that was started, or was not. This thread sleeps
    /// meanwhile, since workers have all processors.
    pub(super) fn finish_spilled(&self) -> Result<(), ExecutorError> {
        self.spill.as_ref().map_or(Ok(()), GpuSpill::finish)
    }

    /// Starts the kernels of a step: from a record, if steps of its shape were seen.
    fn run_shape(&mut self, shape: StepShape) -> Result<(), ExecutorError> {
        let weights = std::sync::Arc::clone(&self.weights);
        let mut graphs = std::mem::take(&mut self.graphs);
        // Prompts launch faster than they compute, and are divided anew each time.
        let is_recorded = shape.tokens <= RECORDED_TOKENS_MAX
            && self.buffers.host.runs.is_empty()
            && self.op_marks.is_none();
        let ran = if is_recorded {
            // SAFETY: the stage's memory stays where it is until `prepare` forgets the records.
            unsafe { graphs.run(weights.gpu(), shape, || self.launch(&shape)) }
        } else {
            self.launch(&shape)
        };
        self.graphs = graphs;
        self.has_moved.set(shape.tokens == 1 && self.ends_moved.get());
        ran
    }

    /// Starts all kernels of a step, up to the first tile of logits.
    fn launch(&self, shape: &StepShape) -> Result<(), ExecutorError> {
        let tokens = shape.tokens;
        // A step whose record was spoilt comes here twice.
        self.has_moved.set(false);
        // Where tokens are alone, who attends rotates on the way.
        let mut on_the_way = None;
        // Where there is one token, products normalise on theirs.
        let mut before = None;
        let ops = &self.weights.program().ops;
        // What the CPU's unit reads, while ops are its.
        let mut of_cpu = None;
        for (index, op) in ops.iter().enumerate() {
            match op {
                &Op::SpillEnd { unit, output } => {
                    if let Some(input) = of_cpu.take() {
                        self.end_spilled(tokens, unit, [input, output])?;
                    }
                }
                _ if of_cpu.is_some() => {}
                &Op::SpillStart { unit, input, .. } => {
                    let is_of_cpu = self.start_spilled((tokens, shape.streamed), (unit, input))?;
                    of_cpu = is_of_cpu.then_some(input);
                }
                Op::Embed { scale, .. } => self.embed(tokens, *scale)?,
                Op::Select { .. } => {}
                &Op::Norm { pending, norm, precision } => {
                    let coming = ComingNorm { pending, norm, precision, is_for_cpu: false };
                    let reader = self.reader(&ops[index + 1..], shape.streamed);
                    before = self.norm_now_or_later(tokens, coming, reader)?;
                }
                Op::Project { input, output, parts, precision } => {
                    let (from, to) = ((*input, *precision), (*output, &parts[..]));
                    self.project(tokens, before.take(), from, to)?;
                }
                &Op::Rotate { shape: heads, query_norm, key_norm, rope, layer } => {
                    let rotation = Rotation { shape: heads, query_norm, key_norm, rope, layer };
                    if shape.is_each_alone {
                        on_the_way = Some(self.rotation(&rotation));
                    } else {
                        self.rotate(tokens, &rotation)?;
                    }
                }
                &Op::Attend { shape: heads, layer, window, scale, softcap } => {
                    let attention = Attention { shape: heads, layer, window, scale, softcap };
                    self.attend(shape, &attention, on_the_way.take().as_ref())?;
                }
                Op::Gate { gate, up, activation } => {
                    self.gate(tokens, before.take(), [*gate, *up], *activation)?;
                }
                Op::Logits { .. } => self.logits_tile((0, shape.rows), tokens)?,
                &Op::Route { router, weight_scale, .. } => {
                    self.route(tokens, router, weight_scale)?;
                }
                &Op::GateExperts { gate, up, activation, .. } => {
                    self.gate_experts(tokens, [gate, up], activation)?;
                }
                &Op::DownExperts { down, .. } => self.down_experts(tokens, down)?,
                // It was copied to its place.
                Op::Receive => {}
                Op::Send { pending } => self.add_pending(tokens, *pending)?,
            }
            self.mark_op(index)?;
        }
        if tokens == 1 {
            self.ends_moved.set(self.has_moved.get());
        }
        Ok(())
    }

    fn positions_max(&self) -> usize {
        self.batch.positions.iter().max().map_or(0, |last| last + 1)
    }

    /// Brings tokens, positions, block tables, angles and wanted rows to the GPU.
    fn prepare(&mut self, plan: &StepPlan, streamed: usize) -> Result<(), ExecutorError> {
        let (gpu, rotations) = (self.weights.gpu(), self.weights.rotations());
        self.buffers.host.find_runs(plan, self.run_blocks);
        let (host, inputs) = (&mut self.buffers.host, &mut self.buffers.inputs);
        let questions = match &self.last {
            Some(_) => host.sampling.plan(plan, self.buffers.logits.cols),
            None => 0,
        };
        let on = (gpu, self.weights.vram());
        if inputs.begin(on, (plan.tokens.len(), plan.block_tables.len(), questions))? {
            self.graphs.forget();
        }
        inputs.put(Part::Positions, self.batch.positions.iter().map(|position| *position as u32));
        let tables = plan.sequences.iter().flat_map(|sequence| {
            std::iter::repeat_n(sequence.block_table.start as u32, sequence.tokens.len())
        });
        inputs.put(Part::Tables, tables);
        inputs.put(Part::Wanted, plan.logits.iter().map(|row| row.row as u32));
        inputs.put(Part::Runs, host.runs.as_flattened().iter().copied());
        inputs.put(Part::Single, host.single.iter().copied());
        let bases = self.spill.as_mut().map(|spill| spill.next_bases(plan.tokens.len(), streamed));
        inputs.put(Part::Crossings, bases.map(|bases| bases.crossing));
        inputs.put(Part::Pieces, bases.map(|bases| bases.ring));
        inputs.put(Part::Rows, plan.tokens.iter().map(|token| token.index() as u32));
        inputs.put(Part::Blocks, plan.block_tables.iter().map(|block| block.0));
        host.sampling.write_questions(inputs.bytes_mut(Part::Questions));
        let width = rotations.width();
        if width > 0 {
            let angles = bytemuck::cast_slice_mut(inputs.bytes_mut(Part::Angles));
            let rows = angles.chunks_exact_mut(width).zip(&self.batch.positions);
            rows.for_each(|(row, position)| rotations.fill(*position, row));
        }
        let file_rows = inputs.bytes_mut(Part::FileRows);
        if !file_rows.is_empty() {
            let bytes = file_rows.len() / plan.tokens.len();
            for (row, token) in file_rows.chunks_exact_mut(bytes).zip(&plan.tokens) {
                row.copy_from_slice(self.weights.file_row(token.index()));
            }
        }
        inputs.send(gpu)
    }

    /// Rows of the embedding, from the GPU's memory or from what came with the step.
    fn embed(&self, tokens: usize, scale: f32) -> Result<(), ExecutorError> {
        let (gpu, inputs) = (self.weights.gpu(), &self.buffers.inputs);
        let out = self.buffers.residual.values();
        let (table, rows) = match (self.weights.embedding(), &self.buffers.looked_up) {
            (Some(table), _) => (table, Some(inputs.span(Part::Rows))),
            (None, Some(table)) => {
                table.pack(gpu, inputs.span(Part::FileRows), 0..tokens)?;
                (table, None)
            }
            (None, None) => unreachable!("an embedding is here or there"),
        };
        Ok(gpu.embed_rows(&EmbedRows { table, rows, tokens, scale, out })?)
    }

    /// A product into columns `first ..` of rows of `stride` elements.
    fn product<'a>(
        &'a self,
        part: &Linear,
        out: Span<'a>,
        (first, stride): (usize, usize),
    ) -> Product<'a> {
        Product {
            matrix: self.matrix(part.matrix),
            bias: part.bias.map(|bias| self.weights.vector(bias)),
            out: out.part(first * F32, out.bytes() - first * F32),
            stride,
        }
    }

    fn project(
        &self,
        tokens: usize,
        before: Option<ComingNorm>,
        (input, precision): (Buffer, Precision),
        (output, parts): (Buffer, &[Linear]),
    ) -> Result<(), ExecutorError> {
        let x = self.buffers.rows(input).columns(tokens, precision);
        let stride = width_of(self.weights.program(), output);
        let out = self.buffers.rows(output).values();
        let mut first = 0;
        let products = parts.iter().map(|part| {
            let product = self.product(part, out, (first, stride));
            first += product.matrix.rows();
            product
        });
        let (gpu, products) = (self.weights.gpu(), products.collect::<Vec<_>>());
        match before {
            Some(norm) => self.moved(gpu.multiply_after(&self.norm_before(norm), &products, &x)?),
            None => gpu.multiply(&products, &x)?,
        }
        Ok(())
    }

    /// Where the tokens of the step stand.
    pub(super) fn tokens(&self, tokens: usize) -> TokenTables<'_> {
        let inputs = &self.buffers.inputs;
        TokenTables {
            tokens,
            positions: inputs.span(Part::Positions),
            tables: inputs.span(Part::Tables),
            blocks: inputs.span(Part::Blocks),
        }
    }

    fn rotation(&self, rotation: &Rotation) -> RotateHeads<'_> {
        let (pairs, style, offset) = self.weights.rotations().shape(rotation.rope);
        let width = self.weights.rotations().width();
        let angles = self.buffers.inputs.span(Part::Angles);
        let norm =
            |norm: Option<Norm>| norm.map(|norm| (self.weights.vector(norm.weight), norm.eps));
        RotateHeads {
            heads: self.buffers.heads.values(),
            angles: angles.part(offset * F32, angles.bytes() - offset * F32),
            angle_stride: width,
            pairs,
            interleaved: style == RopeStyle::Interleaved,
            query_norm: norm(rotation.query_norm),
            key_norm: norm(rotation.key_norm),
        }
    }

    fn rotate(&self, tokens: usize, rotation: &Rotation) -> Result<(), ExecutorError> {
        let pass = self.rotation(rotation);
        let tokens = self.tokens(tokens);
        let store = self.kv.layer(rotation.layer);
        let heads = counts(rotation.shape);
        Ok(self.weights.gpu().rotate_heads(&pass, heads, (&tokens, &store))?)
    }

    fn gate(
        &self,
        tokens: usize,
        before: Option<ComingNorm>,
        [gate, up]: [Linear; 2],
        activation: Activation,
    ) -> Result<(), ExecutorError> {
        let (gpu, hidden) = (self.weights.gpu(), &self.buffers.hidden);
        let x = self.buffers.normed.columns(tokens, Precision::Eight);
        let gated = Gated {
            gate: self.product(&gate, hidden.values(), (0, hidden.cols)),
            up: self.product(&up, self.buffers.up.values(), (0, hidden.cols)),
            activation: gate_of(activation),
            out: self.weights.has_floats().then(|| hidden.values()),
            eight_bits: hidden.eight_bits(tokens, Precision::Eight),
            halves: hidden.halves(tokens),
            counters: self.buffers.gate_counters.span(),
        };
        let norm = before.map(|norm| self.norm_before(norm));
        self.moved(gpu.multiply_gated(norm.as_ref(), &gated, &x)?);
        Ok(())
    }

    /// Norms and products of some wanted rows, and their measures.
    pub(super) fn logits_tile(
        &self,
        (first, rows): (usize, usize),
        tokens: usize,
    ) -> Result<(), ExecutorError> {
        let (gpu, buffers, last) = (self.weights.gpu(), &self.buffers, self.last_ops());
        let selected = &buffers.selected;
        self.select((first, rows), tokens)?;
        let (logits, vocab) = (buffers.logits.values(), buffers.logits.cols);
        let product = self.product(&last.output, logits, (0, vocab));
        gpu.multiply(&[product], &selected.columns(rows, Precision::Eight))?;
        Ok(gpu.measure_rows(logits, (rows, vocab), last.softcap, &buffers.measures)?)
    }
}

pub(super) fn gate_of(activation: Activation) -> Gate {
    match activation {
        Activation::Silu => Gate::Silu,
        Activation::GeluTanh => Gate::GeluTanh,
    }
}

pub(super) fn counts(shape: HeadShape) -> HeadCounts {
    let HeadShape { n_heads, n_kv_heads, head_dim } = shape;
    HeadCounts { n_heads, n_kv_heads, head_dim }
}
