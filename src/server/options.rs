//! What a server is told at its start.

use super::protocol::{ID_BYTES_MAX, Limits};
use crate::config::Config;
use std::ffi::OsString;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Most JSON values of one line: bounds the memory of its tree to about 100 MiB.
const JSON_VALUES_MAX: usize = 1 << 20;

/// Everything that is not the socket and not the engine.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// What is taken from clients; announced in the hello.
    pub limits: Limits,
    /// How long running requests may go on once the server is told to end.
    pub drain: Duration,
    /// How long connections may take after that to read what is left for them.
    pub flush: Duration,
    /// Who may connect, besides root.
    pub owner_uid: u32,
    /// systemd's address for notifications (the value of `NOTIFY_SOCKET`).
    pub notify_socket: Option<OsString>,
    /// systemd's limit between two signs of life (the value of `WATCHDOG_USEC`).
    pub watchdog: Option<Duration>,
}

impl ServerOptions {
    /// The options that a configuration asks for, for clients of our own user, without systemd.
    pub fn from_config(config: &Config) -> Self {
        let server = &config.server;
        let limits = Limits {
            frame_bytes_max: server.frame_bytes_max.0 as usize,
            json_depth_max: server.json_depth_max,
            json_values_max: JSON_VALUES_MAX,
            id_bytes_max: ID_BYTES_MAX,
            connections_max: server.connections_max,
            requests_per_connection_max: server.requests_per_connection_max,
            queue_max: config.scheduler.queue_max,
            window_bytes: config.stream.window_bytes.0,
            slow_consumer_ms: config.stream.slow_consumer_ms,
        };
        Self {
            limits,
            drain: Duration::from_millis(server.drain_ms),
            flush: Duration::from_secs(1),
            owner_uid: rustix::process::geteuid().as_raw(),
            notify_socket: None,
            watchdog: None,
        }
    }
}

/// How a server is told to end. The process's signals are its caller's business.
#[derive(Clone, Debug, Default)]
pub struct Stop {
    /// End when the running requests have ended, or after the drain time.
    pub drain: CancellationToken,
    /// End at once; every stream still gets its terminal event.
    pub now: CancellationToken,
}
