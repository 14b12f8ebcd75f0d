//! Signs of life for systemd (`sd_notify(3)`): ready when a token can be generated, alive while
//! steps are computed.

use super::service::Service;
use super::{EngineReport, ServiceState};
use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// A connected notification socket.
#[derive(Debug)]
pub(super) struct Notifier {
    socket: UnixDatagram,
}

impl Notifier {
    /// Connects to a path, or to an abstract name that is written with a leading `@`.
    pub(super) fn connect(address: &OsStr) -> io::Result<Self> {
        let address = match address.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
            _ => SocketAddr::from_pathname(address)?,
        };
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        socket.connect_addr(&address)?;
        Ok(Self { socket })
    }

    /// Sends assignments, one per line. A supervisor that does not listen is logged and left alone.
    pub(super) fn tell(&self, assignments: &str) {
        if let Err(error) = self.socket.send(assignments.as_bytes()) {
            tracing::warn!(%error, assignments, "the service supervisor did not hear");
        }
    }
}

/// Decides from two looks at an engine whether it is alive.
#[derive(Debug, Default)]
pub(super) struct Pulse {
    steps_seen: Option<u64>,
}

impl Pulse {
    /// Alive is an engine that computed a step since the last look, or has nothing to compute.
    pub(super) fn is_alive(&mut self, report: &EngineReport) -> bool {
        let moved = self.steps_seen != Some(report.steps);
        self.steps_seen = Some(report.steps);
        report.state != ServiceState::Stopped && (moved || !report.has_work)
    }
}

/// Tells the supervisor about the service until it is dropped.
pub(super) async fn run(service: &Service) {
    let Some(notifier) = notifier(service) else { return };
    if let Err(reason) = service.engine.ready().await {
        notifier.tell(&format!("STATUS=no model: {}", reason.replace('\n', " ")));
        return;
    }
    notifier.tell("READY=1\nSTATUS=serving");
    let Some(limit) = service.options.watchdog.filter(|limit| !limit.is_zero()) else { return };
    let mut pulse = Pulse::default();
    // Half of the limit, as sd_watchdog_enabled(3) recommends.
    let mut looks = tokio::time::interval(limit.max(Duration::from_millis(2)) / 2);
    loop {
        looks.tick().await;
        if pulse.is_alive(&service.engine.report()) {
            notifier.tell("WATCHDOG=1");
        }
    }
}

/// Tells the supervisor that the service ends.
pub(super) fn stopping(service: &Service) {
    if let Some(notifier) = notifier(service) {
        notifier.tell("STOPPING=1");
    }
}

fn notifier(service: &Service) -> Option<Notifier> {
    let address = service.options.notify_socket.as_deref()?;
    match Notifier::connect(address) {
        Ok(notifier) => Some(notifier),
        Err(error) => {
            tracing::warn!(%error, ?address, "the service supervisor cannot be reached");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(steps: u64, has_work: bool) -> EngineReport {
        let details = serde_json::Value::Null;
        EngineReport { state: ServiceState::Ready, steps, has_work, details }
    }

    #[test]
    fn an_engine_is_alive_while_it_steps_or_has_nothing_to_do() {
        let mut pulse = Pulse::default();
        assert!(pulse.is_alive(&report(0, false)));
        assert!(pulse.is_alive(&report(0, false)));
        assert!(pulse.is_alive(&report(1, true)));
        assert!(!pulse.is_alive(&report(1, true)), "work, and no step");
        assert!(pulse.is_alive(&report(2, true)));
    }
}
