//! The root thread of an engine: it loads the model, owns the runtime, keeps a supervisor alive,
//! and at the end waits for everything. No engine shares anything with another.

use super::builder::OnProgress;
use super::load;
use super::restarts::{RestartWindow, Verdict};
use super::shared::{Life, Shared};
use super::supervisor::Supervisor;
use super::threads::panic_message;
use super::{EngineError, Faults, StageFactory};
use crate::config::Config;
use ractor::Actor;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use tokio::runtime::{Builder, Runtime};

/// Threads of the runtime: they move messages, the work is done elsewhere.
const RUNTIME_THREADS: usize = 2;
/// How long tasks that have been told to end may take. They wait for nothing by then.
const END_PATIENCE: Duration = Duration::from_secs(5);

/// Where the model comes from.
pub(super) struct Source {
    pub(super) on_progress: Option<OnProgress>,
    /// Where what was measured of this machine is kept.
    pub(super) probe_folder: Option<PathBuf>,
    /// Stages of a test; else the model's own.
    pub(super) stages: Option<Arc<dyn StageFactory>>,
}

/// Starts an engine's root thread.
pub(super) fn start(
    config: Config,
    faults: Arc<Faults>,
    source: Source,
) -> Result<Arc<Shared>, EngineError> {
    let shared = Arc::new(Shared::new(config, faults));
    let for_root = Arc::clone(&shared);
    let root = std::thread::Builder::new()
        .name("tandem-root".into())
        .spawn(move || run(&for_root, source))
        .map_err(|error| EngineError::Thread {
            thread: "tandem-root".into(),
            reason: error.to_string(),
        })?;
    *shared.root.lock().unwrap_or_else(PoisonError::into_inner) = Some(root);
    Ok(shared)
}

fn run(shared: &Arc<Shared>, source: Source) {
    let lived = catch_unwind(AssertUnwindSafe(|| live(shared, source)));
    match lived {
        Ok(Ok(())) => {}
        Ok(Err(error)) => shared.die(error),
        Err(payload) => {
            let message = panic_message(payload);
            shared.die(EngineError::LoadPanicked { message });
        }
    }
    shared.threads.join_all();
    shared.release();
    shared.life.send_if_modified(|life| {
        let ends_well = !matches!(life, Life::Dead(_));
        if ends_well {
            *life = Life::Stopped;
        }
        ends_well
    });
    shared.gone.send_replace(true);
}

fn live(shared: &Arc<Shared>, source: Source) -> Result<(), EngineError> {
    let runtime = runtime()?;
    if shared.runtime.set(runtime.handle().clone()).is_err() {
        unreachable!("an engine has one root thread and it lives once");
    }
    let loaded = load::load(shared, source)?;
    if shared.loaded.set(loaded).is_err() {
        unreachable!("an engine loads one model");
    }
    let reigned = runtime.block_on(reign(shared));
    shared.threads.join_all();
    runtime.shutdown_timeout(END_PATIENCE);
    reigned
}

fn runtime() -> Result<Runtime, EngineError> {
    Builder::new_multi_thread()
        .worker_threads(RUNTIME_THREADS)
        .thread_name("tandem-actors")
        .enable_time()
        .build()
        .map_err(|error| EngineError::Thread {
            thread: "tandem-actors".into(),
            reason: error.to_string(),
        })
}

/// Keeps a supervisor alive until the engine is to end.
async fn reign(shared: &Arc<Shared>) -> Result<(), EngineError> {
    let limits = &shared.config.supervision;
    let mut window = RestartWindow::new(limits.restarts_max, limits.restart_window_ms);
    loop {
        let reason = match Actor::spawn(None, Supervisor, Arc::clone(shared)).await {
            Ok((supervisor, mut reign_of_one)) => {
                tokio::select! {
                    biased;
                    () = wind_down(shared) => {
                        supervisor.stop(None);
                        // It ends or has ended; how does not matter any more.
                        let _ = reign_of_one.await;
                        return Ok(());
                    }
                    _ = &mut reign_of_one => {
                        if shared.is_ending() {
                            wind_down(shared).await;
                            return Ok(());
                        }
                        "the supervisor panicked".to_owned()
                    }
                }
            }
            Err(error) => error.to_string(),
        };
        // Its children were stopped with it; their threads must not meet their successors.
        tokio::task::block_in_place(|| shared.threads.join_all());
        if let Verdict::GiveUp { restarts } = window.death(shared.now_us() / 1000) {
            let dead = EngineError::Dead { actor: "supervisor".into(), restarts, reason };
            shared.die(dead.clone());
            end_streams(shared).await;
            return Err(dead);
        }
        tracing::warn!(%reason, "the supervisor is replaced");
        shared.restarts.supervisor.add(1);
    }
}

/// Resolves when the engine is to end and all streams have had their terminal event.
async fn wind_down(shared: &Shared) {
    let mut life = shared.life.subscribe();
    loop {
        let now = life.borrow_and_update().clone();
        match now {
            Life::Loading | Life::Ready => {
                // The sender lives in `shared`.
                let _ = life.changed().await;
            }
            Life::Draining(until) => {
                shared.streams.close();
                tokio::select! {
                    () = shared.streams.wait() => break,
                    () = tokio::time::sleep_until(until.into()) => break,
                    _ = life.changed() => {}
                }
            }
            Life::Stopping | Life::Stopped | Life::Dead(_) => break,
        }
    }
    shared.life.send_if_modified(|life| {
        let draining = matches!(life, Life::Draining(_));
        if draining {
            *life = Life::Stopping;
        }
        draining
    });
    end_streams(shared).await;
}

async fn end_streams(shared: &Shared) {
    shared.streams.close();
    if tokio::time::timeout(END_PATIENCE, shared.streams.wait()).await.is_err() {
        tracing::error!(left = shared.streams.len(), "streams did not end when told to");
    }
}
