//! What is refused, and how the error names file, field and what is allowed.

use super::hf_folder::{Folder, Format, Stored, file_bytes, put};
use super::small;
use super::tiny_model::{Family, TinyModel};
use serde_json::{Value, json};
use std::path::Path;
use tandem::formats::{Checkpoint, FormatError};
use tandem::model::ModelSpec;
use tandem::tensor::DType;

fn open(path: &Path) -> FormatError {
    let opened = Checkpoint::open(path)
        .and_then(|checkpoint| ModelSpec::from_checkpoint(&checkpoint).map(drop));
    opened.expect_err("it should have been refused")
}

fn refused(folder: &Folder) -> FormatError {
    open(folder.write().path())
}

/// The error names this file, this field, and holds all the words.
fn assert_names(error: &FormatError, file: &str, field: &str, words: &[&str]) {
    assert!(error.file.ends_with(file), "{error}");
    assert_eq!(error.field, field, "{error}");
    for word in words {
        assert!(error.message.contains(word), "{error} lacks {word:?}");
    }
}

#[test]
fn configurations_that_cannot_be_run_name_the_field() {
    let scaling = |kind: &str| json!({ "rope_type": kind, "factor": 2.0 });
    let cases: [(Family, &str, Value, &str, &[&str]); 15] = [
        (Family::Llama, "model_type", json!("mamba"), "model_type", &["mamba", "llama, mistral"]),
        (Family::Llama, "hidden_size", json!("wide"), "hidden_size", &["\"wide\"", "whole number"]),
        (Family::Llama, "hidden_size", json!(-1), "hidden_size", &["-1", "4294967295"]),
        (Family::Llama, "hidden_size", Value::Null, "hidden_size", &["missing"]),
        (Family::Llama, "num_hidden_layers", json!(0), "num_hidden_layers", &["1 to 1024"]),
        (Family::Llama, "num_key_value_heads", json!(3), "num_key_value_heads", &["3", "4"]),
        (Family::Llama, "hidden_act", json!("relu"), "hidden_act", &["relu", "silu"]),
        (Family::Llama, "rms_norm_eps", json!(0), "rms_norm_eps", &["above 0"]),
        (
            Family::Llama,
            "vocab_size",
            json!(7),
            "tensor model.embed_tokens.weight (token_embd.weight)",
            &["320", "7"],
        ),
        (
            Family::Llama,
            "rope_scaling",
            scaling("longrope"),
            "rope_scaling.rope_type",
            &["longrope", "yarn"],
        ),
        (
            Family::Llama,
            "rope_scaling",
            json!({ "rope_type": "linear" }),
            "rope_scaling.factor",
            &["missing"],
        ),
        (Family::Llama, "partial_rotary_factor", json!(0.5), "partial_rotary_factor", &["0.5"]),
        (
            Family::Qwen2,
            "use_sliding_window",
            json!(true),
            "use_sliding_window",
            &["not supported"],
        ),
        (Family::Qwen3Moe, "norm_topk_prob", json!(false), "norm_topk_prob", &["normalised"]),
        (
            Family::Gemma3,
            "layer_types",
            json!(["sideways"]),
            "layer_types",
            &["sideways", "full_attention"],
        ),
    ];
    for (family, name, value, field, words) in cases {
        let mut folder = small(family);
        folder.config[name] = value;
        let error = refused(&folder);
        let file = if field.starts_with("tensor") { "model.safetensors" } else { "config.json" };
        assert_names(&error, file, field, words);
    }
}

#[test]
fn quantisations_that_are_not_known_name_the_field() {
    for (value, field, words) in [
        (json!({ "quant_method": "hqq" }), "quant_method", &["hqq", "awq, gptq"][..]),
        (json!({ "quant_method": "gptq", "bits": 3 }), "bits", &["3", "4"]),
        (json!({ "quant_method": "awq", "bits": 4, "version": "gemv" }), "version", &["gemv"]),
        (
            json!({ "quant_method": "gptq", "bits": 4, "group_size": 128,
                    "checkpoint_format": "marlin" }),
            "checkpoint_format",
            &["marlin", "gptq_v2"],
        ),
        (json!({ "quant_method": "fp8", "weight_block_size": [0] }), "weight_block_size", &["two"]),
        (json!({ "quant_method": "fp8", "fmt": "e5m2" }), "fmt", &["e5m2", "e4m3"]),
        (
            json!({ "quant_method": "compressed-tensors", "format": "int-quantized" }),
            "format",
            &["int-quantized", "float-quantized", "pack-quantized"],
        ),
        (
            json!({ "quant_method": "compressed-tensors", "format": "pack-quantized",
                    "config_groups": { "a": { "weights": { "num_bits": 8 } } } }),
            "config_groups.a.weights.num_bits",
            &["8", "4"],
        ),
        (
            json!({ "quant_method": "compressed-tensors", "format": "pack-quantized",
                    "config_groups": {} }),
            "config_groups",
            &["no group"],
        ),
    ] {
        let mut folder = small(Family::Llama);
        folder.config["quantization_config"] = value;
        let field = format!("quantization_config.{field}");
        assert_names(&refused(&folder), "config.json", &field, words);
    }
}

fn four_bits(format: Format) -> Folder {
    let mut model = TinyModel::new(Family::Qwen2).dtype(DType::INT4_128).layers(1);
    model.embedding_dtype = DType::F16;
    Folder::new(&model, &model.gguf(), format)
}

#[test]
fn four_bit_layers_that_do_not_fit_name_the_tensor() {
    // The first module in the order of names: what is wrong everywhere is said of it.
    const LAYER: &str = "model.layers.0.mlp.down_proj";
    let check = |format, change: &dyn Fn(&mut Folder), property: &str, words: &[&str]| {
        let mut folder = four_bits(format);
        change(&mut folder);
        let error = refused(&folder);
        assert_names(&error, "model.safetensors", &format!("tensor {LAYER}.{property}"), words);
    };
    let name = |suffix: &str| format!("{LAYER}.{suffix}");
    let reorder = |folder: &mut Folder| folder.tensor_mut(&name("g_idx")).data[0] = 1;
    check(Format::Gptq, &reorder, "g_idx: value", &["input 0", "act-order"]);
    let drop_zeros = |folder: &mut Folder| folder.tensors.retain(|t| t.name != name("qzeros"));
    check(Format::Awq, &drop_zeros, "qweight: quantization", &["qzeros", "missing"]);
    let halve = |folder: &mut Folder| {
        let scales = folder.tensor_mut(&name("scales"));
        scales.shape[1] /= 2;
        scales.data.truncate(scales.data.len() / 2);
    };
    check(Format::Awq, &halve, "scales: shape", &["[4, 128]", "[4, 256]"]);
    let retype = |folder: &mut Folder| folder.tensor_mut(&name("scales")).dtype = "I16";
    check(Format::Gptq, &retype, "scales: dtype", &["I16", "F16, BF16, F32"]);
    let reshape = |folder: &mut Folder| folder.tensor_mut(&name("weight_shape")).data[0] = 1;
    check(Format::Packed, &reshape, "weight_shape: value", &["wanted: [256, 512]"]);
    let drop_zeros =
        |folder: &mut Folder| folder.tensors.retain(|t| t.name != name("weight_zero_point"));
    let words = ["weight_zero_point", "missing"];
    check(Format::Packed, &drop_zeros, "weight_packed: quantization", &words);
    let forget = |folder: &mut Folder| folder.config["quantization_config"] = Value::Null;
    check(Format::Gptq, &forget, "qweight: quantization", &["quantization_config"]);
    let narrow =
        |folder: &mut Folder| folder.config["quantization_config"]["group_size"] = json!(16);
    check(Format::Awq, &narrow, "qweight: group_size", &["16", "32"]);
}

#[test]
fn tensors_that_are_missing_or_strange_are_named_as_their_file_has_them() {
    let mut folder = small(Family::Llama);
    folder.tensors.retain(|tensor| !tensor.name.ends_with("layers.0.self_attn.k_proj.weight"));
    let field = "tensor model.layers.0.self_attn.k_proj.weight (blk.0.attn_k.weight)";
    assert_names(&refused(&folder), "model.safetensors", field, &["missing"]);

    let mut folder = small(Family::Llama);
    let (name, data) = ("model.layers.0.self_attn.sinks".to_owned(), vec![0; 16]);
    folder.tensors.push(Stored { name, dtype: "F32", shape: vec![4], data });
    let error = refused(&folder);
    assert!(error.field.contains("model.layers.0.self_attn.sinks"), "{error}");
    assert!(error.message.contains("no part of a llama model"), "{error}");

    let mut folder = small(Family::Llama);
    folder.tensor_mut("model.norm.weight").dtype = "I32";
    let field = "tensor model.norm.weight: dtype";
    assert_names(&refused(&folder), "model.safetensors", field, &["I32", "BF16"]);

    let mut folder = small(Family::Llama);
    folder.config["tie_word_embeddings"] = json!(false);
    assert_names(&refused(&folder), "model.safetensors", "tensor lm_head.weight", &["missing"]);

    let mut folder = small(Family::Mixtral);
    folder.tensors.retain(|tensor| !tensor.name.contains("experts.1.w1"));
    let error = refused(&folder);
    assert!(error.message.contains("number 1 is missing"), "{error}");
}

fn header(json: &str, data: usize) -> Vec<u8> {
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(json.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

#[test]
fn spoiled_headers_are_refused_with_the_tensor() {
    let tensor = |name: &str, start: usize, end: usize| {
        format!(r#""{name}":{{"dtype":"F32","shape":[2],"data_offsets":[{start},{end}]}}"#)
    };
    let long = (1_u64 << 62).to_le_bytes().to_vec();
    for (bytes, field, words) in [
        (vec![1, 2, 3], "header length", &["3 bytes"][..]),
        (long, "header length", &["4611686018427387904"]),
        (b"<!DOCTYPE html><html>".to_vec(), "header length", &["HTML"]),
        (header("{\"a\":1}", 0), "tensor a: description", &["invalid type"]),
        (header("{\"a\":", 0), "header", &["EOF"]),
        (header("{} x", 0), "header", &["trailing"]),
        (
            header(&format!("{{{},{}}}", tensor("a", 0, 8), tensor("a", 8, 16)), 16),
            "tensor a",
            &["twice"],
        ),
        (header(&format!("{{{}}}", tensor("a", 0, 4)), 16), "tensor a: data_offsets", &["8 bytes"]),
        (header(&format!("{{{}}}", tensor("a", 8, 0)), 16), "tensor a: data_offsets", &["[8, 0]"]),
        (
            header(&format!("{{{}}}", tensor("a", 16, 24)), 16),
            "tensor a: data_offsets",
            &["download"],
        ),
        (
            header(&format!("{{{},{}}}", tensor("a", 0, 8), tensor("b", 4, 12)), 16),
            "tensor b: data_offsets",
            &["overlaps that of a"],
        ),
        (
            header(r#"{"a":{"dtype":"F33","shape":[2],"data_offsets":[0,8]}}"#, 8),
            "tensor a: description",
            &["F33", "BF16"],
        ),
        (
            header(
                r#"{"a":{"dtype":"F32","shape":[18446744073709551615,9],"data_offsets":[0,8]}}"#,
                8,
            ),
            "tensor a: shape",
            &["bytes"],
        ),
    ] {
        let folder = small(Family::Llama).write();
        put(folder.path(), "model.safetensors", &bytes);
        assert_names(&open(folder.path()), "model.safetensors", field, words);
    }
}

#[test]
fn shards_that_are_missing_or_elsewhere_are_refused() {
    let folder = small(Family::Llama).write_in_two();
    let second = "model-00002-of-00002.safetensors";
    let path = folder.path().join(second);
    let whole = std::fs::read(&path).unwrap();
    put(folder.path(), second, &file_bytes(&[]));
    let error = open(folder.path());
    assert!(error.field.starts_with("weight_map.") && error.message.contains(second), "{error}");
    put(folder.path(), second, &whole[..whole.len() / 2]);
    assert!(open(folder.path()).message.contains("download"), "a shard cut short");
    std::fs::remove_file(&path).unwrap();
    let index = "model.safetensors.index.json";
    assert_names(&open(folder.path()), index, "weight_map", &[second, "not there"]);
    for name in ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "passwd"] {
        let map = json!({ "weight_map": { "model.norm.weight": name } }).to_string();
        put(folder.path(), index, map.as_bytes());
        let field = "weight_map.model.norm.weight";
        assert_names(&open(folder.path()), index, field, &[name, "in the folder"]);
    }
}

#[test]
fn files_that_are_no_json_are_refused() {
    for (name, bytes) in [
        ("config.json", &b"{"[..]),
        ("config.json", b"[1]"),
        ("config.json", b"\xff\xfe"),
        ("tokenizer_config.json", b"true"),
        ("generation_config.json", b"{\"eos_token_id\": \"x\"}"),
    ] {
        let folder = small(Family::Llama).write();
        put(folder.path(), name, bytes);
        assert!(open(folder.path()).file.ends_with(name), "{name}");
    }
}
