//! Memory while weights are loaded: counted for the whole process, so this file holds one test
//! only.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test")]

#[path = "support/process_memory.rs"]
mod process_memory;
#[path = "support/stage.rs"]
mod stage;
#[path = "support/tiny_model.rs"]
mod tiny_model;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use tiny_model::{Family, TinyModel};

/// With rows of 256 Q8_0 elements, 272 bytes: 27 MB a matrix, six of them.
const N_FF: u64 = 98_304;
const ROW_BYTES: u64 = 272;
/// A tiny llama whose feed-forward matrices are wide and all zero: a hole in the file, which takes
/// no time to write and as much memory to read as any other bytes.
fn write_wide_llama(path: &Path) {
    let mut gguf = TinyModel::new(Family::Llama).gguf();
    gguf.remove("llama.feed_forward_length").u32("llama.feed_forward_length", N_FF as u32);
    let wide = |name: &str| name.contains(".ffn_") && !name.contains("norm");
    let data = |tensor: &tiny_model::gguf_writer::Tensor| tensor.data.len() as u64;
    let mut end = gguf.tensors.iter().map(|tensor| data(tensor).next_multiple_of(32)).sum::<u64>();
    let mut offset = 0;
    for tensor in &mut gguf.tensors {
        tensor.offset = Some(offset);
        offset += data(tensor).next_multiple_of(32);
        if wide(&tensor.name) {
            let is_down = tensor.name.contains("down");
            tensor.dims = if is_down { vec![N_FF, 256] } else { vec![256, N_FF] };
            tensor.offset = Some(end);
            end += N_FF * ROW_BYTES;
        }
    }
    let bytes = gguf.bytes();
    let file = File::create(path).unwrap();
    file.write_all_at(&bytes, 0).unwrap();
    file.set_len(bytes.len() as u64 + 6 * N_FF * ROW_BYTES).unwrap();
}

#[test]
fn loading_never_holds_weights_twice() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("wide.gguf");
    write_wide_llama(&path);
    process_memory::check_load(&path, 160_000_000);
}
