//! Memory while weights are loaded: counted for the whole process, so this file holds one test
//! only.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test")]

#[path = "support/stage.rs"]
mod stage;
#[path = "support/tiny_model.rs"]
mod tiny_model;

use stage::Model;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use tandem::executor::{CpuPool, LoadProgress, PoolOptions, StagePart, Weights, WeightsRequest};
use tandem::formats::Checkpoint;
use tandem::memory::HugePages;
use tiny_model::{Family, TinyModel};

/// With rows of 256 Q8_0 elements, 272 bytes: 27 MB a matrix, six of them.
const N_FF: u64 = 98_304;
const ROW_BYTES: u64 = 272;
/// Stacks, the workers' first allocations, pages that neighbours share.
const SLACK_BYTES: usize = 3 << 20;

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

/// A field of this process's status, in bytes.
fn status_bytes(field: &str) -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
}

/// The most that was ever resident.
fn peak_bytes() -> usize {
    status_bytes("VmHWM:")
}

#[test]
fn loading_never_holds_weights_twice() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("wide.gguf");
    write_wide_llama(&path);
    let model = Model::open(Checkpoint::open(&path).unwrap());
    let spec = model.spec.clone();
    let part = StagePart::whole(spec.layers.len());
    let (source, huge_pages) = (model.checkpoint.into(), HugePages::SystemDefault);
    let request = WeightsRequest { source, spec, part, isa: None, huge_pages };
    let options = PoolOptions { threads: 2, cores: Vec::new(), spin_us: 50 };
    let mut pool = CpuPool::new(&options).unwrap();
    let mut reports: Vec<LoadProgress> = Vec::new();
    let before = status_bytes("VmRSS:");
    assert!(peak_bytes() < before + (32 << 20), "writing the file hides the peak of loading it");
    let weights = Weights::load(&request, &mut pool, &mut |at| reports.push(at)).unwrap();
    let (peak, after) = (peak_bytes() - before, status_bytes("VmRSS:") - before);
    let allowed = weights.bytes() + weights.bytes() / 10;
    assert!(weights.bytes() > 160_000_000, "{} bytes of weights", weights.bytes());
    assert!(after >= weights.bytes() / 2, "{after} resident bytes: the load was not measured");
    assert!(peak <= allowed, "peak of {peak} bytes, allowed {allowed}");
    let settled = weights.bytes() + SLACK_BYTES;
    assert!(after <= settled, "{after} bytes stay, allowed {settled}");
    assert!(reports.is_sorted_by_key(|at| at.done_bytes) && reports.len() > 6);
    let last = reports.last().unwrap();
    assert!(last.done_bytes == last.total_bytes && last.total_bytes >= weights.bytes() / 2);
}
