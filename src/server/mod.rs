//! Owns the socket and everything that a client sees: lines in, lines out, limits, permissions, an
//! orderly end. Must not know how a token comes about: it sees an [`EngineHandle`] and nothing
//! below. The command line calls it.

mod engine_handle;
pub mod protocol;

pub use engine_handle::{EngineHandle, EngineReport, EventStream, ServiceState};
