//! The engine's own OS threads by name. Each is started by the actor that answers for it; the
//! registry outlives the actor, so that a thread is always joined and never forgotten.

use super::EngineError;
use crossbeam_channel::{Receiver, Sender, bounded};
use std::any::Any;
use std::collections::HashMap;
use std::convert::Infallible;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};

/// A thread's end of its stop signal: nothing ever arrives, it disconnects when the thread is to
/// end.
pub(super) type StopSignal = Receiver<Infallible>;

/// Kept in an actor's state: when the state is dropped, for whatever reason, the thread is told
/// to end.
#[derive(Debug)]
pub(super) struct StopOnDrop {
    _sender: Sender<Infallible>,
}

pub(super) fn stop_signal() -> (StopOnDrop, StopSignal) {
    let (sender, receiver) = bounded(0);
    (StopOnDrop { _sender: sender }, receiver)
}

/// Whether the thread is to end.
pub(super) fn is_stopped(stop: &StopSignal) -> bool {
    matches!(stop.try_recv(), Err(crossbeam_channel::TryRecvError::Disconnected))
}

/// What a panic said.
pub(super) fn panic_message(payload: Box<dyn Any + Send>) -> String {
    match payload.downcast::<String>() {
        Ok(text) => *text,
        Err(payload) => match payload.downcast::<&'static str>() {
            Ok(text) => (*text).to_owned(),
            Err(_) => "a panic without a message".to_owned(),
        },
    }
}

/// All threads of one engine.
#[derive(Debug, Default)]
pub(super) struct Threads {
    running: Mutex<HashMap<String, JoinHandle<()>>>,
}

impl Threads {
    /// Starts a named thread. `died` hears why it ended when that was not by its own will: a
    /// panic reaches nobody else. A predecessor of the same name is joined first.
    pub(super) fn start(
        &self,
        name: &str,
        died: impl FnOnce(String) + Send + 'static,
        body: impl FnOnce() -> Result<(), String> + Send + 'static,
    ) -> Result<(), EngineError> {
        self.join(name);
        let run = move || {
            let ended = catch_unwind(AssertUnwindSafe(body));
            match ended.unwrap_or_else(|payload| Err(panic_message(payload))) {
                Ok(()) => {}
                Err(reason) => died(reason),
            }
        };
        let handle = Builder::new().name(name.to_owned()).spawn(run).map_err(|error| {
            EngineError::Thread { thread: name.to_owned(), reason: error.to_string() }
        })?;
        self.lock().insert(name.to_owned(), handle);
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, JoinHandle<()>>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a thread that has been told to end or has died.
    pub(super) fn join(&self, name: &str) {
        let handle = self.lock().remove(name);
        if let Some(handle) = handle {
            // Every body catches its panics, so joining cannot fail.
            let _ = handle.join();
        }
    }

    /// Waits for all threads. They must have been told to end.
    pub(super) fn join_all(&self) {
        let all: Vec<_> = self.lock().drain().collect();
        for (_, handle) in all {
            let _ = handle.join();
        }
    }
}
