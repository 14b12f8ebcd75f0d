//! The thread on which the CPU computes what a GPU has spilled. Inside a step the two meet by flags
//! in memory that both see, so it has nothing to do with the driver; it gets one order a step.

use crate::executor::spill::SpillStep;
use crate::executor::{ExecutorError, Stage, StageOptions, Weights};
use crate::step::StepPlan;
use crate::units::TokenId;
use crossbeam_channel::{Receiver, RecvError, RecvTimeoutError, Sender, TryRecvError, bounded};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tandem_kernels::Crossing;

/// How long workers stay awake between two steps: the rest of a step on the GPU, and what the host
/// does between steps. A service that nobody asks anything parks them after it.
const AWAKE: Duration = Duration::from_millis(3);

/// The CPU's part of one step.
pub(super) struct SpillOrder {
    /// The number that events are counted from.
    pub base: u32,
    pub tokens: usize,
    /// By index: whether the CPU computes a network.
    pub is_here: Arc<[bool]>,
}

/// What both threads hold.
struct Shared {
    crossing: Crossing,
    /// Set when a step can't come to its end: workers that wait for the GPU end.
    is_abandoned: Arc<AtomicBool>,
    wait_max: Duration,
}

impl Shared {
    /// Ends all waits of both sides: the step's rows have no meaning then.
    fn give_up(&self) {
        self.is_abandoned.store(true, Ordering::Release);
        self.crossing.host().release();
    }
}

/// Gives up when its thread leaves, however it leaves.
struct Leaving<'a>(&'a Shared);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.0.give_up();
    }
}

/// A running thread.
pub(super) struct SpillThread {
    shared: Arc<Shared>,
    orders: Option<Sender<SpillOrder>>,
    results: Receiver<Result<Duration, ExecutorError>>,
    thread: Option<JoinHandle<()>>,
}

impl SpillThread {
    /// Starts the thread, and has it make its stage.
    ///
    /// # Errors
    /// Memory or threads refused.
    pub fn start(
        crossing: Crossing,
        (weights, options): (Arc<Weights>, &StageOptions),
        (is_abandoned, wait_max): (Arc<AtomicBool>, Duration),
    ) -> Result<Self, ExecutorError> {
        let shared = Arc::new(Shared { crossing, is_abandoned, wait_max });
        let (orders, ordered) = bounded(1);
        let (done, results) = bounded(1);
        let mut options = options.clone();
        options.pool.spin_us = options.pool.spin_us.max(AWAKE.as_micros() as u64);
        let body_shared = Arc::clone(&shared);
        let body = move || serve(&body_shared, (weights, &options), &ordered, &done);
        let thread = std::thread::Builder::new().name("tandem-spill".into());
        let thread = thread.spawn(body).map_err(ExecutorError::Threads)?;
        let started = Self { shared, orders: Some(orders), results, thread: Some(thread) };
        started.finish()?;
        Ok(started)
    }

    pub fn crossing(&self) -> &Crossing {
        &self.shared.crossing
    }

    /// Gives the order of a step. Each has to be finished before the next.
    ///
    /// # Errors
    /// The thread has gone.
    pub fn begin(&self, order: SpillOrder) -> Result<(), ExecutorError> {
        let orders = self.orders.as_ref().expect("orders until the thread is dropped");
        orders.send(order).map_err(|_| gone())
    }

    /// Waits for the end of an order, and says how long it took.
    ///
    /// # Errors
    /// What the CPU failed with: the GPU has then got rows of no meaning.
    pub fn finish(&self) -> Result<Duration, ExecutorError> {
        self.results.recv().map_err(|_| gone())?
    }

    /// As [`SpillThread::finish`], for no longer than `most`; none when that is over.
    pub fn finish_within(&self, most: Duration) -> Option<Result<Duration, ExecutorError>> {
        match self.results.recv_timeout(most) {
            Ok(result) => Some(result),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => Some(Err(gone())),
        }
    }
}

impl Drop for SpillThread {
    fn drop(&mut self) {
        self.orders = None;
        self.shared.give_up();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was told as the failure of its order.
            let _ = thread.join();
        }
    }
}

fn gone() -> ExecutorError {
    ExecutorError::GpuStageFailed { reason: "the thread of spilled networks has ended".into() }
}

/// The thread's life: makes the stage, answers, and answers each order.
fn serve(
    shared: &Shared,
    (weights, options): (Arc<Weights>, &StageOptions),
    orders: &Receiver<SpillOrder>,
    results: &Sender<Result<Duration, ExecutorError>>,
) {
    let _leaving = Leaving(shared);
    let cols = weights.program().dims.embedding;
    let made = Stage::restart(weights, options).and_then(|mut stage| {
        stage.warm_up(options.huge_pages())?;
        Ok(stage)
    });
    let mut stage = match made {
        Ok(stage) => stage,
        Err(error) => {
            let _ = results.send(Err(error));
            return;
        }
    };
    if results.send(Ok(Duration::ZERO)).is_err() {
        return;
    }
    let mut plan = StepPlan::default();
    while let Ok(SpillOrder { base, tokens, is_here }) = next(orders) {
        let started = Instant::now();
        plan.tokens.resize(tokens, TokenId(0));
        let host = shared.crossing.host();
        let waits = (&*shared.is_abandoned, shared.wait_max);
        // SAFETY: this thread alone works on the host's side, one step after the other, and the
        // GPU keeps to the order of events.
        let step = unsafe { SpillStep::new(host, [tokens, cols], (base, &is_here), waits) };
        let result = stage.run_spilled(&plan, step);
        if result.is_err() {
            shared.give_up();
        }
        if results.send(result.map(|()| started.elapsed())).is_err() {
            return;
        }
    }
}

/// The next order. The thread stays awake for a while, as its workers do.
fn next(orders: &Receiver<SpillOrder>) -> Result<SpillOrder, RecvError> {
    let started = Instant::now();
    while started.elapsed() < AWAKE {
        match orders.try_recv() {
            Ok(order) => return Ok(order),
            Err(TryRecvError::Disconnected) => return Err(RecvError),
            Err(TryRecvError::Empty) => std::hint::spin_loop(),
        }
    }
    orders.recv()
}
