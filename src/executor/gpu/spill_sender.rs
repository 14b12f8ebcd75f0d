//! The thread that sends weights of spilled networks to the GPU while it computes: piece after
//! piece, as slots of the ring become free.

use super::weights::GpuWeights;
use crate::executor::ExecutorError;
use crossbeam_channel::{Receiver, Sender, bounded};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;
use tandem_kernels::WeightRing;

/// The pieces of one step.
pub(super) struct SendOrder {
    /// The number that pieces are counted from.
    pub base: u32,
    /// By index: whether the CPU computes a network; those of all others are sent.
    pub is_here: Arc<[bool]>,
}

struct Shared {
    ring: WeightRing,
    /// Set when a step can't come to its end: no more slots become free.
    is_abandoned: Arc<AtomicBool>,
    // Last: the ring copies from them.
    weights: Arc<GpuWeights>,
}

/// A running thread, and the ring that it fills.
pub(super) struct SpillSender {
    shared: Arc<Shared>,
    orders: Option<Sender<SendOrder>>,
    results: Receiver<Result<(), ExecutorError>>,
    thread: Option<JoinHandle<()>>,
}

impl SpillSender {
    /// Starts the thread.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn start(
        ring: WeightRing,
        weights: Arc<GpuWeights>,
        is_abandoned: Arc<AtomicBool>,
    ) -> Result<Self, ExecutorError> {
        let shared = Arc::new(Shared { ring, is_abandoned, weights });
        let (orders, ordered) = bounded::<SendOrder>(1);
        let (done, results) = bounded(1);
        let body_shared = Arc::clone(&shared);
        let body = move || {
            let _leaving = Leaving(&body_shared);
            for order in ordered {
                if done.send(body_shared.send(&order)).is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("tandem-stream".into());
        let thread = thread.spawn(body).map_err(ExecutorError::Threads)?;
        Ok(Self { shared, orders: Some(orders), results, thread: Some(thread) })
    }

    pub fn ring(&self) -> &WeightRing {
        &self.shared.ring
    }

    /// Begins to send the pieces of a step. Each has to be finished before the next.
    ///
    /// # Errors
    /// The thread has gone.
    pub fn begin(&self, order: SendOrder) -> Result<(), ExecutorError> {
        let orders = self.orders.as_ref().expect("orders until the thread is dropped");
        orders.send(order).map_err(|_| gone())
    }

    /// Waits until the pieces of a step are sent.
    ///
    /// # Errors
    /// What the driver refused.
    pub fn finish(&self) -> Result<(), ExecutorError> {
        self.results.recv().map_err(|_| gone())?
    }

    /// Ends a step whose pieces nobody takes any more.
    pub fn abandon(&self) {
        self.shared.give_up();
    }
}

/// Gives up when its thread leaves, however it leaves.
struct Leaving<'a>(&'a Shared);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.0.give_up();
    }
}

impl Drop for SpillSender {
    fn drop(&mut self) {
        self.orders = None;
        self.shared.give_up();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was told as the end of its step.
            let _ = thread.join();
        }
        // What it copies from may be let go after this; a GPU that is lost copies nothing any more.
        let _ = self.shared.ring.synchronize(self.shared.weights.gpu());
    }
}

fn gone() -> ExecutorError {
    ExecutorError::GpuStageFailed { reason: "the thread that sends weights has ended".into() }
}

impl Shared {
    /// Ends all waits for pieces and slots, and those of the CPU's side: the step fails.
    fn give_up(&self) {
        self.is_abandoned.store(true, Ordering::Release);
        self.ring.release();
    }

    fn send(&self, SendOrder { base, is_here }: &SendOrder) -> Result<(), ExecutorError> {
        let (gpu, from) = (self.weights.gpu(), self.weights.spilled());
        let from = from.expect("what is sent was spilled");
        let pieces = from.streamed(is_here, is_here.len()).map(|piece| from.bytes(piece));
        let (started, wait_max) = (Instant::now(), gpu.wait_max());
        let gives_up = || self.is_abandoned.load(Ordering::Acquire) || started.elapsed() > wait_max;
        // SAFETY: weights never change, and outlive the ring.
        let sent = unsafe { self.ring.send(gpu, *base, pieces, gives_up) };
        if sent.is_err() || gives_up() {
            // The GPU waits for pieces, and the CPU for the GPU.
            self.give_up();
        }
        sent?;
        Ok(())
    }
}
