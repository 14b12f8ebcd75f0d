//! Owns the engine: actors, threads, lanes, streams, and what happens when one of them dies. Must
//! not know sockets, protocols and the terminal, nor how a token is computed. The server, the
//! command line and programs that embed Tandem call it, all through [`Engine`].

mod builder;
mod engine;
mod engine_loop;
mod error;
mod executor;
mod faults;
mod flow;
mod generation;
mod kv_swap;
mod lanes;
mod links;
mod load;
mod op_clock;
mod restarts;
mod root;
mod scheduler;
mod shared;
mod stage;
mod stage_fault;
mod status;
mod stream;
mod supervisor;
mod swap_lane;
mod text;
mod threads;
mod tokenizer;
mod window;

pub use builder::EngineBuilder;
pub use engine::Engine;
pub use error::EngineError;
#[doc(hidden)]
pub use faults::{FaultPoint, Faults};
pub use generation::{Answer, Canceller, Generation};
pub use load::{compute_isa, known_rates, on_gpus, parts_of, stage_options};
#[doc(hidden)]
pub use op_clock::StepOps;
pub use stage::{BlockMover, StageFactory, StepRunner, TierSource};
pub use stage_fault::StageFault;
pub use status::{
    BlockCounts, EngineState, LoadProgress, ModelInfo, RestartCounts, SequenceCounts,
    StatsSnapshot, Status,
};
pub use text::RenderedChat;
