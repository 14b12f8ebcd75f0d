//! Writes tiny models as Hugging Face folders: the same weights as their GGUF file has, in the
//! layout of floats, FP8, AWQ or GPTQ.
//!
//! In a test: `#[path = "support/hf_folder.rs"] mod hf_folder;` beside `tiny_model` and `tempfile`.

#![allow(dead_code, reason = "each test binary uses its part")]

use super::tiny_model::gguf_writer::{Gguf, Tensor};
use super::tiny_model::{Family, Output, TinyModel, tiny_tokenizer};
use serde_json::{Value, json};
use std::path::Path;
use tandem::tensor::DType;
use tempfile::TempDir;

/// How linear layers are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// As the model's own float type.
    Floats,
    /// e4m3 with a scale per row and 128 or 32 columns: `weight_scale_inv`.
    Fp8,
    Awq,
    Gptq,
    GptqV2,
    /// `pack-quantized` of compressed-tensors, with zero points.
    Packed,
}

/// A tensor of a safetensors file; extents are slowest first.
#[derive(Clone, Debug)]
pub struct Stored {
    pub name: String,
    pub dtype: &'static str,
    pub shape: Vec<usize>,
    pub data: Vec<u8>,
}

/// What a folder holds, still to be changed or spoiled.
#[derive(Clone, Debug)]
pub struct Folder {
    pub config: Value,
    pub tokenizer: Value,
    pub settings: Value,
    pub tensors: Vec<Stored>,
}

/// A safetensors file of some tensors.
pub fn file_bytes(tensors: &[Stored]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for Stored { name, dtype, shape, data: bytes } in tensors {
        let offsets = [data.len(), data.len() + bytes.len()];
        let info = json!({ "dtype": dtype, "shape": shape, "data_offsets": offsets });
        header.insert(name.clone(), info);
        data.extend_from_slice(bytes);
    }
    let mut text = Value::Object(header).to_string();
    while !text.len().is_multiple_of(8) {
        text.push(' ');
    }
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    bytes.extend_from_slice(&data);
    bytes
}

impl Folder {
    /// The folder of a model whose file is `gguf`.
    pub fn new(model: &TinyModel, gguf: &Gguf, format: Format) -> Self {
        let [tokenizer, settings] = tiny_tokenizer::hugging_face();
        let mut tensors = Vec::new();
        for tensor in &gguf.tensors {
            add_tensor(model, tensor, format, &mut tensors);
        }
        Self { config: config(model, format), tokenizer, settings, tensors }
    }

    /// The tensor of a name, to be changed.
    pub fn tensor_mut(&mut self, name: &str) -> &mut Stored {
        let found = self.tensors.iter_mut().find(|tensor| tensor.name == name);
        found.unwrap_or_else(|| panic!("no tensor {name}"))
    }

    /// Writes everything into a new folder, all tensors into one file.
    pub fn write(&self) -> TempDir {
        let folder = self.write_texts();
        put(folder.path(), "model.safetensors", &file_bytes(&self.tensors));
        folder
    }

    /// The same with every second tensor in another file, and an index.
    pub fn write_in_two(&self) -> TempDir {
        let folder = self.write_texts();
        let names = [1, 2].map(|part| format!("model-{part:05}-of-00002.safetensors"));
        let mut map = serde_json::Map::new();
        for (part, name) in names.iter().enumerate() {
            let own = self.tensors.iter().skip(part).step_by(2).cloned().collect::<Vec<_>>();
            put(folder.path(), name, &file_bytes(&own));
            map.extend(own.into_iter().map(|tensor| (tensor.name, json!(name))));
        }
        let index = json!({ "metadata": { "total_size": 1 }, "weight_map": map }).to_string();
        put(folder.path(), "model.safetensors.index.json", index.as_bytes());
        folder
    }

    fn write_texts(&self) -> TempDir {
        let folder = tempfile::tempdir().expect("a folder");
        for (name, value) in [
            ("config.json", &self.config),
            ("tokenizer.json", &self.tokenizer),
            ("tokenizer_config.json", &self.settings),
        ] {
            put(folder.path(), name, value.to_string().as_bytes());
        }
        folder
    }
}

pub fn put(folder: &Path, name: &str, bytes: &[u8]) {
    std::fs::write(folder.join(name), bytes).unwrap_or_else(|error| panic!("{name}: {error}"));
}

fn config(model: &TinyModel, format: Format) -> Value {
    let (model_type, activation) = match model.family {
        Family::Llama => ("llama", "silu"),
        Family::Mixtral => ("mixtral", "silu"),
        Family::Qwen2 => ("qwen2", "silu"),
        Family::Qwen3 => ("qwen3", "silu"),
        Family::Qwen3Moe => ("qwen3_moe", "silu"),
        Family::Gemma3 => ("gemma3_text", "gelu_pytorch_tanh"),
    };
    let mut config = json!({
        "model_type": model_type,
        "hidden_act": activation,
        "num_hidden_layers": model.layers,
        "hidden_size": model.embedding_dim,
        "intermediate_size": model.n_ff,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.n_kv_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": model.context_tokens,
        "vocab_size": tiny_tokenizer::VOCAB_SIZE,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": model.output == Output::Tied,
        "bos_token_id": tiny_tokenizer::END_OF_TEXT,
        "eos_token_id": [tiny_tokenizer::TURN_END, tiny_tokenizer::END_OF_TEXT],
        "torch_dtype": "bfloat16",
    });
    let more = match model.family {
        Family::Mixtral => json!({
            "num_local_experts": model.n_experts, "num_experts_per_tok": model.n_experts_used,
        }),
        Family::Qwen3Moe => json!({
            "num_experts": model.n_experts, "num_experts_per_tok": model.n_experts_used,
            "moe_intermediate_size": model.n_ff, "norm_topk_prob": true,
        }),
        Family::Gemma3 => json!({
            "sliding_window": model.window, "sliding_window_pattern": 6,
            "rope_local_base_freq": 10000, "query_pre_attn_scalar": model.head_dim,
        }),
        _ => json!({}),
    };
    for (name, value) in more.as_object().into_iter().flatten() {
        config[name] = value.clone();
    }
    config["quantization_config"] = quantization(model, format);
    config
}

fn quantization(model: &TinyModel, format: Format) -> Value {
    let group = match model.dtype {
        DType::INT4_64 => 64,
        DType::INT4_32 => 32,
        _ => 128,
    };
    match format {
        Format::Floats => Value::Null,
        Format::Fp8 => {
            let cols = model.dtype.block_elements();
            json!({ "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [1, cols] })
        }
        Format::Awq => json!({
            "quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm",
            "zero_point": true,
        }),
        Format::Gptq => json!({
            "quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": false,
            "sym": false,
        }),
        Format::Packed => json!({
            "quant_method": "compressed-tensors", "format": "pack-quantized",
            "config_groups": { "group_0": { "targets": ["Linear"], "weights": {
                "num_bits": 4, "type": "int", "symmetric": false, "strategy": "group",
                "group_size": group,
            } } },
            "ignore": ["lm_head"],
        }),
        Format::GptqV2 => json!({
            "quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": true,
            "checkpoint_format": "gptq_v2",
        }),
    }
}

/// The module of a tensor of GGUF's name; experts count on their own.
fn module(family: Family, name: &str) -> String {
    let stem = name.rsplit_once('.').map_or(name, |(stem, _)| stem);
    let Some((layer, part)) = stem.strip_prefix("blk.").and_then(|rest| rest.split_once('.'))
    else {
        return match stem {
            "token_embd" => "model.embed_tokens",
            "output_norm" => "model.norm",
            _ => "lm_head",
        }
        .to_owned();
    };
    let gemma = family == Family::Gemma3;
    let moe = if family == Family::Mixtral { "block_sparse_moe" } else { "mlp" };
    let part = match part {
        "attn_norm" => "input_layernorm".to_owned(),
        "attn_output" => "self_attn.o_proj".to_owned(),
        "attn_q_norm" | "attn_k_norm" => format!("self_attn.{}", &part[5..]),
        "post_attention_norm" => "post_attention_layernorm".to_owned(),
        "post_ffw_norm" => "post_feedforward_layernorm".to_owned(),
        "ffn_norm" if gemma => "pre_feedforward_layernorm".to_owned(),
        "ffn_norm" => "post_attention_layernorm".to_owned(),
        "ffn_gate_inp" => format!("{moe}.gate"),
        _ => match part.split_once('_') {
            Some(("attn", letter)) => format!("self_attn.{letter}_proj"),
            Some((_, rest)) => match rest.strip_suffix("_exps") {
                Some("gate") if moe != "mlp" => format!("{moe}.experts.#.w1"),
                Some("up") if moe != "mlp" => format!("{moe}.experts.#.w3"),
                Some("down") if moe != "mlp" => format!("{moe}.experts.#.w2"),
                Some(matrix) => format!("mlp.experts.#.{matrix}_proj"),
                None => format!("mlp.{rest}_proj"),
            },
            None => panic!("{name}"),
        },
    };
    format!("model.layers.{layer}.{part}")
}

fn add_tensor(model: &TinyModel, tensor: &Tensor, format: Format, all: &mut Vec<Stored>) {
    let module = module(model.family, &tensor.name);
    let dtype = DType::from_gguf_id(tensor.type_id).expect("a type");
    let (cols, rows) = (tensor.dims[0] as usize, tensor.dims.get(1).map_or(1, |d| *d as usize));
    let experts = tensor.dims.get(2).map_or(1, |experts| *experts as usize);
    let mut data = tensor.data.clone();
    let is_permuted = matches!(model.family, Family::Llama | Family::Mixtral);
    if is_permuted && (module.ends_with("q_proj") || module.ends_with("k_proj")) {
        data = unpermuted(&data, rows, model.head_dim);
    }
    if model.family == Family::Gemma3 && module.ends_with("norm") {
        for value in data.as_chunks_mut::<4>().0 {
            *value = (f32::from_le_bytes(*value) - 1.0).to_le_bytes();
        }
    }
    let suffix = tensor.name.rsplit_once('.').map_or("", |(_, suffix)| suffix);
    for (expert, data) in data.chunks_exact(data.len() / experts).enumerate() {
        let module = module.replace('#', &expert.to_string());
        if dtype.block_elements() > 1 {
            super::hf_layers::add(all, &module, (dtype, rows, cols), data, format);
            continue;
        }
        let shape = if tensor.dims.len() == 1 { vec![cols] } else { vec![rows, cols] };
        let name = format!("{module}.{suffix}");
        all.push(Stored { name, dtype: dtype.name(), shape, data: data.to_vec() });
    }
}

/// Rows of heads in Hugging Face's order: the first halves, then the second ones.
fn unpermuted(data: &[u8], rows: usize, head_dim: usize) -> Vec<u8> {
    let row_bytes = data.len() / rows;
    let mut out = vec![0; data.len()];
    for (row, out) in out.chunks_exact_mut(row_bytes).enumerate() {
        let (head, at) = (row / head_dim, row % head_dim);
        let source = head * head_dim + 2 * (at % (head_dim / 2)) + at / (head_dim / 2);
        out.copy_from_slice(&data[source * row_bytes..][..row_bytes]);
    }
    out
}
