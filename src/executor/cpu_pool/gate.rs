//! What workers wait at: a counter that is waited on by spinning first and parking then, and a
//! barrier made of it that a panicking worker can poison.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Looks at the clock once in so many spins: reading it takes as long as about 20 of them.
const SPINS_PER_CLOCK: u32 = 64;

/// Bit of a gate's word: somebody sleeps, and whoever fulfils a wait wakes all.
const SLEEPERS: u64 = 1;
/// Bit of a gate's word: a worker panicked.
const POISONED: u64 = 2;
/// The word's other bits are its count.
const ONE: u64 = 4;

/// Workers that count themselves where they wait. That is the shortest way (the last one's count
/// is what the others wait for), but each who comes takes the cache line from all who look at it,
/// so more than a few count themselves elsewhere.
const TOGETHER_MAX: usize = 4;
/// Workers that count themselves at one counter elsewhere. Each takes its line from the one before,
/// so the last of 64 that come at once would wait for 63 ways between cores; in groups, for 20.
const GROUP: usize = 16;

/// A worker panicked: nobody passes any more.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Poisoned;

/// A count that only grows, and those who wait for it. Alone on its cache lines (processors fetch
/// them in pairs).
#[repr(align(128))]
#[derive(Debug)]
pub(super) struct Gate {
    word: AtomicU64,
    /// Waits are for multiples of this: other counts wake nobody.
    stride: u64,
    spin: Duration,
    bed: Bed,
}

#[repr(align(128))]
#[derive(Debug, Default)]
struct Bed {
    lock: Mutex<()>,
    wake: Condvar,
}

impl Gate {
    /// A gate at 0, whose waiters spin for `spin` before they park.
    pub fn new(stride: usize, spin: Duration) -> Self {
        let word = AtomicU64::new(0);
        Self { word, stride: stride as u64, spin, bed: Bed::default() }
    }

    /// Adds one and returns the word before. What this thread wrote before is visible to those who
    /// see the count, and what others wrote before their counts is visible to this one.
    fn count_one(&self) -> u64 {
        let word = self.word.fetch_add(ONE, Ordering::AcqRel);
        if word & SLEEPERS != 0 && (word / ONE + 1).is_multiple_of(self.stride) {
            self.wake();
        }
        word
    }

    /// Lets those pass who wait for the next count.
    pub fn advance(&self) {
        self.count_one();
    }

    /// The next count that is waited for, where `word` is the gate's.
    fn goal(&self, word: u64) -> u64 {
        (word / ONE / self.stride + 1) * self.stride
    }

    /// Returns when the count is at least `goal`, a multiple of the stride.
    ///
    /// # Errors
    /// When the gate is poisoned.
    pub fn wait_for(&self, goal: u64) -> Result<(), Poisoned> {
        self.spin_for(goal).unwrap_or_else(|| self.sleep_for(goal))
    }

    /// How a wait for `goal` has ended, if it has.
    fn end(word: u64, goal: u64) -> Option<Result<(), Poisoned>> {
        if word & POISONED != 0 {
            return Some(Err(Poisoned));
        }
        (word / ONE >= goal).then_some(Ok(()))
    }

    fn spin_for(&self, goal: u64) -> Option<Result<(), Poisoned>> {
        let mut started = None;
        loop {
            for _ in 0..SPINS_PER_CLOCK {
                let end = Self::end(self.word.load(Ordering::Acquire), goal);
                if end.is_some() {
                    return end;
                }
                std::hint::spin_loop();
            }
            if started.get_or_insert_with(Instant::now).elapsed() >= self.spin {
                return None;
            }
        }
    }

    /// No wake-up is lost. Whoever sleeps has set the mark in the word itself, so the mark and the
    /// count that fulfils the wait are changes of one word and one of them is first: if the count,
    /// the sleeper sees it as it sets the mark and does not sleep; if the mark, whoever counts sees
    /// it. They then take the lock, which the sleeper holds from before its mark until it is in
    /// `wait`, and wake it. Under the same lock they remove the mark, and all whom it stood for
    /// wake up and set it again if they have to.
    #[cold]
    fn sleep_for(&self, goal: u64) -> Result<(), Poisoned> {
        let mut guard = self.bed.lock.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let word = self.word.fetch_or(SLEEPERS, Ordering::AcqRel);
            if let Some(end) = Self::end(word, goal) {
                return end;
            }
            guard = self.bed.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
    }

    #[cold]
    fn wake(&self) {
        let _guard = self.bed.lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.word.fetch_and(!SLEEPERS, Ordering::AcqRel);
        self.bed.wake.notify_all();
    }

    /// Sends everyone who waits here, or comes later, away.
    fn poison(&self) {
        if self.word.fetch_or(POISONED, Ordering::AcqRel) & SLEEPERS != 0 {
            self.wake();
        }
    }
}

/// Counts a group of workers.
#[repr(align(128))]
#[derive(Debug)]
struct Group {
    arrived: AtomicU64,
    members: u64,
}

impl Group {
    fn new(members: usize) -> Self {
        Self { arrived: AtomicU64::new(0), members: members as u64 }
    }

    /// Whether this one is the last. It sees what the others wrote before they came.
    fn arrive(&self) -> bool {
        let last = self.arrived.fetch_add(1, Ordering::AcqRel) + 1 == self.members;
        if last {
            // Nobody comes again before the gate opens, which the last one has yet to count at.
            self.arrived.store(0, Ordering::Relaxed);
        }
        last
    }
}

/// A barrier for a fixed number of workers. The gate counts workers, or groups that are complete.
#[derive(Debug)]
pub(super) struct Barrier {
    /// Empty where workers count themselves at the gate.
    groups: Box<[Group]>,
    gate: Gate,
}

impl Barrier {
    /// A barrier whose waiters spin for `spin` before they park.
    pub fn new(parties: usize, spin: Duration) -> Self {
        if parties <= TOGETHER_MAX {
            return Self { groups: Box::default(), gate: Gate::new(parties, spin) };
        }
        let starts = (0..parties).step_by(GROUP);
        let groups: Box<[Group]> =
            starts.map(|start| Group::new(GROUP.min(parties - start))).collect();
        Self { gate: Gate::new(groups.len(), spin), groups }
    }

    /// Counts worker `index` and returns what to wait for. What it wrote before is visible to all
    /// who wait.
    pub fn arrive(&self, index: usize) -> Result<u64, Poisoned> {
        let word = match self.groups.get(index / GROUP) {
            None => self.gate.count_one(),
            Some(group) => {
                // The gate can't open before this worker is counted, so this is its phase.
                let word = self.gate.word.load(Ordering::Acquire);
                if word & POISONED == 0 && group.arrive() {
                    self.gate.count_one();
                }
                word
            }
        };
        if word & POISONED == 0 { Ok(self.gate.goal(word)) } else { Err(Poisoned) }
    }

    /// Returns when all are here, this one as `index`. What any of them wrote before is visible to
    /// all.
    pub fn wait(&self, index: usize) -> Result<(), Poisoned> {
        self.gate.wait_for(self.arrive(index)?)
    }

    /// Sends everyone who waits here, or comes later, away.
    pub fn poison(&self) {
        self.gate.poison();
    }

    /// Makes the barrier usable again. Only while no thread is at it.
    pub fn reset(&self) {
        self.groups.iter().for_each(|group| group.arrived.store(0, Ordering::Relaxed));
        self.gate.word.store(0, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parks at once, so that a wake-up that gets lost is a hang.
    const ASLEEP: Duration = Duration::ZERO;

    #[test]
    fn sleepers_meet() {
        for parties in [2, 3, 5, 16, 17, 33] {
            let (barrier, here) = (Barrier::new(parties, ASLEEP), AtomicU64::new(0));
            std::thread::scope(|scope| {
                for index in 0..parties {
                    let (barrier, here) = (&barrier, &here);
                    scope.spawn(move || {
                        for phase in 1..=600 / parties as u64 {
                            here.fetch_add(1, Ordering::Relaxed);
                            assert_eq!(barrier.wait(index), Ok(()));
                            assert!(here.load(Ordering::Relaxed) >= phase * parties as u64);
                        }
                    });
                }
            });
        }
    }

    #[test]
    fn poison_reaches_sleepers_and_late_comers_until_it_is_taken_away() {
        for parties in [2, 4, 5, 17] {
            let barrier = Barrier::new(parties, ASLEEP);
            for _ in 0..20 {
                std::thread::scope(|scope| {
                    for index in 1..parties {
                        let barrier = &barrier;
                        scope.spawn(move || assert_eq!(barrier.wait(index), Err(Poisoned)));
                    }
                    barrier.poison();
                });
                assert_eq!(barrier.wait(0), Err(Poisoned));
                barrier.reset();
                std::thread::scope(|scope| {
                    for index in 0..parties {
                        let barrier = &barrier;
                        scope.spawn(move || assert_eq!(barrier.wait(index), Ok(())));
                    }
                });
            }
        }
    }

    #[test]
    fn a_gate_wakes_who_waits_for_any_count() {
        let gate = Gate::new(1, ASLEEP);
        std::thread::scope(|scope| {
            for goal in 1..=8 {
                let gate = &gate;
                scope.spawn(move || assert_eq!(gate.wait_for(goal), Ok(())));
            }
            (0..8).for_each(|_| gate.advance());
        });
    }
}
