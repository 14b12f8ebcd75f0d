//! What is spilled of a layer, unit by unit as the executor computes it, and how much memory that
//! takes on either side.

use super::cpu::{heads_width, spilled_activation_bytes, worker_bytes};
use super::spill::{CROSSING_TOKENS_MAX, Spill};
use super::{NodeTeams, Workers};
use crate::config::Config;
use crate::model::{FfnSpec, LayerSpec, LinearSpec, ModelSpec, TensorRef};
use crate::tensor::DType;
use std::collections::HashMap;
use tandem_cpu_kernels::repack::ROWS;
use tandem_cpu_kernels::{Layout, packed_bytes};
use tandem_kernels::DeviceMatrix;

/// Thirds of a layer that fit into the ring. Layers of the CPU and those that stream alternate, not
/// always one by one: where three of eight stream, steps take 2 % longer than the shares of the two
/// add up to, with three thirds 10 to 15 %, with two 40, and with five or more no less.
const RING_THIRDS: u64 = 4;
/// Bytes that stream at once: a slot of the ring. A copy of 16 MiB takes 0.3 ms, the kernels around
/// it a twentieth of that.
const PIECE_BYTES_MAX: usize = 16 << 20;

const F32: u64 = size_of::<f32>() as u64;

/// Rows of a matrix of so many rows and bytes that stream at once: as few pieces as slots allow, of
/// one size, each of whole groups of rows.
pub fn piece_rows(rows: usize, bytes: usize) -> usize {
    let pieces = bytes.div_ceil(PIECE_BYTES_MAX).max(1);
    rows.div_ceil(pieces).next_multiple_of(ROWS)
}

/// A run of ops whose weights are spilled.
pub(super) struct Unit<'a> {
    /// What lies in host memory alone.
    pub matrices: Vec<&'a TensorRef>,
    /// Of which both sides have copies.
    copied: Vec<&'a TensorRef>,
    /// Matrices have the rows of so many experts.
    n_experts: usize,
    /// Elements of a token that cross to the CPU, and back.
    pub widths: [usize; 2],
    /// Rows of a token that the CPU may make: of queries, keys and values a second one.
    rows_back: usize,
    /// Elements of what attention gathered, where they are what crosses.
    attended: usize,
}

/// The feed-forward network of a layer.
pub(super) fn ffn_unit(layer: &LayerSpec) -> Unit<'_> {
    let embedding = layer.ffn_norm.weight.cols;
    let (matrices, copied, n_experts) = match &layer.ffn {
        FfnSpec::Dense(ffn) => {
            let linears = [&ffn.gate, &ffn.up, &ffn.down];
            (linears.map(|linear| &linear.weight).to_vec(), biases(&linears), 1)
        }
        FfnSpec::Experts(ffn) => {
            (vec![&ffn.gate, &ffn.up, &ffn.down], vec![&ffn.router], ffn.n_experts)
        }
    };
    Unit { matrices, copied, n_experts, widths: [embedding; 2], rows_back: 1, attended: 0 }
}

/// Those of its attention: queries, keys and values, and the output.
pub(super) fn attention_units(layer: &LayerSpec) -> [Unit<'_>; 2] {
    let (attention, embedding) = (&layer.attention, layer.attention_norm.weight.cols);
    let heads = [&attention.query, &attention.key, &attention.value];
    let attended = attention.n_heads * attention.head_dim;
    [
        Unit {
            matrices: heads.map(|linear| &linear.weight).to_vec(),
            copied: biases(&heads),
            n_experts: 1,
            widths: [embedding, heads_width(attention)],
            rows_back: 2,
            attended: 0,
        },
        Unit {
            matrices: vec![&attention.output.weight],
            copied: biases(&[&attention.output]),
            n_experts: 1,
            widths: [attended, embedding],
            rows_back: 1,
            attended,
        },
    ]
}

fn biases<'a>(linears: &[&'a LinearSpec]) -> Vec<&'a TensorRef> {
    linears.iter().filter_map(|linear| linear.bias.as_ref()).collect()
}

/// Bytes of a tensor as the CPU's kernels have it: vectors in f32.
fn packed(TensorRef { dtype, rows, cols, .. }: &TensorRef) -> u64 {
    if *rows <= 1 {
        return *cols as u64 * F32;
    }
    let layout = if dtype.is_quantized() { Layout::Rows16 } else { Layout::RowMajor };
    packed_bytes(*dtype, layout, *rows, *cols).unwrap_or(usize::MAX) as u64
}

/// Bytes of a matrix as a GPU's kernels have it.
fn on_gpu(TensorRef { dtype, rows, cols, .. }: &TensorRef) -> u64 {
    DeviceMatrix::bytes_of(*dtype, *rows, *cols) as u64
}

impl Unit<'_> {
    /// Bytes in host memory.
    pub fn host_bytes(&self) -> u64 {
        self.matrices.iter().chain(&self.copied).map(|tensor| packed(tensor)).sum()
    }

    /// Type, rows, columns and experts of what is spilled: where they are equal units are, too.
    pub fn shapes(&self) -> impl Iterator<Item = (DType, usize, usize, usize)> {
        let matrices = self.matrices.iter().chain(&self.copied);
        matrices.map(|TensorRef { dtype, rows, cols, .. }| (*dtype, *rows, *cols, self.n_experts))
    }

    /// Bytes that a GPU saves.
    pub fn device_bytes(&self) -> u64 {
        self.matrices.iter().map(|matrix| on_gpu(matrix)).sum()
    }

    /// Bytes of weights that stream where the GPU computes it.
    pub fn streamed_bytes(&self) -> u64 {
        self.matrices.iter().map(|matrix| matrix.bytes()).sum()
    }

    /// Bytes of a token that cross, both ways together.
    pub fn crossed_bytes(&self) -> u64 {
        self.widths.iter().sum::<usize>() as u64 * F32
    }
}

impl Spill {
    /// What is spilled of a layer, in the order of a step.
    pub(super) fn units_of<'a>(&self, layer: usize, spec: &'a LayerSpec) -> Vec<Unit<'a>> {
        let mut units = Vec::new();
        if self.attention_layers.contains(&layer) {
            units.extend(attention_units(spec));
        }
        if self.layers.contains(&layer) {
            units.push(ffn_unit(spec));
        }
        units
    }

    /// All that is spilled.
    pub(super) fn units<'a>(&self, spec: &'a ModelSpec) -> impl Iterator<Item = Unit<'a>> {
        spec.layers.iter().enumerate().flat_map(|(at, layer)| self.units_of(at, layer))
    }

    /// Gives the ring some slots and fills in what follows from them and from the layers: bytes on
    /// the GPU, with those of what pieces are taken apart into. Units with matrices of one shape
    /// share that.
    pub(super) fn set_ring(&mut self, spec: &ModelSpec, ring_slots: usize, nodes: &NodeTeams) {
        let units: Vec<Unit<'_>> = self.units(spec).collect();
        self.ring_slots = ring_slots;
        let mut scratch = HashMap::new();
        for unit in &units {
            let mut used = HashMap::new();
            for matrix in &unit.matrices {
                let shape = (matrix.dtype, matrix.rows, matrix.cols);
                let count = used.entry(shape).or_insert(0_u64);
                *count += 1;
                let most = scratch.entry(shape).or_insert((0, on_gpu(matrix)));
                most.0 = most.0.max(*count);
            }
        }
        let scratch: u64 = scratch.values().map(|(count, bytes)| count * bytes).sum();
        self.ring_bytes = ring_slots as u64 * slot_bytes(&units, nodes) + scratch;
    }
}

/// Bytes of a slot of the ring: the largest piece of a matrix. No piece has rows of two NUMA nodes;
/// those of experts are not divided.
fn slot_bytes(units: &[Unit<'_>], nodes: &NodeTeams) -> u64 {
    let whole = NodeTeams::default();
    let pieces = |unit: &Unit<'_>| {
        let nodes = if unit.n_experts == 1 { nodes } else { &whole };
        let piece = |matrix: &&TensorRef| {
            let (bytes, all) = (packed(matrix), matrix.rows as u64);
            let parts = (0..nodes.count()).map(|team| nodes.rows(team, matrix.rows).len());
            let rows = parts.map(|part| {
                let part_bytes = bytes * part as u64 / all;
                piece_rows(part, part_bytes as usize).min(part) as u64
            });
            bytes * rows.max().unwrap_or(0) / all
        };
        unit.matrices.iter().map(piece).max().unwrap_or(0)
    };
    units.iter().map(pieces).max().unwrap_or(0)
}

/// Slots of a ring that holds some more than the largest layer of what is spilled.
pub(super) fn slots_wanted(spec: &ModelSpec, spill: &Spill, nodes: &NodeTeams) -> usize {
    let bytes = |(at, layer)| {
        let units = spill.units_of(at, layer);
        units.iter().flat_map(|unit| &unit.matrices).map(|matrix| packed(matrix)).sum::<u64>()
    };
    let largest = spec.layers.iter().enumerate().map(bytes).max().unwrap_or(0);
    let units: Vec<Unit<'_>> = spill.units(spec).collect();
    (RING_THIRDS * largest).div_ceil(3 * slot_bytes(&units, nodes).max(1)) as usize
}

/// Bytes of host memory for rows of a GPU on their way to the CPU and back, and for what the CPU,
/// which serves all GPUs, makes of them.
pub(super) fn crossing_bytes(
    spec: &ModelSpec,
    units: &[Unit<'_>],
    (workers, config): (&Workers, &Config),
) -> [u64; 2] {
    let tokens = config.scheduler.step_tokens_max.min(CROSSING_TOKENS_MAX) as u64;
    let widest = |width: &dyn Fn(&Unit<'_>) -> usize| units.iter().map(width).max().unwrap_or(0);
    let to_cpu = widest(&|unit| unit.widths[0]);
    let back = widest(&|unit| unit.rows_back * unit.widths[1]);
    let heads = widest(&|unit| if unit.rows_back > 1 { unit.widths[1] } else { 0 });
    let attended = widest(&|unit| unit.attended);
    let made = spilled_activation_bytes(spec, tokens, (heads, attended));
    [tokens * (to_cpu + back) as u64 * F32, made + worker_bytes(spec, workers, tokens)]
}
