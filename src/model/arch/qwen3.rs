//! Qwen3, the dense sizes (arXiv 2505.09388): a norm on every query and key head, no biases, heads
//! whose length the file gives.

use super::decoder::{self, AttentionTraits, HeadNorms};
use crate::formats::FormatError;
use crate::model::source::{Bias, Source};
use crate::model::{Activation, LayerSpec, ModelSpec, RopeStyle};

pub(super) fn read(source: &Source<'_>) -> Result<ModelSpec, FormatError> {
    decoder::refuse_experts(source)?;
    let dimensions = source.dimensions()?;
    let rope = decoder::rope(source, &dimensions, RopeStyle::HalfSplit, 10_000.0)?;
    let traits = AttentionTraits { bias: Bias::Optional, head_norms: HeadNorms::QueryAndKey };
    let layer = |layer: usize| {
        Ok(LayerSpec {
            attention_norm: decoder::layer_norm(source, &dimensions, layer, "attn_norm")?,
            attention: decoder::attention(source, &dimensions, layer, &rope, traits)?,
            attention_post_norm: None,
            ffn_norm: decoder::layer_norm(source, &dimensions, layer, "ffn_norm")?,
            ffn: source.ffn(layer, &dimensions, Activation::Silu)?,
            ffn_post_norm: None,
        })
    };
    let layers = (0..dimensions.layers.len()).map(layer).collect::<Result<_, FormatError>>()?;
    decoder::model(source, &dimensions, layers)
}
