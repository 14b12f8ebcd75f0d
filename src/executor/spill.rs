//! What the workers of a CPU need in a step in which a GPU leaves spilled units to them.

use super::buffers::Rows;
use super::program::SpilledUnit;
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use tandem_kernels::{CrossingHost, event_number};

/// One step of the CPU's side.
#[derive(Clone, Copy)]
pub(super) struct SpillStep<'a> {
    /// Where rows cross.
    pub crossing: CrossingHost<'a>,
    /// Tokens of the step.
    tokens: usize,
    /// The step's number: events are counted from it.
    base: u32,
    /// The first unit of the GPU that the step is of; of others there are units before and behind.
    first: SpilledUnit,
    /// By its layers with spilled weights: whether the CPU computes their units in this step.
    is_here: &'a [bool],
    /// Set when the GPU will not come.
    pub is_abandoned: &'a AtomicBool,
    /// How long a worker may wait for the GPU.
    pub wait_max: Duration,
}

impl<'a> SpillStep<'a> {
    /// A step of some tokens, in which the CPU computes the layers that `is_here` says of the GPU
    /// whose units begin with `first`.
    ///
    /// # Safety
    /// Nobody else on the host uses the crossing's rows while the step lives, and the GPU writes
    /// rows before it raises an event, and reads them after the CPU has.
    pub unsafe fn new(
        crossing: CrossingHost<'a>,
        tokens: usize,
        (base, first, is_here): (u32, SpilledUnit, &'a [bool]),
        (is_abandoned, wait_max): (&'a AtomicBool, Duration),
    ) -> Self {
        Self { crossing, tokens, base, first, is_here, is_abandoned, wait_max }
    }

    /// `[n_tokens, width]` that the GPU writes.
    pub fn rows_in(&self, width: usize) -> Rows<'a> {
        let (start, elements) = self.crossing.rows_in();
        assert!(self.tokens * width <= elements, "rows of {width} where {elements} elements cross");
        // SAFETY: the crossing has as many elements (asserted), and lives as long; whose turn it is
        // was promised when the step was made.
        unsafe { Rows::shared(start.cast_mut(), self.tokens, width) }
    }

    /// `[rows, width]` that the GPU reads the first `n_tokens` of.
    pub fn rows_out(&self, rows: usize, width: usize) -> Rows<'a> {
        let (start, elements) = self.crossing.rows_out();
        assert!(rows * width <= elements, "[{rows}, {width}] where {elements} elements cross");
        // SAFETY: as of `rows_in`.
        unsafe { Rows::shared(start, rows, width) }
    }

    /// Whether the CPU computes a unit.
    pub fn computes(&self, unit: SpilledUnit) -> bool {
        let layer = unit.layer.checked_sub(self.first.layer);
        layer.is_some_and(|layer| self.is_here.get(layer) == Some(&true))
    }

    /// The number of the event of a unit that it computes.
    pub fn number(&self, unit: SpilledUnit) -> u32 {
        event_number(self.base, unit.index - self.first.index)
    }
}
