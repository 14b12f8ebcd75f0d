//! The thread that sends spilled weights to the GPU while it computes: piece after
//! piece, as slots of the ring become free.

use super::order_thread::OrderThread;
use super::weights::GpuWeights;
use crate::executor::ExecutorError;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;
use tandem_kernels::{StreamTurn, WeightRing};

/// The pieces of one step.
pub(super) struct SendOrder {
    /// The number that pieces are counted from.
    pub base: u32,
    /// By layer with spilled weights: whether the CPU computes its units; all others are sent.
    pub is_here: Arc<[bool]>,
    /// Until all have arrived: then the GPU comes to the step's end by itself.
    pub turn: StreamTurn,
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
    // Dropped before what it works on.
    thread: OrderThread<SendOrder, ()>,
    shared: Arc<Shared>,
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
        let body_shared = Arc::clone(&shared);
        let thread = OrderThread::start(("tandem-stream", 1), move |orders, results| {
            let _leaving = Leaving(&body_shared);
            for order in orders {
                let sent = body_shared.send(&order);
                drop(order.turn);
                if results.send(sent).is_err() {
                    return;
                }
            }
        })?;
        Ok(Self { thread, shared })
    }

    /// Orders, each for the pieces of a step.
    pub fn orders(&self) -> &OrderThread<SendOrder, ()> {
        &self.thread
    }

    pub fn ring(&self) -> &WeightRing {
        &self.shared.ring
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
        // Before the thread is waited for.
        self.shared.give_up();
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // What the ring copies from may be let go after this; a GPU that is lost copies nothing.
        let _ = self.ring.synchronize(self.weights.gpu());
    }
}

impl Shared {
    /// Ends all waits for pieces and slots, and those of the CPU's side: the step fails.
    fn give_up(&self) {
        self.is_abandoned.store(true, Ordering::Release);
        self.ring.release();
    }

    fn send(&self, SendOrder { base, is_here, .. }: &SendOrder) -> Result<(), ExecutorError> {
        let (gpu, from) = (self.weights.gpu(), self.weights.spilled());
        let from = from.expect("what is sent was spilled");
        let pieces = from.streamed(is_here, from.units().len()).map(|piece| from.bytes(piece));
        let (started, wait_max) = (Instant::now(), gpu.wait_max());
        let gives_up = || self.is_abandoned.load(Ordering::Acquire) || started.elapsed() > wait_max;
        // SAFETY: weights never change, and outlive the ring.
        let sent = unsafe { self.ring.send(gpu, *base, pieces, gives_up) };
        let has_given_up = gives_up();
        if sent.is_err() || has_given_up {
            // The GPU waits for pieces, and the CPU for the GPU.
            self.give_up();
        }
        sent?;
        match has_given_up {
            true => {
                let reason = "weights were not all sent to the GPU".into();
                Err(ExecutorError::GpuStageFailed { reason })
            }
            false => Ok(()),
        }
    }
}
