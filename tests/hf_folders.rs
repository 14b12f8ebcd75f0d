//! Hugging Face folders: the same answers as the same weights have in a GGUF file, and what is
//! refused.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test and its figures")]

#[path = "hf_folders/four_bits.rs"]
mod four_bits;
#[path = "support/hf_folder.rs"]
mod hf_folder;
#[path = "support/hf_layers.rs"]
mod hf_layers;
#[path = "hf_folders/logits.rs"]
mod logits;
#[path = "hf_folders/mutations.rs"]
mod mutations;
#[path = "hf_folders/real.rs"]
mod real;
#[path = "support/reference.rs"]
mod reference;
#[path = "hf_folders/refused.rs"]
mod refused;
#[path = "hf_folders/scaling.rs"]
mod scaling;
#[path = "support/stage.rs"]
mod stage;
#[path = "support/tiny_model.rs"]
mod tiny_model;
#[path = "hf_folders/vocabulary.rs"]
mod vocabulary;

use hf_folder::{Folder, Format};
use tandem::tensor::DType;
use tiny_model::{Family, TinyModel};

/// A tiny model of a family in floats.
fn small(family: Family) -> Folder {
    let model = TinyModel::new(family).dtype(DType::F32).layers(1);
    Folder::new(&model, &model.gguf(), Format::Floats)
}
