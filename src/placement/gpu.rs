//! Whether a model is run on a GPU, and what it takes there.

use super::cpu::heads_width;
use super::gpu_absence;
use super::room::margin_bytes;
use super::{Device, Room};
use crate::config::{Config, ConfigError, GpuChoice};
use crate::hardware::{Gpu, HardwareProfile};
use crate::model::{ExpertsSpec, ModelSpec, TensorRef};
use crate::request::RequestError;
use crate::units::ByteSize;
use std::ops::Range;
use tandem_kernels::{DeviceMatrix, ExpertRoutes};

/// Largest head and longest residual stream of a GPU's kernels.
const HEAD_DIM_MAX: usize = 256;
const EMBEDDING_DIM_MAX: usize = 16 << 10;
/// Oldest compute capability in `kernels/nvcc-flags.txt`.
const CAPABILITY_MIN: (u32, u32) = (7, 5);
/// Elements of weights that a GPU's kernels read at once.
const ROW_MULTIPLE: usize = 8;
/// Rows of logits that exist at once, and bytes of unmerged attention.
const LOGITS_ROWS: u64 = 128;
const PARTIAL_BYTES: u64 = 64 << 20;
/// Bytes of what is known of a row of logits: its measure in parts, counts of tokens by their
/// distance from the best, a list of the most likely.
const MEASURE_BYTES: u64 = 26 << 10;
/// Memory through which weights travel.
const STAGING_BYTES: u64 = 32 << 20;

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
        activation_bytes: activation_bytes(spec, &layers, config.scheduler.step_tokens_max as u64),
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

/// The same without the margin.
pub(super) fn usable_bytes(gpu: &Gpu, config: &Config) -> u64 {
    let available = available_bytes(gpu, config);
    available - margin_bytes(available)
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

/// Whether no kernels were compiled for a GPU.
fn too_old(gpu: &Gpu) -> Option<String> {
    let Gpu { ordinal, name, compute_capability, .. } = gpu;
    let (major, minor) = compute_capability.split_once('.')?;
    let capability: (u32, u32) = (major.parse().ok()?, minor.parse().ok()?);
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

/// Tokens of a step up to which products read activations in 8 bits, at most, and above which, at
/// least, in f16.
const NARROW_MAX: u64 = 128;
const NARROW_MAX_WITH_WGMMA: u64 = 8;
/// Such a step has room for a multiple of so many.
const NARROW_TILE: u64 = 64;

/// Bytes of a step's buffers on a GPU with some layers: f32 rows, and rounded copies where a
/// product follows.
pub(super) fn activation_bytes(spec: &ModelSpec, layers: &Range<usize>, tokens: u64) -> u64 {
    let (embeds, has_logits) = (layers.start == 0, layers.end == spec.layers.len());
    let widest = |width: &dyn Fn(&crate::model::LayerSpec) -> usize| {
        spec.layers.iter().map(width).max().unwrap_or(0) as u64
    };
    let heads = widest(&|layer| heads_width(&layer.attention));
    let attended = widest(&|layer| layer.attention.n_heads * layer.attention.head_dim);
    let angles = widest(&|layer| layer.attention.rope.dims);
    let hidden = widest(&|layer| layer.ffn.hidden_dim());
    let embedding = spec.embedding_dim as u64;
    let n_experts = widest(&|layer| layer.ffn.experts().map_or(0, |experts| experts.n_experts));
    let used = widest(&|layer| layer.ffn.experts().map_or(1, |experts| experts.n_used));
    // The up projection, and with experts what each of a token's makes; logits and bits of routes,
    // weights and pairs.
    let (products, routes) = match n_experts {
        0 => (hidden, 0),
        _ => (used * hidden.max(embedding), 2 * n_experts + 2 * used),
    };
    // residual, normed, projected; angles of up to two rotations; numbers of a token.
    let plain = 3 * embedding + heads + attended + used * hidden + products + routes;
    let plain = plain + 2 * angles + 17;
    let rounded = 2 * embedding + attended + used * (hidden + 128) + 3 * 128;
    let narrow = tokens.min(NARROW_MAX).next_multiple_of(NARROW_TILE) * rounded * 5 / 4;
    let wide = if tokens > NARROW_MAX_WITH_WGMMA { tokens * 2 * rounded } else { 0 };
    let logits_rows = if has_logits { LOGITS_ROWS } else { 0 };
    let logits = logits_rows * (4 * spec.vocab_size as u64 + 6 * embedding + MEASURE_BYTES);
    // Rows of an embedding in host memory, as they come and as they are taken apart.
    let row_bytes = spec.embedding.bytes() / spec.embedding.rows as u64;
    let is_looked_up = embeds && !(has_logits && spec.is_output_tied());
    let rows = if is_looked_up { 2 * tokens * (row_bytes + 128) } else { 0 };
    // Second place of a single token's residual stream, and counters of gated products.
    let single = 4 * embedding + hidden / 8 + 4;
    tokens * 4 * plain + narrow + wide + rows + logits + single + PARTIAL_BYTES + STAGING_BYTES
}
