//! The ends of a unit that a GPU has spilled to this stage: rows come from memory that the GPU
//! writes, and products go to memory that it reads.

use super::{Step, whole_row_mut};
use crate::executor::cpu_pool::Worker;
use crate::executor::program::{Buffer, Precision, SpilledUnit};
use crate::executor::spill::SpillStep;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// How often a worker looks for the GPU's rows between two looks at the clock.
const LOOKS: usize = 1 << 10;

impl Step<'_> {
    fn spill(&self) -> &SpillStep<'_> {
        self.spill.as_ref().expect("a stage that others spill to is told where")
    }

    /// Waits for the GPU's rows, and rounds those of this worker.
    pub(super) fn take_spilled(
        &self,
        worker: &Worker<'_>,
        unit: SpilledUnit,
        (input, precision): (Buffer, Precision),
    ) {
        let spill = self.spill();
        wait(spill, unit);
        let (target, tokens) = (self.input(input), self.plan.tokens.len());
        let width = target.values.width;
        let rows_in = spill.rows_in(width);
        let take = |token: usize| {
            // SAFETY: the row is of this worker's own memory or fell to it; the GPU has handed its
            // rows over, and writes the next ones when it has those of this unit back.
            unsafe {
                let row = rows_in.part(token, 0..width);
                whole_row_mut(target.values, token).copy_from_slice(row);
            }
            self.quantize(target, token, 0..width);
            if self.has_second_rows(precision) {
                self.refine(target, token, token + tokens);
            }
        };
        match input {
            Buffer::Attended => self.tokens(worker).for_each(take),
            _ => self.rows(worker, tokens).for_each(take),
        }
    }

    /// Lets the GPU have the products, which all workers have finished.
    pub(super) fn give_spilled(&self, worker: &Worker<'_>, unit: SpilledUnit) {
        if worker.index == 0 {
            let spill = self.spill();
            spill.crossing.done(spill.number(unit));
        }
    }
}

/// Spins: the GPU is some microseconds away.
///
/// # Panics
/// When it does not come in the time that a step may take: then all workers end.
fn wait(spill: &SpillStep<'_>, unit: SpilledUnit) {
    let number = spill.number(unit);
    let started = Instant::now();
    loop {
        for _ in 0..LOOKS {
            if spill.crossing.has_reached(number) {
                return;
            }
            std::hint::spin_loop();
        }
        let (waited, is_abandoned) = (started.elapsed(), &spill.is_abandoned);
        assert!(!is_abandoned.load(Ordering::Acquire), "the GPU has failed in this step");
        assert!(waited < spill.wait_max, "the GPU did not hand over its rows in {waited:?}");
    }
}
