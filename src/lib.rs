//! Tandem: an actor-based inference runtime for large language models on machines whose GPU is too
//! small for them. Modules stand in layer order; imports only point up this list.

// L0, words
pub mod config;
pub mod request;
pub mod step;
pub mod tensor;
pub mod units;

// L1, facts
pub mod formats;
pub mod hardware;
pub mod telemetry;

// L2, meaning
pub mod kv;
pub mod memory;
pub mod model;
pub mod sampling;
pub mod speculative;
pub mod tokenizer;

// L3, decision
pub mod placement;
pub mod scheduler;

// L4, action
pub mod executor;

// L5, wiring
pub mod actors;
pub mod blocking;

// L6, edge
pub mod server;

pub use actors::{Engine, EngineError, Generation};
