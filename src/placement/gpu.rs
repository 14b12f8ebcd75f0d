//! Whether a model is run on a GPU, and what it takes there.

use super::heads_width;
use crate::config::{Config, ConfigError, GpuChoice};
use crate::hardware::{Gpu, HardwareProfile};
use crate::model::ModelSpec;
use crate::request::RequestError;
use crate::tensor::KvDType;

/// Largest head and longest residual stream of a GPU's kernels.
const HEAD_DIM_MAX: usize = 256;
const EMBEDDING_DIM_MAX: usize = 16 << 10;
/// Rows of logits that exist at once, and bytes of unmerged attention.
const LOGITS_ROWS: u64 = 128;
const PARTIAL_BYTES: u64 = 64 << 20;
/// Memory through which weights travel.
const STAGING_BYTES: u64 = 32 << 20;

/// The GPU that a model is to be placed on, or none; `notes` say why not, where one was wanted.
pub(super) fn choose<'h>(
    spec: &ModelSpec,
    hardware: &'h HardwareProfile,
    config: &Config,
    notes: &mut Vec<String>,
) -> Result<Option<&'h Gpu>, RequestError> {
    let choice = config.gpu.choice().map_err(|error| {
        let ConfigError { field, got, allowed } = error;
        RequestError::InvalidParams { field, got, allowed }
    })?;
    let devices = &hardware.gpus.devices;
    let absence = hardware.gpus.absence.as_deref().unwrap_or("there is no such GPU");
    let index = match choice {
        GpuChoice::Off => return Ok(None),
        GpuChoice::Auto => 0,
        GpuChoice::Index(index) => index,
    };
    let found = match devices.iter().find(|gpu| gpu.ordinal == index) {
        Some(gpu) => unsupported(spec, config).map_or(Ok(gpu), Err),
        None => Err(absence.to_owned()),
    };
    match (found, choice) {
        (Ok(gpu), _) => Ok(Some(gpu)),
        (Err(reason), GpuChoice::Auto) => {
            notes.push(format!("no GPU is used: {reason}"));
            Ok(None)
        }
        (Err(reason), _) => Err(RequestError::InvalidParams {
            field: "gpu.device".into(),
            got: index.to_string(),
            allowed: format!("off, or a GPU that can run this model ({reason})"),
        }),
    }
}

/// What of the model has no kernels on a GPU.
fn unsupported(spec: &ModelSpec, config: &Config) -> Option<String> {
    if spec.experts().next().is_some() {
        return Some("mixtures of experts run on the CPU only".into());
    }
    if config.kv.dtype != KvDType::F16 {
        return Some(format!("a KV cache of {} is kept on the CPU only", config.kv.dtype));
    }
    let odd = |dim: &usize| !dim.is_multiple_of(8) || *dim > HEAD_DIM_MAX;
    if let Some(dim) = spec.layers.iter().map(|layer| layer.attention.head_dim).find(odd) {
        return Some(format!("heads of {dim} elements run on the CPU only"));
    }
    let dim = spec.embedding_dim;
    (dim > EMBEDDING_DIM_MAX).then(|| format!("embeddings of {dim} run on the CPU only"))
}

/// Tokens of a step up to which products read activations in 8 bits, and above which in f16.
const NARROW_MAX: u64 = 128;

/// Bytes of a step's buffers on a GPU: f32 rows, and rounded copies where a product follows.
pub(super) fn activation_bytes(spec: &ModelSpec, tokens: u64) -> u64 {
    let widest = |width: &dyn Fn(&crate::model::LayerSpec) -> usize| {
        spec.layers.iter().map(width).max().unwrap_or(0) as u64
    };
    let heads = widest(&|layer| heads_width(&layer.attention));
    let attended = widest(&|layer| layer.attention.n_heads * layer.attention.head_dim);
    let angles = widest(&|layer| layer.attention.rope.dims);
    let hidden = widest(&|layer| layer.ffn.hidden_dim());
    let embedding = spec.embedding_dim as u64;
    // residual, normed, projected; angles of up to two rotations.
    let plain = 3 * embedding + heads + attended + 2 * hidden + 2 * angles + 4;
    let rounded = 2 * embedding + attended + hidden;
    let narrow = tokens.min(NARROW_MAX) * rounded * 5 / 4;
    let wide = if tokens > NARROW_MAX { tokens * 2 * (rounded + 4 * 128) } else { 0 };
    let logits = LOGITS_ROWS * (4 * spec.vocab_size as u64 + 6 * embedding);
    tokens * 4 * plain + narrow + wide + logits + PARTIAL_BYTES + STAGING_BYTES
}
