//! Whose turn it is where several models of one process use GPUs.
//!
//! A step whose weights stream waits, on the GPU, for what a thread of the host sends meanwhile,
//! which takes calls of the driver. Other calls keep these from the driver while they wait until
//! the GPU has nothing to do: some that load kernels or make, free and lock memory. If another
//! model makes one, all wait for each other for ever. And while a step is recorded, waiting for all
//! that is on a GPU fails, and spoils the record. So such a step, such a call and a record are
//! turns, which models have one after the other: who came first goes first, so that nobody waits
//! for longer than what was there. What a model itself asks for in a turn of its own is its own
//! affair: it goes on at once.

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

    /// Waits for a turn.
    pub fn turn(self) -> Turn<'static> {
        TURNS.turn(self)
    }

    /// Waits for a turn, no longer than some time.
    pub fn turn_within(self, most: Duration) -> Option<Turn<'static>> {
        TURNS.take(self, Some(most))
    }

    /// Whether another model waits for a turn.
    pub fn is_in_the_way(self) -> bool {
        TURNS.lock().waiting.iter().any(|(_, other)| *other != self)
    }
}

#[derive(Debug, Default)]
struct State {
    /// Whose turn it is, and how many it has, one inside of or beside the other.
    taken: Option<(Taker, usize)>,
    /// With ascending numbers.
    waiting: VecDeque<(u64, Taker)>,
    next: u64,
}

impl State {
    fn may_begin(&self, number: u64, taker: Taker) -> bool {
        match self.taken {
            Some((other, _)) => other == taker,
            None => self.waiting.iter().all(|(other, _)| *other >= number),
        }
    }
}

struct Turns {
    state: Mutex<State>,
    changed: Condvar,
}

impl Turns {
    const fn new() -> Self {
        let state = State { taken: None, waiting: VecDeque::new(), next: 0 };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn turn(&self, taker: Taker) -> Turn<'_> {
        self.take(taker, None).expect("a turn comes where nobody stops waiting for it")
    }

    fn take(&self, taker: Taker, most: Option<Duration>) -> Option<Turn<'_>> {
        let mut state = self.lock();
        let number = state.next;
        state.next += 1;
        if !state.may_begin(number, taker) {
            state.waiting.push_back((number, taker));
            let must_wait = |state: &mut State| !state.may_begin(number, taker);
            // No limit is a very long one.
            let most = most.unwrap_or(Duration::MAX);
            state = self
                .changed
                .wait_timeout_while(state, most, must_wait)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
            let has_come = state.may_begin(number, taker);
            state.waiting.retain(|(other, _)| *other != number);
            if !has_come {
                self.changed.notify_all();
                return None;
            }
        }
        let before = state.taken.map_or(0, |(_, turns)| turns);
        state.taken = Some((taker, before + 1));
        // Others of the same model may go on beside it.
        if !state.waiting.is_empty() {
            self.changed.notify_all();
        }
        Some(Turn { turns: self })
    }
}

/// A turn, until it is dropped.
pub(crate) struct Turn<'a> {
    turns: &'a Turns,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut state = self.turns.lock();
        state.taken =
            state.taken.and_then(|(taker, turns)| Some((taker, turns - 1)).filter(|t| t.1 > 0));
        self.turns.changed.notify_all();
    }
}

/// The turn of a step whose weights stream, until it is dropped: when all of them have arrived.
pub struct StreamTurn {
    _turn: Turn<'static>,
}

impl crate::Gpu {
    /// Waits until no other model of this process streams weights, or makes calls that would keep a
    /// stream from the driver: to be taken before anything of a step is started that waits for a
    /// [`WeightRing`](crate::WeightRing) to be filled. A model's GPUs are those that were [opened
    /// beside](crate::Gpu::open_beside) each other.
    ///
    /// # Errors
    /// What the GPU was lost with, or [`GpuError::Failed`] where the turn does not come in the time
    /// that [a wait may take](crate::Gpu::limit_waits).
    pub fn stream_turn(&self) -> Result<StreamTurn, GpuError> {
        self.fate().check()?;
        let wait_max = self.wait_max();
        let turn = self.fate().taker().turn_within(wait_max);
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
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::thread;

    const SHORT: Duration = Duration::from_millis(30);
    const LONG: Duration = Duration::from_secs(30);

    /// Turns that are left to the end of the process, so that threads may have them.
    fn turns() -> &'static Turns {
        Box::leak(Box::new(Turns::new()))
    }

    /// Takes a turn on another thread, says so, and gives it back when it is told.
    fn elsewhere(turns: &'static Turns, taker: Taker) -> (Receiver<()>, Sender<()>) {
        let ((has, taken), (leave, leaves)) = (channel(), channel::<()>());
        let started = turns.lock().next;
        thread::spawn(move || {
            let turn = turns.turn(taker);
            has.send(()).expect("somebody who looks");
            let _ = leaves.recv();
            drop(turn);
        });
        // Until it has its turn or is in the queue.
        while turns.lock().next == started {
            thread::yield_now();
        }
        (taken, leave)
    }

    fn has_turn(taken: &Receiver<()>) -> bool {
        taken.recv_timeout(SHORT).is_ok()
    }

    #[test]
    fn a_turn_is_one_models_and_goes_on_inside_itself() {
        let (turns, [a, b]) = (turns(), [Taker::new(), Taker::new()]);
        let turn = turns.turn(a);
        let (other, leave) = elsewhere(turns, b);
        assert!(!has_turn(&other));
        // Though another waits: it waits for this.
        drop(turns.take(a, Some(SHORT)).expect("its own turn"));
        let (beside, leave_beside) = elsewhere(turns, a);
        assert!(has_turn(&beside) && !has_turn(&other));
        drop(turn);
        assert!(!has_turn(&other), "one of the model's turns has not ended");
        drop(leave_beside);
        assert!(has_turn(&other));
        assert!(turns.take(a, Some(SHORT)).is_none());
        drop(leave);
        drop(turns.take(a, Some(LONG)).expect("the other has ended"));
        let state = turns.lock();
        assert!(state.taken.is_none() && state.waiting.is_empty(), "{state:?}");
    }

    #[test]
    fn who_came_first_goes_first() {
        let (turns, [a, b, c]) = (turns(), [Taker::new(), Taker::new(), Taker::new()]);
        let turn = turns.turn(a);
        let (first, leave_first) = elsewhere(turns, b);
        let (second, leave_second) = elsewhere(turns, c);
        drop(turn);
        assert!(has_turn(&first) && !has_turn(&second));
        drop(leave_first);
        assert!(has_turn(&second));
        drop(leave_second);
    }

    #[test]
    fn who_gives_up_waiting_is_in_nobodys_way() {
        let (turns, [a, b, c]) = (turns(), [Taker::new(), Taker::new(), Taker::new()]);
        let turn = turns.turn(a);
        assert!(turns.take(b, Some(SHORT)).is_none());
        let (other, leave) = elsewhere(turns, c);
        drop(turn);
        assert!(has_turn(&other) && turns.lock().waiting.is_empty());
        drop(leave);
        drop(turns.take(b, Some(LONG)).expect("all have left"));
    }
}
