//! What a program means: every op as plain loops over f32, all weights dequantised, keys and
//! values rounded to f16, one sequence at a time. No layout, no thread, no rounding to 8 bits.

use std::collections::HashMap;
use tandem::executor::Program;
use tandem::executor::program::{
    Buffer, ExpertShape, HeadShape, KvLayerId, Linear, MatrixId, Norm, Op, Pending, RopeId,
    VectorId,
};
use tandem::formats::Checkpoint;
use tandem::model::{Activation, RopeStyle, TensorRef};
use tandem::step::RowOutput;
use tandem::units::TokenId;
use tandem_cpu_kernels::dequantize_row;

/// Rows of activations.
type Rows = Vec<Vec<f32>>;

/// Runs a program on whole sequences.
pub struct Reference<'a> {
    checkpoint: &'a Checkpoint,
    program: &'a Program,
    tensors: HashMap<String, Rows>,
    buffers: HashMap<Buffer, Rows>,
    /// Keys and values per layer: `[n_tokens][n_kv_heads * head_dim]`.
    kv: HashMap<KvLayerId, [Rows; 2]>,
    logits: Rows,
}

/// Mean and largest distance in nats of what some rows of a sequence hold from exact logits,
/// `[n_tokens][vocab_size]`.
pub fn distance_from(exact: &[Vec<f32>], rows: &[RowOutput]) -> (f64, f64) {
    let (mut sum, mut count, mut largest) = (0.0, 0.0, 0.0_f64);
    for row in rows {
        let exact = log_softmax(&exact[row.position - 1]);
        for token in std::iter::once(&row.token).chain(&row.top) {
            let difference = (f64::from(token.logprob) - exact[token.id.index()]).abs();
            (sum, count, largest) = (sum + difference, count + 1.0, largest.max(difference));
        }
    }
    (sum / count, largest)
}

impl<'a> Reference<'a> {
    pub fn new(checkpoint: &'a Checkpoint, program: &'a Program) -> Self {
        let (tensors, buffers, kv) = (HashMap::new(), HashMap::new(), HashMap::new());
        Self { checkpoint, program, tensors, buffers, kv, logits: Vec::new() }
    }

    /// Logits of every token of a sequence: `[n_tokens][vocab_size]`.
    pub fn logits(&mut self, tokens: &[TokenId]) -> Rows {
        for op in &self.program.ops {
            self.interpret(op, tokens);
        }
        std::mem::take(&mut self.logits)
    }

    fn interpret(&mut self, op: &Op, tokens: &[TokenId]) {
        match op {
            Op::Embed { table, scale } => {
                let table = self.matrix(*table);
                let row = |token: &TokenId| scaled(&table[token.index()], *scale);
                let rows = tokens.iter().map(row).collect();
                self.buffers.insert(Buffer::Residual, rows);
            }
            Op::Norm { pending, norm, .. } => {
                let normed = self.settled(*pending, *norm);
                self.buffers.insert(Buffer::Normed, normed);
            }
            Op::Project { input, output, parts, .. } => {
                let rows = self.product(*input, parts);
                self.buffers.insert(*output, rows);
            }
            Op::Rotate { shape, query_norm, key_norm, rope, layer } => {
                self.rotate(*shape, [*query_norm, *key_norm], *rope, *layer);
            }
            Op::Attend { shape, layer, window, scale, softcap } => {
                self.attend(*shape, *layer, *window, (*scale, *softcap));
            }
            Op::Gate { gate, up, activation } => {
                let gate = self.product(Buffer::Normed, &[*gate]);
                let up = self.product(Buffer::Normed, &[*up]);
                let row = |(gate, up): (&Vec<f32>, &Vec<f32>)| {
                    let pairs = gate.iter().zip(up);
                    pairs.map(|(gate, up)| activate(*activation, *gate) * up).collect()
                };
                let hidden = gate.iter().zip(&up).map(row).collect();
                self.buffers.insert(Buffer::Hidden, hidden);
            }
            Op::Route { shape, router, weight_scale } => {
                let router = self.matrix(*router);
                let routes = |x: &Vec<f32>| routes(&router, x, *shape, *weight_scale);
                let rows = self.buffers[&Buffer::Normed].iter().map(routes).collect();
                self.buffers.insert(Buffer::Routes, rows);
            }
            Op::GateExperts { shape, gate, up, activation } => {
                self.gate_experts(*shape, [*gate, *up], *activation);
            }
            Op::DownExperts { shape, down } => self.down_experts(*shape, *down),
            Op::Select { pending, norm } => {
                let selected = self.settled(*pending, *norm);
                self.buffers.insert(Buffer::Selected, selected);
            }
            Op::Logits { output, softcap } => {
                let logits = self.product(Buffer::Selected, &[*output]);
                self.logits = logits.iter().map(|row| capped(row, *softcap)).collect();
            }
            Op::Receive | Op::Send { .. } => panic!("the reference runs whole models"),
            Op::SpillStart { .. } | Op::SpillEnd { .. } => {}
        }
    }

    fn tensor(&mut self, tensor: &TensorRef) -> Rows {
        let checkpoint = self.checkpoint;
        let load = || {
            let TensorRef { name, dtype, rows, cols } = tensor;
            let mut bytes = vec![0; dtype.row_bytes(*cols).expect("whole blocks")];
            let row = |row: usize| {
                checkpoint.read_rows(name, row..row + 1, &mut bytes).expect("a checked tensor");
                let mut values = vec![0.0; *cols];
                dequantize_row(*dtype, &bytes, &mut values);
                values
            };
            (0..*rows).map(row).collect()
        };
        self.tensors.entry(tensor.name.clone()).or_insert_with(load).clone()
    }

    fn matrix(&mut self, id: MatrixId) -> Rows {
        self.tensor(&self.program.matrix(id).tensor)
    }

    fn vector(&mut self, id: VectorId) -> Vec<f32> {
        self.tensor(&self.program.vectors[id.0 as usize]).concat()
    }

    fn normed(&mut self, row: &[f32], norm: Norm) -> Vec<f32> {
        let weight = self.vector(norm.weight);
        let mean = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / row.len() as f64;
        let factor = 1.0 / (mean + f64::from(norm.eps)).sqrt();
        row.iter().zip(&weight).map(|(x, w)| (f64::from(*x) * factor) as f32 * w).collect()
    }

    /// Adds what is pending to the residual stream, and returns its norm.
    fn settled(&mut self, pending: Pending, norm: Norm) -> Rows {
        let mut residual = self.buffers[&Buffer::Residual].clone();
        for (token, row) in residual.iter_mut().enumerate() {
            let addend = match pending {
                Pending::Nothing => continue,
                Pending::Add => self.buffers[&Buffer::Projected][token].clone(),
                Pending::AddNormed(norm) => {
                    let projected = self.buffers[&Buffer::Projected][token].clone();
                    self.normed(&projected, norm)
                }
            };
            row.iter_mut().zip(&addend).for_each(|(x, addend)| *x += addend);
        }
        let normed = residual.iter().map(|row| self.normed(row, norm)).collect();
        self.buffers.insert(Buffer::Residual, residual);
        normed
    }

    fn product(&mut self, input: Buffer, parts: &[Linear]) -> Rows {
        let input = self.buffers[&input].clone();
        let mut out = vec![Vec::new(); input.len()];
        for part in parts {
            let matrix = self.matrix(part.matrix);
            let bias = part.bias.map_or(vec![0.0; matrix.len()], |bias| self.vector(bias));
            for (out, x) in out.iter_mut().zip(&input) {
                out.extend(matrix.iter().zip(&bias).map(|(row, bias)| dot(row, x) + bias));
            }
        }
        out
    }

    /// A row of hidden per pair of token and slot, token by token.
    fn gate_experts(&mut self, shape: ExpertShape, [gate, up]: [MatrixId; 2], of: Activation) {
        let [gate, up] = [gate, up].map(|id| self.matrix(id));
        let rows = gate.len() / shape.n_experts;
        let mut hidden = Rows::new();
        for (x, routes) in self.buffers[&Buffer::Normed].iter().zip(&self.buffers[&Buffer::Routes])
        {
            for expert in &routes[..shape.n_used] {
                let own = *expert as usize * rows..(*expert as usize + 1) * rows;
                let pairs = gate[own.clone()].iter().zip(&up[own]);
                hidden.push(pairs.map(|(g, u)| activate(of, dot(g, x)) * dot(u, x)).collect());
            }
        }
        self.buffers.insert(Buffer::Hidden, hidden);
    }

    fn down_experts(&mut self, shape: ExpertShape, down: MatrixId) {
        let down = self.matrix(down);
        let rows = down.len() / shape.n_experts;
        let hidden = self.buffers[&Buffer::Hidden].chunks_exact(shape.n_used);
        let row = |(hidden, routes): (&[Vec<f32>], &Vec<f32>)| {
            let mut sum = vec![0.0; rows];
            let (experts, weights) = routes.split_at(shape.n_used);
            for ((x, expert), weight) in hidden.iter().zip(experts).zip(weights) {
                let own = &down[*expert as usize * rows..][..rows];
                sum.iter_mut().zip(own).for_each(|(sum, row)| *sum += weight * dot(row, x));
            }
            sum
        };
        let projected = hidden.zip(&self.buffers[&Buffer::Routes]).map(row).collect();
        self.buffers.insert(Buffer::Projected, projected);
    }

    fn rotate(
        &mut self,
        shape: HeadShape,
        norms: [Option<Norm>; 2],
        rope: RopeId,
        layer: KvLayerId,
    ) {
        let rows = self.buffers[&Buffer::Heads].clone();
        let (mut queries, mut kv) = (Vec::new(), [Vec::new(), Vec::new()]);
        for (position, row) in rows.iter().enumerate() {
            let mut parts = [0..shape.query_dim(), 0..shape.kv_dim()].map(|part| part.len());
            parts[1] += parts[0];
            let mut turned = [row[..parts[0]].to_vec(), row[parts[0]..parts[1]].to_vec()];
            for (heads, norm) in turned.iter_mut().zip(norms) {
                for head in heads.chunks_exact_mut(shape.head_dim) {
                    if let Some(norm) = norm {
                        let normed = self.normed(head, norm);
                        head.copy_from_slice(&normed);
                    }
                    self.turn(head, rope, position);
                }
            }
            let [query, key] = turned;
            queries.push(query);
            kv[0].push(as_f16(&key));
            kv[1].push(as_f16(&row[parts[1]..]));
        }
        self.buffers.insert(Buffer::Heads, queries);
        self.kv.insert(layer, kv);
    }

    fn turn(&mut self, head: &mut [f32], rope: RopeId, position: usize) {
        let spec = self.program.ropes[rope.0 as usize].clone();
        let factors = spec.frequency_factors.as_ref().map(|tensor| self.tensor(tensor).concat());
        let frequencies = spec.frequencies(factors.as_deref());
        for (pair, frequency) in frequencies.iter().enumerate() {
            let (i, j) = match spec.style {
                RopeStyle::Interleaved => (2 * pair, 2 * pair + 1),
                RopeStyle::HalfSplit => (pair, pair + spec.dims / 2),
            };
            let (sin, cos) = (position as f64 * f64::from(*frequency)).sin_cos();
            let (a, b) = (f64::from(head[i]), f64::from(head[j]));
            let magnitude = f64::from(spec.magnitude());
            head[i] = (magnitude * (a * cos - b * sin)) as f32;
            head[j] = (magnitude * (b * cos + a * sin)) as f32;
        }
    }

    fn attend(
        &mut self,
        shape: HeadShape,
        layer: KvLayerId,
        window: Option<usize>,
        (scale, softcap): (f32, Option<f32>),
    ) {
        let (queries, [keys, values]) = (&self.buffers[&Buffer::Heads], &self.kv[&layer]);
        let dim = shape.head_dim;
        let mut attended = Rows::new();
        for (position, query) in queries.iter().enumerate() {
            let first = window.map_or(0, |window| (position + 1).saturating_sub(window));
            let mut row = Vec::new();
            for (head, query) in query.chunks_exact(dim).enumerate() {
                let kv_head = head / (shape.n_heads / shape.n_kv_heads);
                let part = kv_head * dim..(kv_head + 1) * dim;
                let scores: Vec<f32> = keys[first..=position]
                    .iter()
                    .map(|key| scale * dot(query, &key[part.clone()]))
                    .collect();
                let weights = softmax(&capped(&scores, softcap));
                let mut sum = vec![0.0_f64; dim];
                for (weight, value) in weights.iter().zip(&values[first..=position]) {
                    for (sum, value) in sum.iter_mut().zip(&value[part.clone()]) {
                        *sum += weight * f64::from(*value);
                    }
                }
                row.extend(sum.iter().map(|sum| *sum as f32));
            }
            attended.push(row);
        }
        self.buffers.insert(Buffer::Attended, attended);
    }
}

/// As papers and llama.cpp have it: a softmax over all experts, the largest, normalised again.
fn routes(router: &Rows, x: &[f32], shape: ExpertShape, scale: f32) -> Vec<f32> {
    let logits: Vec<f32> = router.iter().map(|row| dot(row, x)).collect();
    let all = softmax(&logits);
    let mut order: Vec<usize> = (0..all.len()).collect();
    order.sort_by(|a, b| all[*b].total_cmp(&all[*a]));
    order.truncate(shape.n_used);
    let sum: f64 = order.iter().map(|expert| all[*expert]).sum();
    let weights = order.iter().map(|expert| (f64::from(scale) * all[*expert] / sum) as f32);
    order.iter().map(|expert| *expert as f32).chain(weights).collect()
}

fn as_f16(row: &[f32]) -> Vec<f32> {
    row.iter().map(|x| half::f16::from_f32(*x).to_f32()).collect()
}

fn scaled(row: &[f32], factor: f32) -> Vec<f32> {
    row.iter().map(|x| x * factor).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() as f32
}

fn capped(row: &[f32], cap: Option<f32>) -> Vec<f32> {
    row.iter().map(|x| cap.map_or(*x, |cap| cap * (x / cap).tanh())).collect()
}

fn activate(activation: Activation, x: f32) -> f32 {
    match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::GeluTanh => {
            let inner = (2.0 / std::f32::consts::PI).sqrt() * (x + 0.044_715 * x * x * x);
            x / 2.0 * (1.0 + inner.tanh())
        }
    }
}

/// Probabilities of a row of scores.
fn softmax(scores: &[f32]) -> Vec<f64> {
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f64> = scores.iter().map(|score| f64::from(score - max).exp()).collect();
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|weight| weight / sum).collect()
}

/// Natural logarithms of the probabilities of a row of logits.
fn log_softmax(logits: &[f32]) -> Vec<f64> {
    softmax(logits).iter().map(|probability| probability.ln()).collect()
}
