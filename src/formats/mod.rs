//! Owns the reading of model files: one [`Checkpoint`] of metadata and tensors, whatever the
//! format. It must not know what a tensor is for or what any architecture is. `model` and
//! `tokenizer` read metadata from it, and the executor takes its weights.

mod checkpoint;
mod cursor;
mod error;
mod gguf;
mod hf_config;
mod hf_weights;
mod lookalike;
mod mapped_file;
mod metadata;
mod metadata_writer;
mod safetensors;
mod split;
mod stored_type;
mod value;

pub use checkpoint::{Checkpoint, TensorInfo};
pub use error::FormatError;
pub use mapped_file::MappedFile;
pub use metadata::Metadata;
pub use stored_type::StoredType;
pub use value::{ArrayView, Texts, Value, ValueType};
