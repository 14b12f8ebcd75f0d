//! Llama (arXiv 2302.13971) and what borrows its shape: Mistral, SmolLM, TinyLlama, Yi, and with
//! experts Mixtral (arXiv 2401.04088).
//!
//! Query and key rows are permuted in GGUF files so that the rotation pairs neighbours; those of
//! other formats, which say so in `rope.half_split`, are not. Llama 3.1 brings its frequency
//! scaling as a tensor, `rope_freqs.weight`. A window is Mistral 7B v0.1's.

use super::decoder::{self, AttentionTraits, HeadNorms};
use super::experts::{DefaultWidth, Experts};
use crate::formats::FormatError;
use crate::model::source::{Bias, Source};
use crate::model::{Activation, LayerSpec, ModelSpec, RopeStyle};

pub(super) fn read(source: &Source<'_>) -> Result<ModelSpec, FormatError> {
    let dimensions = source.dimensions()?;
    let experts = Experts::read(source)?;
    let is_half_split = source.metadata().bool_opt(&source.key("rope.half_split"))?;
    let style = match is_half_split {
        Some(true) => RopeStyle::HalfSplit,
        _ => RopeStyle::Interleaved,
    };
    let rope = decoder::rope(source, &dimensions, style, 10_000.0)?;
    let traits = AttentionTraits { bias: Bias::Optional, head_norms: HeadNorms::None };
    let window = source.count_opt("attention.sliding_window", 0..=1 << 27)?;
    let layer = |layer: usize| {
        let mut attention = decoder::attention(source, &dimensions, layer, &rope, traits)?;
        attention.window = window.filter(|window| *window > 0);
        Ok(LayerSpec {
            attention_norm: decoder::layer_norm(source, &dimensions, layer, "attn_norm")?,
            attention,
            attention_post_norm: None,
            ffn_norm: decoder::layer_norm(source, &dimensions, layer, "ffn_norm")?,
            ffn: match &experts {
                None => source.ffn(layer, &dimensions, Activation::Silu)?,
                Some(experts) => experts.ffn(source, &dimensions, layer, DefaultWidth::Whole)?,
            },
            ffn_post_norm: None,
        })
    };
    let layers = (0..dimensions.layers.len()).map(layer).collect::<Result<_, FormatError>>()?;
    decoder::model(source, &dimensions, layers)
}
