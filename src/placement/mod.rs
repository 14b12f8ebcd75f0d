//! Owns the decision of what lies where: weights, KV blocks, activations, the longest sequence that
//! fits, and the workers' processors. Pure: the same model, machine and configuration give the same
//! placement, and nothing is allocated here. The engine calls it before it loads anything,
//! `tandem plan` to explain.

mod explain;
mod gpu;
mod kv_dtype;
mod workers;

pub use explain::ExplainRow;
pub use workers::Workers;

use crate::config::{Config, ConfigError, GpuChoice};
use crate::hardware::HardwareProfile;
use crate::kv::blocks_for;
use crate::model::{AttentionSpec, ModelSpec};
use crate::request::RequestError;
use crate::tensor::KvDType;
use crate::units::ByteSize;
use serde::Serialize;
use std::fmt;
use std::ops::Range;

/// Full contexts that the KV store holds by itself, if a quarter of the memory that is left does.
/// Its pages are taken from the system only as sequences touch them.
const KV_CONTEXTS_WANTED: usize = 8;
const KV_ROOM_DIVISOR: usize = 4;
/// Shortest context worth starting with when the model's own does not fit.
const CONTEXT_TOKENS_MIN: usize = 256;
/// Part of the available memory that is left to others: 1/16.
const MARGIN_DIVISOR: u64 = 16;
/// Rows of logits that exist at once in an executor.
const LOGITS_ROWS: u64 = 64;

/// Tokens, and rows, of an expert that a worker of an executor multiplies at once.
const EXPERT_TILE: u64 = 128;

/// Elements of the residual stream, times its workers, that each worker of an executor may compute
/// again for itself.
const REPEATED_ELEMENTS: u64 = 2 << 10;
/// Tokens of a sequence whose heads each worker of an executor may rotate for itself.
const ROTATED_TOKENS: u64 = 16;

/// Memory that something can be placed in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// The host's memory; the CPU computes.
    Cpu,
    /// The memory of the GPU of this index, which computes.
    Gpu(usize),
}

impl fmt::Display for Device {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => formatter.write_str("cpu"),
            Device::Gpu(index) => write!(formatter, "gpu {index}"),
        }
    }
}

/// What a device has for a model.
struct Room {
    device: Device,
    /// As errors call it.
    name: String,
    /// Bytes that are free.
    free: u64,
    /// Of them, those that may be used.
    available: u64,
    /// How it keeps keys and values.
    kv_dtype: KvDType,
    /// Bytes of weights there.
    weight_bytes: u64,
    /// Bytes of a step's activations there.
    activation_bytes: u64,
    /// Bytes of host memory for KV blocks that wait; `None` where they share the device's.
    swap_room: Option<u64>,
    /// What to do where it is too small.
    suggest: String,
}

/// A run of layers on one device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StagePlacement {
    /// Where.
    pub device: Device,
    /// Which layers.
    pub layers: Range<usize>,
    /// Bytes of weights in the kernels' layout.
    pub weight_bytes: u64,
    /// Of them, those of experts.
    pub expert_bytes: u64,
    /// Of them, those that one token goes through.
    pub active_expert_bytes: u64,
    /// Bytes of KV blocks that attention reads.
    pub kv_bytes: u64,
    /// Bytes of a step's activations.
    pub activation_bytes: u64,
}

/// What lies where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Placement {
    /// The model's name.
    pub model: String,
    /// In the order of the layers.
    pub stages: Vec<StagePlacement>,
    /// Longest sequence, in tokens.
    pub context_tokens: usize,
    /// What the model was trained for, in tokens.
    pub context_tokens_trained: usize,
    /// Tokens of one KV block.
    pub block_tokens: usize,
    /// How keys and values are kept.
    #[serde(serialize_with = "crate::config::kv_dtype::serialize")]
    pub kv_dtype: KvDType,
    /// KV blocks that attention reads.
    pub device_blocks: usize,
    /// KV blocks of the second tier, for preempted sequences.
    pub host_blocks: usize,
    /// Bytes of the second tier.
    pub host_kv_bytes: u64,
    /// CPU worker threads and their processors.
    pub workers: Workers,
    /// Memory that is free on the device.
    pub memory_free_bytes: u64,
    /// Of it, what the placement may use: all, or what `gpu.vram_limit` allows.
    pub memory_available_bytes: u64,
    /// Of that, what is left to others.
    pub margin_bytes: u64,
    /// Everything that is not as asked or as the model was trained, in words.
    pub notes: Vec<String>,
}

impl Placement {
    /// Places a model on a machine.
    ///
    /// # Errors
    /// `InsufficientMemory` with need and free bytes and what to change; `InvalidParams` for
    /// threads that the machine can't run, for a GPU that is not there or can't run the model, and
    /// for a type of KV elements that the CPU has not.
    /// A context that was asked for beyond what the model was trained for is given, with a note.
    pub fn plan(
        spec: &ModelSpec,
        hardware: &HardwareProfile,
        config: &Config,
    ) -> Result<Self, RequestError> {
        let workers = Workers::choose(&hardware.topology, &config.cpu).map_err(|error| {
            let ConfigError { field, got, allowed } = error;
            RequestError::InvalidParams { field, got, allowed }
        })?;
        let step_tokens = config.scheduler.step_tokens_max as u64;
        let mut notes = Vec::new();
        if let Some(gpu) = gpu::choose(spec, hardware, config, &mut notes)? {
            let mut gpu_notes = notes.clone();
            let room = gpu::room(spec, (hardware, gpu), config, &mut gpu_notes);
            match Self::within(spec, config, (&workers, &room), gpu_notes) {
                Err(error) if config.gpu.choice() == Ok(GpuChoice::Auto) => {
                    notes.push(format!("no GPU is used: {error}"));
                }
                placed => return placed,
            }
        }
        let room = Room {
            device: Device::Cpu,
            name: "host memory".into(),
            free: hardware.memory_available_bytes,
            available: hardware.memory_available_bytes,
            kv_dtype: kv_dtype::on_cpu(config, &mut notes)?,
            weight_bytes: spec.weight_bytes(),
            activation_bytes: activation_bytes(spec, step_tokens)
                + own_bytes(spec, workers.threads, step_tokens)
                + expert_scratch_bytes(spec, workers.threads),
            swap_room: None,
            suggest: "use a smaller or more quantised model, or a shorter context".into(),
        };
        Self::within(spec, config, (&workers, &room), notes)
    }

    /// Places a model on one device.
    fn within(
        spec: &ModelSpec,
        config: &Config,
        (workers, on): (&Workers, &Room),
        mut notes: Vec<String>,
    ) -> Result<Self, RequestError> {
        let margin_bytes = on.available / MARGIN_DIVISOR;
        let usable = on.available - margin_bytes;
        let fixed = on.weight_bytes + on.activation_bytes;
        let block_tokens = config.kv.block_tokens;
        let block_bytes = spec.kv_bytes_per_token(on.kv_dtype) * block_tokens as u64;
        let room = usable.saturating_sub(fixed);
        let kv = KvRoom { room, block_tokens, block_bytes };
        let context_tokens = context(spec, config, &kv, &mut notes).map_err(|need| {
            RequestError::InsufficientMemory {
                device: on.name.clone(),
                need: fixed.saturating_add(need),
                free: usable,
                suggest: on.suggest.clone(),
            }
        })?;
        let device_blocks = kv.blocks(context_tokens, config.kv.cache_bytes, &mut notes);
        let kv_bytes = device_blocks as u64 * block_bytes;
        let swap_room = on.swap_room.unwrap_or(room - kv_bytes);
        let host_blocks = (config.kv.swap_bytes.0.min(swap_room) / block_bytes) as usize;
        Ok(Self {
            model: spec.name.clone(),
            stages: vec![StagePlacement {
                device: on.device.clone(),
                layers: 0..spec.layers.len(),
                weight_bytes: on.weight_bytes,
                expert_bytes: spec.expert_bytes(),
                active_expert_bytes: spec.active_expert_bytes(),
                kv_bytes,
                activation_bytes: on.activation_bytes,
            }],
            context_tokens,
            context_tokens_trained: spec.context_tokens_max,
            block_tokens,
            kv_dtype: on.kv_dtype,
            device_blocks,
            host_blocks,
            host_kv_bytes: host_blocks as u64 * block_bytes,
            workers: workers.clone(),
            memory_free_bytes: on.free,
            memory_available_bytes: on.available,
            margin_bytes,
            notes,
        })
    }

    /// The device of all layers.
    pub fn device(&self) -> &Device {
        &self.stages[0].device
    }

    /// Bytes of one KV block over all layers.
    pub fn block_bytes(&self) -> u64 {
        let kv_bytes: u64 = self.stages.iter().map(|stage| stage.kv_bytes).sum();
        kv_bytes.checked_div(self.device_blocks as u64).unwrap_or(0)
    }

    /// Bytes that the placement takes of its device's memory. The host's KV blocks are among them
    /// where the CPU computes.
    pub fn device_bytes(&self) -> u64 {
        let stages = self.stages.iter();
        let stage_bytes: u64 =
            stages.map(|s| s.weight_bytes + s.kv_bytes + s.activation_bytes).sum();
        let is_shared = *self.device() == Device::Cpu;
        stage_bytes + if is_shared { self.host_kv_bytes } else { 0 }
    }
}

/// What is left for KV.
struct KvRoom {
    room: u64,
    block_tokens: usize,
    block_bytes: u64,
}

impl KvRoom {
    fn bytes(&self, tokens: usize) -> u64 {
        (blocks_for(tokens, self.block_tokens) as u64).saturating_mul(self.block_bytes)
    }

    /// Tokens that fit, in whole blocks.
    fn tokens_max(&self) -> usize {
        let blocks = self.room / self.block_bytes;
        usize::try_from(blocks).unwrap_or(usize::MAX).saturating_mul(self.block_tokens)
    }

    /// Blocks of the store: what was asked for, at least one context, at most what fits.
    fn blocks(&self, context_tokens: usize, asked: ByteSize, notes: &mut Vec<String>) -> usize {
        let context_blocks = blocks_for(context_tokens, self.block_tokens);
        let fit = (self.room / self.block_bytes) as usize;
        let wanted = match asked.0 {
            0 => (KV_CONTEXTS_WANTED * context_blocks).min(fit / KV_ROOM_DIVISOR),
            bytes => (bytes / self.block_bytes) as usize,
        };
        let given = wanted.min(fit).max(context_blocks);
        if asked.0 > 0 && given != wanted {
            let bytes = ByteSize(given as u64 * self.block_bytes);
            notes.push(format!("kv.cache_bytes is {asked}, the KV store has {bytes}"));
        }
        given
    }
}

/// Tokens of the longest sequence, or the bytes of KV that it would have needed.
fn context(
    spec: &ModelSpec,
    config: &Config,
    kv: &KvRoom,
    notes: &mut Vec<String>,
) -> Result<usize, u64> {
    let trained = spec.context_tokens_max;
    if config.model.context_tokens > 0 {
        let asked = config.model.context_tokens;
        if asked > trained {
            notes.push(format!("the context of {asked} tokens exceeds the {trained} trained"));
        }
        let need = kv.bytes(asked);
        return if need <= kv.room { Ok(asked) } else { Err(need) };
    }
    let fit = kv.tokens_max();
    if fit >= trained {
        return Ok(trained);
    }
    if fit < CONTEXT_TOKENS_MIN.min(trained) {
        return Err(kv.bytes(CONTEXT_TOKENS_MIN.min(trained)));
    }
    notes.push(format!("memory holds {fit} of the {trained} tokens of context trained"));
    Ok(fit)
}

/// Bytes of a step's buffers: f32 rows, and 8-bit copies where a product follows.
fn activation_bytes(spec: &ModelSpec, tokens: u64) -> u64 {
    let widest = |width: &dyn Fn(&crate::model::LayerSpec) -> usize| {
        spec.layers.iter().map(width).max().unwrap_or(0) as u64
    };
    let attended = widest(&|layer| layer.attention.n_heads * layer.attention.head_dim);
    let heads = widest(&|layer| heads_width(&layer.attention));
    // Each of a token's experts has a row of hidden; up is in the workers' scratch then.
    let dense_up = widest(&|layer| layer.ffn.dense().map_or(0, |dense| dense.up.weight.rows));
    let hidden = widest(&|layer| {
        layer.ffn.hidden_dim() * layer.ffn.experts().map_or(1, |experts| experts.n_used)
    });
    let routing = widest(&|layer| {
        layer.ffn.experts().map_or(0, |experts| experts.n_experts + 2 * experts.n_used)
    });
    let embedding = spec.embedding_dim as u64;
    // residual, projected, up; heads twice and normed twice for their second-order 8-bit form.
    let plain = 2 * embedding + 2 * heads + dense_up + routing;
    let quantized = 4 * embedding + attended + hidden;
    // Rounded to bf16, or to 8 bits with scales, which take less.
    tokens * (4 * plain + quantized * (4 + 2)) + LOGITS_ROWS * 4 * spec.vocab_size as u64
}

/// Elements of a token's queries, keys and values.
fn heads_width(attention: &AttentionSpec) -> usize {
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

/// Bytes in which workers gather tokens of an expert and keep products on their way.
fn expert_scratch_bytes(spec: &ModelSpec, threads: usize) -> u64 {
    if spec.experts().next().is_none() {
        return 0;
    }
    let embedding = spec.embedding_dim as u64;
    let tile = 4 * embedding + 2 * embedding + 4 * EXPERT_TILE;
    threads as u64 * EXPERT_TILE * tile
}
