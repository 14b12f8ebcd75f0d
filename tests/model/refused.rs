//! Models whose file is sound but whose numbers are not: each refusal names key or tensor, and
//! place.

use super::read;
use super::tiny_model::gguf_writer::{Gguf, array_bytes, id};
use super::tiny_model::{Family, TinyModel};
use tandem::request::RequestError;

/// Spoils a tiny llama and returns the refusal's field and message, its offset checked.
fn refused_key(key: &str, spoil: impl FnOnce(&mut Gguf)) -> String {
    let mut gguf = TinyModel::new(Family::Llama).gguf();
    spoil(&mut gguf);
    let error = read(&gguf).unwrap_err();
    assert_eq!(error.field, key, "{error}");
    let present = gguf.entries.iter().any(|entry| entry.key == key);
    if !present {
        assert_eq!(error.offset, 0, "{error}");
    } else if error.message.contains("entries") {
        assert_eq!(error.offset, gguf.value_at(key) + 12, "{error}");
    } else {
        let length_bytes = if key == "general.architecture" { 8 } else { 0 };
        assert_eq!(error.offset, gguf.value_at(key) + length_bytes, "{error}");
    }
    error.message
}

fn refused_tensor(family: Family, name: &str, spoil: impl FnOnce(&mut Gguf)) -> String {
    let mut gguf = TinyModel::new(family).gguf();
    spoil(&mut gguf);
    let error = read(&gguf).unwrap_err();
    assert_eq!(error.field, format!("tensor {name}"), "{error}");
    let present = gguf.tensors.iter().any(|tensor| tensor.name == name);
    let first = gguf.tensors[0].name.clone();
    assert_eq!(error.offset, gguf.info_at(if present { name } else { &first }), "{error}");
    error.message
}

#[test]
fn unknown_architectures_get_the_list_of_known_ones() {
    let said = refused_key("general.architecture", |gguf| {
        gguf.text("general.architecture", "mamba");
    });
    assert_eq!(
        said,
        "\"mamba\" is not supported; supported: llama, qwen2, qwen3, qwen3moe, gemma3"
    );
    let said = refused_key("general.architecture", |gguf| {
        gguf.remove("general.architecture");
    });
    assert_eq!(said, "the key is missing");
}

#[test]
fn absurd_counts_are_refused_with_what_is_allowed() {
    for (key, value, allowed) in [
        ("llama.attention.head_count", 0, "0; allowed: 1 to 4096"),
        ("llama.attention.head_count_kv", 0, "0; allowed: 1 to 4096"),
        ("llama.attention.head_count_kv", 3, "3 key heads do not divide 4 query heads"),
        ("llama.attention.head_count", u32::MAX, "4294967295; allowed: 1 to 4096"),
        ("llama.attention.key_length", 63, "heads of 63 elements; rotation takes an even number"),
        ("llama.attention.key_length", 0, "0; allowed: 1 to 4096"),
        ("llama.attention.value_length", 32, "32; only the keys' length, 64, is supported"),
        ("llama.block_count", 0, "0; allowed: 1 to 1024"),
        ("llama.block_count", 4_000_000_000, "4000000000; allowed: 1 to 1024"),
        ("llama.context_length", 0, "0; allowed: 1 to 134217728"),
        ("llama.embedding_length", 0, "0; allowed: 1 to 4194304"),
        ("llama.feed_forward_length", 0, "0; allowed: 1 to 4194304"),
        ("llama.rope.dimension_count", 63, "63; rotation takes an even number"),
        ("llama.rope.dimension_count", 66, "66; allowed: 2 to 64"),
        ("llama.expert_count", 1025, "1025; allowed: 0 to 1024"),
    ] {
        assert_eq!(refused_key(key, |gguf| _ = gguf.u32(key, value)), allowed, "{key}");
    }
}

#[test]
fn experts_that_make_no_sense_or_are_chosen_otherwise_are_refused() {
    let refused = |key: &str, spoil: &dyn Fn(&mut Gguf, &str)| {
        let mut gguf = TinyModel::new(Family::Qwen3Moe).gguf();
        let key = format!("qwen3moe.{key}");
        spoil(&mut gguf, &key);
        let error = read(&gguf).unwrap_err();
        assert_eq!(error.field, key, "{error}");
        error.message
    };
    for (key, value, said) in [
        ("expert_count", 0, "0 or missing"),
        ("expert_count", u32::MAX, "4294967295; allowed: 0 to 1024"),
        ("expert_used_count", 0, "0; allowed: 1 to 8"),
        ("expert_used_count", 9, "9; allowed: 1 to 8"),
        ("expert_gating_func", 2, "2; supported: 1, softmax"),
        ("expert_shared_count", 1, "1; supported: at most 0"),
        ("expert_group_count", 4, "4; supported: at most 1"),
    ] {
        assert_eq!(refused(key, &|gguf, key| _ = gguf.u32(key, value)), said, "{key}");
    }
    let missing = |gguf: &mut Gguf, key: &str| _ = gguf.remove(key);
    assert_eq!(refused("expert_used_count", &missing), "the key is missing");
    assert_eq!(refused("expert_count", &missing), "0 or missing");
    let said = refused("expert_weights_norm", &|gguf, key| _ = gguf.bool(key, false));
    assert_eq!(said, "false; only normalised weights are supported");
    let said = refused("expert_weights_scale", &|gguf, key| _ = gguf.f32(key, -1.0));
    assert_eq!(said, "-1; allowed: a finite number above 0");
    let said = refused("feed_forward_length", &|gguf, _| {
        gguf.u32("qwen3moe.expert_feed_forward_length", 0).u32("qwen3moe.feed_forward_length", 512);
    });
    assert_eq!(said, "512 is no multiple of the 3 experts used");
    let mut gguf = TinyModel::new(Family::Qwen3).gguf();
    gguf.u32("qwen3.expert_count", 8);
    let said = read(&gguf).unwrap_err().message;
    assert_eq!(said, "8; mixtures of experts are not supported");
}

#[test]
fn misshapen_and_missing_tensors_of_experts_are_refused() {
    let exps = "blk.1.ffn_up_exps.weight";
    let said =
        refused_tensor(Family::Mixtral, exps, |gguf| gguf.tensor_mut(exps).dims = vec![256, 1024]);
    assert_eq!(said, "is [256, 1024], wanted: [256, 256, 4]");
    let said = refused_tensor(Family::Mixtral, exps, |gguf| {
        gguf.tensor_mut(exps).dims = vec![256, 4, 256];
    });
    assert_eq!(said, "is [256, 4, 256], wanted: [256, 256, 4]");
    let router = "blk.0.ffn_gate_inp.weight";
    let said = refused_tensor(Family::Qwen3Moe, router, |gguf| {
        gguf.u32("qwen3moe.expert_count", 7);
    });
    assert_eq!(said, "is [256, 8], wanted: [256, 7]");
    for name in ["ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"] {
        let name = format!("blk.0.{name}.weight");
        let said = refused_tensor(Family::Mixtral, &name, |gguf| {
            gguf.tensors.retain(|tensor| tensor.name != name);
        });
        assert_eq!(said, "the tensor is missing");
    }
    // A bias, or an expert that all tokens share: parts of other families.
    for name in ["blk.0.ffn_gate_inp.bias", "blk.1.ffn_up_shexp.weight"] {
        let said = refused_tensor(Family::Qwen3Moe, name, |gguf| {
            gguf.tensor(name, &[256], 0, vec![0; 1024]);
        });
        assert_eq!(said, "no part of a qwen3moe model with 2 layers");
    }
}

#[test]
fn a_tensor_per_expert_as_old_files_have_is_refused_with_what_to_do() {
    let name = "blk.0.ffn_gate.0.weight";
    let said = refused_tensor(Family::Mixtral, name, |gguf| {
        gguf.tensor_mut("blk.0.ffn_gate_exps.weight").name = name.to_owned();
    });
    assert!(said.ends_with("is not supported; convert the model again"), "{said}");
}

#[test]
fn heads_that_do_not_divide_the_embedding_are_refused() {
    let said = refused_key("llama.attention.head_count", |gguf| {
        gguf.remove("llama.attention.key_length").remove("llama.attention.value_length");
        gguf.u32("llama.attention.head_count", 3).u32("llama.attention.head_count_kv", 1);
    });
    assert_eq!(said, "3 heads do not divide the embedding's 256");
}

#[test]
fn numbers_that_are_not_finite_or_not_positive_are_refused() {
    let eps = "llama.attention.layer_norm_rms_epsilon";
    for value in [f32::NAN, f32::INFINITY, 0.0, -1e-5] {
        for key in [eps, "llama.rope.freq_base"] {
            let said = refused_key(key, |gguf| _ = gguf.f32(key, value));
            assert_eq!(said, format!("{value}; allowed: a finite number above 0"));
        }
    }
    assert_eq!(refused_key(eps, |gguf| _ = gguf.f32(eps, 2.0)), "2; allowed: below 1");
    let base = "llama.rope.freq_base";
    assert_eq!(refused_key(base, |gguf| _ = gguf.f32(base, 0.5)), "0.5; allowed: above 1");
    let factor = "llama.rope.scaling.factor";
    let said = refused_key(factor, |gguf| _ = gguf.f32(factor, f32::NEG_INFINITY));
    assert_eq!(said, "-inf; allowed: a finite number above 0");
}

#[test]
fn missing_keys_and_wrong_value_types_are_refused() {
    for key in [
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.layer_norm_rms_epsilon",
    ] {
        let key = format!("llama.{key}");
        assert_eq!(refused_key(&key, |gguf| _ = gguf.remove(&key)), "the key is missing");
    }
    let key = "llama.block_count";
    let said = refused_key(key, |gguf| _ = gguf.f32(key, 2.0));
    assert_eq!(said, "a float, wanted: an integer from 0 to 4294967295");
    let key = "llama.rope.scaling.type";
    let mut gguf = TinyModel::new(Family::Llama).gguf();
    gguf.text(key, "longrope");
    let said = read(&gguf).unwrap_err().message;
    assert_eq!(said, "\"longrope\" is not supported; supported: none, linear, yarn");
}

#[test]
fn lists_per_layer_must_have_an_entry_per_layer() {
    let key = "llama.attention.head_count_kv";
    let said = refused_key(key, |gguf| {
        gguf.raw(key, id::ARRAY, array_bytes(id::U32, 3, &[1, 0, 0, 0].repeat(3)));
    });
    assert_eq!(said, "3 entries, wanted: one for each of 2 layers");
}

#[test]
fn missing_tensors_are_named() {
    for (family, name) in [
        (Family::Llama, "token_embd.weight"),
        (Family::Llama, "output_norm.weight"),
        (Family::Llama, "blk.1.ffn_down.weight"),
        (Family::Qwen2, "blk.0.attn_k.bias"),
        (Family::Qwen3, "blk.1.attn_q_norm.weight"),
        (Family::Gemma3, "blk.5.post_ffw_norm.weight"),
    ] {
        let said = refused_tensor(family, name, |gguf| _ = gguf.remove_tensor(name));
        assert_eq!(said, "the tensor is missing");
    }
}

#[test]
fn misshapen_tensors_are_refused_with_both_shapes() {
    let name = "blk.0.attn_k.weight";
    let said = refused_tensor(Family::Llama, name, |gguf| gguf.tensor_mut(name).dims[1] = 64);
    assert_eq!(said, "is [256, 64], wanted: [256, 128]");
    let name = "blk.1.attn_norm.weight";
    let said = refused_tensor(Family::Llama, name, |gguf| gguf.tensor_mut(name).dims[0] = 255);
    assert_eq!(said, "is [255], wanted: [256]");
    let name = "blk.0.ffn_up.weight";
    let said =
        refused_tensor(Family::Qwen3, name, |gguf| gguf.tensor_mut(name).dims = vec![256, 256, 2]);
    assert_eq!(said, "is [256, 256, 2], wanted: [256, 512]");
}

#[test]
fn a_layer_with_unknown_tensors_is_refused() {
    let name = "blk.0.attn_q_norm.weight";
    let said = refused_tensor(Family::Llama, name, |gguf| {
        gguf.tensor(name, &[64], 0, vec![0; 256]);
    });
    assert_eq!(said, "no part of a llama model with 2 layers");
    let name = "blk.2.attn_norm.weight";
    let said = refused_tensor(Family::Llama, name, |gguf| {
        gguf.tensor(name, &[256], 0, vec![0; 1024]);
    });
    assert_eq!(said, "no part of a llama model with 2 layers");
}

#[test]
fn a_foreign_tensor_outside_the_layers_is_listed_even_if_its_type_is_unknown() {
    let mut gguf = TinyModel::new(Family::Llama).gguf();
    gguf.tensor("vision.patch_embd", &[64], 999, vec![0; 64]);
    assert_eq!(read(&gguf).unwrap().unused_tensors, ["vision.patch_embd"]);
}

#[test]
fn a_tensor_of_unknown_type_is_refused_when_the_model_needs_it() {
    let name = "blk.0.ffn_gate.weight";
    let said = refused_tensor(Family::Llama, name, |gguf| gguf.tensor_mut(name).type_id = 999);
    assert!(said.starts_with("its elements are type 999, which is not supported"), "{said}");
}

#[test]
fn a_vocabulary_that_does_not_fit_the_embedding_is_refused() {
    let said = refused_tensor(Family::Llama, "token_embd.weight", |gguf| {
        gguf.texts("tokenizer.ggml.tokens", &["a", "b"]);
    });
    assert_eq!(said, "is [256, 320], so has 320 rows; tokenizer.ggml.tokens says 2");
    let said = refused_tensor(Family::Llama, "token_embd.weight", |gguf| {
        gguf.remove("tokenizer.ggml.tokens").u32("llama.vocab_size", 319);
    });
    assert_eq!(said, "is [256, 320], so has 320 rows; llama.vocab_size says 319");
}

#[test]
fn clients_are_told_model_invalid() {
    let mut gguf = TinyModel::new(Family::Llama).gguf();
    gguf.u32("llama.block_count", 0);
    let error = read(&gguf).unwrap_err();
    let told = RequestError::from(error.clone());
    assert_eq!(told.kind().name(), "model_invalid");
    assert_eq!(told.to_string(), error.to_string());
    assert!(told.to_string().starts_with("tiny.gguf: llama.block_count at byte "), "{told}");
}
