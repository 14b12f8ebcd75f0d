//! Memory while the weights of a Hugging Face folder are loaded, whose matrices are made from
//! several tensors: counted for the whole process, so this file holds one test only.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test")]

#[path = "support/hf_folder.rs"]
mod hf_folder;
#[path = "support/hf_layers.rs"]
mod hf_layers;
#[path = "support/process_memory.rs"]
mod process_memory;
#[path = "support/stage.rs"]
mod stage;
#[path = "support/tiny_model.rs"]
mod tiny_model;

use hf_folder::{Folder, Format, Stored};
use serde_json::json;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use tandem::tensor::DType;
use tiny_model::{Family, TinyModel};

/// With 256 inputs in groups of 128, 134 bytes each: 8.8 MB a matrix, 18 of them.
const N_FF: usize = 65_536;
const LAYERS: usize = 6;

/// Writes the tensors as one file. Those of feed-forward networks are wide and all zero: holes in
/// the file, which take no time to write and as much memory to read as any other bytes.
fn write_wide(folder: &Path, n_ff: usize, tensors: &[Stored]) {
    let (mut header, mut end, mut pieces) = (serde_json::Map::new(), 0, Vec::new());
    for Stored { name, dtype, shape, data } in tensors {
        let (mut shape, mut bytes) = (shape.clone(), data.len());
        if name.contains(".mlp.") {
            // AWQ has a matrix as [inputs, outputs / 8] and its scales as [groups, outputs].
            let wide = if name.contains("down_proj") { 0 } else { 1 };
            shape[wide] = shape[wide] * N_FF / n_ff;
            bytes = bytes * N_FF / n_ff;
        } else {
            pieces.push((end, data));
        }
        let offsets = [end, end + bytes];
        header.insert(
            name.clone(),
            json!({ "dtype": dtype, "shape": shape, "data_offsets": offsets }),
        );
        end += bytes;
    }
    let mut text = serde_json::Value::Object(header).to_string();
    text.extend(std::iter::repeat_n(' ', text.len().next_multiple_of(8) - text.len()));
    let file = File::create(folder.join("model.safetensors")).unwrap();
    file.write_all_at(&(text.len() as u64).to_le_bytes(), 0).unwrap();
    file.write_all_at(text.as_bytes(), 8).unwrap();
    let start = 8 + text.len();
    for (at, data) in pieces {
        file.write_all_at(data, (start + at) as u64).unwrap();
    }
    file.set_len((start + end) as u64).unwrap();
}

#[test]
fn loading_awq_never_holds_weights_twice() {
    let mut model = TinyModel::new(Family::Llama).dtype(DType::INT4_128).layers(LAYERS);
    model.embedding_dtype = DType::F16;
    let mut folder = Folder::new(&model, &model.gguf(), Format::Awq);
    folder.config["intermediate_size"] = json!(N_FF);
    let tensors = std::mem::take(&mut folder.tensors);
    let place = folder.write();
    write_wide(place.path(), model.n_ff, &tensors);
    process_memory::check_load(place.path(), 150_000_000);
}
