//! Who is let in: counts connections and requests, and refuses fast what is too much or too late.

use super::protocol::{ErrorObject, Limits, ServerStats};
use crate::request::RequestError;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};

/// The counters of one server. They decide nothing but numbers, so `Relaxed` is enough.
#[derive(Debug, Default)]
pub(super) struct Admission {
    connections: AtomicUsize,
    connections_total: AtomicU64,
    connections_refused: AtomicU64,
    requests_live: AtomicUsize,
    requests_total: AtomicU64,
    errors_total: AtomicU64,
    draining: AtomicBool,
}

/// One thing let in; dropping it makes room for another.
#[derive(Debug)]
pub(super) struct Permit {
    admission: Arc<Admission>,
    counter: fn(&Admission) -> &AtomicUsize,
}

impl Drop for Permit {
    fn drop(&mut self) {
        (self.counter)(&self.admission).fetch_sub(1, Relaxed);
    }
}

impl Admission {
    fn permit(self: &Arc<Self>, counter: fn(&Admission) -> &AtomicUsize) -> Permit {
        counter(self).fetch_add(1, Relaxed);
        Permit { admission: Arc::clone(self), counter }
    }

    /// Lets a connection in.
    pub(super) fn connection(self: &Arc<Self>, limits: &Limits) -> Result<Permit, ErrorObject> {
        let open = self.connections.load(Relaxed);
        if open >= limits.connections_max {
            self.refuse_connection();
            return Err(ErrorObject::overloaded("connections", open, limits.connections_max));
        }
        self.connections_total.fetch_add(1, Relaxed);
        Ok(self.permit(|admission| &admission.connections))
    }

    /// Notes a connection that was not let in.
    pub(super) fn refuse_connection(&self) {
        self.connections_refused.fetch_add(1, Relaxed);
    }

    /// Lets a request in that takes the engine's time.
    pub(super) fn request(self: &Arc<Self>) -> Result<Permit, ErrorObject> {
        if self.is_draining() {
            return Err(RequestError::ShuttingDown.into());
        }
        self.requests_total.fetch_add(1, Relaxed);
        Ok(self.permit(|admission| &admission.requests_live))
    }

    /// Notes a line that was answered with an error.
    pub(super) fn count_error(&self) {
        self.errors_total.fetch_add(1, Relaxed);
    }

    /// From now on no request is let in.
    pub(super) fn drain(&self) {
        self.draining.store(true, Relaxed);
    }

    pub(super) fn is_draining(&self) -> bool {
        self.draining.load(Relaxed)
    }

    pub(super) fn stats(&self) -> ServerStats {
        ServerStats {
            connections: self.connections.load(Relaxed),
            connections_total: self.connections_total.load(Relaxed),
            connections_refused: self.connections_refused.load(Relaxed),
            requests_live: self.requests_live.load(Relaxed),
            requests_total: self.requests_total.load(Relaxed),
            errors_total: self.errors_total.load(Relaxed),
        }
    }
}
