//! The thread on which the CPU computes what a GPU has spilled. Inside a step the two meet by flags
//! in memory that both see, so it has nothing to do with the driver; it gets one order a step.

use super::order_thread::{OrderResult, OrderThread};
use crate::executor::spill::SpillStep;
use crate::executor::{ExecutorError, Stage, StageOptions, Weights};
use crate::step::StepPlan;
use crate::units::TokenId;
use crossbeam_channel::{Receiver, RecvError, Sender, TryRecvError};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
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
    /// By layer with spilled weights: whether the CPU computes its units.
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
    // Dropped before what it works on.
    thread: OrderThread<SpillOrder, Duration>,
    shared: Arc<Shared>,
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
        let mut options = options.clone();
        options.pool.spin_us = options.pool.spin_us.max(AWAKE.as_micros() as u64);
        let body_shared = Arc::clone(&shared);
        let thread = OrderThread::start("tandem-spill", move |orders, results| {
            serve(&body_shared, (weights, &options), orders, results);
        })?;
        let started = Self { thread, shared };
        // That the stage is made.
        started.thread.finish()?;
        Ok(started)
    }

    /// Orders, each for the CPU's part of a step, and how long they took. Where one failed, the GPU
    /// has got rows of no meaning.
    pub fn orders(&self) -> &OrderThread<SpillOrder, Duration> {
        &self.thread
    }

    pub fn crossing(&self) -> &Crossing {
        &self.shared.crossing
    }
}

impl Drop for SpillThread {
    fn drop(&mut self) {
        // Before the thread is waited for.
        self.shared.give_up();
    }
}

/// The thread's life: makes the stage, answers, and answers each order.
fn serve(
    shared: &Shared,
    (weights, options): (Arc<Weights>, &StageOptions),
    orders: &Receiver<SpillOrder>,
    results: &Sender<OrderResult<Duration>>,
) {
    let _leaving = Leaving(shared);
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
        let step = unsafe { SpillStep::new(host, tokens, (base, &is_here), waits) };
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
