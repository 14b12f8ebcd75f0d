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
mod block_planes;
mod copies;
mod crossing;
mod device;
mod draw;
mod driver;
mod e4m3;
mod e4m3_stream;
mod embed;
mod event;
mod experts;
mod fate;
mod flash;
mod float_tiles;
mod floats;
mod gpu;
mod gpu_error;
mod graph;
mod holders;
mod launch;
mod mark;
mod narrow;
mod pack;
mod peer;
mod pinned;
mod products;
mod registered;
mod roof;
mod rotate;
mod route;
mod rows;
mod sample;
mod stream;
mod turns;
mod weight_stream;
mod wide;

pub use attention::{Attend, HeadCounts, KvSpans, TokenTables};
pub use block_planes::{BlockCopies, BlockPlanes};
pub use copies::{CopyLanes, CopyWay};
pub use crossing::{Crossing, CrossingHost};
pub use device::{ComputeCapability, DeviceFacts, UnusableDevice};
pub use draw::{Asked, ListBounds, RowAnswer, RowDraws, RowList, RowQuestion};
pub use driver::{CudaVersion, Driver, DriverError, driver};
pub use embed::EmbedRows;
pub use event::event_number;
pub use experts::{ExpertProduct, ExpertSums};
pub use flash::Runs;
pub use gpu::{DeviceMemory, Gpu, GpuError, Plain, Span};
pub use graph::LaunchGraph;
pub use holders::MemoryHolder;
pub use mark::Mark;
pub use pack::{DeviceMatrix, Staging};
pub use peer::{PeerCopies, PeerLane};
pub use pinned::PinnedMemory;
pub use products::{Columns, EightBits, Product, half_bytes};
pub use registered::RegisteredMemory;
pub use roof::RoofMatrices;
pub use rotate::RotateHeads;
pub use route::{ExpertRoutes, Route, Routed};
pub use rows::{Added, Gate, NormRows, RoundRows, RowNorm};
pub use sample::{RowMeasure, RowMeasures};
pub use stream::{Gated, NormBefore};
pub use turns::StreamTurn;
pub use weight_stream::WeightRing;
