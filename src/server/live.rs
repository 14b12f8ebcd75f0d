//! The live requests of one connection, by id.

use super::admission::Permit;
use super::protocol::{ErrorObject, RequestId};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio_util::sync::CancellationToken;

/// The live requests of one connection.
#[derive(Debug, Default)]
pub(super) struct LiveTable {
    entries: Mutex<HashMap<RequestId, CancellationToken>>,
}

/// One live request. Its id is free again when this is dropped.
#[derive(Debug)]
pub(super) struct Live {
    pub(super) id: RequestId,
    /// Cancelled when a client asks for this request's end.
    pub(super) cancelled: CancellationToken,
    table: Arc<LiveTable>,
    _permit: Permit,
}

impl LiveTable {
    fn lock(&self) -> MutexGuard<'_, HashMap<RequestId, CancellationToken>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses an id that is in use.
    pub(super) fn check(&self, id: &RequestId) -> Result<(), ErrorObject> {
        if self.lock().contains_key(id) {
            return Err(ErrorObject::duplicate_id(id));
        }
        Ok(())
    }

    /// Makes a request live. Only the connection's reader calls this, after [`LiveTable::check`].
    pub(super) fn begin(
        self: &Arc<Self>,
        id: RequestId,
        limit: usize,
        permit: Permit,
    ) -> Result<Live, ErrorObject> {
        let cancelled = CancellationToken::new();
        let mut entries = self.lock();
        if entries.len() >= limit {
            let live = entries.len();
            return Err(ErrorObject::overloaded("live requests of this connection", live, limit));
        }
        entries.insert(id.clone(), cancelled.clone());
        drop(entries);
        Ok(Live { id, cancelled, table: Arc::clone(self), _permit: permit })
    }

    /// Asks for a request's end; false if none of that id is live.
    pub(super) fn cancel(&self, id: &RequestId) -> bool {
        let entry = self.lock().get(id).cloned();
        entry.inspect(CancellationToken::cancel).is_some()
    }
}

impl LiveTable {
    /// Asks for the end of all requests.
    pub(super) fn cancel_all(&self) {
        self.lock().values().for_each(CancellationToken::cancel);
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.table.lock().remove(&self.id);
    }
}
