//! Which feed-forward networks are spilled: their weights lie in host memory, though a GPU that
//! does not hold the whole model runs it. Attention, KV, norms and logits of all layers stay there.
//!
//! In a step the CPU computes a spilled network, or its weights stream through a ring of slots into
//! the GPU's memory, or both. The fewest networks are spilled: reading one from host memory takes
//! some forty times as long. They are spread evenly over the layers, so that what streams or is
//! computed for one has the time that the GPU takes for those between.

use super::cpu::{HOST, ffn_activation_bytes, worker_bytes};
use super::room::{margin_bytes, with_margin};
use super::{Room, Workers};
use crate::config::Config;
use crate::hardware::HardwareProfile;
use crate::model::{FfnSpec, ModelSpec, TensorRef};
use crate::request::RequestError;
use crate::units::ByteSize;
use serde::Serialize;
use std::collections::HashSet;
use tandem_cpu_kernels::repack::ROWS;
use tandem_cpu_kernels::{Layout, packed_bytes};
use tandem_kernels::DeviceMatrix;

/// Slots of the ring: one is multiplied with while others fill, the rest takes up what copies and
/// kernels differ in pace.
pub const RING_SLOTS: usize = 4;
/// Tokens of the widest step whose rows cross to the CPU and back: beyond them weights stream.
pub const CROSSING_TOKENS_MAX: usize = 256;

/// Feed-forward networks whose weights lie in host memory though a GPU runs the model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Spill {
    /// Layers, ascending.
    pub layers: Vec<usize>,
    /// Bytes of their weights in host memory, in the CPU kernels' layout.
    pub weight_bytes: u64,
    /// Bytes of the slots and scratch through which they stream, on the GPU.
    pub ring_bytes: u64,
    /// Bytes of host memory in which rows cross, and of the CPU's activations.
    pub crossing_bytes: u64,
}

/// What a GPU and the host have for a model of which as little as possible is spilled, where
/// spilling helps at all. `whole` is what the GPU has for the whole model.
///
/// The store of KV is one context or what was asked for, as far as it fits with the most that can
/// be spilled.
///
/// # Errors
/// `InsufficientMemory` of the host.
pub(super) fn room(
    spec: &ModelSpec,
    (hardware, workers): (&HardwareProfile, &Workers),
    config: &Config,
    whole: &Room,
    notes: &mut Vec<String>,
) -> Result<Option<Room>, RequestError> {
    let host_bytes: Vec<u64> = (0..spec.layers.len()).map(|at| ffn_bytes(spec, at)).collect();
    let crossing_bytes = crossing_bytes(spec, workers, config);
    let candidate = |count| {
        let layers = spread(&host_bytes, count);
        let spill = Spill {
            weight_bytes: layers.iter().map(|layer| host_bytes[*layer]).sum(),
            ring_bytes: ring_bytes(spec, &layers),
            crossing_bytes,
            layers,
        };
        let left = spill.layers.iter().map(|layer| device_bytes(spec, *layer)).sum::<u64>();
        Room { weight_bytes: whole.weight_bytes - left, spill: Some(spill), ..whole.clone() }
    };
    let candidates: Vec<Room> = (1..=spec.layers.len()).map(candidate).collect();
    let Some(least) = candidates.iter().map(Room::fixed_bytes).min() else { return Ok(None) };
    if least >= whole.fixed_bytes() {
        return Ok(None);
    }
    let usable = whole.usable();
    let wanted = candidates[0].for_kv(spec, config).wanted_bytes(config);
    let kv_bytes = wanted.min(usable.saturating_sub(least));
    let fits = |room: &Room| room.fixed_bytes() + kv_bytes <= usable.max(least);
    let Some(mut room) = candidates.into_iter().find(fits) else { return Ok(None) };
    if let Some(spill) = &room.spill {
        let left = host_left(spill, hardware)?;
        room.swap_room = room.swap_room.map(|swap| swap.min(left));
        notes.push(in_words(spill, spec, whole, kv_bytes));
    }
    Ok(Some(room))
}

/// What lies in host memory, and what more memory of the GPU would change.
fn in_words(spill: &Spill, spec: &ModelSpec, whole: &Room, kv_bytes: u64) -> String {
    let need = with_margin(whole.fixed_bytes().saturating_add(kv_bytes));
    let limit = if whole.available < whole.free { " (gpu.vram_limit)" } else { "" };
    format!(
        "the feed-forward networks of {} of {} layers are spilled to host memory; {} more of the \
         GPU's memory{limit} would hold them all, less some of them",
        spill.layers.len(),
        spec.layers.len(),
        ByteSize(need.saturating_sub(whole.available))
    )
}

/// Bytes of host memory that are left for other things.
fn host_left(spill: &Spill, hardware: &HardwareProfile) -> Result<u64, RequestError> {
    let available = hardware.memory_available_bytes;
    let free = available - margin_bytes(available);
    let need = spill.weight_bytes + spill.crossing_bytes;
    free.checked_sub(need).ok_or_else(|| RequestError::InsufficientMemory {
        device: HOST.into(),
        need,
        free,
        suggest: "the GPU's memory does not hold the whole model, and the host's not what would \
                  be spilled: use a smaller or more quantised model, or a shorter context"
            .into(),
    })
}

/// `count` of the layers, ascending, each with its equal share of all their `bytes` around it.
fn spread(bytes: &[u64], count: usize) -> Vec<usize> {
    let total: u64 = bytes.iter().sum();
    let (mut layer, mut end) = (0, bytes[0]);
    let mut layers = Vec::with_capacity(count);
    for index in 0..count {
        let middle = total as u128 * (2 * index as u128 + 1) / (2 * count as u128);
        while u128::from(end) <= middle && layer + 1 < bytes.len() {
            layer += 1;
            end += bytes[layer];
        }
        // Of unequal layers a large one may have two middles in it, and a small one none.
        let first = layers.last().map_or(0, |last| last + 1);
        layers.push(layer.clamp(first, bytes.len() - (count - index)));
    }
    layers
}

/// Gate, up and down: what is spilled of a layer.
pub(super) fn matrices(ffn: &FfnSpec) -> [&TensorRef; 3] {
    match ffn {
        FfnSpec::Dense(dense) => [&dense.gate.weight, &dense.up.weight, &dense.down.weight],
        FfnSpec::Experts(experts) => [&experts.gate, &experts.up, &experts.down],
    }
}

/// Bytes of a matrix as the CPU's kernels have it.
fn packed(TensorRef { dtype, rows, cols, .. }: &TensorRef) -> u64 {
    let layout = if dtype.is_quantized() { Layout::Rows16 } else { Layout::RowMajor };
    packed_bytes(*dtype, layout, *rows, *cols).unwrap_or(usize::MAX) as u64
}

/// Bytes of a layer's network in host memory; of a router and biases the GPU has copies.
fn ffn_bytes(spec: &ModelSpec, layer: usize) -> u64 {
    let ffn = &spec.layers[layer].ffn;
    let small = match ffn {
        FfnSpec::Dense(dense) => [&dense.gate, &dense.up, &dense.down]
            .into_iter()
            .filter_map(|linear| linear.bias.as_ref())
            .map(|bias| bias.elements() * size_of::<f32>() as u64)
            .sum(),
        FfnSpec::Experts(experts) => packed(&experts.router),
    };
    matrices(ffn).into_iter().map(packed).sum::<u64>() + small
}

/// Bytes that a GPU saves where a layer's network is spilled.
fn device_bytes(spec: &ModelSpec, layer: usize) -> u64 {
    let bytes = |TensorRef { dtype, rows, cols, .. }: &TensorRef| {
        DeviceMatrix::bytes_of(*dtype, *rows, *cols) as u64
    };
    matrices(&spec.layers[layer].ffn).into_iter().map(bytes).sum()
}

/// Whether networks can stream to the GPU: only in the interleaved layout, which float weights and
/// experts of odd sizes have not.
pub(super) fn can_stream(spec: &ModelSpec) -> bool {
    spec.layers.iter().all(|layer| {
        let experts = layer.ffn.experts().map_or(1, |experts| experts.n_experts);
        let is_interleaved = |matrix: &&TensorRef| {
            let rows = matrix.rows / experts;
            matrix.dtype.is_quantized() && (experts == 1 || rows.is_multiple_of(ROWS))
        };
        matrices(&layer.ffn).iter().all(is_interleaved)
    })
}

/// Bytes of the ring: slots for any matrix, and for each kind of matrix the one that it becomes in
/// the layout of a GPU's kernels.
fn ring_bytes(spec: &ModelSpec, layers: &[usize]) -> u64 {
    if !can_stream(spec) {
        return 0;
    }
    let (mut slot, mut scratch, mut seen) = (0, 0, HashSet::new());
    for layer in layers {
        for (role, matrix) in matrices(&spec.layers[*layer].ffn).into_iter().enumerate() {
            let TensorRef { dtype, rows, cols, .. } = matrix;
            slot = packed(matrix).max(slot);
            if seen.insert((role, *dtype, *rows, *cols)) {
                scratch += DeviceMatrix::bytes_of(*dtype, *rows, *cols) as u64;
            }
        }
    }
    RING_SLOTS as u64 * slot + scratch
}

/// Bytes of host memory for rows on their way to the CPU and back, and for what it makes of them.
fn crossing_bytes(spec: &ModelSpec, workers: &Workers, config: &Config) -> u64 {
    let most = if can_stream(spec) { CROSSING_TOKENS_MAX } else { usize::MAX };
    let tokens = config.scheduler.step_tokens_max.min(most) as u64;
    let rows = 2 * tokens * spec.embedding_dim as u64 * size_of::<f32>() as u64;
    rows + ffn_activation_bytes(spec, tokens) + worker_bytes(spec, workers, tokens)
}
