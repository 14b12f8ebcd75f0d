//! Pinned worker threads that run one job together. Every worker walks the same code, takes its
//! pieces of each loop and meets the others at a barrier (single program, multiple data).
//! The thread that calls [`CpuPool::run`] is worker 0; the others spin for a short while between
//! jobs and then park.

mod deal;
mod gate;

use crate::placement::NodeTeams;
pub use deal::Deal;
use deal::Share;
use gate::{Barrier, Gate, Poisoned};
use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::collections::BTreeSet;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, ThreadId};
use std::time::Duration;

/// Core numbers that the system's affinity mask has room for (`CPU_SETSIZE`); core_affinity panics
/// beyond.
const CORES_MAX: usize = 1024;

/// How long a worker waits for another inside a job before it parks. Waking a parked thread takes
/// tens of microseconds, hundreds in a virtual machine whose idle core the host gave away, and a
/// job has hundreds of meetings: one late worker must not send the others to sleep. That is for
/// workers with cores of their own: others may spin where the late one is to run.
const MEETING_SPIN: Duration = Duration::from_millis(20);

/// How many workers, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolOptions {
    /// Workers, the caller's thread included; at least 1.
    pub threads: usize,
    /// Core of each worker in the system's numbering; workers without an entry are not pinned.
    /// Worker 0's core becomes the core of every thread that calls [`CpuPool::run`].
    pub cores: Vec<usize>,
    /// Which workers belong to which NUMA node, where that is of interest. Teams of another number
    /// of workers count as one.
    pub nodes: NodeTeams,
    /// Microseconds that a worker spins between jobs before it parks; it spins longer inside one
    /// if each has a core of its own. Where there are more workers than processors they park at
    /// once.
    pub spin_us: u64,
}

impl PoolOptions {
    /// How long workers spin between jobs and inside one, as threads of the calling one. Who spins
    /// long must not be in the way of the one that it waits for.
    fn spins(&self) -> [Duration; 2] {
        let between = Duration::from_micros(self.spin_us);
        let cores = self.cores.iter().take(self.threads).collect::<BTreeSet<_>>().len();
        if cores == self.threads {
            return [between, between.max(MEETING_SPIN)];
        }
        let pinned = self.cores.len() >= self.threads;
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        if pinned || self.threads > processors {
            // Not a yield either: beside another program that gives its whole time slice away.
            return [Duration::ZERO; 2];
        }
        [between; 2]
    }
}

/// A worker's panic, caught.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("CPU worker {worker} panicked: {message}")]
pub struct WorkerPanic {
    /// Which worker.
    pub worker: usize,
    /// What the panic said.
    pub message: String,
}

/// A job that all workers run at the same time.
type Job<'a> = dyn Fn(&Worker<'_>) + Sync + 'a;

/// A job whose lifetime [`CpuPool::run`] vouches for.
#[derive(Clone, Copy)]
struct JobPointer(*const Job<'static>);

struct Shared {
    /// Written by the caller while no worker runs; read by workers after `start` has advanced.
    job: UnsafeCell<Option<JobPointer>>,
    start: Gate,
    barrier: Barrier,
    /// What is left to each worker of the loop that is shared out.
    shares: Vec<Share>,
    nodes: NodeTeams,
    /// Where workers come when they have finished the job; only the caller waits there.
    finish: Barrier,
    stop: AtomicBool,
    failure: Mutex<Option<WorkerPanic>>,
    pin_failures: Mutex<Vec<usize>>,
    threads: usize,
}

// SAFETY: only `job` is not Sync by itself. It is written by the one caller of `run` (which has
// the pool by `&mut`) before it advances `start`, and read by workers between that and their coming
// to `finish`, for all of whom the caller waits before it returns. Both are synchronising
// operations, so reads and writes never overlap.
unsafe impl Sync for Shared {}
// SAFETY: a `JobPointer` points to a `Sync` closure, which may be called from any thread.
unsafe impl Send for Shared {}

/// The pool. Dropping it joins its threads.
pub struct CpuPool {
    shared: Arc<Shared>,
    handles: Vec<JoinHandle<()>>,
    caller_core: Option<usize>,
    pinned_caller: Option<ThreadId>,
}

/// A worker's view of the job it is in.
pub struct Worker<'p> {
    /// Which worker, `0 .. count`.
    pub index: usize,
    /// The workers of its NUMA node.
    team: Range<usize>,
    shared: &'p Shared,
    /// Loops that were shared out so far in this job.
    deals: Cell<u64>,
}

impl CpuPool {
    /// Starts `threads − 1` workers and pins them. A core that can't be had is not fatal: see
    /// [`CpuPool::pin_failures`].
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub fn new(options: &PoolOptions) -> std::io::Result<Self> {
        let threads = options.threads.max(1);
        let [between, inside] = PoolOptions { threads, ..options.clone() }.spins();
        let shared = Arc::new(Shared {
            job: UnsafeCell::new(None),
            start: Gate::new(1, between),
            barrier: Barrier::new(threads, inside),
            shares: (0..threads).map(|_| Share::default()).collect(),
            nodes: options.nodes.clone().of_all(threads),
            finish: Barrier::new(threads, inside),
            stop: AtomicBool::new(false),
            failure: Mutex::new(None),
            pin_failures: Mutex::new(Vec::new()),
            threads,
        });
        let caller_core = options.cores.first().copied();
        let mut pool = Self { shared, handles: Vec::new(), caller_core, pinned_caller: None };
        for index in 1..threads {
            let (shared, core) = (pool.shared.clone(), options.cores.get(index).copied());
            let thread = std::thread::Builder::new().name(format!("tandem-cpu-{index}"));
            pool.handles.push(thread.spawn(move || shared.serve(index, core))?);
        }
        Ok(pool)
    }

    /// Workers, the caller included.
    pub fn threads(&self) -> usize {
        self.shared.threads
    }

    /// Which workers belong to which NUMA node.
    pub fn nodes(&self) -> &NodeTeams {
        &self.shared.nodes
    }

    /// Workers that run on no core of their own because the system refused it.
    pub fn pin_failures(&self) -> Vec<usize> {
        let mut failures =
            self.shared.pin_failures.lock().unwrap_or_else(PoisonError::into_inner).clone();
        failures.sort_unstable();
        failures.dedup();
        failures
    }

    /// Runs `job` on every worker, this thread as worker 0, and returns when all have finished.
    /// Allocates nothing unless a worker panics.
    ///
    /// # Errors
    /// The first panic. The others are sent away from their barriers; the pool stays usable.
    pub fn run(&mut self, job: &Job<'_>) -> Result<(), WorkerPanic> {
        self.pin_caller();
        let shared = &*self.shared;
        shared.shares.iter().for_each(Share::reset);
        // SAFETY: this only lengthens the lifetime. The pointer is used by workers before they come
        // to `finish`, and this function does not return, nor unwind, before all have.
        let job: JobPointer =
            JobPointer(unsafe { std::mem::transmute::<*const Job<'_>, *const Job<'static>>(job) });
        // SAFETY: all workers finished the job before, so nobody reads the cell.
        unsafe { *shared.job.get() = Some(job) };
        shared.start.advance();
        shared.work(0, job);
        let finished = shared.finish.wait(0);
        assert!(finished.is_ok(), "nobody poisons the finish");
        match shared.failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(panic) => {
                shared.barrier.reset();
                Err(panic)
            }
            None => Ok(()),
        }
    }

    fn pin_caller(&mut self) {
        let Some(core) = self.caller_core else { return };
        let this = std::thread::current().id();
        if self.pinned_caller != Some(this) {
            self.pinned_caller = Some(this);
            self.shared.pin(0, core);
        }
    }
}

impl Drop for CpuPool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.start.advance();
        for handle in self.handles.drain(..) {
            // A worker catches its panics, so there is none to report.
            let _ = handle.join();
        }
    }
}

impl Shared {
    fn pin(&self, worker: usize, core: usize) {
        let pinned =
            core < CORES_MAX && core_affinity::set_for_current(core_affinity::CoreId { id: core });
        if !pinned {
            self.pin_failures.lock().unwrap_or_else(PoisonError::into_inner).push(worker);
        }
    }

    /// The life of a worker thread.
    fn serve(&self, index: usize, core: Option<usize>) {
        if let Some(core) = core {
            self.pin(index, core);
        }
        for number in 1.. {
            let started = self.start.wait_for(number);
            debug_assert!(started.is_ok(), "nobody poisons the start");
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            // SAFETY: `start` has advanced for a job, so the caller has written the cell and
            // waits until all have finished before it writes again.
            if let Some(job) = unsafe { *self.job.get() } {
                self.work(index, job);
            }
            let finished = self.finish.arrive(index);
            debug_assert!(finished.is_ok(), "nobody poisons the finish");
        }
    }

    /// One worker's part of a job; a panic poisons the barrier and is kept for the caller.
    fn work(&self, index: usize, job: JobPointer) {
        let team = self.nodes.workers(self.nodes.team_of(index), self.threads);
        let worker = Worker { index, team, shared: self, deals: Cell::new(0) };
        // SAFETY: the caller of `run` keeps the closure alive until all workers are through.
        let job = unsafe { &*job.0 };
        if let Err(payload) = catch_unwind(AssertUnwindSafe(|| job(&worker))) {
            if !payload.is::<Poisoned>() {
                let message = panic_message(payload.as_ref());
                let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
                failure.get_or_insert(WorkerPanic { worker: index, message });
            }
            self.barrier.poison();
        }
    }
}

impl Worker<'_> {
    /// How many workers run the job.
    pub fn count(&self) -> usize {
        self.shared.threads
    }

    /// Which workers belong to which NUMA node.
    pub fn nodes(&self) -> &NodeTeams {
        &self.shared.nodes
    }

    /// Waits for all workers. What each wrote before is visible to all after.
    ///
    /// # Panics
    /// Leaves the job by unwinding, silently, when another worker has panicked.
    pub fn meet(&self) {
        if self.shared.threads > 1
            && let Err(poisoned) = self.shared.barrier.wait(self.index)
        {
            resume_unwind(Box::new(poisoned));
        }
    }

    /// This worker's share of `0 .. items`, cut at multiples of `unit`. Shares of one job are
    /// disjoint, cover all items and depend on nothing but the arguments.
    pub fn share(&self, items: usize, unit: usize) -> Range<usize> {
        share(self.index, self.count(), items, unit)
    }

    /// Pieces of `0 .. items`, cut at multiples of `unit` and at least `grain` units long where so
    /// many are left. All workers must call this, in the same order with the same arguments; every
    /// item is then in one piece of one worker, but in which depends on how fast they are.
    ///
    /// # Panics
    /// When there are 2²² units or more.
    pub fn deal(
        &self,
        items: usize,
        unit: usize,
        grain: usize,
    ) -> impl Iterator<Item = Range<usize>> {
        let (units, count) = (items.div_ceil(unit), self.count());
        let pieces = self.deal_from(grain, move |worker| units * worker / count);
        pieces.map(move |piece| piece.start * unit..items.min(piece.end * unit))
    }

    /// As [`Worker::deal`] for the rows of a matrix: a worker's first share lies in the rows of its
    /// NUMA node. `unit` is a divisor of [`crate::placement::NODE_ROWS`].
    ///
    /// # Panics
    /// When there are 2²² units or more.
    pub fn deal_rows(
        &self,
        rows: usize,
        unit: usize,
        grain: usize,
    ) -> impl Iterator<Item = Range<usize>> {
        let (nodes, count) = (&self.shared.nodes, self.count());
        let cut = move |worker| nodes.first_unit((worker, count), (rows, unit));
        let pieces = self.deal_from(grain, cut);
        pieces.map(move |piece| piece.start * unit..rows.min(piece.end * unit))
    }

    /// As [`Worker::deal`], in units, with a given beginning of each worker's first share: `cut`
    /// ascends from 0 for worker 0 to the number of units for worker `count`.
    pub fn deal_from<C: Fn(usize) -> usize>(&self, grain: usize, cut: C) -> Deal<'_, C> {
        let number = self.deals.get() + 1;
        self.deals.set(number);
        Deal::new(&self.shared.shares, (self.index, &self.team), (number, grain), cut)
    }
}

/// Share `index` of `count` of `0 .. items`, cut at multiples of `unit`.
pub(super) fn share(index: usize, count: usize, items: usize, unit: usize) -> Range<usize> {
    let units = items.div_ceil(unit);
    let cut = |index: usize| (units * index / count * unit).min(items);
    cut(index)..cut(index + 1)
}

fn panic_message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without a text".to_owned())
}
