//! Models as data: real files, tiny models of every family, and everything that is refused.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "model/families.rs"]
mod families;
#[path = "support/real_files.rs"]
mod real_files;
#[path = "model/refused.rs"]
mod refused;
#[path = "support/tiny_model.rs"]
mod tiny_model;

use std::path::Path;
use tandem::formats::{Checkpoint, FormatError};
use tandem::model::ModelSpec;
use tiny_model::gguf_writer::Gguf;

/// The model of a file that lies in memory.
fn read(gguf: &Gguf) -> Result<ModelSpec, FormatError> {
    let checkpoint = Checkpoint::from_bytes(Path::new("tiny.gguf"), &gguf.bytes())?;
    ModelSpec::from_checkpoint(&checkpoint)
}
