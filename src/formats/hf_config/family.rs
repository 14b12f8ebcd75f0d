//! The families of `model_type`, and their numbers under GGUF's names.

use super::Fields;
use crate::formats::FormatError;
use crate::formats::metadata_writer::MetadataWriter;

/// Families that can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::formats) enum Family {
    Llama,
    Mistral,
    Mixtral,
    Qwen2,
    Qwen3,
    Qwen3Moe,
    Gemma3,
}

/// `model_type` and the family.
const FAMILIES: [(&str, Family); 7] = [
    ("llama", Family::Llama),
    ("mistral", Family::Mistral),
    ("mixtral", Family::Mixtral),
    ("qwen2", Family::Qwen2),
    ("qwen3", Family::Qwen3),
    ("qwen3_moe", Family::Qwen3Moe),
    ("gemma3_text", Family::Gemma3),
];

const ANY: std::ops::RangeInclusive<u32> = 0..=u32::MAX;

impl Family {
    pub fn read(config: &Fields) -> Result<Self, FormatError> {
        let got = config.text("model_type")?;
        let found = FAMILIES.iter().find(|(name, _)| *name == got);
        found.map(|(_, family)| *family).ok_or_else(|| {
            let known = FAMILIES.map(|(name, _)| name).join(", ");
            config.refuse("model_type", format!("{got:?} is not supported; supported: {known}"))
        })
    }

    /// GGUF's word.
    pub fn architecture(self) -> &'static str {
        match self {
            Self::Llama | Self::Mistral | Self::Mixtral => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Qwen3Moe => "qwen3moe",
            Self::Gemma3 => "gemma3",
        }
    }

    pub fn is_tied_by_default(self) -> bool {
        self == Self::Gemma3
    }

    /// Whether the family's norms store their weights less one; by GGUF's name without `.weight`.
    pub fn adds_one_to(self, name: &str) -> bool {
        self == Self::Gemma3 && name.ends_with("norm")
    }

    /// Length of a head where the configuration doesn't give it; otherwise the embedding is shared
    /// out.
    fn head_dim_default(self) -> Option<u32> {
        match self {
            Self::Qwen3 | Self::Qwen3Moe => Some(128),
            Self::Gemma3 => Some(256),
            _ => None,
        }
    }

    /// Writes the family's numbers.
    pub fn write(self, config: &Fields, writer: &mut MetadataWriter) -> Result<(), FormatError> {
        let architecture = self.architecture();
        let key = |name: &str| format!("{architecture}.{name}");
        for (field, name) in [
            ("num_hidden_layers", "block_count"),
            ("hidden_size", "embedding_length"),
            ("intermediate_size", "feed_forward_length"),
            ("num_attention_heads", "attention.head_count"),
            ("max_position_embeddings", "context_length"),
            ("vocab_size", "vocab_size"),
        ] {
            writer.u32(&key(name), config.count(field, ANY)?, (config, field));
        }
        let eps = "rms_norm_eps";
        let eps_key = key("attention.layer_norm_rms_epsilon");
        writer.f32(&eps_key, config.number(eps)?, (config, eps));
        let kv_heads = "num_key_value_heads";
        if let Some(count) = config.count_opt(kv_heads, ANY)? {
            writer.u32(&key("attention.head_count_kv"), count, (config, kv_heads));
        }
        if let Some(head_dim) = config.count_opt("head_dim", ANY)?.or(self.head_dim_default()) {
            writer.u32(&key("attention.key_length"), head_dim, (config, "head_dim"));
            writer.u32(&key("attention.value_length"), head_dim, (config, "head_dim"));
        }
        if architecture == "llama" {
            // GGUF's query and key rows are permuted for the other pairing.
            writer.bool(&key("rope.half_split"), true, (config, "model_type"));
        }
        self.check_activation(config)?;
        self.write_windows(config, writer)?;
        match self {
            Self::Mixtral => write_experts(config, writer, (architecture, "num_local_experts")),
            Self::Qwen3Moe => write_qwen_experts(config, writer),
            Self::Gemma3 => write_gemma(config, writer),
            _ => Ok(()),
        }
    }

    fn check_activation(self, config: &Fields) -> Result<(), FormatError> {
        let known = if self == Self::Gemma3 { "gelu_pytorch_tanh" } else { "silu" };
        for field in ["hidden_act", "hidden_activation"] {
            config.one_of(field, &[known])?;
        }
        Ok(())
    }

    fn write_windows(
        self,
        config: &Fields,
        writer: &mut MetadataWriter,
    ) -> Result<(), FormatError> {
        let field = "sliding_window";
        let window = config.count_opt(field, ANY)?.unwrap_or(0);
        match self {
            Self::Mistral | Self::Mixtral | Self::Gemma3 => {
                let key = format!("{}.attention.sliding_window", self.architecture());
                writer.u32(&key, window, (config, field));
            }
            _ if config.bool_opt("use_sliding_window")? == Some(true) => {
                let message = "true; windows of this family are not supported";
                return Err(config.refuse("use_sliding_window", message));
            }
            _ => {}
        }
        Ok(())
    }
}

fn write_experts(
    config: &Fields,
    writer: &mut MetadataWriter,
    (architecture, count): (&str, &str),
) -> Result<(), FormatError> {
    for (field, name) in [(count, "expert_count"), ("num_experts_per_tok", "expert_used_count")] {
        let number = config.count(field, 1..=u32::MAX)?;
        writer.u32(&format!("{architecture}.{name}"), number, (config, field));
    }
    Ok(())
}

fn write_qwen_experts(config: &Fields, writer: &mut MetadataWriter) -> Result<(), FormatError> {
    write_experts(config, writer, ("qwen3moe", "num_experts"))?;
    let field = "moe_intermediate_size";
    let width = config.count(field, ANY)?;
    writer.u32("qwen3moe.expert_feed_forward_length", width, (config, field));
    let field = "norm_topk_prob";
    let normalised = config.bool_opt(field)?.unwrap_or(false);
    writer.bool("qwen3moe.expert_weights_norm", normalised, (config, field));
    if let Some(step) = config.count_opt("decoder_sparse_step", ANY)?.filter(|step| *step != 1) {
        return Err(config.refuse("decoder_sparse_step", format!("{step}; supported: 1")));
    }
    match config.list_opt("mlp_only_layers")? {
        Some([_, ..]) => {
            let message = "layers without experts beside layers with them are not supported";
            Err(config.refuse("mlp_only_layers", message))
        }
        _ => Ok(()),
    }
}

fn write_gemma(config: &Fields, writer: &mut MetadataWriter) -> Result<(), FormatError> {
    let field = "query_pre_attn_scalar";
    if let Some(scalar) = config.number_opt(field)? {
        writer.f32("gemma3.attention.scale", 1.0 / scalar.sqrt(), (config, field));
    }
    for (field, key) in [
        ("attn_logit_softcapping", "gemma3.attn_logit_softcapping"),
        ("final_logit_softcapping", "gemma3.final_logit_softcapping"),
    ] {
        if let Some(cap) = config.number_opt(field)? {
            writer.f32(key, cap, (config, field));
        }
    }
    let pattern = "gemma3.attention.sliding_window_pattern";
    if let Some(layers) = config.list_opt("layer_types")? {
        let is_local = |layer: &serde_json::Value| match layer.as_str() {
            Some("sliding_attention") => Ok(true),
            Some("full_attention") => Ok(false),
            _ => {
                let message = format!("{layer}; allowed: sliding_attention, full_attention");
                Err(config.refuse("layer_types", message))
            }
        };
        let local = layers.iter().map(is_local).collect::<Result<Vec<bool>, _>>()?;
        writer.bools(pattern, &local, (config, "layer_types"));
    } else if let Some(period) = config.count_opt("sliding_window_pattern", ANY)? {
        writer.u32(pattern, period, (config, "sliding_window_pattern"));
    }
    Ok(())
}
