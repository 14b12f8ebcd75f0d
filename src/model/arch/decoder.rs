//! What the families share: attention's projections, rotary positions, the model's two ends.

use crate::formats::FormatError;
use crate::model::source::{Bias, Dimensions, Source};
use crate::model::{
    AttentionSpec, LayerSpec, ModelSpec, NormSpec, RopeScaling, RopeSpec, RopeStyle,
};

/// Which norms a family puts on queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HeadNorms {
    None,
    /// `attn_q_norm` and `attn_k_norm`, each over one head.
    QueryAndKey,
}

/// How a family's attention differs from the plain one.
#[derive(Clone, Copy, Debug)]
pub(super) struct AttentionTraits {
    /// Of query, key and value.
    pub bias: Bias,
    pub head_norms: HeadNorms,
}

/// A layer's attention with a scale of `1 / sqrt(head_dim)` and no window or cap.
pub(super) fn attention(
    source: &Source<'_>,
    dimensions: &Dimensions,
    layer: usize,
    rope: &RopeSpec,
    traits: AttentionTraits,
) -> Result<AttentionSpec, FormatError> {
    let (width, head_dim) = (dimensions.embedding_dim, dimensions.head_dim);
    let of_layer = dimensions.layers[layer];
    let (query, key) = (of_layer.n_heads * head_dim, of_layer.n_kv_heads * head_dim);
    let linear =
        |name: &str, shape, bias| source.linear(&format!("blk.{layer}.{name}"), shape, bias);
    let norm = |name: &str| -> Result<Option<NormSpec>, FormatError> {
        match traits.head_norms {
            HeadNorms::None => Ok(None),
            HeadNorms::QueryAndKey => {
                source.norm(&format!("blk.{layer}.{name}"), head_dim, dimensions.eps).map(Some)
            }
        }
    };
    Ok(AttentionSpec {
        n_heads: of_layer.n_heads,
        n_kv_heads: of_layer.n_kv_heads,
        head_dim,
        query: linear("attn_q", [query, width], traits.bias)?,
        key: linear("attn_k", [key, width], traits.bias)?,
        value: linear("attn_v", [key, width], traits.bias)?,
        output: linear("attn_output", [width, query], Bias::Optional)?,
        query_norm: norm("attn_q_norm")?,
        key_norm: norm("attn_k_norm")?,
        rope: rope.clone(),
        window: None,
        scale: 1.0 / (head_dim as f32).sqrt(),
        softcap: None,
    })
}

/// Norm of a layer over the residual stream: `blk.N.NAME.weight`.
pub(super) fn layer_norm(
    source: &Source<'_>,
    dimensions: &Dimensions,
    layer: usize,
    name: &str,
) -> Result<NormSpec, FormatError> {
    source.norm(&format!("blk.{layer}.{name}"), dimensions.embedding_dim, dimensions.eps)
}

/// The rotation that the keys under `rope.` describe.
pub(super) fn rope(
    source: &Source<'_>,
    dimensions: &Dimensions,
    style: RopeStyle,
    base_default: f32,
) -> Result<RopeSpec, FormatError> {
    let (key, head_dim) = ("rope.dimension_count", dimensions.head_dim);
    let dims = source.count_opt(key, 2..=head_dim)?.unwrap_or(head_dim);
    if !dims.is_multiple_of(2) {
        return Err(source.refuse(key, format!("{dims}; rotation takes an even number")));
    }
    let base = source.positive_opt("rope.freq_base")?.unwrap_or(base_default);
    if base <= 1.0 {
        return Err(source.refuse("rope.freq_base", format!("{base}; allowed: above 1")));
    }
    Ok(RopeSpec {
        style,
        dims,
        base,
        scaling: scaling(source, dimensions)?,
        frequency_factors: source.vector_opt("rope_freqs.weight", dims / 2)?,
        attention_factor: source.positive_opt("rope.scaling.attn_factor")?.unwrap_or(1.0),
    })
}

fn scaling(source: &Source<'_>, dimensions: &Dimensions) -> Result<RopeScaling, FormatError> {
    let type_key = "rope.scaling.type";
    let kind = source.metadata().str_opt(&source.key(type_key))?.unwrap_or("linear");
    let factor = match source.metadata().f32_opt(&source.key("rope.scaling.factor"))? {
        // Converters write 0 for "unscaled".
        Some(0.0) => 1.0,
        Some(_) => source.positive_opt("rope.scaling.factor")?.unwrap_or(1.0),
        // The key of 2023.
        None => source.positive_opt("rope.scale_linear")?.unwrap_or(1.0),
    };
    match kind {
        "none" => Ok(RopeScaling::None),
        "linear" if factor == 1.0 => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor }),
        "yarn" => {
            let tokens = source.count_opt("rope.scaling.original_context_length", 1..=1 << 27)?;
            let beta = |key: &str| source.positive_opt(key);
            Ok(RopeScaling::Yarn {
                factor,
                original_context_tokens: tokens.unwrap_or(dimensions.context_tokens_max),
                beta_fast: beta("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
                beta_slow: beta("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
            })
        }
        _ => {
            let message = format!("{kind:?} is not supported; supported: none, linear, yarn");
            Err(source.refuse(type_key, message))
        }
    }
}

/// Refuses mixtures of experts in families that have none.
pub(super) fn refuse_experts(source: &Source<'_>) -> Result<(), FormatError> {
    let key = "expert_count";
    match source.metadata().u32_opt(&source.key(key))? {
        Some(experts @ 1..) => {
            let message = format!("{experts}; mixtures of experts are not supported");
            Err(source.refuse(key, message))
        }
        _ => Ok(()),
    }
}

/// The model around its layers. The output is the embedding unless the checkpoint has its own.
pub(super) fn model(
    source: &Source<'_>,
    dimensions: &Dimensions,
    layers: Vec<LayerSpec>,
) -> Result<ModelSpec, FormatError> {
    let (vocab_size, width) = (dimensions.vocab_size, dimensions.embedding_dim);
    let embedding = source.matrix("token_embd.weight", vocab_size, width)?;
    let output = if source.has("output.weight") {
        source.matrix("output.weight", vocab_size, width)?
    } else {
        embedding.clone()
    };
    let name = source.metadata().str_opt("general.name")?.filter(|name| !name.is_empty());
    Ok(ModelSpec {
        name: name.unwrap_or(source.architecture).to_owned(),
        architecture: source.architecture,
        vocab_size,
        embedding_dim: width,
        context_tokens_max: dimensions.context_tokens_max,
        embedding,
        embedding_scale: None,
        layers,
        output_norm: source.norm("output_norm", width, dimensions.eps)?,
        output,
        output_bias: source.vector_opt("output.bias", vocab_size)?,
        logit_softcap: None,
        unused_tensors: Vec::new(),
    })
}
