//! What a stream task and the engine loop know together of one sequence.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

/// Flags of one sequence, outliving the engine loop.
#[derive(Debug, Default)]
pub(super) struct Flow {
    /// The engine loop was working on the sequence since it last planned without it: if the loop
    /// dies now, the sequence may be why.
    in_flight: AtomicBool,
    /// The engine loop has paused the sequence until its lane is read.
    paused: AtomicBool,
    /// Which engine loop, counted from 1, took the sequence; 0 is none yet.
    loop_life: AtomicU64,
}

impl Flow {
    /// The engine loop has taken the sequence and is about to work on it.
    pub(super) fn enter_loop(&self, loop_life: u64) {
        self.loop_life.store(loop_life, Ordering::SeqCst);
        self.set_in_flight(true);
    }

    pub(super) fn loop_life(&self) -> u64 {
        self.loop_life.load(Ordering::SeqCst)
    }

    pub(super) fn set_in_flight(&self, in_flight: bool) {
        self.in_flight.store(in_flight, Ordering::SeqCst);
    }

    pub(super) fn is_in_flight(&self) -> bool {
        self.in_flight.load(Ordering::SeqCst)
    }

    /// Says that the sequence pauses. The engine loop looks at the lane once more after this, the
    /// reader looks at this after it has read from the lane: the fences on both sides make sure
    /// that at least one of them sees what the other did.
    pub(super) fn set_paused(&self) {
        self.paused.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// Whether it was paused; whoever takes the flag sees to it that the sequence goes on.
    pub(super) fn take_paused(&self) -> bool {
        fence(Ordering::SeqCst);
        self.paused.load(Ordering::SeqCst) && self.paused.swap(false, Ordering::SeqCst)
    }
}
