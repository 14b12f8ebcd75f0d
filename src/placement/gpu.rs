//! Whether a model is run on a GPU, and what it takes there.

use super::gpu_absence;
use super::gpu_buffers::{BufferDims, BufferSize};
use super::room::Activations;
use super::room::margin_bytes;
use super::{Device, Room};
use crate::config::{Config, ConfigError, GpuChoice};
use crate::hardware::{Gpu, HardwareProfile};
use crate::model::{ExpertsSpec, ModelSpec, TensorRef};
use crate::request::RequestError;
use crate::units::ByteSize;
use std::ops::Range;
use tandem_kernels::{DeviceMatrix, ExpertRoutes, Gpu as DeviceGpu};

/// Largest head and longest residual stream of a GPU's kernels.
const HEAD_DIM_MAX: usize = 256;
const EMBEDDING_DIM_MAX: usize = 16 << 10;
/// Oldest compute capability in `kernels/nvcc-flags.txt`.
const CAPABILITY_MIN: (u32, u32) = (7, 5);
/// Elements of weights that a GPU's kernels read at once.
const ROW_MULTIPLE: usize = 8;
/// Most steps that are recorded at once.
pub const GRAPHS_MAX: usize = 256;
/// Bytes that the driver takes for the kernels' code, and leaves unused of the pieces of 32 MiB in
/// which it gives memory.
pub const KERNELS_BYTES: u64 = 56 << 20;
/// Bytes that recorded steps always may take; and part of a GPU's memory, 1/64, that they may take
/// where weights and KV leave it.
const GRAPHS_BYTES_MIN: u64 = 24 << 20;
const GRAPHS_DIVISOR: u64 = 64;
/// Launches of a layer in a recorded step, and of one with experts, at most.
const LAUNCHES: [usize; 2] = [12, 18];

/// Bytes that a recorded step of so many launches takes of a GPU, at most.
pub fn recorded_bytes(launches: usize) -> u64 {
    (128 << 10) + (launches as u64) * (4 << 10)
}

/// What a model may be placed on.
pub(super) enum Candidates<'h> {
    /// Sets of GPUs, of which the first that holds it is taken.
    Gpus(Vec<Vec<&'h Gpu>>),
    /// The CPU, for this reason.
    Cpu(String),
}

/// What a model may be placed on. `notes` say why that is no GPU where one was wanted and there is
/// one, or might be.
pub(super) fn choose<'h>(
    spec: &ModelSpec,
    hardware: &'h HardwareProfile,
    config: &Config,
    notes: &mut Vec<String>,
) -> Result<Candidates<'h>, RequestError> {
    let choice = config.gpu.choice().map_err(|error| {
        let ConfigError { field, got, allowed } = error;
        RequestError::InvalidParams { field, got, allowed }
    })?;
    let devices = &hardware.gpus.devices;
    let of_index = |index: &usize| devices.iter().find(|gpu| gpu.ordinal == *index);
    let refused = gpu_absence::refused(&hardware.gpus);
    let asked = match &choice {
        GpuChoice::Off => return Ok(Candidates::Cpu("gpu.device is off".into())),
        GpuChoice::All if refused.is_some() => None,
        GpuChoice::Auto | GpuChoice::All => Some(devices.iter().collect::<Vec<_>>()),
        GpuChoice::These(indices) => indices.iter().map(of_index).collect(),
    };
    let found = match asked {
        Some(gpus) if !gpus.is_empty() => usable(spec, gpus, &choice),
        _ => Err(gpu_absence::reason(&hardware.gpus)),
    };
    match (found, choice) {
        (Ok(gpus), GpuChoice::Auto) => {
            notes.extend(refused.map(|reason| format!("not all GPUs are used: {reason}")));
            Ok(Candidates::Gpus(fewest_first(gpus, spec.layers.len())))
        }
        (Ok(gpus), _) => Ok(Candidates::Gpus(vec![gpus])),
        (Err(reason), GpuChoice::Auto) => {
            // A machine without a GPU is not to be warned of that at every start.
            if hardware.gpus.is_broken || refused.is_some() || !devices.is_empty() {
                notes.push(format!("no GPU is used: {reason}"));
            }
            Ok(Candidates::Cpu(reason))
        }
        (Err(reason), _) => Err(RequestError::InvalidParams {
            field: "gpu.device".into(),
            got: config.gpu.device.clone(),
            allowed: format!("off or auto ({reason}), or another GPU that can run this model"),
        }),
    }
}

/// Those of some GPUs that can run a model, or why that is none, or where all are asked for, not
/// all.
fn usable<'h>(
    spec: &ModelSpec,
    gpus: Vec<&'h Gpu>,
    choice: &GpuChoice,
) -> Result<Vec<&'h Gpu>, String> {
    let refused = |gpu: &&Gpu| too_old(gpu).or_else(|| unsupported(spec));
    let reason = gpus.iter().find_map(refused);
    let most = spec.layers.len();
    match (reason, choice) {
        (Some(reason), GpuChoice::Auto) => {
            let able: Vec<_> = gpus.into_iter().filter(|gpu| refused(gpu).is_none()).collect();
            if able.is_empty() { Err(reason) } else { Ok(able) }
        }
        (Some(reason), _) => Err(reason),
        (None, GpuChoice::All | GpuChoice::These(_)) if gpus.len() > most => {
            Err(format!("each of {} GPUs needs a layer, and there are {most}", gpus.len()))
        }
        (None, _) => Ok(gpus),
    }
}

/// Each GPU by itself; then the two with most free memory, the three, and so on, each set in the
/// driver's order.
fn fewest_first(gpus: Vec<&Gpu>, layers: usize) -> Vec<Vec<&Gpu>> {
    let mut by_room = gpus.clone();
    by_room.sort_by_key(|gpu| std::cmp::Reverse(gpu.memory_free_bytes));
    let several = (2..=gpus.len().min(layers)).map(|count| {
        let mut those = by_room[..count].to_vec();
        those.sort_by_key(|gpu| gpu.ordinal);
        those
    });
    let several: Vec<_> = several.collect();
    gpus.into_iter().map(|gpu| vec![gpu]).chain(several).collect()
}

/// What a GPU has for some layers of a model; `notes` say where that is less than was allowed.
pub(super) fn room(
    spec: &ModelSpec,
    (hardware, gpu): (&HardwareProfile, &Gpu),
    layers: Range<usize>,
    config: &Config,
    notes: &mut Vec<String>,
) -> Room {
    let (limit, free) = (config.gpu.vram_limit, ByteSize(gpu.memory_free_bytes));
    let available = available_bytes(gpu, config);
    let is_limited = available < free.0;
    if limit > free {
        let index = gpu.ordinal;
        notes.push(format!("gpu.vram_limit is {limit}, GPU {index} has {free} free"));
    }
    let raise = if is_limited { "a larger gpu.vram_limit, " } else { "" };
    Room {
        device: Device::Gpu(gpu.ordinal),
        name: format!("GPU {} ({})", gpu.ordinal, gpu.name),
        free: free.0,
        available,
        kv_dtype: config.kv.dtype,
        weight_bytes: weight_bytes(spec, &layers),
        activations: Activations::OfGpu(
            BufferDims::of(spec, &layers),
            size(config, narrow_max(gpu)),
        ),
        graph_bytes: graph_bytes(spec, available - margin_bytes(available)),
        layers,
        swap_room: Some(hardware.memory_available_bytes / 2),
        suggest: format!(
            "use {raise}a smaller or more quantised model, a shorter context, or the CPU \
             (gpu.device = \"off\"){}",
            gpu_absence::held(&gpu.holders)
        ),
        spill: None,
    }
}

/// Bytes that may be used of a GPU.
fn available_bytes(gpu: &Gpu, config: &Config) -> u64 {
    match config.gpu.vram_limit.0 {
        0 => gpu.memory_free_bytes,
        limit => limit.min(gpu.memory_free_bytes),
    }
}

/// The same without the margin and what the driver takes.
pub(super) fn usable_bytes(spec: &ModelSpec, gpu: &Gpu, config: &Config) -> u64 {
    let available = available_bytes(gpu, config);
    let usable = available - margin_bytes(available);
    let [least, _] = graph_bytes(spec, usable);
    usable.saturating_sub(least)
}

/// Bytes of weights that a GPU holds with some layers: matrices as its kernels have them, vectors
/// in f32. The last layer comes with the output. Rows of an embedding that does not lie there as
/// the output the host looks up.
pub(super) fn weight_bytes(spec: &ModelSpec, layers: &Range<usize>) -> u64 {
    let mut bytes = 0;
    let mut add = |TensorRef { dtype, rows, cols, .. }: &TensorRef| {
        bytes += match rows {
            0 | 1 => rows * cols * size_of::<f32>(),
            _ => DeviceMatrix::bytes_of(*dtype, *rows, *cols),
        };
    };
    spec.layers[layers.clone()].iter().for_each(|layer| layer.for_each_tensor(&mut add));
    if layers.end == spec.layers.len() {
        let bias = spec.output_bias.iter();
        [&spec.output_norm.weight, &spec.output].into_iter().chain(bias).for_each(add);
    }
    bytes as u64
}

/// Major and minor number of a GPU's compute capability.
fn capability(gpu: &Gpu) -> Option<(u32, u32)> {
    let (major, minor) = gpu.compute_capability.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Most tokens whose products meet activations in 8 bits on a GPU.
pub(super) fn narrow_max(gpu: &Gpu) -> usize {
    DeviceGpu::narrow_max_of(capability(gpu).unwrap_or_default())
}

/// How large a stage is before its KV store is known.
pub(super) fn size(config: &Config, narrow_max: usize) -> BufferSize {
    let (tokens, block_tokens) = (config.scheduler.step_tokens_max, config.kv.block_tokens);
    BufferSize { tokens, narrow_max, blocks: 0, block_tokens }
}

/// Bytes that are left to the driver for the kernels' code and for recorded steps: those that must
/// be, and those for as many steps as there may be, where that is not too much of what may be used.
pub(super) fn graph_bytes(spec: &ModelSpec, usable: u64) -> [u64; 2] {
    let launches = LAUNCHES[usize::from(spec.experts().next().is_some())] * spec.layers.len();
    let all = GRAPHS_MAX as u64 * recorded_bytes(launches);
    let least = all.min(GRAPHS_BYTES_MIN);
    [least, all.min(usable / GRAPHS_DIVISOR).max(least)].map(|bytes| KERNELS_BYTES + bytes)
}

/// Whether no kernels were compiled for a GPU.
fn too_old(gpu: &Gpu) -> Option<String> {
    let Gpu { ordinal, name, compute_capability, .. } = gpu;
    let capability = capability(gpu)?;
    let (least_major, least_minor) = CAPABILITY_MIN;
    (capability < CAPABILITY_MIN).then(|| {
        format!(
            "GPU {ordinal} ({name}) has compute capability {compute_capability}, the kernels need \
             {least_major}.{least_minor}"
        )
    })
}

/// What of the model has no kernels on a GPU.
fn unsupported(spec: &ModelSpec) -> Option<String> {
    let odd = |dim: &usize| !dim.is_multiple_of(8) || !(8..=HEAD_DIM_MAX).contains(dim);
    if let Some(dim) = spec.layers.iter().map(|layer| layer.attention.head_dim).find(odd) {
        return Some(format!("heads of {dim} elements run on the CPU only"));
    }
    let dim = spec.embedding_dim;
    if dim > EMBEDDING_DIM_MAX {
        return Some(format!("embeddings of {dim} run on the CPU only"));
    }
    let mut refused = spec.experts().find_map(unsupported_experts);
    spec.for_each_tensor(&mut |TensorRef { name, rows, cols, .. }| {
        if refused.is_none() && *rows > 1 && !cols.is_multiple_of(ROW_MULTIPLE) {
            refused = Some(format!("{name} with rows of {cols} elements runs on the CPU only"));
        }
    });
    refused
}

/// What of a layer's experts has no kernels on a GPU.
fn unsupported_experts(experts: &ExpertsSpec) -> Option<String> {
    let ExpertsSpec { n_experts, n_used, .. } = *experts;
    if n_experts > ExpertRoutes::EXPERTS_MAX || n_used > ExpertRoutes::USED_MAX {
        return Some(format!("{n_used} of {n_experts} experts run on the CPU only"));
    }
    [&experts.gate, &experts.up, &experts.down].into_iter().find_map(|tensor| {
        let TensorRef { name, dtype, rows, .. } = tensor;
        let rows = rows / n_experts;
        let is_odd = !DeviceMatrix::supports_experts(*dtype, rows);
        is_odd
            .then(|| format!("{name} of {dtype} with experts of {rows} rows runs on the CPU only"))
    })
}
