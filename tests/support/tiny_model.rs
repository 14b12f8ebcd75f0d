//! Tiny models with random weights, of every family and element type, small enough to run anywhere
//! and complete enough for the whole engine: a byte-level BPE tokenizer and a chat template
//! included.
//!
//! In a test: `#[path = "support/tiny_model.rs"] mod tiny_model;`

#![allow(dead_code, reason = "each test binary uses its part")]

#[path = "gguf_writer.rs"]
pub mod gguf_writer;
#[path = "tiny_tokenizer.rs"]
pub mod tiny_tokenizer;

use gguf_writer::Gguf;
use std::path::Path;
use tandem::tensor::DType;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    Llama,
    /// A llama with experts.
    Mixtral,
    Qwen2,
    Qwen3,
    Qwen3Moe,
    Gemma3,
}

impl Family {
    pub const ALL: [Family; 6] =
        [Self::Llama, Self::Mixtral, Self::Qwen2, Self::Qwen3, Self::Qwen3Moe, Self::Gemma3];

    pub fn has_experts(self) -> bool {
        matches!(self, Self::Mixtral | Self::Qwen3Moe)
    }

    pub fn architecture(self) -> &'static str {
        match self {
            Self::Llama | Self::Mixtral => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Qwen3Moe => "qwen3moe",
            Self::Gemma3 => "gemma3",
        }
    }
}

/// Where the logits come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// The embedding.
    Tied,
    /// A tensor of its own.
    Own,
}

/// A model to be written. All widths are multiples of 256, so that every element type fits; the
/// vocabulary has [`tiny_tokenizer::VOCAB_SIZE`] tokens.
#[derive(Clone, Debug)]
pub struct TinyModel {
    pub family: Family,
    /// Of all matrices of the layers; norms and biases are F32.
    pub dtype: DType,
    /// Of the embedding and the output.
    pub embedding_dtype: DType,
    pub output: Output,
    /// Decides all weights.
    pub seed: u64,
    pub layers: usize,
    pub embedding_dim: usize,
    pub n_heads: usize,
    pub n_kv_heads: usize,
    pub head_dim: usize,
    /// Of each expert where there are several.
    pub n_ff: usize,
    /// 0 in dense families.
    pub n_experts: usize,
    pub n_experts_used: usize,
    pub context_tokens: usize,
    /// Gemma's sliding window.
    pub window: usize,
}

impl TinyModel {
    /// About one million parameters; gemma3 has six layers, so that one sees everything.
    pub fn new(family: Family) -> Self {
        let (layers, n_heads, n_kv_heads, head_dim) = match family {
            Family::Llama | Family::Mixtral | Family::Qwen2 => (2, 4, 2, 64),
            Family::Qwen3 | Family::Qwen3Moe => (2, 4, 2, 128),
            Family::Gemma3 => (6, 4, 1, 64),
        };
        let (n_ff, n_experts, n_experts_used) = match family {
            Family::Mixtral => (256, 4, 2),
            Family::Qwen3Moe => (256, 8, 3),
            _ => (512, 0, 0),
        };
        let output = if family == Family::Qwen2 { Output::Own } else { Output::Tied };
        Self {
            family,
            dtype: DType::Q8_0,
            embedding_dtype: DType::Q8_0,
            output,
            seed: 1,
            layers,
            embedding_dim: 256,
            n_heads,
            n_kv_heads,
            head_dim,
            n_ff,
            n_experts,
            n_experts_used,
            context_tokens: 2048,
            window: 16,
        }
    }

    pub fn dtype(mut self, dtype: DType) -> Self {
        self.dtype = dtype;
        self.embedding_dtype = dtype;
        self
    }

    /// All experts for every token: rounding may swap two that are nearly as good, which is no
    /// error but a large difference.
    pub fn with_all_experts(mut self) -> Self {
        self.n_experts_used = self.n_experts;
        self
    }

    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    pub fn layers(mut self, layers: usize) -> Self {
        self.layers = layers;
        self
    }

    pub fn context_tokens(mut self, tokens: usize) -> Self {
        self.context_tokens = tokens;
        self
    }

    /// Writes the model's file.
    pub fn write(&self, path: &Path) {
        self.gguf().write(path);
    }

    /// The model's file, still to be changed or spoiled.
    pub fn gguf(&self) -> Gguf {
        let mut gguf = Gguf::default();
        self.add_metadata(&mut gguf);
        tiny_tokenizer::add(&mut gguf);
        self.add_tensors(&mut gguf);
        gguf
    }

    /// A key of the family.
    pub fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.family.architecture())
    }

    fn add_metadata(&self, gguf: &mut Gguf) {
        gguf.text("general.architecture", self.family.architecture());
        gguf.text("general.name", &format!("tiny {}", self.family.architecture()));
        for (key, value) in [
            ("block_count", self.layers),
            ("context_length", self.context_tokens),
            ("embedding_length", self.embedding_dim),
            ("feed_forward_length", self.n_ff),
            ("attention.head_count", self.n_heads),
            ("attention.head_count_kv", self.n_kv_heads),
            ("attention.key_length", self.head_dim),
            ("attention.value_length", self.head_dim),
        ] {
            gguf.u32(&self.key(key), value as u32);
        }
        gguf.f32(&self.key("attention.layer_norm_rms_epsilon"), 1e-5);
        gguf.f32(&self.key("rope.freq_base"), 10_000.0);
        if self.family == Family::Gemma3 {
            gguf.u32(&self.key("attention.sliding_window"), self.window as u32);
        }
        if self.n_experts > 0 {
            gguf.u32(&self.key("expert_count"), self.n_experts as u32);
            gguf.u32(&self.key("expert_used_count"), self.n_experts_used as u32);
        }
        if self.family == Family::Qwen3Moe {
            gguf.u32(&self.key("feed_forward_length"), 9999);
            gguf.u32(&self.key("expert_feed_forward_length"), self.n_ff as u32);
        }
    }

    fn add_tensors(&self, gguf: &mut Gguf) {
        let mut weights = Weights { state: self.seed, gguf };
        let (width, vocab) = (self.embedding_dim, tiny_tokenizer::VOCAB_SIZE);
        // Logits are the normed stream times these rows: a spread of 2 makes some tokens likely.
        let spread = 2.0 / (width as f32).sqrt();
        weights.matrix("token_embd.weight", [vocab, width], self.embedding_dtype, spread);
        weights.norm("output_norm.weight", width);
        if self.output == Output::Own {
            weights.matrix("output.weight", [vocab, width], self.embedding_dtype, spread);
        }
        for layer in 0..self.layers {
            self.add_layer(&mut weights, &format!("blk.{layer}"));
        }
    }

    fn add_layer(&self, weights: &mut Weights<'_>, layer: &str) {
        let width = self.embedding_dim;
        let (query, key) = (self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim);
        for (name, shape) in [
            ("attn_q", [query, width]),
            ("attn_k", [key, width]),
            ("attn_v", [key, width]),
            ("attn_output", [width, query]),
        ] {
            let spread = 1.0 / (shape[1] as f32).sqrt();
            weights.matrix(&format!("{layer}.{name}.weight"), shape, self.dtype, spread);
        }
        self.add_ffn(weights, layer);
        weights.norm(&format!("{layer}.attn_norm.weight"), width);
        weights.norm(&format!("{layer}.ffn_norm.weight"), width);
        if self.family == Family::Qwen2 {
            for (name, len) in [("attn_q", query), ("attn_k", key), ("attn_v", key)] {
                weights.vector(&format!("{layer}.{name}.bias"), len, 0.0);
            }
        }
        if matches!(self.family, Family::Qwen3 | Family::Qwen3Moe | Family::Gemma3) {
            weights.norm(&format!("{layer}.attn_q_norm.weight"), self.head_dim);
            weights.norm(&format!("{layer}.attn_k_norm.weight"), self.head_dim);
        }
        if self.family == Family::Gemma3 {
            weights.norm(&format!("{layer}.post_attention_norm.weight"), width);
            weights.norm(&format!("{layer}.post_ffw_norm.weight"), width);
        }
    }

    fn add_ffn(&self, weights: &mut Weights<'_>, layer: &str) {
        let (width, n_ff) = (self.embedding_dim, self.n_ff);
        let (experts, suffix) = match self.n_experts {
            0 => (1, ""),
            experts => (experts, "_exps"),
        };
        let parts = [("gate", [n_ff, width]), ("up", [n_ff, width]), ("down", [width, n_ff])];
        for (part, [rows, cols]) in parts {
            let name = format!("{layer}.ffn_{part}{suffix}.weight");
            let fits = self.dtype.row_bytes(cols).is_some();
            let dtype = if fits { self.dtype } else { DType::F32 };
            weights.matrix(&name, [experts * rows, cols], dtype, 1.0 / (cols as f32).sqrt());
            if self.n_experts > 0 {
                let dims = [cols, rows, experts].map(|extent| extent as u64);
                weights.gguf.tensor_mut(&name).dims = dims.into();
            }
        }
        if self.n_experts > 0 {
            // Logits with a spread of 2: some experts are clearly better than others.
            let (name, spread) =
                (format!("{layer}.ffn_gate_inp.weight"), 2.0 / (width as f32).sqrt());
            weights.matrix(&name, [experts, width], DType::F32, spread);
        }
    }
}

/// Random tensors from a SplitMix64 sequence.
struct Weights<'a> {
    state: u64,
    gguf: &'a mut Gguf,
}

/// SplitMix64 (Steele, Lea and Flood 2014): the next of a sequence of random numbers.
pub fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

impl Weights<'_> {
    /// Uniform with mean 0 and standard deviation 1: `±sqrt(3)`.
    fn next(&mut self) -> f32 {
        let unit = (split_mix(&mut self.state) >> 40) as f32 / (1_u64 << 24) as f32;
        (unit * 2.0 - 1.0) * 3.0_f32.sqrt()
    }

    fn matrix(&mut self, name: &str, [rows, cols]: [usize; 2], dtype: DType, spread: f32) {
        let row_bytes = dtype.row_bytes(cols).unwrap_or_else(|| panic!("{name}: {cols} {dtype}"));
        let mut data = vec![0; rows * row_bytes];
        for row in data.chunks_exact_mut(row_bytes) {
            let values: Vec<f32> = (0..cols).map(|_| self.next() * spread).collect();
            tandem_cpu_kernels::quantize_row(dtype, &values, row);
        }
        self.gguf.tensor(name, &[cols as u64, rows as u64], dtype.gguf_id(), data);
    }

    fn vector(&mut self, name: &str, len: usize, mean: f32) {
        let data = (0..len).flat_map(|_| (mean + 0.1 * self.next()).to_le_bytes()).collect();
        self.gguf.tensor(name, &[len as u64], DType::F32.gguf_id(), data);
    }

    fn norm(&mut self, name: &str, len: usize) {
        self.vector(name, len, 1.0);
    }
}
