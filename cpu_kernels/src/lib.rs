//! SIMD kernels on quantised weights.
//!
//! This crate knows no model, no actor and no thread: a caller gives it bytes, row ranges and
//! buffers. `scalar` files are the specification; every instruction set gives their bits.
//! Matmuls of quantised weights have a second one, that of AMX's bf16 tiles: `matmul/bf16.rs`.

pub mod activations;
mod amx_permission;
pub mod attention;
pub mod blocks;
pub mod dequantize;
pub mod dispatch;
mod elementwise;
mod gated;
pub mod isa;
#[cfg(target_arch = "x86_64")]
mod lanes;
pub mod matmul;
mod norm;
pub mod quantize;
pub mod repack;
mod roof;
pub mod rope;
pub mod softmax;
mod vector;

pub use activations::{ActivationBuffer, ActivationForm, Activations, ActivationsMut};
pub use blocks::DType;
pub use dequantize::dequantize_row;
pub use dispatch::Kernels;
pub use isa::{Isa, UnsupportedIsa};
pub use matmul::{Layout, MatrixError, MatrixView, OutputColumns};
pub use quantize::quantize_row;
pub use repack::{dequantize_packed_row, layout_for, packed_bytes, repack_row_group};
pub use roof::{TrialProduct, TrialRows};
pub use rope::{RopeFrequencies, RopeParams, RopeRow, RopeScaling, RopeStyle};
pub use softmax::{SUM_BLOCK, exp_nonpositive, sum_of_weights};
