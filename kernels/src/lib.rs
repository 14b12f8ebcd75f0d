//! The door to the CUDA driver. It owns every call into libcuda and answers with types on machines
//! without one.
//!
//! This crate knows no model and no actor: it launches what it is told on the buffers that it is
//! given. The root crate's `hardware` asks it which GPUs exist.
//!
//! The driver library is loaded at run time, so that one binary serves machines with and without a
//! GPU. The bindings panic when it is missing: nothing may call them except through a [`Driver`],
//! which exists only where the library, a device and a recent enough driver do.

mod attention;
mod device;
mod driver;
mod gpu;
mod matvec;
mod pack;
mod rows;

pub use attention::{Attend, HeadCounts, KvSpans, RotateHeads, TokenTables};
pub use device::{ComputeCapability, DeviceFacts};
pub use driver::{CudaVersion, Driver, DriverError, driver};
pub use gpu::{DeviceMemory, Gpu, GpuError, Plain, Span};
pub use matvec::{Columns, EightBits, Product};
pub use pack::{DeviceMatrix, Staging};
pub use rows::{Added, Gate, NormRows, RoundRows, RowNorm};
