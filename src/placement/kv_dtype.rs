//! How the CPU keeps keys and values, where it has not the type that was asked for.

use crate::config::{Config, GpuChoice};
use crate::request::RequestError;
use crate::tensor::KvDType;

/// The type of KV elements where the CPU computes. With `gpu.device = "auto"` a type that only a
/// GPU has becomes the nearest of the CPU's, with a note.
///
/// # Errors
/// `InvalidParams` where no GPU was wanted for such a type.
pub(super) fn on_cpu(config: &Config, notes: &mut Vec<String>) -> Result<KvDType, RequestError> {
    let asked = config.kv.dtype;
    if asked.is_on_cpu() {
        return Ok(asked);
    }
    if config.gpu.choice() != Ok(GpuChoice::Auto) {
        let here = KvDType::ON_CPU.map(KvDType::name).join(" or ");
        return Err(RequestError::InvalidParams {
            field: "kv.dtype".into(),
            got: asked.to_string(),
            allowed: format!("{here} on the CPU; {asked} needs a GPU (gpu.device)"),
        });
    }
    let taken = match asked {
        KvDType::Fp8E4m3 => KvDType::Q8_0,
        _ => KvDType::F16,
    };
    notes.push(format!("kv.dtype is {asked}, which only a GPU has: the CPU keeps {taken}"));
    Ok(taken)
}
