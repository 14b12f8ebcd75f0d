//! Scales of FP8 weights, and scalings of positions.

use super::hf_folder::{Folder, Stored};
use super::small;
use super::tiny_model::Family;
use half::bf16;
use serde_json::json;
use tandem::formats::{Checkpoint, FormatError};
use tandem::model::{ModelSpec, RopeScaling, RopeSpec};
use tandem::tensor::DType;
use tandem_cpu_kernels::dequantize_row;

const NAME: &str = "model.layers.0.mlp.up_proj";

/// A folder whose `up_proj` of `[512, 256]` counts through all e4m3 that are numbers, with a scale.
fn folder(suffix: &str, shape: &[usize], dtype: &'static str, scales: Vec<u8>) -> Folder {
    let mut folder = small(Family::Qwen2);
    let codes = (0..512 * 256).map(|at: usize| at as u8).map(|code| match code & 0x7f {
        0x7f => code ^ 1,
        _ => code,
    });
    let weight = folder.tensor_mut(&format!("{NAME}.weight"));
    (weight.dtype, weight.data) = ("F8_E4M3", codes.collect());
    let name = format!("{NAME}.{suffix}");
    folder.tensors.push(Stored { name, dtype, shape: shape.to_vec(), data: scales });
    folder
}

/// Value of an e4m3 by its definition.
fn value(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match exponent {
        0 => mantissa / 8.0 * 2f32.powi(-6),
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

fn check(folder: &Folder, scale: impl Fn(usize, usize) -> f32) {
    let written = folder.write();
    let checkpoint = Checkpoint::open(written.path()).unwrap();
    let mut bytes = vec![0; DType::E4M3_128.row_bytes(256).unwrap()];
    let mut values = [0.0; 256];
    for row in [0, 1, 255, 511] {
        checkpoint.read_rows("blk.0.ffn_up.weight", row..row + 1, &mut bytes).unwrap();
        dequantize_row(DType::E4M3_128, &bytes, &mut values);
        for (col, got) in values.iter().enumerate() {
            let code = (row * 256 + col) as u8;
            let code = if code & 0x7f == 0x7f { code ^ 1 } else { code };
            assert_eq!(*got, scale(row, col) * value(code), "row {row}, column {col}");
        }
    }
}

fn floats(values: impl Iterator<Item = f32>) -> Vec<u8> {
    values.flat_map(f32::to_le_bytes).collect()
}

#[test]
fn a_scale_of_a_tensor_a_row_or_a_block_multiplies_its_weights() {
    for shape in [&[][..], &[1]] {
        let one = floats(std::iter::once(0.37));
        check(&folder("weight_scale", shape, "F32", one), |_, _| 0.37);
    }
    let of_row = |row: usize| bf16::from_f32(0.01 * (row + 1) as f32);
    let rows = (0..512).flat_map(|row| of_row(row).to_le_bytes()).collect();
    let mut by_row = folder("weight_scale", &[512, 1], "BF16", rows);
    by_row.config["quantization_config"] = json!({
        "quant_method": "compressed-tensors", "format": "float-quantized",
        "config_groups": { "group_0": {
            "targets": ["Linear"],
            "weights": { "num_bits": 8, "type": "float", "strategy": "channel" },
        } },
    });
    check(&by_row, |row, _| of_row(row).to_f32());
    let blocks = floats((0..8).map(|block| 0.1 + block as f32));
    let mut by_block = folder("weight_scale_inv", &[4, 2], "F32", blocks);
    by_block.config["quantization_config"] =
        json!({ "quant_method": "fp8", "weight_block_size": [128, 128] });
    check(&by_block, |row, col| 0.1 + (row / 128 * 2 + col / 128) as f32);
}

#[test]
fn weights_and_scales_that_are_no_number_are_refused_as_they_are_read() {
    let mut weights = folder("weight_scale", &[1], "F32", floats(std::iter::once(1.0)));
    weights.tensor_mut(&format!("{NAME}.weight")).data[2 * 256 + 3] = 0xff;
    let scale = folder("weight_scale", &[1], "F32", floats(std::iter::once(f32::NAN)));
    for (folder, words) in [(weights, "row 2, column 3"), (scale, "scale of row 2 is NaN")] {
        let written = folder.write();
        let checkpoint = Checkpoint::open(written.path()).unwrap();
        let mut bytes = vec![0; DType::E4M3_128.row_bytes(256).unwrap()];
        let error = checkpoint.read_rows("blk.0.ffn_up.weight", 2..3, &mut bytes).unwrap_err();
        assert!(error.message.contains(words), "{error}");
        assert!(error.field.starts_with(&format!("tensor {NAME}.weight")), "{error}");
    }
}

fn spec(folder: &Folder) -> Result<ModelSpec, FormatError> {
    let written = folder.write();
    ModelSpec::from_checkpoint(&Checkpoint::open(written.path())?)
}

fn rope(scaling: serde_json::Value) -> RopeSpec {
    let mut folder = small(Family::Qwen3);
    folder.config["rope_scaling"] = scaling;
    spec(&folder).unwrap().layers[0].attention.rope.clone()
}

#[test]
fn linear_and_yarn_scale_as_gguf_has_them() {
    let linear = rope(json!({ "type": "linear", "factor": 4 }));
    assert_eq!(linear.scaling, RopeScaling::Linear { factor: 4.0 });
    let yarn = rope(json!({
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512,
    }));
    let wanted = RopeScaling::Yarn {
        factor: 4.0,
        original_context_tokens: 512,
        beta_fast: 32.0,
        beta_slow: 1.0,
    };
    assert_eq!(yarn.scaling, wanted);
    assert!((yarn.magnitude() - (0.1 * 4f32.ln() + 1.0)).abs() < 1e-6);
    let given = rope(json!({ "rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5 }));
    assert!((given.magnitude() - 1.5).abs() < 1e-6);
    assert_eq!(rope(json!({ "rope_type": "default" })).scaling, RopeScaling::None);
}

/// Llama 3.1's published settings: the fastest pair is kept, the slowest divided by 8.
#[test]
fn llama3_divides_slow_frequencies() {
    let mut folder = small(Family::Llama);
    folder.config["rope_theta"] = json!(500_000.0);
    folder.config["rope_scaling"] = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    });
    let written = folder.write();
    let checkpoint = Checkpoint::open(written.path()).unwrap();
    let spec = ModelSpec::from_checkpoint(&checkpoint).unwrap();
    let factors = spec.layers[0].attention.rope.frequency_factors.as_ref().unwrap();
    let mut bytes = vec![0; 4 * factors.cols];
    checkpoint.read_rows(&factors.name, 0..1, &mut bytes).unwrap();
    let mut values = vec![0.0; factors.cols];
    dequantize_row(DType::F32, &bytes, &mut values);
    assert_eq!((values.len(), values[0], values[31]), (32, 1.0, 8.0));
    assert!(values.is_sorted() && values.iter().any(|value| *value > 1.0 && *value < 8.0));
}

#[test]
fn gemmas_windows_and_bases_are_those_of_the_configuration() {
    let mut folder = small(Family::Gemma3);
    let layers: Vec<_> = ["sliding_attention", "full_attention"].into();
    folder.config["num_hidden_layers"] = json!(1);
    folder.config["layer_types"] = json!(layers[..1]);
    folder.config["rope_theta"] = json!(1e6);
    let layer = spec(&folder).unwrap().layers[0].attention.clone();
    assert_eq!((layer.window, layer.rope.base), (Some(16), 10_000.0));
    folder.config["layer_types"] = json!(layers[1..]);
    let layer = spec(&folder).unwrap().layers[0].attention.clone();
    assert_eq!((layer.window, layer.rope.base), (None, 1e6));
    assert_eq!(layer.scale, 1.0 / 8.0);
}
