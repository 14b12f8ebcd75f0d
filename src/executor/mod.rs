//! Owns the doing: it lowers a model to a flat program of ops and runs steps of it on its worker
//! threads, from token ids to sampled tokens. It must not know requests' lives, queues or clocks:
//! a [`crate::step::StepPlan`] says all. Called by the executor actor, one [`Stage`] per thread.

mod attention_split;
mod batch;
mod buffers;
mod cpu;
mod cpu_pool;
mod error;
mod expert_groups;
mod gpu;
mod handoff;
mod kv_store;
mod kv_tiers;
mod op_times;
mod own_buffers;
mod passes;
pub mod program;
mod rotations;
mod sample;
mod spill;
mod stage;
mod stage_memory;
mod warm_up;
mod weight_fill;
mod weight_made;
mod weight_places;
mod weight_repack;
mod weight_source;
mod weights;

pub use cpu_pool::{CpuPool, PoolOptions, Worker, WorkerPanic};
pub use error::ExecutorError;
pub use gpu::{
    FLOAT_WIDTH_BORDERS, GpuPipeline, GpuStage, GpuWeights, VramPlan, WIDTH_BORDERS, buffer_dims,
};
pub use handoff::{HandoffClosed, HandoffReceiver, HandoffSender, Slot, handoff};
pub use kv_store::KvOptions;
pub use kv_tiers::{KvBlocks, KvTiers, Registration, TierBytes, TierOptions};
pub use op_times::OpTime;
pub use passes::StepPasses;
pub use program::{Inlet, Outlet, PartWeights, Program, SpilledLayers, SpilledUnit, StagePart};
pub use stage::{Stage, StageOptions};
pub use stage_memory::StageMemory;
pub use weight_source::WeightSource;
pub use weights::{LoadProgress, Weights, WeightsRequest};
