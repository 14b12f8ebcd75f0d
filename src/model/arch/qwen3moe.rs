//! Qwen3, the sizes with experts (arXiv 2505.09388): the attention of the dense ones, and in every
//! layer many narrow experts, 8 of 128 in Qwen3-30B-A3B.

use super::decoder::{self, AttentionTraits, HeadNorms};
use super::experts::{DefaultWidth, Experts};
use crate::formats::FormatError;
use crate::model::source::{Bias, Source};
use crate::model::{LayerSpec, ModelSpec, RopeStyle};

pub(super) fn read(source: &Source<'_>) -> Result<ModelSpec, FormatError> {
    let dimensions = source.dimensions()?;
    let experts = Experts::read(source)?;
    let experts = experts.ok_or_else(|| source.refuse("expert_count", "0 or missing"))?;
    let rope = decoder::rope(source, &dimensions, RopeStyle::HalfSplit, 10_000.0)?;
    let traits = AttentionTraits { bias: Bias::Optional, head_norms: HeadNorms::QueryAndKey };
    let layer = |layer: usize| {
        Ok(LayerSpec {
            attention_norm: decoder::layer_norm(source, &dimensions, layer, "attn_norm")?,
            attention: decoder::attention(source, &dimensions, layer, &rope, traits)?,
            attention_post_norm: None,
            ffn_norm: decoder::layer_norm(source, &dimensions, layer, "ffn_norm")?,
            ffn: experts.ffn(source, &dimensions, layer, DefaultWidth::Shared)?,
            ffn_post_norm: None,
        })
    };
    let layers = (0..dimensions.layers.len()).map(layer).collect::<Result<_, FormatError>>()?;
    decoder::model(source, &dimensions, layers)
}
