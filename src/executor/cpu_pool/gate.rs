//! What workers wait at: a counter that is waited on by spinning first and parking then, and a
//! barrier made of it that a panicking worker can poison.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Looks at the clock once in so many spins: reading it takes as long as about 20 of them.
const SPINS_PER_CLOCK: u32 = 64;

/// A counter that only grows, and those who wait for it to grow.
#[derive(Debug)]
pub(super) struct Gate {
    value: AtomicU64,
    sleepers: AtomicU32,
    lock: Mutex<()>,
    wake: Condvar,
    spin: Duration,
}

impl Gate {
    /// A gate at 0 whose waiters spin for `spin` before they park.
    pub fn new(spin: Duration) -> Self {
        let (value, sleepers) = (AtomicU64::new(0), AtomicU32::new(0));
        Self { value, sleepers, lock: Mutex::new(()), wake: Condvar::new(), spin }
    }

    /// The counter. What was written before the advance to it is visible.
    pub fn value(&self) -> u64 {
        self.value.load(Ordering::Acquire)
    }

    /// Adds one and wakes everyone who waits.
    pub fn advance(&self) {
        // Sequentially consistent on both sides: either this load sees the sleeper, or the
        // sleeper's load of `value` sees this addition.
        self.value.fetch_add(1, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            drop(self.lock.lock().unwrap_or_else(PoisonError::into_inner));
            self.wake.notify_all();
        }
    }

    /// Returns when the counter is no longer `seen`.
    pub fn wait_past(&self, seen: u64) {
        if self.spin_past(seen) {
            return;
        }
        let mut guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        while self.value.load(Ordering::SeqCst) == seen {
            guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }

    fn spin_past(&self, seen: u64) -> bool {
        let started = Instant::now();
        loop {
            for _ in 0..SPINS_PER_CLOCK {
                if self.value() != seen {
                    return true;
                }
                std::hint::spin_loop();
            }
            if started.elapsed() >= self.spin {
                return false;
            }
        }
    }
}

/// A worker panicked: nobody passes this barrier any more.
#[derive(Debug)]
pub(super) struct Poisoned;

/// A barrier for a fixed number of threads.
#[derive(Debug)]
pub(super) struct Barrier {
    parties: usize,
    arrived: AtomicUsize,
    poisoned: AtomicBool,
    gate: Gate,
}

impl Barrier {
    pub fn new(parties: usize, spin: Duration) -> Self {
        let (arrived, poisoned) = (AtomicUsize::new(0), AtomicBool::new(false));
        Self { parties, arrived, poisoned, gate: Gate::new(spin) }
    }

    /// Returns when all parties are here. What any of them wrote before is visible to all.
    pub fn wait(&self) -> Result<(), Poisoned> {
        // Read first: the gate can't advance before this thread arrives, unless it is poisoned.
        let seen = self.gate.value();
        self.check()?;
        if self.arrived.fetch_add(1, Ordering::AcqRel) + 1 == self.parties {
            self.arrived.store(0, Ordering::Relaxed);
            self.gate.advance();
        } else {
            self.gate.wait_past(seen);
        }
        self.check()
    }

    fn check(&self) -> Result<(), Poisoned> {
        if self.poisoned.load(Ordering::Acquire) { Err(Poisoned) } else { Ok(()) }
    }

    /// Sends everyone who waits here, or comes later, away.
    pub fn poison(&self) {
        self.poisoned.store(true, Ordering::Release);
        self.gate.advance();
    }

    /// Makes the barrier usable again. Only while no thread is at it.
    pub fn reset(&self) {
        self.arrived.store(0, Ordering::Release);
        self.poisoned.store(false, Ordering::Release);
    }
}
