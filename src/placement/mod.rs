//! Owns the decision of what lies where: weights, KV blocks, activations, the longest sequence that
//! fits, and the workers' processors; and the prediction of how fast that will be. Pure: the same
//! model, machine and configuration give the same placement, and nothing is allocated here. The
//! engine calls it before it loads anything, `tandem plan` to explain.

mod claims;
mod cpu;
mod explain;
mod gpu;
mod gpu_absence;
mod gpu_buffers;
mod kv_dtype;
mod node_memory;
mod nodes;
mod predict;
mod predict_costs;
mod predict_cpu;
mod predict_gpu;
mod predict_work;
mod room;
mod several;
mod share;
mod shortage;
mod spill;
mod spill_choice;
mod spill_cuts;
mod spill_units;
mod spill_ways;
mod width;
mod workers;

pub use claims::{claimed_units, dealt_rows, tiled_units};
pub use explain::ExplainRow;
pub use gpu::{GRAPHS_MAX, KERNELS_BYTES, recorded_bytes};
pub use gpu_buffers::{
    BufferBytes, BufferDims, BufferSize, ExpertBytes, INPUT_ALIGNMENT, LOGITS_TILE_ROWS, RowBytes,
};
pub use nodes::{NODE_ROWS, NodeTeams};
pub use predict::{DecodeSpeed, Job, Prediction, PromptSpeed};
pub use predict_costs::StepSeconds;
pub use share::SharedTimes;
pub use shortage::{Phase, Shortage};
pub use spill::{CROSSING_TOKENS_MAX, Spill};
pub use spill_units::piece_rows;
pub use workers::Workers;

use crate::config::{Config, ConfigError, GpuChoice};
use crate::hardware::{Gpu, HardwareProfile};
use crate::model::ModelSpec;
use crate::request::RequestError;
use crate::tensor::KvDType;
use crate::units::ByteSize;
use gpu::Candidates;
use room::{Room, margin_bytes, spilled_context};
use serde::Serialize;
use spill_ways::Ways;
use std::cell::OnceCell;
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
    /// Bytes that a GPU's driver takes for the kernels' code and for recorded steps.
    pub graph_bytes: u64,
    /// What of its layers' weights lies in host memory, where a GPU can't hold them.
    pub spill: Option<Spill>,
    /// Memory that is free on the device.
    pub memory_free_bytes: u64,
    /// Of it, what the stage may use: all, or what `gpu.vram_limit` allows.
    pub memory_available_bytes: u64,
    /// Of that, what is left to others.
    pub margin_bytes: u64,
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
    /// Tokens of the widest step.
    pub step_tokens_max: usize,
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
    /// Weights that lie in host memory, where GPUs run a model that they can't hold: those of all
    /// stages together.
    pub spill: Option<Spill>,
    /// CPU worker threads and their processors.
    pub workers: Workers,
    /// Memory that is free, of all devices together.
    pub memory_free_bytes: u64,
    /// Of it, what the placement may use: all, or what `gpu.vram_limit` allows of each GPU.
    pub memory_available_bytes: u64,
    /// Of that, what is left to others.
    pub margin_bytes: u64,
    /// Why the CPU runs the model; `None` where a GPU does.
    pub why_cpu: Option<String>,
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
        width::plan(spec, hardware, config).map(|placed| placed.by_node(hardware))
    }

    /// The same with the configured width of steps. Ways to spill are those of all widths.
    fn of_width<'a>(
        spec: &'a ModelSpec,
        (hardware, config): (&HardwareProfile, &Config),
        ways: &OnceCell<Ways<'a>>,
    ) -> Result<Self, RequestError> {
        let workers = Workers::choose(&hardware.topology, &config.cpu).map_err(|error| {
            let ConfigError { field, got, allowed } = error;
            RequestError::InvalidParams { field, got, allowed }
        })?;
        let mut notes = Vec::new();
        let why_cpu = match gpu::choose(spec, hardware, config, &mut notes)? {
            Candidates::Cpu(why) => why,
            Candidates::Gpus(candidates) => {
                let on = (&workers, &candidates[..], ways);
                let is_auto = config.gpu.choice() == Ok(GpuChoice::Auto);
                match Self::on_gpus(spec, (hardware, config), on, notes.clone()) {
                    Err(error) if is_auto => {
                        notes.push(format!("no GPU is used: {error}"));
                        error.to_string()
                    }
                    Ok(placed) if is_auto && placed.spill.is_some() => {
                        let on_cpu = Self::on_cpu(spec, (hardware, config), &workers, notes);
                        return Ok(placed.or_faster(on_cpu.ok(), spec, (hardware, config)));
                    }
                    placed => return placed,
                }
            }
        };
        let placed = Self::on_cpu(spec, (hardware, config), &workers, notes)?;
        Ok(Self { why_cpu: Some(why_cpu), ..placed })
    }

    fn on_cpu(
        spec: &ModelSpec,
        (hardware, config): (&HardwareProfile, &Config),
        workers: &Workers,
        mut notes: Vec<String>,
    ) -> Result<Self, RequestError> {
        let room = cpu::room(spec, (hardware, workers), config, &mut notes)?;
        Self::within(spec, config, (workers, &[room]), notes)
    }

    /// Places a model on the first of some sets of GPUs that holds the whole with a context of use.
    /// Where none does, the one has it that spills least, or the whole with the context that is
    /// left.
    fn on_gpus<'a>(
        spec: &'a ModelSpec,
        (hardware, config): (&HardwareProfile, &Config),
        (workers, candidates, ways): (&Workers, &[Vec<&Gpu>], &OnceCell<Ways<'a>>),
        notes: Vec<String>,
    ) -> Result<Self, RequestError> {
        let asked = config.model.context_tokens;
        let is_enough =
            |placed: &Self| asked > 0 || placed.context_tokens >= spilled_context(spec) / 2;
        let mut whole = None;
        for gpus in candidates {
            let mut notes = notes.clone();
            let rooms = several::rooms(spec, (hardware, gpus), config, &mut notes);
            let placed = Self::within(spec, config, (workers, &rooms), notes);
            if placed.as_ref().is_ok_and(is_enough) {
                return placed;
            }
            whole = Some(with_longer_context(whole, placed));
        }
        let whole = whole.expect("some GPUs");
        if !config.gpu.spill {
            return whole;
        }
        let numa_node = candidates.iter().flatten().find_map(|gpu| gpu.numa_node);
        let workers = workers.beside_gpu(&config.cpu, numa_node);
        let on = (&workers, candidates, ways);
        let beside = (whole.as_ref().ok(), &notes[..]);
        let spilled = Self::spilling(spec, (hardware, config), on, beside);
        match (whole, spilled) {
            (whole, None) | (whole @ Ok(_), Some(Err(_))) => whole,
            (_, Some(spilled)) => spilled,
        }
    }

    /// Places a model on devices that have its layers between them.
    fn within(
        spec: &ModelSpec,
        config: &Config,
        (workers, rooms): (&Workers, &[Room]),
        mut notes: Vec<String>,
    ) -> Result<Self, RequestError> {
        let kv = room::for_kv(rooms, spec, config);
        let lacking = |kv_bytes| lacks_memory(rooms, (spec, config), kv_bytes);
        let context_tokens = kv.context(config, &mut notes).map_err(lacking)?;
        let device_blocks = kv.blocks(context_tokens, config.kv.cache_bytes, &mut notes);
        let kv_bytes = device_blocks as u64 * kv.block_bytes;
        let first = &rooms[0];
        let swap_room = first.swap_room.unwrap_or(kv.room - kv_bytes);
        let host_blocks = (config.kv.swap_bytes.0.min(swap_room) / kv.block_bytes) as usize;
        let disk_blocks = disk_blocks(config, kv.block_bytes, &mut notes);
        let stages = rooms.iter().map(|on| on.stage(spec, config, device_blocks));
        let sum = |bytes: &dyn Fn(&Room) -> u64| rooms.iter().map(bytes).sum::<u64>();
        Ok(Self {
            model: spec.name.clone(),
            stages: stages.collect(),
            context_tokens,
            context_tokens_trained: spec.context_tokens_max,
            step_tokens_max: config.scheduler.step_tokens_max,
            block_tokens: config.kv.block_tokens,
            kv_dtype: first.kv_dtype,
            device_blocks,
            host_blocks,
            host_kv_bytes: host_blocks as u64 * kv.block_bytes,
            disk_blocks,
            disk_kv_bytes: disk_blocks as u64 * kv.block_bytes,
            spill: spill::in_all(rooms.iter().filter_map(|on| on.spill.as_ref())),
            workers: workers.clone(),
            memory_free_bytes: sum(&|on| on.free),
            memory_available_bytes: sum(&|on| on.available),
            margin_bytes: sum(&|on| margin_bytes(on.available)),
            why_cpu: None,
            notes,
        })
    }

    /// The device of all layers, or of the first of them.
    pub fn device(&self) -> &Device {
        &self.stages[0].device
    }

    /// Bytes of one KV block over all layers.
    pub fn block_bytes(&self) -> u64 {
        let kv_bytes: u64 = self.stages.iter().map(|stage| stage.kv_bytes).sum();
        kv_bytes.checked_div(self.device_blocks as u64).unwrap_or(0)
    }

    /// Bytes that the placement takes of its devices' memory. The host's KV blocks are among them
    /// where the CPU computes.
    pub fn device_bytes(&self) -> u64 {
        self.stages.iter().map(|stage| self.bytes_of(stage)).sum()
    }

    /// The same of one of its stages.
    pub fn bytes_of(&self, stage: &StagePlacement) -> u64 {
        let ring_bytes = stage.spill.as_ref().map_or(0, |spill| spill.ring_bytes);
        let is_shared = stage.device == Device::Cpu;
        let host_bytes = if is_shared { self.host_kv_bytes } else { 0 };
        let own_bytes = stage.weight_bytes + stage.kv_bytes + stage.activation_bytes;
        own_bytes + stage.graph_bytes + ring_bytes + host_bytes
    }
}

/// The one with the longer context; of two refusals the first.
fn with_longer_context(
    one: Option<Result<Placement, RequestError>>,
    other: Result<Placement, RequestError>,
) -> Result<Placement, RequestError> {
    match (one, other) {
        (None, other) | (Some(Err(_)), other @ Ok(_)) => other,
        (Some(Ok(one)), Ok(other)) if one.context_tokens < other.context_tokens => Ok(other),
        (Some(one), _) => one,
    }
}

/// The refusal of the device that lacks most, where a model needs so many bytes of KV in all.
fn lacks_memory(
    rooms: &[Room],
    (spec, config): (&ModelSpec, &Config),
    kv_bytes: u64,
) -> RequestError {
    let on = rooms.iter().min_by_key(|on| on.blocks(spec, config)).expect("a device");
    let blocks = kv_bytes / room::for_kv(rooms, spec, config).block_bytes;
    let kv_bytes = on.kv_bytes(spec, config, blocks);
    RequestError::InsufficientMemory {
        device: on.name.clone(),
        need: on.fixed_bytes().saturating_add(kv_bytes),
        free: on.usable(),
        suggest: on.suggest.clone(),
    }
}
