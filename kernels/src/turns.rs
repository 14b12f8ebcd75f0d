//! Whose turn it is where several models of one process use GPUs.
//!
//! A step whose weights stream waits, on the GPU, for what a thread of the host sends meanwhile,
//! which takes calls of the driver. Other calls keep these from the driver while they wait until
//! the GPU has nothing to do: some that load kernels or make, free and lock memory. If another
//! model makes one, all wait for each other for ever. So
//! ```text
//! a call that may wait   begins while no other model has such a step
//! such a step            begins while no other model has such a step, or makes such a call
//! ```
//! Who came first goes first, so that nobody waits for longer than the steps and calls that were
//! there. What a model itself asks for in its own step is its own affair: it goes on at once.

use crate::gpu::GpuError;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Turns are taken on all GPUs together: memory that is locked is so for all of them.
static TURNS: Turns = Turns::new();

/// A model, as far as turns go: GPUs that wait for each other are one's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Taker(u64);

impl Taker {
    /// Another one than all before.
    pub fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }

    /// Waits for the turn of a call that may wait for the GPU.
    pub fn call(self) -> Turn<'static> {
        TURNS.call(self)
    }

    /// Waits for the turn of a step whose weights stream, no longer than some time.
    pub fn stream(self, wait_max: Duration) -> Option<Turn<'static>> {
        TURNS.stream(self, wait_max)
    }

    /// Whether another model waits for a turn.
    pub fn is_in_the_way(self) -> bool {
        TURNS.lock().waiting.iter().any(|(_, other)| other.taker != self)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Call,
    Stream,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Taken {
    taker: Taker,
    kind: Kind,
}

impl Taken {
    fn excludes(self, other: Taken) -> bool {
        self.taker != other.taker && (self.kind == Kind::Stream || other.kind == Kind::Stream)
    }
}

#[derive(Debug, Default)]
struct State {
    taken: Vec<Taken>,
    /// With ascending numbers.
    waiting: VecDeque<(u64, Taken)>,
    next: u64,
}

impl State {
    fn may_begin(&self, number: u64, wanted: Taken) -> bool {
        let excludes = |other: &Taken| other.excludes(wanted);
        // What it has begun others wait for: it would wait for them.
        let has_begun = self.taken.iter().any(|other| other.taker == wanted.taker);
        let before = self.waiting.iter().take_while(|(other, _)| *other < number);
        !self.taken.iter().any(excludes) && (has_begun || !before.map(|(_, w)| w).any(excludes))
    }

    fn leave_queue(&mut self, number: u64) {
        self.waiting.retain(|(other, _)| *other != number);
    }
}

struct Turns {
    state: Mutex<State>,
    changed: Condvar,
}

impl Turns {
    const fn new() -> Self {
        let state = State { taken: Vec::new(), waiting: VecDeque::new(), next: 0 };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn call(&self, taker: Taker) -> Turn<'_> {
        let wanted = Taken { taker, kind: Kind::Call };
        let turn = self.take(wanted, None);
        turn.expect("a turn comes where nobody stops waiting for it")
    }

    fn stream(&self, taker: Taker, wait_max: Duration) -> Option<Turn<'_>> {
        self.take(Taken { taker, kind: Kind::Stream }, Some(wait_max))
    }

    fn take(&self, wanted: Taken, wait_max: Option<Duration>) -> Option<Turn<'_>> {
        let mut state = self.lock();
        let number = state.next;
        state.next += 1;
        if !state.may_begin(number, wanted) {
            state.waiting.push_back((number, wanted));
            let must_wait = |state: &mut State| !state.may_begin(number, wanted);
            state = match wait_max {
                None => self.changed.wait_while(state, must_wait),
                Some(most) => self
                    .changed
                    .wait_timeout_while(state, most, must_wait)
                    .map(|(state, _)| state)
                    .map_err(|poisoned| PoisonError::new(poisoned.into_inner().0)),
            }
            .unwrap_or_else(PoisonError::into_inner);
            let has_come = state.may_begin(number, wanted);
            state.leave_queue(number);
            if !has_come {
                self.changed.notify_all();
                return None;
            }
        }
        state.taken.push(wanted);
        Some(Turn { turns: self, taken: wanted })
    }
}

/// A turn, until it is dropped.
pub(crate) struct Turn<'a> {
    turns: &'a Turns,
    taken: Taken,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut state = self.turns.lock();
        if let Some(at) = state.taken.iter().position(|taken| *taken == self.taken) {
            state.taken.swap_remove(at);
        }
        self.turns.changed.notify_all();
    }
}

/// The turn of a step whose weights stream, until it is dropped: when all of them have arrived.
pub struct StreamTurn {
    _turn: Turn<'static>,
}

impl crate::Gpu {
    /// Waits until no other model of this process streams weights, or makes calls that a stream
    /// would be kept from the driver by: to be taken before anything of a step is started that
    /// waits for a [`WeightRing`](crate::WeightRing) to be filled. A model's GPUs are those that
    /// were [opened beside](crate::Gpu::open_beside) each other.
    ///
    /// # Errors
    /// What the GPU was lost with, or [`GpuError::Failed`] where the turn does not come in the time
    /// that [a wait may take](crate::Gpu::limit_waits).
    pub fn stream_turn(&self) -> Result<StreamTurn, GpuError> {
        self.fate().check()?;
        let wait_max = self.wait_max();
        let turn = self.fate().taker().stream(wait_max);
        let turn = turn.ok_or_else(|| GpuError::Failed {
            ordinal: self.ordinal(),
            what: "streaming weights",
            reason: format!("another model of this process was not done within {wait_max:?}"),
        })?;
        Ok(StreamTurn { _turn: turn })
    }

    /// Whether another model of this process waits for this one: a step that need not be waited for
    /// should be.
    pub fn is_in_the_way(&self) -> bool {
        self.fate().taker().is_in_the_way()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, channel};
    use std::thread;

    const SHORT: Duration = Duration::from_millis(30);
    const LONG: Duration = Duration::from_secs(30);

    /// Turns that are left to the end of the process, so that threads may have them.
    fn turns() -> &'static Turns {
        Box::leak(Box::new(Turns::new()))
    }

    /// Takes a turn on another thread, says so, and gives it back when it is told.
    fn elsewhere(
        turns: &'static Turns,
        taker: Taker,
        kind: Kind,
    ) -> (Receiver<()>, std::sync::mpsc::Sender<()>) {
        let ((has, taken), (leave, leaves)) = (channel(), channel::<()>());
        let waiting = turns.lock().waiting.len();
        let (wanted, started) = (Taken { taker, kind }, turns.lock().next);
        thread::spawn(move || {
            let turn = turns.take(wanted, None);
            has.send(()).expect("somebody who looks");
            let _ = leaves.recv();
            drop(turn);
        });
        // Until it has its turn or is in the queue.
        while turns.lock().next == started {
            thread::yield_now();
        }
        assert!(turns.lock().waiting.len() <= waiting + 1);
        (taken, leave)
    }

    fn has_turn(taken: &Receiver<()>) -> bool {
        taken.recv_timeout(SHORT).is_ok()
    }

    #[test]
    fn calls_of_others_wait_for_a_stream_and_a_stream_for_calls_of_others() {
        let (turns, [a, b]) = (turns(), [Taker::new(), Taker::new()]);
        let stream = turns.stream(a, LONG).expect("nobody is there");
        // Its own calls, and further streams of its own, go on.
        drop((turns.call(a), turns.stream(a, SHORT).expect("its own")));
        let (call, leave) = elsewhere(turns, b, Kind::Call);
        assert!(!has_turn(&call));
        drop(stream);
        assert!(has_turn(&call));
        assert!(turns.stream(a, SHORT).is_none(), "a call of another is under way");
        drop((turns.call(a), turns.call(b)));
        drop(leave);
        drop(turns.stream(a, LONG).expect("the call has ended"));
        assert!(turns.lock().taken.is_empty() && turns.lock().waiting.is_empty());
    }

    #[test]
    fn who_came_first_goes_first() {
        let (turns, [a, b, c]) = (turns(), [Taker::new(), Taker::new(), Taker::new()]);
        let call = turns.call(b);
        let (stream, leave_stream) = elsewhere(turns, a, Kind::Stream);
        // It would never begin if calls of all others went before it.
        let (later, leave_later) = elsewhere(turns, c, Kind::Call);
        assert!(!has_turn(&stream) && !has_turn(&later));
        // A call inside of one that has begun is not later.
        drop(turns.call(b));
        drop(call);
        assert!(has_turn(&stream) && !has_turn(&later));
        drop(leave_stream);
        assert!(has_turn(&later));
        drop(leave_later);
    }

    #[test]
    fn who_gives_up_waiting_is_in_nobodys_way() {
        let (turns, [a, b, c]) = (turns(), [Taker::new(), Taker::new(), Taker::new()]);
        let call = turns.call(a);
        assert!(turns.stream(b, SHORT).is_none());
        let (other, leave) = elsewhere(turns, c, Kind::Call);
        assert!(has_turn(&other) && turns.lock().waiting.is_empty());
        drop((call, leave));
        drop(turns.stream(b, LONG).expect("all have left"));
    }
}
