//! The ends of a feed-forward network that a GPU has spilled to this stage: rows come from memory
//! that the GPU writes, and go to memory that it reads.

use super::{Step, whole_row_mut};
use crate::executor::cpu_pool::Worker;
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
    pub(super) fn take_spilled(&self, worker: &Worker<'_>, index: usize) {
        let spill = self.spill();
        wait(spill, index);
        let (normed, width) = (self.buffers.normed, self.buffers.normed.values.width);
        for token in self.rows(worker, self.plan.tokens.len()) {
            // SAFETY: the row is of this worker's own memory or fell to it; the GPU has handed its
            // rows over, and writes the next ones when it has those of this network back.
            unsafe {
                let row = spill.rows_in.part(token, 0..width);
                whole_row_mut(normed.values, token).copy_from_slice(row);
            }
            self.quantize(normed, token, 0..width);
        }
    }

    /// Lets the GPU have the products, which all workers have finished.
    pub(super) fn give_spilled(&self, worker: &Worker<'_>, index: usize) {
        if worker.index == 0 {
            let spill = self.spill();
            spill.crossing.done(spill.number(index));
        }
    }
}

/// Spins: the GPU is some microseconds away.
///
/// # Panics
/// When it does not come in the time that a step may take: then all workers end.
fn wait(spill: &SpillStep<'_>, index: usize) {
    let number = spill.number(index);
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
