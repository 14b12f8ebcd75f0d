//! Owns what a model is: one [`ModelSpec`] per checkpoint, with every tensor's name, shape and type
//! checked. It must not know how anything is computed, on which device, or by whom. Placement
//! weighs it, and the executor lowers it to operations.

mod arch;
mod ffn;
mod file_type;
mod rope;
mod source;
mod spec;
mod synthetic;

pub use ffn::{Activation, DenseFfnSpec, ExpertsSpec, FfnSpec};
pub use file_type::FileType;
pub use rope::{RopeScaling, RopeSpec, RopeStyle};
pub use spec::{AttentionSpec, LayerSpec, LinearSpec, ModelSpec, NormSpec, TensorRef};
pub use synthetic::{SyntheticError, SyntheticModel, WeightTypes};

use crate::formats::{Checkpoint, FormatError};

impl ModelSpec {
    /// Reads a checkpoint's metadata and checks all tensors that the model needs.
    ///
    /// # Errors
    /// The architecture is unknown; a key is missing or out of range; a tensor is missing,
    /// misshapen or of a type that cannot be computed with; a layer holds tensors that its family
    /// does not know.
    pub fn from_checkpoint(checkpoint: &Checkpoint) -> Result<Self, FormatError> {
        arch::read(checkpoint)
    }

    /// GGUF's words for the families that can be read.
    pub fn known_architectures() -> impl Iterator<Item = &'static str> {
        arch::known()
    }
}
