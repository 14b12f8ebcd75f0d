//! The published dimensions, by the models' `config.json`.

use crate::model::RopeStyle;

/// The dimensions of a decoder.
#[derive(Debug)]
pub(super) struct Shape {
    pub name: &'static str,
    pub family: Family,
    pub layers: usize,
    pub embedding_dim: usize,
    pub n_heads: usize,
    pub n_kv_heads: usize,
    pub head_dim: usize,
    /// Of each expert where there are several.
    pub n_ff: usize,
    pub vocab_size: usize,
    pub context_tokens: usize,
    pub output: Output,
    /// 0 in a dense model.
    pub n_experts: usize,
    pub n_used: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    /// Llama 3: no biases.
    Llama,
    /// A llama with experts.
    Mixtral,
    /// Qwen 2 and 2.5: biases on query, key and value.
    Qwen2,
    /// Qwen 3 with experts: norms on query and key heads.
    Qwen3Moe,
}

impl Family {
    pub fn architecture(self) -> &'static str {
        match self {
            Self::Llama | Self::Mixtral => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3Moe => "qwen3moe",
        }
    }

    pub fn eps(self) -> f32 {
        match self {
            Self::Llama | Self::Mixtral => 1e-5,
            Self::Qwen2 | Self::Qwen3Moe => 1e-6,
        }
    }

    pub fn has_head_norms(self) -> bool {
        self == Self::Qwen3Moe
    }

    pub fn rope_style(self) -> RopeStyle {
        match self {
            Self::Llama | Self::Mixtral => RopeStyle::Interleaved,
            Self::Qwen2 | Self::Qwen3Moe => RopeStyle::HalfSplit,
        }
    }

    pub fn rope_base(self) -> f32 {
        if self == Self::Llama { 500_000.0 } else { 1_000_000.0 }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Output {
    /// The embedding.
    Tied,
    /// A matrix of its own.
    Own,
}

/// `[layers, embedding, heads, KV heads, head, feed-forward, vocabulary, context]` in a row.
const fn shape(name: &'static str, family: Family, output: Output, sizes: [usize; 8]) -> Shape {
    let [layers, embedding_dim, n_heads, n_kv_heads, head_dim, n_ff, vocab_size, context_tokens] =
        sizes;
    Shape {
        name,
        family,
        layers,
        embedding_dim,
        n_heads,
        n_kv_heads,
        head_dim,
        n_ff,
        vocab_size,
        context_tokens,
        output,
        n_experts: 0,
        n_used: 0,
    }
}

impl Shape {
    /// With `n_experts` experts in each layer, of which a token goes through `n_used`.
    const fn experts(self, n_experts: usize, n_used: usize) -> Self {
        Self { n_experts, n_used, ..self }
    }
}

/// Llama 3.1 and 3.2, Qwen 2.5 and 3, Mixtral; tiny ones to try things with.
#[rustfmt::skip]
pub(super) const SHAPES: [Shape; 10] = [
    shape("llama-1b", Family::Llama, Output::Tied, [16, 2048, 32, 8, 64, 8192, 128_256, 131_072]),
    shape("llama-3b", Family::Llama, Output::Tied, [28, 3072, 24, 8, 128, 8192, 128_256, 131_072]),
    shape("llama-8b", Family::Llama, Output::Own, [32, 4096, 32, 8, 128, 14336, 128_256, 131_072]),
    shape("llama-70b", Family::Llama, Output::Own, [80, 8192, 64, 8, 128, 28672, 128_256, 131_072]),
    shape("qwen2.5-7b", Family::Qwen2, Output::Own, [28, 3584, 28, 4, 128, 18944, 152_064, 32_768]),
    shape("mixtral-8x7b", Family::Mixtral, Output::Own,
        [32, 4096, 32, 8, 128, 14336, 32_000, 32_768])
        .experts(8, 2),
    shape("qwen3-30b-a3b", Family::Qwen3Moe, Output::Own,
        [48, 2048, 32, 4, 128, 768, 151_936, 40_960])
        .experts(128, 8),
    shape("tiny", Family::Llama, Output::Tied, [2, 256, 4, 2, 64, 512, 512, 2048]),
    shape("tiny-qwen2", Family::Qwen2, Output::Own, [2, 256, 4, 2, 64, 512, 512, 2048]),
    shape("tiny-qwen3moe", Family::Qwen3Moe, Output::Own, [2, 256, 4, 2, 128, 256, 512, 2048])
        .experts(8, 3),
];
