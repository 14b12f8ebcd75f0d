//! Owns the decision of what lies where: weights, KV blocks, activations, the longest sequence that
//! fits, and the workers' processors; and the prediction of how fast that will be. Pure: the same
//! model, machine and configuration give the same placement, and nothing is allocated here. The
//! engine calls it before it loads anything, `tandem plan` to explain.

mod cpu;
mod explain;
mod gpu;
mod kv_dtype;
mod predict;
mod predict_costs;
mod predict_work;
mod room;
mod share;
mod spill;
mod spill_units;
mod workers;

pub use explain::ExplainRow;
pub use predict::{DecodeSpeed, Job, Prediction, PromptSpeed};
pub use share::SharedTimes;
pub use spill::{CROSSING_TOKENS_MAX, Spill};
pub use spill_units::piece_rows;
pub use workers::Workers;

use crate::config::{Config, ConfigError, GpuChoice};
use crate::hardware::HardwareProfile;
use crate::model::{ExpertsSpec, ModelSpec};
use crate::request::RequestError;
use crate::tensor::KvDType;
use crate::units::ByteSize;
use room::{Room, margin_bytes, spilled_context};
use serde::Serialize;
use std::fmt;
use std::ops::Range;

/// Blocks of the disk tier at most: their books take some 250 bytes of memory each.
const DISK_BLOCKS_MAX: u64 = 1 << 20;

/// Blocks of the disk tier.
fn disk_blocks(config: &Config, block_bytes: u64, notes: &mut Vec<String>) -> usize {
    let wanted = config.kv.disk_bytes.0 / block_bytes;
    if wanted > DISK_BLOCKS_MAX {
        let most = ByteSize(DISK_BLOCKS_MAX * block_bytes);
        notes.push(format!(
            "kv.disk_bytes is {}; {most} are used, which are {DISK_BLOCKS_MAX} blocks",
            config.kv.disk_bytes
        ));
    }
    wanted.min(DISK_BLOCKS_MAX) as usize
}

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

/// A run of layers on one device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StagePlacement {
    /// Where.
    pub device: Device,
    /// Which layers.
    pub layers: Range<usize>,
    /// Bytes of weights in the kernels' layout, without those that are spilled.
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
    /// KV blocks of the second tier, in host memory: of preempted sequences and of prefixes.
    pub host_blocks: usize,
    /// Bytes of the second tier.
    pub host_kv_bytes: u64,
    /// KV blocks of the third tier, a file.
    pub disk_blocks: usize,
    /// Bytes of the third tier.
    pub disk_kv_bytes: u64,
    /// Weights that lie in host memory, where a GPU runs a model that it can't hold.
    pub spill: Option<Spill>,
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
        let mut notes = Vec::new();
        if let Some(gpu) = gpu::choose(spec, hardware, config, &mut notes)? {
            let mut gpu_notes = notes.clone();
            let room = gpu::room(spec, (hardware, gpu), config, &mut gpu_notes);
            let is_auto = config.gpu.choice() == Ok(GpuChoice::Auto);
            match Self::on_gpu(spec, (hardware, config), (&workers, &room), gpu_notes) {
                Err(error) if is_auto => notes.push(format!("no GPU is used: {error}")),
                Ok(placed) if is_auto && placed.spill.is_some() => {
                    let on_cpu = Self::on_cpu(spec, (hardware, config), &workers, notes);
                    return Ok(placed.or_faster(on_cpu.ok(), spec, (hardware, config)));
                }
                placed => return placed,
            }
        }
        Self::on_cpu(spec, (hardware, config), &workers, notes)
    }

    fn on_cpu(
        spec: &ModelSpec,
        (hardware, config): (&HardwareProfile, &Config),
        workers: &Workers,
        mut notes: Vec<String>,
    ) -> Result<Self, RequestError> {
        let room = cpu::room(spec, (hardware, workers), config, &mut notes)?;
        Self::within(spec, config, (workers, &room), notes)
    }

    /// This placement on a GPU, or the other one on the CPU where that is predicted to be faster;
    /// where nothing was measured, this one.
    fn or_faster(
        self,
        other: Option<Self>,
        spec: &ModelSpec,
        on: (&HardwareProfile, &Config),
    ) -> Self {
        let seconds = |placement: &Self| predict::REQUEST.seconds(spec, placement, on);
        let Some(mut other) = other else { return self };
        match (seconds(&self), seconds(&other)) {
            (Some(on_gpu), Some(on_cpu)) if on_cpu < on_gpu => {
                other.notes.insert(
                    0,
                    format!(
                        "no GPU is used: with what must be spilled of the model a request is \
                         predicted to take {on_gpu:.1} s, on the CPU alone {on_cpu:.1} s"
                    ),
                );
                other
            }
            _ => self,
        }
    }

    /// Places a model on a GPU that has `room` for it: the whole, or, where that does not fit with
    /// a context of use, all but what is spilled.
    fn on_gpu(
        spec: &ModelSpec,
        (hardware, config): (&HardwareProfile, &Config),
        (workers, room): (&Workers, &Room),
        mut notes: Vec<String>,
    ) -> Result<Self, RequestError> {
        let whole = Self::within(spec, config, (workers, room), notes.clone());
        let asked = config.model.context_tokens;
        let is_enough =
            |placed: &Self| asked > 0 || placed.context_tokens >= spilled_context(spec) / 2;
        if !config.gpu.spill || whole.as_ref().is_ok_and(is_enough) {
            return whole;
        }
        let workers = workers.beside_gpu(&config.cpu);
        let spilled = match spill::room(spec, (hardware, &workers), config, room, &mut notes) {
            Ok(None) => return whole,
            Ok(Some(room)) => Self::within(spec, config, (&workers, &room), notes),
            Err(error) => Err(error),
        };
        match (whole, spilled) {
            (Ok(whole), Ok(spilled)) if whole.context_tokens < spilled.context_tokens => {
                Ok(spilled)
            }
            (Ok(whole), _) => Ok(whole),
            (Err(_), spilled) => spilled,
        }
    }

    /// Places a model on one device.
    fn within(
        spec: &ModelSpec,
        config: &Config,
        (workers, on): (&Workers, &Room),
        mut notes: Vec<String>,
    ) -> Result<Self, RequestError> {
        let kv = on.for_kv(spec, config);
        let context_tokens =
            kv.context(config, &mut notes).map_err(|need| RequestError::InsufficientMemory {
                device: on.name.clone(),
                need: on.fixed_bytes().saturating_add(need),
                free: on.usable(),
                suggest: on.suggest.clone(),
            })?;
        let device_blocks = kv.blocks(context_tokens, config.kv.cache_bytes, &mut notes);
        let kv_bytes = device_blocks as u64 * kv.block_bytes;
        let swap_room = on.swap_room.unwrap_or(kv.room - kv_bytes);
        let host_blocks = (config.kv.swap_bytes.0.min(swap_room) / kv.block_bytes) as usize;
        let disk_blocks = disk_blocks(config, kv.block_bytes, &mut notes);
        let spilled = |layer: usize| on.spill.as_ref().is_some_and(|s| s.layers.contains(&layer));
        let experts = || {
            let resident = spec.layers.iter().enumerate().filter(|(at, _)| !spilled(*at));
            resident.filter_map(|(_, layer)| layer.ffn.experts())
        };
        Ok(Self {
            model: spec.name.clone(),
            stages: vec![StagePlacement {
                device: on.device.clone(),
                layers: 0..spec.layers.len(),
                weight_bytes: on.weight_bytes,
                expert_bytes: experts().map(ExpertsSpec::bytes).sum(),
                active_expert_bytes: experts().map(|e| e.used_of(e.bytes())).sum(),
                kv_bytes,
                activation_bytes: on.activation_bytes,
            }],
            context_tokens,
            context_tokens_trained: spec.context_tokens_max,
            block_tokens: config.kv.block_tokens,
            kv_dtype: on.kv_dtype,
            device_blocks,
            host_blocks,
            host_kv_bytes: host_blocks as u64 * kv.block_bytes,
            disk_blocks,
            disk_kv_bytes: disk_blocks as u64 * kv.block_bytes,
            spill: on.spill.clone(),
            workers: workers.clone(),
            memory_free_bytes: on.free,
            memory_available_bytes: on.available,
            margin_bytes: margin_bytes(on.available),
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
        let ring_bytes = self.spill.as_ref().map_or(0, |spill| spill.ring_bytes);
        let is_shared = *self.device() == Device::Cpu;
        stage_bytes + ring_bytes + if is_shared { self.host_kv_bytes } else { 0 }
    }
}
