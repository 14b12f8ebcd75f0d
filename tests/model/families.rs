//! What each family's metadata becomes.

use super::read;
use super::real_files::real;
use super::tiny_model::gguf_writer::{array_bytes, id};
use super::tiny_model::tiny_tokenizer::VOCAB_SIZE;
use super::tiny_model::{Family, Output, TinyModel};
use tandem::formats::Checkpoint;
use tandem::model::{Activation, ModelSpec, RopeScaling, RopeStyle};
use tandem::tensor::{DType, KvDType};

fn real_spec(name: &str) -> Option<ModelSpec> {
    let checkpoint = Checkpoint::open(&real(name)?).unwrap();
    Some(ModelSpec::from_checkpoint(&checkpoint).unwrap())
}

#[test]
fn every_family_reads_in_every_type() {
    for family in Family::ALL {
        for dtype in DType::ALL {
            let model = TinyModel::new(family).dtype(dtype).layers(1);
            let spec = read(&model.gguf()).unwrap_or_else(|e| panic!("{family:?} {dtype}: {e}"));
            assert_eq!(spec.architecture, family.architecture());
            assert_eq!(spec.vocab_size, VOCAB_SIZE);
            assert_eq!(spec.layers[0].attention.query.weight.dtype, dtype);
            assert_eq!(spec.is_output_tied(), model.output == Output::Tied);
            assert_eq!(spec.unused_tensors, Vec::<String>::new());
        }
    }
}

#[test]
fn the_same_seed_gives_the_same_file() {
    let model = TinyModel::new(Family::Gemma3);
    assert_eq!(model.gguf().bytes(), model.gguf().bytes());
    assert_ne!(model.gguf().bytes(), model.clone().seed(2).gguf().bytes());
}

#[test]
fn weights_and_kv_are_counted_in_bytes() {
    let model = TinyModel::new(Family::Qwen2);
    let gguf = model.gguf();
    let spec = read(&gguf).unwrap();
    let stored: usize = gguf.tensors.iter().map(|tensor| tensor.data.len()).sum();
    assert_eq!(spec.weight_bytes(), stored as u64);
    let elements: u64 = gguf.tensors.iter().map(|t| t.dims.iter().product::<u64>()).sum();
    assert_eq!(spec.parameters(), elements);
    // 2 layers, keys and values, 2 heads of 64, f16.
    assert_eq!(spec.kv_bytes_per_token(KvDType::F16), 2 * 2 * 2 * 64 * 2);
    assert_eq!(spec.kv_bytes_per_token(KvDType::Q8_0), 2 * 2 * 2 * (64 + 2 * 2));
}

#[test]
fn llama_pairs_neighbours_and_takes_llama_3s_frequency_factors() {
    let model = TinyModel::new(Family::Llama);
    let mut gguf = model.gguf();
    let spec = read(&gguf).unwrap();
    let attention = &spec.layers[1].attention;
    assert_eq!((attention.rope.style, attention.rope.dims), (RopeStyle::Interleaved, 64));
    assert_eq!((attention.scale, attention.window), (0.125, None));
    assert_eq!(spec.layers[0].ffn.activation(), Activation::Silu);
    assert_eq!((spec.embedding_scale, spec.logit_softcap), (None, None));

    gguf.tensor("rope_freqs.weight", &[32], DType::F32.gguf_id(), vec![0; 128]);
    let spec = read(&gguf).unwrap();
    let factors = spec.layers[1].attention.rope.frequency_factors.as_ref().unwrap();
    assert_eq!((factors.name.as_str(), factors.cols), ("rope_freqs.weight", 32));
    let stored: usize = gguf.tensors.iter().map(|tensor| tensor.data.len()).sum();
    assert_eq!(spec.weight_bytes(), stored as u64);
}

#[test]
fn mistral_shaped_llama_keeps_its_window_and_optional_biases() {
    let model = TinyModel::new(Family::Llama);
    let mut gguf = model.gguf();
    gguf.u32("llama.attention.sliding_window", 4096);
    gguf.tensor("blk.0.attn_output.bias", &[256], DType::F32.gguf_id(), vec![0; 1024]);
    gguf.tensor("blk.1.ffn_up.bias", &[512], DType::F32.gguf_id(), vec![0; 2048]);
    let spec = read(&gguf).unwrap();
    assert!(spec.layers.iter().all(|layer| layer.attention.window == Some(4096)));
    assert!(spec.layers[0].attention.output.bias.is_some());
    let up_bias = |layer: usize| &spec.layers[layer].ffn.dense().unwrap().up.bias;
    assert!(up_bias(0).is_none() && up_bias(1).is_some());
}

#[test]
fn missing_keys_fall_back_as_gguf_defines() {
    let model = TinyModel::new(Family::Llama);
    let mut gguf = model.gguf();
    for key in ["attention.key_length", "attention.value_length", "rope.freq_base"] {
        gguf.remove(&model.key(key));
    }
    gguf.remove("general.name");
    let spec = read(&gguf).unwrap();
    let attention = &spec.layers[0].attention;
    assert_eq!((attention.head_dim, attention.rope.base), (64, 10_000.0));
    assert_eq!(spec.name, "llama");
}

#[test]
fn rope_scaling_is_read_in_all_its_spellings() {
    let scaling = |change: &dyn Fn(&mut super::Gguf)| {
        let mut gguf = TinyModel::new(Family::Llama).gguf();
        change(&mut gguf);
        read(&gguf).unwrap().layers[0].attention.rope.scaling
    };
    let factor = "llama.rope.scaling.factor";
    let kind = "llama.rope.scaling.type";
    let linear = RopeScaling::Linear { factor: 8.0 };
    assert_eq!(scaling(&|gguf| _ = gguf.f32(factor, 8.0)), linear);
    assert_eq!(scaling(&|gguf| _ = gguf.f32("llama.rope.scale_linear", 8.0)), linear);
    assert_eq!(scaling(&|gguf| _ = gguf.f32(factor, 0.0)), RopeScaling::None);
    assert_eq!(scaling(&|gguf| _ = gguf.f32(factor, 8.0).text(kind, "none")), RopeScaling::None);
    let yarn = scaling(&|gguf| {
        gguf.text(kind, "yarn").f32(factor, 4.0);
        gguf.u32("llama.rope.scaling.original_context_length", 512);
    });
    let (original_context_tokens, beta_fast, beta_slow) = (512, 32.0, 1.0);
    let wanted = RopeScaling::Yarn { factor: 4.0, original_context_tokens, beta_fast, beta_slow };
    assert_eq!(yarn, wanted);
}

#[test]
fn qwen2_has_biases_and_turns_half_against_half() {
    let spec = read(&TinyModel::new(Family::Qwen2).gguf()).unwrap();
    let attention = &spec.layers[0].attention;
    let biases = [&attention.query.bias, &attention.key.bias, &attention.value.bias];
    assert!(biases.iter().all(|bias| bias.is_some()));
    assert_eq!(attention.rope.style, RopeStyle::HalfSplit);
    assert!(attention.output.bias.is_none() && attention.query_norm.is_none());
}

#[test]
fn qwen3_norms_heads_whose_length_the_file_gives() {
    let spec = read(&TinyModel::new(Family::Qwen3).gguf()).unwrap();
    let attention = &spec.layers[0].attention;
    // 4 heads of 128 over an embedding of 256.
    assert_eq!((attention.head_dim, attention.query.weight.rows), (128, 512));
    assert_eq!(attention.query_norm.as_ref().unwrap().weight.cols, 128);
    assert_eq!(attention.key_norm.as_ref().unwrap().weight.cols, 128);
    assert_eq!(attention.rope.style, RopeStyle::HalfSplit);
}

#[test]
fn mixtral_is_a_llama_with_experts() {
    let model = TinyModel::new(Family::Mixtral);
    let mut gguf = model.gguf();
    let spec = read(&gguf).unwrap();
    assert_eq!(spec.layers[0].attention.rope.style, RopeStyle::Interleaved);
    let experts = spec.layers[1].ffn.experts().unwrap();
    assert_eq!((experts.n_experts, experts.n_used, experts.weight_scale), (4, 2, 1.0));
    assert_eq!((experts.router.rows, experts.router.dtype), (4, DType::F32));
    assert_eq!((experts.gate.rows, experts.gate.cols), (4 * 256, 256));
    assert_eq!((experts.down.rows, spec.layers[1].ffn.hidden_dim()), (4 * 256, 256));
    assert_eq!(spec.layers[1].ffn.activation(), Activation::Silu);
    gguf.f32("llama.expert_weights_scale", 2.5);
    gguf.u32("llama.expert_gating_func", 1).bool("llama.expert_weights_norm", true);
    let scale = |gguf: &super::Gguf| read(gguf).unwrap().experts().next().unwrap().weight_scale;
    assert_eq!(scale(&gguf), 2.5);
    gguf.f32("llama.expert_weights_scale", 0.0);
    assert_eq!(scale(&gguf), 1.0);
    gguf.u32("llama.expert_count", 0);
    let error = read(&gguf).unwrap_err();
    assert_eq!(error.field, "tensor blk.0.ffn_gate.weight", "{error}");
}

#[test]
fn qwen3moe_norms_heads_and_has_an_expert_width_of_its_own() {
    let mut gguf = TinyModel::new(Family::Qwen3Moe).gguf();
    let spec = read(&gguf).unwrap();
    let attention = &spec.layers[0].attention;
    assert_eq!((attention.rope.style, attention.head_dim), (RopeStyle::HalfSplit, 128));
    assert!(attention.query_norm.is_some() && attention.key_norm.is_some());
    let experts = spec.layers[0].ffn.experts().unwrap();
    assert_eq!((experts.n_experts, experts.n_used), (8, 3));
    assert_eq!((experts.up.rows, experts.up.cols), (8 * 256, 256));
    // Without that width, the experts in use share the whole one.
    gguf.remove("qwen3moe.expert_feed_forward_length");
    gguf.u32("qwen3moe.feed_forward_length", 3 * 256);
    assert_eq!(read(&gguf).unwrap(), spec);
}

#[test]
fn of_experts_only_those_in_use_count_as_active() {
    let spec = read(&TinyModel::new(Family::Qwen3Moe).gguf()).unwrap();
    let expert = 3 * 256 * 256;
    let layers = spec.layers.len() as u64;
    assert_eq!(spec.parameters() - spec.active_parameters(), layers * (8 - 3) * expert);
    // Q8_0: 34 bytes per 32 elements.
    assert_eq!(spec.expert_bytes(), layers * 8 * expert / 32 * 34);
    assert_eq!(spec.active_expert_bytes(), layers * 3 * expert / 32 * 34);
    let dense = read(&TinyModel::new(Family::Qwen3).gguf()).unwrap();
    assert_eq!((dense.active_parameters(), dense.expert_bytes()), (dense.parameters(), 0));
}

#[test]
fn gemma3_alternates_windows_and_rotations() {
    let model = TinyModel::new(Family::Gemma3).layers(13);
    let mut gguf = model.gguf();
    gguf.f32("gemma3.rope.freq_base", 1e6).f32("gemma3.rope.scaling.factor", 8.0);
    gguf.text("gemma3.rope.scaling.type", "linear");
    gguf.f32("gemma3.final_logit_softcapping", 30.0);
    let spec = read(&gguf).unwrap();
    assert_eq!((spec.embedding_scale, spec.logit_softcap), (Some(16.0), Some(30.0)));
    for (index, layer) in spec.layers.iter().enumerate() {
        let (attention, rope) = (&layer.attention, &layer.attention.rope);
        assert_eq!(attention.scale, 0.125);
        assert!(layer.attention_post_norm.is_some() && layer.ffn_post_norm.is_some());
        if index % 6 == 5 {
            let linear = RopeScaling::Linear { factor: 8.0 };
            assert_eq!((attention.window, rope.base, rope.scaling), (None, 1e6, linear));
        } else {
            let local = (Some(16), 10_000.0, RopeScaling::None);
            assert_eq!((attention.window, rope.base, rope.scaling), local);
        }
    }
    assert_eq!(spec.layers[0].ffn.activation(), Activation::GeluTanh);
}

#[test]
fn gemma3s_pattern_may_be_a_list() {
    let mut gguf = TinyModel::new(Family::Gemma3).layers(3).gguf();
    let key = "gemma3.attention.sliding_window_pattern";
    gguf.raw(key, id::ARRAY, array_bytes(id::BOOL, 3, &[1, 0, 1]));
    let windows = |spec: &ModelSpec| spec.layers.iter().map(|l| l.attention.window).collect();
    let found: Vec<_> = windows(&read(&gguf).unwrap());
    assert_eq!(found, [Some(16), None, Some(16)]);
    gguf.u32("gemma3.attention.sliding_window", 0).remove(key);
    let found: Vec<_> = windows(&read(&gguf).unwrap());
    assert_eq!(found, [None, None, None]);
}

/// Gemma 3 27B: 62 layers, an embedding of 5376 over 32 heads of 128, scaled by `1/sqrt(168)`.
#[test]
fn gemma3_27b_has_its_own_attention_scale() {
    let mut model = TinyModel::new(Family::Gemma3).layers(62).dtype(DType::Q4_0);
    model.n_ff = 32;
    model.n_heads = 2;
    let spec = read(&model.gguf()).unwrap();
    assert_eq!(spec.layers[0].attention.scale, 1.0 / 128.0_f32.sqrt());
}

#[test]
fn heads_may_differ_from_layer_to_layer() {
    let mut gguf = TinyModel::new(Family::Llama).gguf();
    let heads = array_bytes(id::U32, 2, &[2, 0, 0, 0, 1, 0, 0, 0]);
    gguf.raw("llama.attention.head_count_kv", id::ARRAY, heads);
    for name in ["blk.1.attn_k.weight", "blk.1.attn_v.weight"] {
        let tensor = gguf.tensor_mut(name);
        tensor.dims[1] = 64;
        tensor.data.truncate(tensor.data.len() / 2);
    }
    let spec = read(&gguf).unwrap();
    let kv_heads: Vec<_> = spec.layers.iter().map(|l| l.attention.n_kv_heads).collect();
    assert_eq!(kv_heads, [2, 1]);
    assert_eq!(spec.kv_bytes_per_token(KvDType::F16), 2 * 2 * (2 + 1) * 64);
}

#[test]
fn smollm2_is_what_its_card_says() {
    let Some(spec) = real_spec("SmolLM2-135M-Instruct.Q4_1.gguf") else { return };
    assert_eq!((spec.layers.len(), spec.embedding_dim, spec.vocab_size), (30, 576, 49152));
    assert_eq!((spec.parameters(), spec.is_output_tied()), (134_515_008, true));
    let attention = &spec.layers[29].attention;
    assert_eq!((attention.n_heads, attention.n_kv_heads, attention.head_dim), (9, 3, 64));
    assert_eq!((attention.rope.style, attention.rope.base), (RopeStyle::Interleaved, 100_000.0));
}

#[test]
fn gemma_3_270m_is_what_its_card_says() {
    let Some(spec) = real_spec("gemma-3-270m-q4_k_m.gguf") else { return };
    assert_eq!((spec.layers.len(), spec.vocab_size, spec.parameters()), (18, 262_144, 268_098_176));
    let global: Vec<usize> =
        (0..18).filter(|l| spec.layers[*l].attention.window.is_none()).collect();
    assert_eq!(global, [5, 11, 17]);
    assert_eq!(spec.layers[0].attention.window, Some(512));
    assert_eq!(spec.layers[0].attention.scale, 0.0625);
    assert_eq!(spec.embedding_scale, Some(640.0_f32.sqrt()));
}

#[test]
fn qwen25_coder_is_what_its_card_says() {
    let half = real_spec("qwen2.5-coder-0.5b-instruct-q4_k_m.gguf");
    let one = real_spec("qwen2.5-coder-1.5b-instruct-q4_k_m.gguf");
    for (spec, layers, width, heads) in [(half, 24, 896, 14), (one, 28, 1536, 12)] {
        let Some(spec) = spec else { continue };
        assert_eq!((spec.layers.len(), spec.embedding_dim), (layers, width));
        assert_eq!((spec.layers[0].attention.n_heads, spec.vocab_size), (heads, 151_936));
        assert!(!spec.is_output_tied() && spec.layers[0].attention.value.bias.is_some());
        assert_eq!(spec.context_tokens_max, 32_768);
    }
}

#[test]
fn tinyllama_is_refused_only_for_the_types_without_kernels() {
    let Some(path) = real("tinyllama-1.1b-chat-iq2_xxs.gguf") else { return };
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!(checkpoint.tensor("token_embd.weight").unwrap().dtype, DType::Q2_K);
    let error = ModelSpec::from_checkpoint(&checkpoint).unwrap_err();
    assert_eq!(error.field, "tensor blk.0.attn_q.weight");
    assert!(error.message.contains("IQ2_XXS, which is not supported"), "{error}");
}
