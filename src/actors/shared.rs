//! What all parts of one engine share. It belongs to the root thread and outlives every actor:
//! lanes, credits, figures and the engine's state survive any restart.

use super::executor::StepLane;
use super::lanes::{CommandLane, TextLane};
use super::load::{Loaded, sequences_alive_max};
use super::op_clock::OpClock;
use super::status::{BlockCounts, EngineState, LoadProgress, SequenceCounts};
use super::swap_lane::SwapLane;
use super::text::{TextDone, TextWork};
use super::threads::Threads;
use super::{EngineError, Faults, RestartCounts, StatsSnapshot, Status};
use crate::config::Config;
use crate::request::RequestError;
use crate::telemetry::{Counter, Metrics, TraceRing};
use crate::units::SequenceId;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};
use tokio_util::task::TaskTracker;

/// Steps kept for the trace.
const TRACED_STEPS_MAX: usize = 4096;
/// The longest wait for requests to end: ten years.
const DRAIN_MAX: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Where an engine is in its life, with what its tasks need to know of it.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Life {
    Loading,
    Ready,
    /// Running requests may end until then.
    Draining(Instant),
    /// Running requests are ended now.
    Stopping,
    Stopped,
    Dead(EngineError),
}

impl Life {
    /// Whether nothing goes on any more.
    pub(super) fn ends_streams(&self) -> bool {
        matches!(self, Self::Stopping | Self::Stopped | Self::Dead(_))
    }
}

/// Restarts per kind of actor, over the engine's whole life.
#[derive(Debug, Default)]
pub(super) struct Restarts {
    pub(super) supervisor: Counter,
    pub(super) tokenizer: Counter,
    pub(super) scheduler: Counter,
    pub(super) executor: Counter,
    pub(super) kv_swap: Counter,
    pub(super) stream: Counter,
}

/// What the engine loop publishes once per step.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Occupancy {
    pub(super) sequences: SequenceCounts,
    pub(super) blocks: BlockCounts,
}

/// How often requests end, for `retry_after_ms`.
#[derive(Debug, Default)]
struct Ends {
    last_us: AtomicU64,
    /// Moving mean of the time between two ends; 0 before there were two.
    interval_us: AtomicU64,
}

impl Ends {
    const RETRY_MS_MIN: u64 = 50;
    const RETRY_MS_MAX: u64 = 30_000;
    const RETRY_MS_UNKNOWN: u64 = 1000;

    /// Two ends at the same moment may count as one: this is an estimate.
    fn count(&self, now_us: u64) {
        let last_us = self.last_us.swap(now_us, Relaxed);
        if last_us > 0 {
            let (interval_us, mean_us) =
                (now_us.saturating_sub(last_us), self.interval_us.load(Relaxed));
            let next_us = if mean_us == 0 { interval_us } else { (7 * mean_us + interval_us) / 8 };
            self.interval_us.store(next_us.max(1), Relaxed);
        }
    }

    /// After so long a request will probably have ended.
    fn retry_after_ms(&self) -> u64 {
        match self.interval_us.load(Relaxed) {
            0 => Self::RETRY_MS_UNKNOWN,
            us => (us / 1000).clamp(Self::RETRY_MS_MIN, Self::RETRY_MS_MAX),
        }
    }
}

pub(super) struct Shared {
    pub(super) config: Config,
    pub(super) faults: Arc<Faults>,
    pub(super) metrics: Metrics,
    pub(super) traces: TraceRing,
    pub(super) op_clock: OpClock,
    pub(super) restarts: Restarts,
    pub(super) life: watch::Sender<Life>,
    /// Every thread but the root's last steps is gone.
    pub(super) gone: watch::Sender<bool>,
    pub(super) commands: CommandLane,
    pub(super) texts: TextLane,
    pub(super) steps: StepLane,
    pub(super) swaps: SwapLane,
    pub(super) threads: Threads,
    pub(super) loaded: OnceLock<Loaded>,
    pub(super) runtime: OnceLock<Handle>,
    /// One permit per sequence that may be alive: what bounds every lane.
    pub(super) credits: Arc<Semaphore>,
    /// The stream tasks.
    pub(super) streams: TaskTracker,
    pub(super) occupancy: Mutex<Occupancy>,
    sequence_ids: AtomicU64,
    loop_lives: AtomicU64,
    pub(super) root: Mutex<Option<JoinHandle<()>>>,
    ends: Ends,
    load_done_bytes: AtomicU64,
    load_total_bytes: AtomicU64,
    started: Instant,
}

impl Shared {
    pub(super) fn new(config: Config, faults: Arc<Faults>) -> Self {
        let credits = sequences_alive_max(&config);
        Self {
            faults,
            metrics: Metrics::default(),
            traces: TraceRing::new(TRACED_STEPS_MAX),
            op_clock: OpClock::default(),
            restarts: Restarts::default(),
            life: watch::Sender::new(Life::Loading),
            gone: watch::Sender::new(false),
            commands: CommandLane::new(credits),
            texts: TextLane::new(config.tokenizer.queue_max),
            steps: StepLane::default(),
            swaps: SwapLane::default(),
            threads: Threads::default(),
            loaded: OnceLock::new(),
            runtime: OnceLock::new(),
            credits: Arc::new(Semaphore::new(credits)),
            streams: TaskTracker::new(),
            occupancy: Mutex::default(),
            sequence_ids: AtomicU64::new(1),
            loop_lives: AtomicU64::new(1),
            root: Mutex::new(None),
            ends: Ends::default(),
            load_done_bytes: AtomicU64::new(0),
            load_total_bytes: AtomicU64::new(0),
            started: Instant::now(),
            config,
        }
    }

    /// Microseconds since the engine's start: the time that all of its parts speak of.
    pub(super) fn now_us(&self) -> u64 {
        self.started.elapsed().as_micros() as u64
    }

    /// Counts a request's end.
    pub(super) fn request_ended(&self) {
        self.ends.count(self.now_us());
    }

    /// What a client is told that finds the engine full.
    pub(super) fn overloaded(&self) -> RequestError {
        self.metrics.requests_overloaded.add(1);
        RequestError::Overloaded {
            queue_depth: self.metrics.requests_live.get().max(0) as usize,
            retry_after_ms: self.ends.retry_after_ms(),
        }
    }

    /// An id that no sequence of this engine ever had.
    pub(super) fn next_sequence_id(&self) -> SequenceId {
        SequenceId(self.sequence_ids.fetch_add(1, Relaxed))
    }

    /// The number of a new engine loop.
    pub(super) fn next_loop_life(&self) -> u64 {
        self.loop_lives.fetch_add(1, Relaxed)
    }

    /// Joins the root thread. It has said that all is gone, so this takes no time.
    pub(super) fn join_root(&self) {
        let root = self.root.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(root) = root {
            // It catches its panics.
            let _ = root.join();
        }
    }

    pub(super) fn report_load(&self, progress: LoadProgress) {
        self.load_done_bytes.store(progress.done_bytes, Relaxed);
        self.load_total_bytes.store(progress.total_bytes, Relaxed);
    }

    /// Why a request would be refused now.
    pub(super) fn refusal(&self) -> Option<RequestError> {
        match &*self.life.borrow() {
            Life::Ready => None,
            Life::Loading => Some(RequestError::NotReady {
                reason: "the model is being loaded".into(),
                retry_after_ms: 1000,
            }),
            Life::Draining(_) | Life::Stopping | Life::Stopped => Some(RequestError::ShuttingDown),
            Life::Dead(error) => Some(error.clone().into()),
        }
    }

    /// A stage is up: requests are served from now on, unless the engine was told to end meanwhile.
    pub(super) fn become_ready(&self) {
        self.life.send_if_modified(|life| {
            let loading = *life == Life::Loading;
            if loading {
                *life = Life::Ready;
            }
            loading
        });
    }

    /// Whether all streams are being ended.
    pub(super) fn is_ending(&self) -> bool {
        self.life.borrow().ends_streams()
    }

    /// Drops what only a living engine needs: what waits in the lanes, and the weights.
    pub(super) fn release(&self) {
        while self.commands.receiver.try_recv().is_ok() {}
        while self.texts.receiver.try_recv().is_ok() {}
        while self.steps.orders.1.try_recv().is_ok() {}
        while self.steps.results.1.try_recv().is_ok() {}
        self.swaps.release();
        *self.occupancy.lock().unwrap_or_else(PoisonError::into_inner) = Occupancy::default();
        if let Some(loaded) = self.loaded.get() {
            loaded.stages.release();
        }
    }

    /// Stops the engine after at most `drain`. An earlier, shorter wish is kept.
    pub(super) fn drain(&self, drain: Duration) {
        let now = Instant::now();
        // A time that the clock can't hold is for ever.
        let until = now.checked_add(drain).unwrap_or(now + DRAIN_MAX);
        self.life.send_if_modified(|life| match life {
            Life::Loading | Life::Ready => {
                *life = Life::Draining(until);
                true
            }
            Life::Draining(earlier) if until < *earlier => {
                *earlier = until;
                true
            }
            _ => false,
        });
    }

    /// Gives the engine up: every stream ends with an error, now.
    pub(super) fn die(&self, error: EngineError) {
        tracing::error!(%error, "the engine is dead");
        self.life.send_if_modified(|life| {
            let living = !matches!(life, Life::Dead(_) | Life::Stopped);
            if living {
                *life = Life::Dead(error);
            }
            living
        });
    }

    pub(super) fn status(&self) -> Status {
        let (state, reason) = match &*self.life.borrow() {
            Life::Loading => (EngineState::Loading, None),
            Life::Ready => (EngineState::Ready, None),
            Life::Draining(_) | Life::Stopping => (EngineState::Draining, None),
            Life::Stopped => (EngineState::Stopped, None),
            Life::Dead(error) => (EngineState::Dead, Some(error.to_string())),
        };
        Status {
            state,
            runs_on: self.loaded.get().map(|loaded| loaded.placement.runs_on()),
            reason,
            load: LoadProgress {
                done_bytes: self.load_done_bytes.load(Relaxed),
                total_bytes: self.load_total_bytes.load(Relaxed),
            },
            restarts: RestartCounts {
                supervisor: self.restarts.supervisor.get(),
                tokenizer: self.restarts.tokenizer.get(),
                scheduler: self.restarts.scheduler.get(),
                executor: self.restarts.executor.get(),
                kv_swap: self.restarts.kv_swap.get(),
                stream: self.restarts.stream.get(),
            },
            requests_live: self.metrics.requests_live.get().max(0) as u64,
            uptime_ms: self.started.elapsed().as_millis() as u64,
        }
    }

    pub(super) fn stats(&self) -> StatsSnapshot {
        let occupancy = *self.occupancy.lock().unwrap_or_else(PoisonError::into_inner);
        StatsSnapshot {
            status: self.status(),
            metrics: self.metrics.snapshot(),
            sequences: occupancy.sequences,
            blocks: occupancy.blocks,
        }
    }

    /// Has a tokenizer thread do some work.
    pub(super) async fn work_on_text(&self, work: TextWork) -> Result<TextDone, RequestError> {
        if let Some(refusal) = self.refusal() {
            return Err(refusal);
        }
        let mut life = self.life.subscribe();
        tokio::select! {
            biased;
            done = self.texts.submit(work, self.now_us()) => done,
            _ = life.wait_for(Life::ends_streams) => {
                Err(self.refusal().unwrap_or(RequestError::ShuttingDown))
            }
        }
    }
}

impl Occupancy {
    pub(super) fn of(stats: &crate::scheduler::SchedulerStats) -> Self {
        let sequences = SequenceCounts {
            running: stats.running,
            waiting: stats.waiting + stats.swapped,
            paused: stats.paused,
            preemptions: stats.preemptions,
        };
        let blocks = BlockCounts {
            total: stats.device.total(),
            used: stats.device.used,
            cached: stats.device.cached,
            host_total: stats.host.total(),
            host_used: stats.host.used,
            host_cached: stats.host.cached,
            disk_total: stats.disk.total(),
            disk_used: stats.disk.used,
            disk_cached: stats.disk.cached,
            disk_stopped: stats.disk_stopped,
            block_bytes: stats.block_bytes,
            copies_under_way: stats.copies_under_way,
        };
        Self { sequences, blocks }
    }
}
