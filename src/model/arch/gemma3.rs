//! Gemma 3, text only (arXiv 2503.19786): a scaled embedding, a norm before and after both halves
//! of a layer and on every query and key head, GeGLU, and five layers with a sliding window to each
//! that sees everything. The two kinds of layers turn positions differently.

use super::decoder::{self, AttentionTraits, HeadNorms};
use crate::formats::{FormatError, Value};
use crate::model::source::{Bias, Dimensions, Source};
use crate::model::{Activation, LayerSpec, ModelSpec, RopeScaling, RopeSpec, RopeStyle};

/// The family's constants (its `config.json`): they stand in no key that every file has.
const GLOBAL_BASE: f32 = 1_000_000.0;
const LOCAL_BASE: f32 = 10_000.0;
const PERIOD: usize = 6;

/// Layers of the 27B model, whose attention scale is not that of its head length.
const LAYERS_27B: usize = 62;

/// How the layers with a window differ from those without.
struct Local {
    window: usize,
    rope: RopeSpec,
    pattern: Pattern,
}

/// Which layers have a window.
enum Pattern {
    /// All but each n-th.
    Period(usize),
    /// Those with `true`.
    Layers(Vec<bool>),
}

impl Local {
    fn read(
        source: &Source<'_>,
        layers: usize,
        global: &RopeSpec,
    ) -> Result<Option<Self>, FormatError> {
        let window = source.count_opt("attention.sliding_window", 0..=1 << 27)?;
        let Some(window) = window.filter(|window| *window > 0) else { return Ok(None) };
        let pattern = Pattern::read(source, layers)?;
        let base = source.positive_opt("rope.freq_base_swa")?.unwrap_or(LOCAL_BASE);
        if base <= 1.0 {
            return Err(source.refuse("rope.freq_base_swa", format!("{base}; allowed: above 1")));
        }
        // The context was extended in the global layers only.
        let rope = RopeSpec { base, scaling: RopeScaling::None, ..global.clone() };
        Ok(Some(Self { window, rope, pattern }))
    }

    fn covers(&self, layer: usize) -> bool {
        match &self.pattern {
            Pattern::Period(period) => !(layer + 1).is_multiple_of(*period),
            Pattern::Layers(local) => local[layer],
        }
    }
}

impl Pattern {
    /// A period, as an integer, or a truth value per layer.
    fn read(source: &Source<'_>, layers: usize) -> Result<Self, FormatError> {
        let key = "attention.sliding_window_pattern";
        let Some(Value::Array(array)) = source.metadata().get(&source.key(key)) else {
            let period = source.count_opt(key, 1..=1024)?;
            return Ok(Self::Period(period.unwrap_or(PERIOD)));
        };
        if array.len() != layers {
            let message = format!("{} entries for {layers} layers", array.len());
            return Err(source.refuse(key, message));
        }
        Ok(Self::Layers(array.bools()?.collect()))
    }
}

/// `1 / sqrt(head_dim)`; in 27B `1 / sqrt(embedding_dim / n_heads)`, its `query_pre_attn_scalar`.
fn attention_scale(dimensions: &Dimensions) -> f32 {
    let of = if dimensions.layers.len() == LAYERS_27B {
        // More heads than elements is no reason to divide by zero.
        dimensions.embedding_dim as f32 / dimensions.layers[0].n_heads as f32
    } else {
        dimensions.head_dim as f32
    };
    1.0 / of.sqrt()
}

pub(super) fn read(source: &Source<'_>) -> Result<ModelSpec, FormatError> {
    let dimensions = source.dimensions()?;
    let global = decoder::rope(source, &dimensions, RopeStyle::HalfSplit, GLOBAL_BASE)?;
    let local = Local::read(source, dimensions.layers.len(), &global)?;
    let scale = source.positive_opt("attention.scale")?;
    let scale = scale.unwrap_or_else(|| attention_scale(&dimensions));
    let softcap = source.softcap("attn_logit_softcapping")?;
    let traits = AttentionTraits { bias: Bias::Optional, head_norms: HeadNorms::QueryAndKey };
    let layer = |layer: usize| {
        let local = local.as_ref().filter(|local| local.covers(layer));
        let rope = local.map_or(&global, |local| &local.rope);
        let mut attention = decoder::attention(source, &dimensions, layer, rope, traits)?;
        attention.window = local.map(|local| local.window);
        attention.scale = scale;
        attention.softcap = softcap;
        let norm = |name: &str| decoder::layer_norm(source, &dimensions, layer, name);
        Ok(LayerSpec {
            attention_norm: norm("attn_norm")?,
            attention,
            attention_post_norm: Some(norm("post_attention_norm")?),
            ffn_norm: norm("ffn_norm")?,
            ffn: source.ffn(layer, &dimensions, Activation::GeluTanh)?,
            ffn_post_norm: Some(norm("post_ffw_norm")?),
        })
    };
    let layers = (0..dimensions.layers.len()).map(layer).collect::<Result<_, FormatError>>()?;
    let mut spec = decoder::model(source, &dimensions, layers)?;
    spec.embedding_scale = Some((dimensions.embedding_dim as f32).sqrt());
    spec.logit_softcap = source.softcap("final_logit_softcapping")?;
    Ok(spec)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::source::LayerDimensions;

    #[test]
    fn the_scale_of_27b_is_that_of_its_embedding_and_always_finite() {
        let scale = |embedding_dim, n_heads| {
            let layer = LayerDimensions { n_heads, n_kv_heads: 1, n_ff: 1 };
            attention_scale(&Dimensions {
                vocab_size: 1,
                embedding_dim,
                context_tokens_max: 1,
                head_dim: 128,
                eps: 1e-6,
                layers: vec![layer; LAYERS_27B],
            })
        };
        assert_eq!(scale(5376, 32), 1.0 / 168f32.sqrt());
        assert!(scale(256, 512).is_finite());
    }
}
