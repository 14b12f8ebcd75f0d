//! Model files: what is read, what is refused and where, and what refusing costs.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/counting_allocator.rs"]
mod counting_allocator;
#[path = "formats/files.rs"]
mod files;
#[path = "formats/mutations.rs"]
mod mutations;
#[path = "formats/reading.rs"]
mod reading;
#[path = "support/real_files.rs"]
mod real_files;
#[path = "formats/refused.rs"]
mod refused;
#[path = "formats/split.rs"]
mod split;
#[path = "support/tiny_model.rs"]
mod tiny_model;

use counting_allocator::CountingAllocator;
use std::path::Path;
use tandem::formats::{Checkpoint, FormatError};
use tiny_model::gguf_writer::Gguf;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

fn open_bytes(bytes: &[u8]) -> Result<Checkpoint, FormatError> {
    Checkpoint::from_bytes(Path::new("test.gguf"), bytes)
}

fn open(gguf: &Gguf) -> Result<Checkpoint, FormatError> {
    open_bytes(&gguf.bytes())
}

/// A small valid file: three keys, two F32 tensors of 8 and 3 elements.
fn small() -> Gguf {
    let mut gguf = Gguf::default();
    gguf.text("general.architecture", "none").u32("a.count", 7).texts("a.texts", &["x", "", "yz"]);
    gguf.tensor("first", &[4, 2], 0, (0..8).flat_map(|i| (i as f32).to_le_bytes()).collect());
    gguf.tensor("second", &[3], 0, (0..3).flat_map(|i| (i as f32).to_le_bytes()).collect());
    gguf
}
