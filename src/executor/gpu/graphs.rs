//! Recorded steps: what a step of some shape launches, as one launch.

use crate::executor::ExecutorError;
use std::collections::HashMap;
use tandem_kernels::{Gpu, LaunchGraph};

/// Most shapes that are kept; beyond it all are forgotten and recorded anew.
const SHAPES_MAX: usize = 256;

/// All that decides which kernels a step launches with which numbers; the rest lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct StepShape {
    pub tokens: usize,
    /// Wanted rows of logits.
    pub rows: usize,
    /// Positions that attention is laid out for.
    pub positions_max: usize,
    /// Whether each token is its sequence's only one.
    pub is_each_alone: bool,
    /// Layers whose spilled weights stream.
    pub streamed: usize,
}

/// What is known of a shape.
enum Seen {
    /// It ran once, launch by launch, so that all its kernels are loaded.
    Once,
    Recorded(LaunchGraph),
}

/// Recorded steps by shape.
#[derive(Default)]
pub(super) struct Graphs {
    seen: HashMap<StepShape, Seen>,
}

impl Graphs {
    /// Forgets all: to be called before any memory of the stage moves.
    pub fn forget(&mut self) {
        self.seen.clear();
    }

    /// Runs a step whose kernels `launch` starts: the first of a shape as it is, the second
    /// recorded, all others from the record.
    ///
    /// # Safety
    /// `launch` always uses the same memory for a shape, until [`Graphs::forget`].
    pub unsafe fn run(
        &mut self,
        gpu: &Gpu,
        shape: StepShape,
        launch: impl Fn() -> Result<(), ExecutorError>,
    ) -> Result<(), ExecutorError> {
        if self.seen.len() >= SHAPES_MAX && !self.seen.contains_key(&shape) {
            self.forget();
        }
        match self.seen.get(&shape) {
            None => {
                launch()?;
                self.seen.insert(shape, Seen::Once);
            }
            Some(Seen::Once) => {
                // What other threads ask of the driver can spoil a record, and memory may
                // lack: a later step makes it.
                let Some(graph) = gpu.record(&launch)? else { return launch() };
                // SAFETY: it was recorded with the stage's memory, which is there.
                unsafe { gpu.replay(&graph)? };
                self.seen.insert(shape, Seen::Recorded(graph));
            }
            // SAFETY: the memory is that of the record, as the caller promises.
            Some(Seen::Recorded(graph)) => unsafe { gpu.replay(graph)? },
        }
        Ok(())
    }
}
