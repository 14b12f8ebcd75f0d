//! Recorded steps: what a step of some shape launches, as one launch.

use crate::executor::ExecutorError;
use crate::placement::{GRAPHS_MAX, recorded_bytes};
use std::collections::HashMap;
use tandem_kernels::{Gpu, LaunchGraph};

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
    /// There is no room for its record.
    TooLarge,
    Recorded(LaunchGraph),
}

/// Recorded steps by shape.
#[derive(Default)]
pub(super) struct Graphs {
    seen: HashMap<StepShape, Seen>,
    /// Bytes of the GPU's memory that they take, and may take.
    used_bytes: u64,
    bytes_max: u64,
}

impl Graphs {
    /// Room for records of so many bytes.
    pub fn new(bytes_max: u64) -> Self {
        Self { bytes_max, ..Self::default() }
    }

    /// Forgets all: to be called before any memory of the stage moves.
    pub fn forget(&mut self) {
        self.seen.clear();
        self.used_bytes = 0;
    }

    /// Keeps a record, in the place of all others where they have no room together.
    fn keep(&mut self, shape: StepShape, graph: LaunchGraph) {
        let bytes = recorded_bytes(graph.launches());
        if self.used_bytes + bytes > self.bytes_max {
            self.forget();
        }
        if bytes > self.bytes_max {
            self.seen.insert(shape, Seen::TooLarge);
            return;
        }
        self.used_bytes += bytes;
        self.seen.insert(shape, Seen::Recorded(graph));
    }

    /// Bytes of the GPU's memory that records take, at most.
    pub fn bytes(&self) -> u64 {
        self.used_bytes
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
        // Beyond what was planned all are forgotten and recorded anew.
        if self.seen.len() >= GRAPHS_MAX && !self.seen.contains_key(&shape) {
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
                self.keep(shape, graph);
            }
            Some(Seen::TooLarge) => launch()?,
            // SAFETY: the memory is that of the record, as the caller promises.
            Some(Seen::Recorded(graph)) => unsafe { gpu.replay(graph)? },
        }
        Ok(())
    }
}
