//! How long each op takes in the steps of a running engine, while somebody wants to know: the
//! executor's thread counts, whoever asked takes.

use super::stage::StepRunner;
use super::stage_fault::StageFault;
use crate::executor::OpTime;
use crate::step::{StepOutput, StepPlan};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

/// Where the time of some steps went.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepOps {
    /// Tokens of each of the steps.
    pub tokens: usize,
    /// How many steps.
    pub steps: u64,
    /// Sums over the steps, by kind of op.
    pub times: Vec<OpTime>,
}

/// Counts, if it is on.
#[derive(Debug, Default)]
pub(super) struct OpClock {
    is_on: AtomicBool,
    /// By tokens of a step.
    steps: Mutex<BTreeMap<usize, StepOps>>,
}

impl OpClock {
    /// Counts the steps that begin from now on.
    pub(super) fn start(&self) {
        self.is_on.store(true, Relaxed);
    }

    /// Ends the counting; what was counted, by ascending tokens of a step.
    pub(super) fn take(&self) -> Vec<StepOps> {
        self.is_on.store(false, Relaxed);
        let mut steps = self.steps.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *steps).into_values().collect()
    }

    /// Runs a step, and counts it where that is wanted.
    pub(super) fn run(
        &self,
        stage: &mut dyn StepRunner,
        plan: &StepPlan,
        output: &mut StepOutput,
    ) -> Result<(), StageFault> {
        if !self.is_on.load(Relaxed) {
            return stage.run(plan, output);
        }
        stage.start_op_times()?;
        stage.run(plan, output)?;
        self.add(plan.tokens.len(), &stage.take_op_times());
        Ok(())
    }

    fn add(&self, tokens: usize, times: &[OpTime]) {
        let mut steps = self.steps.lock().unwrap_or_else(PoisonError::into_inner);
        let sums = steps.entry(tokens).or_insert_with(|| {
            let zero = |time: &OpTime| OpTime { work_ns: 0.0, wait_ns: 0.0, ..*time };
            StepOps { tokens, steps: 0, times: times.iter().map(zero).collect() }
        });
        sums.steps += 1;
        // The ops of a stage are those of its program, in every step.
        for (sum, time) in sums.times.iter_mut().zip(times) {
            sum.work_ns += time.work_ns;
            sum.wait_ns += time.wait_ns;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_of_as_many_tokens_are_added_up() {
        let clock = OpClock::default();
        let time = |work_ns| [OpTime { op: "norm", work_ns, wait_ns: 1.0 }];
        clock.start();
        clock.add(8, &time(10.0));
        clock.add(1, &time(7.0));
        clock.add(8, &time(20.0));
        let [one, eight] = &clock.take()[..] else { panic!("two widths") };
        assert_eq!((one.tokens, one.steps, one.times[0].work_ns), (1, 1, 7.0));
        assert_eq!((eight.tokens, eight.steps, eight.times[0].work_ns), (8, 2, 30.0));
        assert_eq!(eight.times[0].wait_ns, 2.0);
        assert_eq!(clock.take(), []);
    }
}
