//! What a device has for a model, and how much of it becomes KV: the longest sequence and the
//! blocks of the store.

use super::gpu_buffers::{BufferDims, BufferSize, Growth};
use super::{Device, Spill, StagePlacement};
use crate::config::Config;
use crate::kv::blocks_for;
use crate::model::{ExpertsSpec, ModelSpec};
use crate::tensor::KvDType;
use crate::units::ByteSize;
use std::ops::Range;

/// Full contexts that the KV store holds by itself, if a quarter of the memory that is left does.
/// Its pages are taken from the system only as sequences touch them.
const KV_CONTEXTS_WANTED: usize = 8;
const KV_ROOM_DIVISOR: usize = 4;
/// Shortest context worth starting with when the model's own does not fit.
const CONTEXT_TOKENS_MIN: usize = 256;
/// Longest context that is worth spilling weights for, unless a longer one is asked for.
const CONTEXT_TOKENS_SPILLED: usize = 8192;
/// Part of the available memory that is left to others: 1/16.
const MARGIN_DIVISOR: u64 = 16;

/// What of `available` bytes is left to others.
pub(super) fn margin_bytes(available: u64) -> u64 {
    available / MARGIN_DIVISOR
}

/// What must be available so that `bytes` remain beside the margin.
pub(super) fn with_margin(bytes: u64) -> u64 {
    (bytes as u128 * MARGIN_DIVISOR as u128).div_ceil(MARGIN_DIVISOR as u128 - 1) as u64
}

/// A step's activations.
#[derive(Clone, Copy)]
pub(super) enum Activations {
    /// So many bytes.
    Bytes(u64),
    /// Buffers on a GPU, where some grow with the KV store, whose blocks do not count here.
    OfGpu(BufferDims, BufferSize),
}

impl Activations {
    /// Bytes that do not depend on the KV store.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => *bytes,
            Self::OfGpu(dims, size) => dims.fixed_bytes(*size),
        }
    }

    /// Bytes with so many KV blocks.
    fn bytes_with(&self, blocks: usize) -> u64 {
        match self {
            Self::Bytes(bytes) => *bytes,
            Self::OfGpu(dims, size) => dims.bytes(BufferSize { blocks, ..*size }).total() as u64,
        }
    }

    /// What grows with the KV store.
    pub fn growth(&self) -> Growth {
        match self {
            Self::Bytes(_) => Growth::default(),
            Self::OfGpu(dims, size) => dims.growth(size.block_tokens),
        }
    }
}

/// What a device has for a model.
#[derive(Clone)]
pub(super) struct Room {
    pub device: Device,
    /// As errors call it.
    pub name: String,
    /// Which layers lie there.
    pub layers: Range<usize>,
    /// Bytes that are free.
    pub free: u64,
    /// Of them, those that may be used.
    pub available: u64,
    /// How it keeps keys and values.
    pub kv_dtype: KvDType,
    /// Bytes of weights there.
    pub weight_bytes: u64,
    /// A step's activations there.
    pub activations: Activations,
    /// Bytes that the driver takes there for kernels and recorded steps: at least, and where all
    /// else leaves them.
    pub graph_bytes: [u64; 2],
    /// Bytes of host memory for KV blocks that wait; `None` where they share the device's.
    pub swap_room: Option<u64>,
    /// What to do where it is too small.
    pub suggest: String,
    /// Weights that lie elsewhere.
    pub spill: Option<Spill>,
}

impl Room {
    /// Bytes without the margin.
    pub fn usable(&self) -> u64 {
        self.available - margin_bytes(self.available)
    }

    /// Bytes of all but KV.
    pub fn fixed_bytes(&self) -> u64 {
        let ring_bytes = self.spill.as_ref().map_or(0, |spill| spill.ring_bytes);
        self.weight_bytes + self.activations.bytes() + self.graph_bytes[0] + ring_bytes
    }

    /// Bytes of a KV block's part there.
    pub fn block_bytes(&self, spec: &ModelSpec, config: &Config) -> u64 {
        let layers = &spec.layers[self.layers.clone()];
        let token = layers.iter().map(|layer| layer.kv_bytes_per_token(self.kv_dtype));
        token.sum::<u64>() * config.kv.block_tokens as u64
    }

    /// Bytes of so many KV blocks, and of what grows with them.
    pub fn kv_bytes(&self, spec: &ModelSpec, config: &Config, blocks: u64) -> u64 {
        self.activations.growth().bytes(blocks, self.block_bytes(spec, config))
    }

    /// KV blocks whose parts fit there; less than 0 where not even all else does.
    pub fn blocks(&self, spec: &ModelSpec, config: &Config) -> i64 {
        let block = self.block_bytes(spec, config);
        self.activations.growth().blocks(self.usable(), self.fixed_bytes(), block)
    }

    /// What lies there with so many KV blocks.
    pub fn stage(&self, spec: &ModelSpec, config: &Config, blocks: usize) -> StagePlacement {
        let spilled = |layer: usize| self.spill.as_ref().is_some_and(|s| s.layers.contains(&layer));
        let experts = || {
            let resident = self.layers.clone().filter(|layer| !spilled(*layer));
            resident.filter_map(|layer| spec.layers[layer].ffn.experts())
        };
        let taken = self.fixed_bytes() + self.kv_bytes(spec, config, blocks as u64);
        let left = self.usable().saturating_sub(taken);
        StagePlacement {
            device: self.device.clone(),
            layers: self.layers.clone(),
            weight_bytes: self.weight_bytes,
            expert_bytes: experts().map(ExpertsSpec::bytes).sum(),
            active_expert_bytes: experts().map(|e| e.used_of(e.bytes())).sum(),
            kv_bytes: blocks as u64 * self.block_bytes(spec, config),
            activation_bytes: self.activations.bytes_with(blocks),
            graph_bytes: self.graph_bytes[1].min(self.graph_bytes[0] + left),
            spill: self.spill.clone(),
            memory_free_bytes: self.free,
            memory_available_bytes: self.available,
            margin_bytes: margin_bytes(self.available),
        }
    }
}

/// Tokens of a context for which weights are spilled, unless another one is asked for.
pub(super) fn spilled_context(spec: &ModelSpec) -> usize {
    spec.context_tokens_max.min(CONTEXT_TOKENS_SPILLED)
}

/// What devices that have the layers of a model between them leave for KV: a block has a part on
/// each, so the fewest that one of them holds count.
pub(super) fn for_kv(rooms: &[Room], spec: &ModelSpec, config: &Config) -> KvRoom {
    let (block_tokens, trained) = (config.kv.block_tokens, spec.context_tokens_max);
    let block_bytes = spec.kv_bytes_per_token(rooms[0].kv_dtype) * block_tokens as u64;
    let room = match rooms {
        [one] if one.device == Device::Cpu => one.usable().saturating_sub(one.fixed_bytes()),
        _ => {
            let blocks = rooms.iter().map(|room| room.blocks(spec, config)).min();
            (blocks.unwrap_or(0).max(0) as u64).saturating_mul(block_bytes)
        }
    };
    // Weights that are spilled for KV cost every token, a longer context a few.
    let is_spilled = rooms.iter().any(|room| room.spill.is_some());
    KvRoom {
        room,
        block_tokens,
        block_bytes,
        trained,
        context_max: if is_spilled { spilled_context(spec) } else { trained },
        contexts: if is_spilled { 1 } else { KV_CONTEXTS_WANTED },
    }
}

/// KV blocks for which weights are spilled: of one context of `tokens` tokens, or what was asked
/// for.
pub(super) fn wanted_blocks(spec: &ModelSpec, config: &Config, tokens: usize) -> u64 {
    let (kv, asked) = (&config.kv, config.model.context_tokens);
    let tokens = if asked > 0 { asked } else { tokens };
    let block_bytes = spec.kv_bytes_per_token(kv.dtype) * kv.block_tokens as u64;
    let of_context = blocks_for(tokens, kv.block_tokens) as u64;
    of_context.max(kv.cache_bytes.0 / block_bytes)
}

/// What is left for KV.
pub(super) struct KvRoom {
    /// Bytes.
    pub room: u64,
    block_tokens: usize,
    /// Bytes of a block.
    pub block_bytes: u64,
    /// Tokens of context that the model was trained for.
    trained: usize,
    /// Of them, those that are given without being asked for.
    context_max: usize,
    /// Contexts that the store is to hold, unless its size was asked for.
    contexts: usize,
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
    pub fn blocks(&self, context_tokens: usize, asked: ByteSize, notes: &mut Vec<String>) -> usize {
        let context_blocks = blocks_for(context_tokens, self.block_tokens);
        let fit = (self.room / self.block_bytes) as usize;
        let wanted = match asked.0 {
            0 => (self.contexts * context_blocks).min(fit / KV_ROOM_DIVISOR),
            bytes => (bytes / self.block_bytes) as usize,
        };
        let given = wanted.min(fit).max(context_blocks);
        if asked.0 > 0 && given != wanted {
            let bytes = ByteSize(given as u64 * self.block_bytes);
            notes.push(format!("kv.cache_bytes is {asked}, the KV store has {bytes}"));
        }
        given
    }

    /// Tokens of the longest sequence, or the bytes of KV that it would have needed.
    pub fn context(&self, config: &Config, notes: &mut Vec<String>) -> Result<usize, u64> {
        let Self { trained, context_max, .. } = *self;
        if config.model.context_tokens > 0 {
            let asked = config.model.context_tokens;
            if asked > trained {
                notes.push(format!("the context of {asked} tokens exceeds the {trained} trained"));
            }
            let need = self.bytes(asked);
            return if need <= self.room { Ok(asked) } else { Err(need) };
        }
        let fit = self.tokens_max();
        if fit < CONTEXT_TOKENS_MIN.min(trained) {
            return Err(self.bytes(CONTEXT_TOKENS_MIN.min(trained)));
        }
        if fit < context_max {
            notes.push(format!("memory holds {fit} of the {trained} tokens of context trained"));
        } else if context_max < trained {
            notes.push(format!(
                "context of {context_max} of the {trained} tokens trained, since weights are \
                 spilled; model.context_tokens asks for more"
            ));
        }
        Ok(fit.min(context_max))
    }
}
