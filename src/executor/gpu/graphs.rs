//! Recorded steps: what a step of some shape launches, as one launch.

use crate::executor::ExecutorError;
use std::collections::HashMap;
use tandem_kernels::{Gpu, GpuError, LaunchGraph};

/// Most records that are kept: a decoding stream has a shape for each 256 positions.
const RECORDS_MAX: usize = 256;
/// Most shapes without a record that are remembered.
const SHAPES_MAX: usize = 256;
/// Steps of a shape that are launched kernel by kernel before one is recorded. A record takes about
/// as long as a few launches and some of the GPU's memory, and shapes in which prompts and answers
/// meet seldom come back.
const RUNS_BEFORE: u32 = 2;

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

/// Something of each of the latest shapes. Of more than `most` that one is dropped which was used
/// longest ago.
struct Latest<T> {
    /// With the number of its last use.
    entries: HashMap<StepShape, (T, u64)>,
    most: usize,
    uses: u64,
}

impl<T> Latest<T> {
    fn new(most: usize) -> Self {
        Self { entries: HashMap::with_capacity(most), most, uses: 0 }
    }

    /// That of a shape, which is used now.
    fn get(&mut self, shape: &StepShape) -> Option<&mut T> {
        self.uses += 1;
        let (value, used) = self.entries.get_mut(shape)?;
        *used = self.uses;
        Some(value)
    }

    fn insert(&mut self, shape: StepShape, value: T) {
        if self.entries.len() >= self.most && !self.entries.contains_key(&shape) {
            let oldest = self.entries.iter().min_by_key(|(_, (_, used))| *used);
            if let Some(oldest) = oldest.map(|(shape, _)| *shape) {
                self.entries.remove(&oldest);
            }
        }
        self.uses += 1;
        self.entries.insert(shape, (value, self.uses));
    }
}

/// How a step is started.
#[derive(Debug, PartialEq)]
enum Start<'r, R> {
    /// Kernel by kernel.
    Launch,
    /// Recorded, and then from the record.
    Record,
    /// From the record.
    Replay(&'r R),
}

/// Which shapes have a record, and how often others came.
struct Records<R> {
    records: Latest<R>,
    /// Steps of shapes without a record.
    runs: Latest<u32>,
}

impl<R> Default for Records<R> {
    fn default() -> Self {
        Self { records: Latest::new(RECORDS_MAX), runs: Latest::new(SHAPES_MAX) }
    }
}

impl<R> Records<R> {
    /// How the next step, of this shape, is started.
    fn start(&mut self, shape: &StepShape) -> Start<'_, R> {
        if let Some(record) = self.records.get(shape) {
            return Start::Replay(record);
        }
        match self.runs.get(shape) {
            Some(runs) if *runs >= RUNS_BEFORE => Start::Record,
            Some(runs) => {
                *runs += 1;
                Start::Launch
            }
            None => {
                self.runs.insert(*shape, 1);
                Start::Launch
            }
        }
    }

    fn keep(&mut self, shape: StepShape, record: R) {
        self.runs.entries.remove(&shape);
        self.records.insert(shape, record);
    }

    /// Drops the record of a shape, which then comes as if for the first time.
    fn drop_record(&mut self, shape: &StepShape) {
        self.records.entries.remove(shape);
    }

    /// Drops all records. Their shapes get another when they come next.
    fn forget(&mut self) {
        for (shape, _) in self.records.entries.drain() {
            self.runs.insert(shape, RUNS_BEFORE);
        }
    }
}

/// Recorded steps by shape.
#[derive(Default)]
pub(super) struct Graphs(Records<LaunchGraph>);

impl Graphs {
    /// Forgets all: to be called before any memory of the stage moves.
    pub fn forget(&mut self) {
        self.0.forget();
    }

    /// Runs a step whose kernels `launch` starts: from a record where its shape has come often
    /// enough, else kernel by kernel.
    ///
    /// # Safety
    /// `launch` always uses the same memory for a shape, until [`Graphs::forget`].
    pub unsafe fn run(
        &mut self,
        gpu: &Gpu,
        shape: StepShape,
        launch: impl Fn() -> Result<(), ExecutorError>,
    ) -> Result<(), ExecutorError> {
        let started = match self.0.start(&shape) {
            Start::Launch => return launch(),
            Start::Record => {
                // What other threads ask of the driver can spoil a record, and memory may
                // lack: a later step makes it.
                let Some(graph) = gpu.record(&launch)? else { return launch() };
                // SAFETY: it was recorded with the stage's memory, which is there.
                let started = unsafe { gpu.replay(&graph) };
                self.0.keep(shape, graph);
                started
            }
            // SAFETY: the memory is that of the record, as the caller promises.
            Start::Replay(graph) => unsafe { gpu.replay(graph) },
        };
        match started {
            // The driver brings a record to the GPU where it is first started. Without room for it
            // nothing of the step was.
            Err(GpuError::OutOfMemory { .. }) => {
                self.0.drop_record(&shape);
                launch()
            }
            started => Ok(started?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(tokens: usize) -> StepShape {
        StepShape { tokens, rows: 1, positions_max: 256, is_each_alone: true, streamed: 0 }
    }

    /// Has a step of a shape; whether it came from a record.
    fn step(records: &mut Records<usize>, tokens: usize) -> bool {
        match records.start(&shape(tokens)) {
            Start::Launch => false,
            Start::Record => {
                records.keep(shape(tokens), tokens);
                false
            }
            Start::Replay(record) => {
                assert_eq!(*record, tokens);
                true
            }
        }
    }

    #[test]
    fn a_shape_is_recorded_when_it_comes_back_often_enough() {
        let mut records = Records::<usize>::default();
        for _ in 0..RUNS_BEFORE {
            assert_eq!(records.start(&shape(1)), Start::Launch);
        }
        // A record that was spoilt is made the next time.
        assert_eq!(records.start(&shape(1)), Start::Record);
        assert_eq!(records.start(&shape(1)), Start::Record);
        records.keep(shape(1), 7);
        assert_eq!(records.start(&shape(1)), Start::Replay(&7));
        assert_eq!(records.start(&shape(2)), Start::Launch, "another shape");
        records.drop_record(&shape(1));
        assert_eq!(records.start(&shape(1)), Start::Launch, "as if for the first time");
    }

    #[test]
    fn shapes_that_come_once_drop_no_record() {
        let mut records = Records::<usize>::default();
        (0..=RUNS_BEFORE).for_each(|_| assert!(!step(&mut records, 1)));
        for tokens in 2..10 * SHAPES_MAX {
            assert!(!step(&mut records, tokens));
        }
        assert!(step(&mut records, 1), "its record is there");
        assert_eq!(records.records.entries.len(), 1);
        assert_eq!(records.runs.entries.len(), SHAPES_MAX);
    }

    #[test]
    fn of_too_many_records_those_go_that_were_used_longest_ago() {
        let mut records = Records::<usize>::default();
        for tokens in 1..=2 * RECORDS_MAX {
            (0..=RUNS_BEFORE).for_each(|_| assert!(!step(&mut records, tokens)));
            // One that decodes all the time.
            let is_first = tokens == 1;
            assert!(step(&mut records, 1) || is_first, "{tokens}");
        }
        let kept = |tokens| records.records.entries.contains_key(&shape(tokens));
        assert_eq!(records.records.entries.len(), RECORDS_MAX);
        let first = RECORDS_MAX + 2;
        assert!(kept(1) && (first..=2 * RECORDS_MAX).all(kept) && !(2..first).any(kept));
    }

    #[test]
    fn after_memory_has_moved_records_are_made_at_once() {
        let mut records = Records::<usize>::default();
        (0..=RUNS_BEFORE).for_each(|_| assert!(!step(&mut records, 1)));
        records.forget();
        assert_eq!(records.records.entries.len(), 0);
        assert_eq!(records.start(&shape(1)), Start::Record);
    }
}
