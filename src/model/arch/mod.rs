//! Owns the families: each file turns metadata into a [`ModelSpec`] and holds no forward code. They
//! must not know files or kernels, only what `source` gives them. [`read`] is called by
//! `ModelSpec::from_checkpoint` and picks the family by `general.architecture`.

mod decoder;
mod experts;
mod gemma3;
mod llama;
mod qwen2;
mod qwen3;
mod qwen3moe;

use super::ModelSpec;
use super::source::Source;
use crate::formats::{Checkpoint, FormatError};

type Read = fn(&Source<'_>) -> Result<ModelSpec, FormatError>;

/// Every family: GGUF's word and its reader.
const FAMILIES: [(&str, Read); 5] = [
    ("llama", llama::read),
    ("qwen2", qwen2::read),
    ("qwen3", qwen3::read),
    ("qwen3moe", qwen3moe::read),
    ("gemma3", gemma3::read),
];

pub(super) fn known() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().map(|(name, _)| *name)
}

pub(super) fn read(checkpoint: &Checkpoint) -> Result<ModelSpec, FormatError> {
    let key = "general.architecture";
    let metadata = checkpoint.metadata();
    let architecture = metadata.str(key)?;
    let Some((name, read)) = FAMILIES.iter().find(|(name, _)| *name == architecture) else {
        let known = known().collect::<Vec<_>>().join(", ");
        let message = format!("{architecture:?} is not supported; supported: {known}");
        return Err(metadata.refuse(key, message));
    };
    let source = Source::new(checkpoint, name);
    let mut spec = read(&source)?;
    spec.unused_tensors = unused(&source, &spec)?;
    Ok(spec)
}

/// Tensors that the model does not read. One inside a layer means that the layer computes something
/// that its family does not know here, so the answers would be wrong: that is refused.
fn unused(source: &Source<'_>, spec: &ModelSpec) -> Result<Vec<String>, FormatError> {
    let mut used = std::collections::HashSet::new();
    spec.for_each_tensor(&mut |tensor| {
        used.insert(tensor.name.as_str());
    });
    let factors = spec.layers.iter().filter_map(|l| l.attention.rope.frequency_factors.as_ref());
    used.extend(factors.map(|tensor| tensor.name.as_str()));
    let mut unused = Vec::new();
    for info in source.tensors().filter(|info| !used.contains(info.name)) {
        // Early converters wrote the rotation's frequencies, which follow from the metadata.
        let derived = info.name.ends_with(".attn_rot_embd") || info.name.ends_with(".rope_freqs");
        if info.name.starts_with("blk.") && !derived {
            let message = format!(
                "no part of a {} model with {} layers",
                spec.architecture,
                spec.layers.len()
            );
            return Err(source.refuse_tensor(&info, message));
        }
        unused.push(info.name.to_owned());
    }
    Ok(unused)
}
