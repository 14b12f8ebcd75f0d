//! What the workers of a CPU need in a step in which a GPU spills feed-forward networks to them.

use super::buffers::Rows;
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use tandem_kernels::{CrossingHost, event_number};

/// One step of the CPU's side.
#[derive(Clone, Copy)]
pub(super) struct SpillStep<'a> {
    /// Where rows cross.
    pub crossing: CrossingHost<'a>,
    /// `[n_tokens, embedding_dim]` that the GPU writes.
    pub rows_in: Rows<'a>,
    /// `[n_tokens, embedding_dim]` that the GPU reads.
    pub rows_out: Rows<'a>,
    /// The step's number: events are counted from it.
    base: u32,
    /// By index: whether the CPU computes a network in this step.
    pub is_here: &'a [bool],
    /// Set when the GPU will not come.
    pub is_abandoned: &'a AtomicBool,
    /// How long a worker may wait for the GPU.
    pub wait_max: Duration,
}

impl<'a> SpillStep<'a> {
    /// A step of `[tokens, cols]` rows, in which the CPU computes the networks that `is_here` says.
    ///
    /// # Safety
    /// Nobody else on the host uses the crossing's rows while the step lives, and the GPU writes
    /// rows before it raises an event, and reads them after the CPU has.
    pub unsafe fn new(
        crossing: CrossingHost<'a>,
        [tokens, cols]: [usize; 2],
        (base, is_here): (u32, &'a [bool]),
        (is_abandoned, wait_max): (&'a AtomicBool, Duration),
    ) -> Self {
        let (out, elements) = crossing.rows_out();
        assert!(tokens * cols <= elements, "[{tokens}, {cols}] where {elements} elements cross");
        // SAFETY: the crossing has as many elements on either side, and lives as long.
        let [rows_in, rows_out] = [crossing.rows_in().cast_mut(), out]
            .map(|start| unsafe { Rows::shared(start, tokens, cols) });
        Self { crossing, rows_in, rows_out, base, is_here, is_abandoned, wait_max }
    }

    /// The number of a network's event.
    pub fn number(&self, index: usize) -> u32 {
        event_number(self.base, index)
    }
}
