//! Owns the socket and everything that a client sees: lines in, lines out, limits, permissions, an
//! orderly end. Must not know how a token comes about: it sees an [`EngineHandle`] and nothing
//! below. The command line calls it.

mod admission;
pub mod client;
mod connection;
mod dispatch;
mod engine;
mod engine_handle;
mod hangup;
mod listen;
mod live;
mod notify;
mod options;
mod outbox;
pub mod protocol;
mod service;
mod shutdown;
mod stream;
mod subscription;
mod unix;
mod whole;

pub use engine_handle::{EngineHandle, EngineReport, EventStream, ServiceState};
pub use listen::serve;
pub use options::{ServerOptions, Stop};
pub use shutdown::Ending;
pub use unix::{
    EXIT_ALREADY_RUNNING, Endpoint, EndpointError, Folder, PATH_BYTES_MAX, default_socket,
};
