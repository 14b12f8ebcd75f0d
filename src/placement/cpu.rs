//! What a model takes where the CPU computes it.

use super::room::Activations;
use super::{Device, Room, Workers, kv_dtype};
use crate::config::Config;
use crate::hardware::HardwareProfile;
use crate::model::{AttentionSpec, LayerSpec, ModelSpec};
use crate::request::RequestError;
use tandem_cpu_kernels::Isa;

/// Rows of logits that exist at once in an executor.
const LOGITS_ROWS: u64 = 64;

/// Tokens, and rows, of an expert that a worker of an executor multiplies at once.
const EXPERT_TILE: u64 = 128;

/// Elements of the residual stream, times its workers, that each worker of an executor may compute
/// again for itself.
const REPEATED_ELEMENTS: u64 = 2 << 10;
/// Tokens of a sequence whose heads each worker of an executor may rotate for itself.
const ROTATED_TOKENS: u64 = 16;
/// Elements of a token that a worker keeps of gate, and of up (`executor/own_buffers.rs`).
const GATED_WIDTH: u64 = 256 + 16;

/// What host memory has for a model.
pub(super) fn room(
    spec: &ModelSpec,
    (hardware, workers): (&HardwareProfile, &Workers),
    config: &Config,
    notes: &mut Vec<String>,
) -> Result<Room, RequestError> {
    let tokens = config.scheduler.step_tokens_max as u64;
    Ok(Room {
        device: Device::Cpu,
        name: HOST.into(),
        layers: 0..spec.layers.len(),
        free: hardware.memory_available_bytes,
        available: hardware.memory_available_bytes,
        kv_dtype: kv_dtype::on_cpu(config, notes)?,
        weight_bytes: spec.weight_bytes(),
        activations: Activations::Bytes(
            activation_bytes(spec, tokens) + worker_bytes(spec, workers, tokens),
        ),
        graph_bytes: [0; 2],
        swap_room: None,
        suggest: "use a smaller or more quantised model, or a shorter context".into(),
        spill: None,
    })
}

/// Host memory, as errors call it.
pub(super) const HOST: &str = "host memory";

/// Bytes of what workers keep for themselves in steps of up to `tokens` tokens.
pub(super) fn worker_bytes(spec: &ModelSpec, workers: &Workers, tokens: u64) -> u64 {
    let threads = workers.threads;
    own_bytes(spec, threads, tokens)
        + gated_bytes(spec, threads, tokens)
        + expert_scratch_bytes(spec, threads)
}

/// Widths of buffers, the largest of all layers.
struct Widths {
    /// Rows of up of a dense network; experts keep theirs in the workers' scratch.
    dense_up: u64,
    /// Each of a token's experts has a row.
    hidden: u64,
    /// Logits and routes of a token's experts.
    routing: u64,
}

fn widest(spec: &ModelSpec, width: impl Fn(&LayerSpec) -> usize) -> u64 {
    spec.layers.iter().map(width).max().unwrap_or(0) as u64
}

impl Widths {
    fn of(spec: &ModelSpec) -> Self {
        let dense_up = |layer: &LayerSpec| layer.ffn.dense().map_or(0, |ffn| ffn.up.weight.rows);
        let used = |layer: &LayerSpec| layer.ffn.experts().map_or(1, |experts| experts.n_used);
        let routing = |layer: &LayerSpec| {
            layer.ffn.experts().map_or(0, |experts| experts.n_experts + 2 * experts.n_used)
        };
        Self {
            dense_up: widest(spec, dense_up),
            hidden: widest(spec, |layer| layer.ffn.hidden_dim() * used(layer)),
            routing: widest(spec, routing),
        }
    }
}

/// Bytes of an element, and of its copy that is rounded to bf16, or to 8 bits with scales, which
/// take less.
const ROUNDED_BYTES: u64 = 4 + 2;

/// Bytes of a step's buffers: f32 rows, and rounded copies where a product follows.
fn activation_bytes(spec: &ModelSpec, tokens: u64) -> u64 {
    let attended = widest(spec, |layer| layer.attention.n_heads * layer.attention.head_dim);
    let heads = widest(spec, |layer| heads_width(&layer.attention));
    let Widths { dense_up, hidden, routing } = Widths::of(spec);
    let embedding = spec.embedding_dim as u64;
    // residual, projected, up; heads twice and normed twice for their second-order 8-bit form.
    let plain = 2 * embedding + 2 * heads + dense_up + routing;
    let quantized = 4 * embedding + attended + hidden;
    tokens * (4 * plain + quantized * ROUNDED_BYTES) + LOGITS_ROWS * 4 * spec.vocab_size as u64
}

/// The same where the CPU computes nothing but what is spilled, with queries, keys and values and
/// what attention gathered as wide as given: not at all where only networks are.
pub(super) fn spilled_activation_bytes(
    spec: &ModelSpec,
    tokens: u64,
    (heads, attended): (usize, usize),
) -> u64 {
    let Widths { dense_up, hidden, routing } = Widths::of(spec);
    let embedding = spec.embedding_dim as u64;
    // residual, projected, up; heads twice and normed twice for their second-order 8-bit form.
    let plain = 2 * embedding + 2 * heads as u64 + dense_up + routing;
    tokens * (4 * plain + (2 * embedding + attended as u64 + hidden) * ROUNDED_BYTES)
}

/// Elements of a token's queries, keys and values.
pub(super) fn heads_width(attention: &AttentionSpec) -> usize {
    (attention.n_heads + 2 * attention.n_kv_heads) * attention.head_dim
}

/// Bytes in which each worker of several keeps what it computes for itself: rows of narrow steps,
/// and heads that it rotates.
fn own_bytes(spec: &ModelSpec, threads: usize, tokens: u64) -> u64 {
    let (embedding, threads) = (spec.embedding_dim as u64, threads as u64);
    if threads < 2 {
        return 0;
    }
    let repeated = threads * REPEATED_ELEMENTS / embedding.max(1) + 1;
    let rows = ((repeated * threads).div_ceil(threads - 1) - 1).min(tokens);
    // residual; normed twice and selected, also rounded.
    let row = 4 * embedding + 3 * (4 * embedding + 2 * embedding);
    let heads = spec.layers.iter().map(|layer| heads_width(&layer.attention)).max().unwrap_or(0);
    threads * (rows * row + ROTATED_TOKENS * 4 * heads as u64)
}

/// Bytes in which each worker keeps rows of gate and up in wide steps, where their kernels are on
/// tiles (`executor/own_buffers.rs`).
fn gated_bytes(spec: &ModelSpec, threads: usize, tokens: u64) -> u64 {
    let is_dense = Widths::of(spec).hidden > 0;
    match is_dense && Isa::for_workers(threads) == Isa::Amx {
        true => threads as u64 * 2 * tokens * 4 * GATED_WIDTH,
        false => 0,
    }
}

/// Bytes in which workers gather tokens of an expert and keep products on their way.
fn expert_scratch_bytes(spec: &ModelSpec, threads: usize) -> u64 {
    if spec.experts().next().is_none() {
        return 0;
    }
    let embedding = spec.embedding_dim as u64;
    let tile = 4 * embedding + 2 * embedding + 4 * EXPERT_TILE;
    threads as u64 * EXPERT_TILE * tile
}
