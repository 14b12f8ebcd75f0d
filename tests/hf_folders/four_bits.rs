//! Rows of 4-bit layers against numbers that are worked out one by one: any run of rows, scales of
//! every float type, and layers without zero points.

use super::hf_folder::{Folder, Format, Stored};
use super::tiny_model::{Family, TinyModel};
use half::{bf16, f16};
use proptest::prelude::*;
use serde_json::json;
use tandem::formats::Checkpoint;
use tandem::tensor::DType;
use tandem_cpu_kernels::dequantize_row;

const LAYER: &str = "model.layers.0.mlp.down_proj";
/// The same in GGUF's words.
const TENSOR: &str = "blk.0.ffn_down.weight";

static FORMATS: [Format; 4] = [Format::Awq, Format::Gptq, Format::GptqV2, Format::Packed];
static TYPES: [DType; 3] = [DType::INT4_128, DType::INT4_64, DType::INT4_32];

fn folder(dtype: DType, format: Format) -> Folder {
    let mut model = TinyModel::new(Family::Qwen2).dtype(dtype).layers(1);
    model.embedding_dtype = DType::F16;
    Folder::new(&model, &model.gguf(), format)
}

/// Bytes of some rows of the tensor.
fn rows(checkpoint: &Checkpoint, rows: std::ops::Range<usize>) -> Vec<u8> {
    let info = checkpoint.tensor_info(TENSOR).unwrap();
    let row_bytes = info.bytes.unwrap() / info.shape.rows();
    let mut bytes = vec![0; rows.len() * row_bytes];
    checkpoint.read_rows(TENSOR, rows, &mut bytes).unwrap();
    bytes
}

proptest! {
    #[test]
    fn any_run_of_rows_is_a_part_of_all(
        (format, dtype) in (prop::sample::select(&FORMATS[..]), prop::sample::select(&TYPES[..])),
        (first, count) in (0_usize..256, 0_usize..40),
    ) {
        let written = folder(dtype, format).write();
        let checkpoint = Checkpoint::open(written.path()).unwrap();
        let all = rows(&checkpoint, 0..256);
        let end = 256.min(first + count);
        let row_bytes = all.len() / 256;
        prop_assert_eq!(rows(&checkpoint, first..end), &all[first * row_bytes..end * row_bytes]);
    }
}

fn values(checkpoint: &Checkpoint) -> Vec<f32> {
    let dtype = checkpoint.dtype(TENSOR).unwrap();
    let bytes = rows(checkpoint, 0..256);
    let mut values = vec![0.0; 256 * 512];
    let of_rows = bytes.chunks_exact(bytes.len() / 256).zip(values.chunks_exact_mut(512));
    of_rows.for_each(|(bytes, values)| dequantize_row(dtype, bytes, values));
    values
}

fn scales_of(stored: &Stored) -> Vec<f16> {
    stored.data.as_chunks::<2>().0.iter().map(|bytes| f16::from_le_bytes(*bytes)).collect()
}

/// Makes the scales of a layer another type; those of bf16 lose what it can't hold.
fn retype(stored: &mut Stored, dtype: &'static str) {
    let scales = scales_of(stored).into_iter().map(f16::to_f32);
    stored.data = match dtype {
        "BF16" => scales.flat_map(|scale| bf16::from_f32(scale).to_le_bytes()).collect(),
        _ => scales.flat_map(f32::to_le_bytes).collect(),
    };
    stored.dtype = dtype;
}

#[test]
fn scales_of_bf16_and_f32_are_those_of_f16() {
    for format in FORMATS {
        let suffix = if format == Format::Packed { "weight_scale" } else { "scales" };
        let name = format!("{LAYER}.{suffix}");
        for dtype in ["BF16", "F32"] {
            let mut exact = folder(DType::INT4_64, format);
            // What both types hold.
            let stored = exact.tensor_mut(&name);
            let scales = scales_of(stored).into_iter();
            let scales = scales.map(|scale| f16::from_f32(bf16::from_f32(scale.to_f32()).to_f32()));
            stored.data = scales.flat_map(f16::to_le_bytes).collect();
            let mut other = exact.clone();
            retype(other.tensor_mut(&name), dtype);
            let [exact, other] = [exact, other].map(|folder| {
                let written = folder.write();
                values(&Checkpoint::open(written.path()).unwrap())
            });
            assert!(exact == other, "{format:?} with scales of {dtype}");
        }
    }
}

#[test]
fn a_scale_that_is_no_f16_is_refused_by_its_output() {
    let mut folder = folder(DType::INT4_64, Format::Awq);
    let stored = folder.tensor_mut(&format!("{LAYER}.scales"));
    retype(stored, "F32");
    stored.data[4 * 7..4 * 8].copy_from_slice(&1e5_f32.to_le_bytes());
    let written = folder.write();
    let checkpoint = Checkpoint::open(written.path()).unwrap();
    let mut bytes = vec![0; checkpoint.tensor_info(TENSOR).unwrap().bytes.unwrap()];
    let error = checkpoint.read_rows(TENSOR, 0..256, &mut bytes).unwrap_err().to_string();
    assert!(error.contains("the scale of output 7 is 100000"), "{error}");
}

#[test]
fn packed_layers_without_zero_points_subtract_8_and_may_have_a_scale_a_row() {
    for strategy in ["group", "channel"] {
        let mut folder = folder(DType::INT4_128, Format::Packed);
        let weights =
            &mut folder.config["quantization_config"]["config_groups"]["group_0"]["weights"];
        weights["symmetric"] = json!(true);
        weights["strategy"] = json!(strategy);
        folder.tensors.retain(|tensor| !tensor.name.ends_with("weight_zero_point"));
        for tensor in &mut folder.tensors {
            if strategy == "channel" && tensor.name.ends_with("weight_scale") {
                let groups = tensor.shape[1];
                let scales = scales_of(tensor).into_iter().step_by(groups);
                tensor.data = scales.flat_map(f16::to_le_bytes).collect();
                tensor.shape[1] = 1;
            }
        }
        let scales = folder.tensor_mut(&format!("{LAYER}.weight_scale"));
        let (groups, scales) = (scales.shape[1], scales_of(scales));
        let packed = folder.tensor_mut(&format!("{LAYER}.weight_packed")).data.clone();
        let written = folder.write();
        let got = values(&Checkpoint::open(written.path()).unwrap());
        for (at, got) in got.into_iter().enumerate() {
            let (row, col) = (at / 512, at % 512);
            let quant = packed[at / 2] >> (4 * (at % 2)) & 15;
            let scale = scales[row * groups + col / (512 / groups)].to_f32();
            assert_eq!(
                got,
                scale * (f32::from(quant) - 8.0),
                "row {row}, column {col}, {strategy}"
            );
        }
    }
}
