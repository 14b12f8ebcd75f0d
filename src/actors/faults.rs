//! Named points where a test can make an actor panic: "at the k-th time that anyone comes past
//! this point". Nothing is ever armed outside tests; an unarmed point costs one relaxed load.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// Where a fault can strike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FaultPoint {
    /// A tokenizer thread has a job and has not worked on it.
    TokenizerBeforeWork,
    /// A tokenizer thread has worked on a job and not answered.
    TokenizerAfterWork,
    /// A tokenizer thread has no job: the thread itself dies.
    TokenizerIdle,
    /// The engine loop has taken a new sequence and not added it.
    SchedulerBeforeAdd,
    /// The engine loop is about to plan.
    SchedulerBeforePlan,
    /// A plan is made and not handed over.
    SchedulerBeforeDispatch,
    /// A step's output is there and not applied.
    SchedulerBeforeApply,
    /// A step's output is applied, its events are not delivered.
    SchedulerAfterApply,
    /// Some of a step's events are delivered, some are not.
    SchedulerInDelivery,
    /// The stage is about to be made.
    ExecutorBeforeStart,
    /// The executor has a plan and has not run it.
    ExecutorBeforeRun,
    /// The stage is at work: struck by stages made for tests.
    ExecutorInRun,
    /// The stage has run a plan; its output is not handed back.
    ExecutorAfterRun,
    /// The swap thread has copies to perform and has not begun.
    KvSwapBeforeCopy,
    /// The swap thread has performed copies and not said so.
    KvSwapAfterCopy,
    /// A stream task has a message and has not computed anything from it.
    StreamBeforeCompute,
    /// A stream task has computed what follows and not committed it.
    StreamBeforeCommit,
    /// The supervisor has heard of a dead child and not restarted it.
    SupervisorBeforeRestart,
}

impl FaultPoint {
    /// Every point.
    pub const ALL: [Self; 18] = [
        Self::TokenizerBeforeWork,
        Self::TokenizerAfterWork,
        Self::TokenizerIdle,
        Self::SchedulerBeforeAdd,
        Self::SchedulerBeforePlan,
        Self::SchedulerBeforeDispatch,
        Self::SchedulerBeforeApply,
        Self::SchedulerAfterApply,
        Self::SchedulerInDelivery,
        Self::ExecutorBeforeStart,
        Self::ExecutorBeforeRun,
        Self::ExecutorInRun,
        Self::ExecutorAfterRun,
        Self::KvSwapBeforeCopy,
        Self::KvSwapAfterCopy,
        Self::StreamBeforeCompute,
        Self::StreamBeforeCommit,
        Self::SupervisorBeforeRestart,
    ];
}

/// The armed faults of one engine and how often each point was passed.
#[derive(Debug, Default)]
pub struct Faults {
    armed_count: AtomicUsize,
    armed: Mutex<HashSet<(FaultPoint, u64)>>,
    passes: [AtomicU64; FaultPoint::ALL.len()],
}

impl Faults {
    /// Arms a panic at the `pass`-th passing of `point`, counted from 1 and from the engine's
    /// start. May be called several times.
    pub fn arm(&self, point: FaultPoint, pass: u64) {
        self.armed.lock().unwrap_or_else(PoisonError::into_inner).insert((point, pass));
        self.armed_count.fetch_add(1, Ordering::SeqCst);
    }

    /// How many armed faults have not struck.
    pub fn left(&self) -> usize {
        self.armed_count.load(Ordering::SeqCst)
    }

    /// How often a point was passed. Counted only while something is armed.
    pub fn passes(&self, point: FaultPoint) -> u64 {
        self.passes[point as usize].load(Ordering::SeqCst)
    }

    /// Comes past a point.
    ///
    /// # Panics
    /// When a fault is armed for this passing: that is what it is for.
    pub fn pass(&self, point: FaultPoint) {
        if self.armed_count.load(Ordering::Relaxed) == 0 {
            return;
        }
        let pass = self.passes[point as usize].fetch_add(1, Ordering::SeqCst) + 1;
        let struck =
            self.armed.lock().unwrap_or_else(PoisonError::into_inner).remove(&(point, pass));
        if struck {
            self.armed_count.fetch_sub(1, Ordering::SeqCst);
            panic!("fault injected at {point:?}, pass {pass}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    #[test]
    fn a_fault_strikes_once_at_its_pass() {
        let faults = Faults::default();
        faults.arm(FaultPoint::SchedulerBeforePlan, 2);
        faults.pass(FaultPoint::SchedulerBeforePlan);
        faults.pass(FaultPoint::SchedulerBeforeApply);
        let struck =
            catch_unwind(AssertUnwindSafe(|| faults.pass(FaultPoint::SchedulerBeforePlan)));
        assert!(struck.is_err());
        assert_eq!(faults.left(), 0);
        faults.pass(FaultPoint::SchedulerBeforePlan);
    }

    #[test]
    fn points_stand_in_declaration_order() {
        for (index, point) in FaultPoint::ALL.iter().enumerate() {
            assert_eq!(*point as usize, index, "{point:?}");
        }
    }
}
