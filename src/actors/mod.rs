//! Owns the engine: actors, threads, lanes, streams, and what happens when one of them dies. Must
//! not know sockets, protocols and the terminal, nor how a token is computed. The server, the
//! command line and programs that embed Tandem call it, all through [`Engine`].

mod builder;
mod engine;
mod error;
mod faults;
mod generation;
mod root;
mod shared;
mod stage;
mod status;
mod stream;
mod text;
mod window;

pub use builder::EngineBuilder;
pub use engine::Engine;
pub use error::EngineError;
#[doc(hidden)]
pub use faults::{FaultPoint, Faults};
pub use generation::{Answer, Canceller, Generation};
#[doc(hidden)]
pub use stage::{StageFactory, StepRunner};
pub use status::{
    BlockCounts, EngineState, LoadProgress, ModelInfo, RestartCounts, SequenceCounts,
    StatsSnapshot, Status,
};
pub use text::RenderedChat;
