//! Recorded steps: what a step of some shape launches, as one launch.

use crate::executor::ExecutorError;
use crate::placement::{GRAPHS_MAX, recorded_bytes};
use std::collections::HashMap;
use tandem_kernels::{Gpu, GpuError, LaunchGraph};

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

/// Something of each of the latest shapes.
struct Latest<T> {
    /// With the number of its last use.
    entries: HashMap<StepShape, (T, u64)>,
    uses: u64,
}

impl<T> Latest<T> {
    fn new(most: usize) -> Self {
        Self { entries: HashMap::with_capacity(most), uses: 0 }
    }

    /// That of a shape, which is used now.
    fn get(&mut self, shape: &StepShape) -> Option<&mut T> {
        self.uses += 1;
        let (value, used) = self.entries.get_mut(shape)?;
        *used = self.uses;
        Some(value)
    }

    fn insert(&mut self, shape: StepShape, value: T) {
        self.uses += 1;
        self.entries.insert(shape, (value, self.uses));
    }

    /// Drops the one that was used longest ago.
    fn drop_oldest(&mut self) -> Option<T> {
        let oldest = self.entries.iter().min_by_key(|(_, (_, used))| *used);
        let shape = oldest.map(|(shape, _)| *shape)?;
        self.entries.remove(&shape).map(|(value, _)| value)
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

/// What is known of a shape without a record.
enum Seen {
    /// It came so often.
    Times(u32),
    /// There is no room for its record.
    TooLarge,
}

impl Latest<Seen> {
    /// Remembers a shape, in the place of the one that came longest ago where there are too many.
    fn remember(&mut self, shape: StepShape, seen: Seen) {
        if self.entries.len() >= SHAPES_MAX && !self.entries.contains_key(&shape) {
            self.drop_oldest();
        }
        self.insert(shape, seen);
    }
}

/// Which shapes have a record, and how often others came.
struct Records<R> {
    /// With the bytes of the GPU's memory that each takes, at most.
    records: Latest<(R, u64)>,
    others: Latest<Seen>,
    /// Bytes of all records, and those that they may take.
    used_bytes: u64,
    bytes_max: u64,
}

impl<R> Records<R> {
    fn new(bytes_max: u64) -> Self {
        let (records, others) = (Latest::new(GRAPHS_MAX), Latest::new(SHAPES_MAX));
        Self { records, others, used_bytes: 0, bytes_max }
    }

    /// How the next step, of this shape, is started.
    fn start(&mut self, shape: &StepShape) -> Start<'_, R> {
        if let Some((record, _)) = self.records.get(shape) {
            return Start::Replay(record);
        }
        match self.others.get(shape) {
            Some(Seen::TooLarge) => Start::Launch,
            Some(Seen::Times(times)) if *times >= RUNS_BEFORE => Start::Record,
            Some(Seen::Times(times)) => {
                *times += 1;
                Start::Launch
            }
            None => {
                self.others.remember(*shape, Seen::Times(1));
                Start::Launch
            }
        }
    }

    /// That a shape could not be recorded now: it comes as if for the first time.
    fn put_off(&mut self, shape: StepShape) {
        self.others.remember(shape, Seen::Times(0));
    }

    /// Keeps a record of so many bytes, in the place of those that were used longest ago where not
    /// all have room.
    fn keep(&mut self, shape: StepShape, record: R, bytes: u64) {
        self.drop_record(&shape);
        if bytes > self.bytes_max {
            return self.others.remember(shape, Seen::TooLarge);
        }
        self.others.entries.remove(&shape);
        let is_full = |records: &Self| {
            records.used_bytes + bytes > records.bytes_max
                || records.records.entries.len() >= GRAPHS_MAX
        };
        while is_full(self)
            && let Some((_, dropped)) = self.records.drop_oldest()
        {
            self.used_bytes -= dropped;
        }
        self.used_bytes += bytes;
        self.records.insert(shape, (record, bytes));
    }

    /// Drops the record of a shape, which then comes as if for the first time.
    fn drop_record(&mut self, shape: &StepShape) {
        if let Some(((_, bytes), _)) = self.records.entries.remove(shape) {
            self.used_bytes -= bytes;
        }
    }

    /// Drops all records. Their shapes get another when they come next.
    fn forget(&mut self) {
        self.used_bytes = 0;
        for (shape, _) in self.records.entries.drain() {
            self.others.remember(shape, Seen::Times(RUNS_BEFORE));
        }
    }
}

/// Recorded steps by shape.
pub(super) struct Graphs(Records<LaunchGraph>);

impl Default for Graphs {
    /// Without room for any, and without memory: it stands for those that a step has taken.
    fn default() -> Self {
        let (records, others) = (Latest::new(0), Latest::new(0));
        Self(Records { records, others, used_bytes: 0, bytes_max: 0 })
    }
}

impl Graphs {
    /// Room for records of so many bytes.
    pub fn new(bytes_max: u64) -> Self {
        Self(Records::new(bytes_max))
    }

    /// Bytes of the GPU's memory that records take, at most.
    pub fn bytes(&self) -> u64 {
        self.0.used_bytes
    }

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
                let Some(graph) = gpu.record(&launch)? else {
                    self.0.put_off(shape);
                    return launch();
                };
                // SAFETY: it was recorded with the stage's memory, which is there.
                let started = unsafe { gpu.replay(&graph) };
                let bytes = recorded_bytes(graph.launches());
                self.0.keep(shape, graph, bytes);
                started
            }
            // SAFETY: the memory is that of the record, as the caller promises.
            Start::Replay(graph) => unsafe { gpu.replay(graph) },
        };
        match started {
            // Without room for what a record takes when it is started nothing of the step was.
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

    fn records() -> Records<usize> {
        Records::new(u64::MAX)
    }

    /// Has a step of a shape; whether it came from a record.
    fn step(records: &mut Records<usize>, tokens: usize) -> bool {
        match records.start(&shape(tokens)) {
            Start::Launch => false,
            Start::Record => {
                records.keep(shape(tokens), tokens, 1);
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
        let mut records = records();
        for _ in 0..RUNS_BEFORE {
            assert_eq!(records.start(&shape(1)), Start::Launch);
        }
        // A record that was spoilt is made the next time.
        assert_eq!(records.start(&shape(1)), Start::Record);
        assert_eq!(records.start(&shape(1)), Start::Record);
        records.put_off(shape(1));
        for _ in 0..RUNS_BEFORE {
            assert_eq!(records.start(&shape(1)), Start::Launch, "put off");
        }
        assert_eq!(records.start(&shape(1)), Start::Record);
        records.keep(shape(1), 7, 1);
        assert_eq!(records.start(&shape(1)), Start::Replay(&7));
        assert_eq!(records.start(&shape(2)), Start::Launch, "another shape");
        records.drop_record(&shape(1));
        assert_eq!(records.start(&shape(1)), Start::Launch, "as if for the first time");
    }

    #[test]
    fn shapes_that_come_once_drop_no_record() {
        let mut records = records();
        (0..=RUNS_BEFORE).for_each(|_| assert!(!step(&mut records, 1)));
        for tokens in 2..10 * SHAPES_MAX {
            assert!(!step(&mut records, tokens));
        }
        assert!(step(&mut records, 1), "its record is there");
        assert_eq!(records.records.entries.len(), 1);
        assert_eq!(records.others.entries.len(), SHAPES_MAX);
    }

    #[test]
    fn of_too_many_records_those_go_that_were_used_longest_ago() {
        let mut records = records();
        for tokens in 1..=2 * GRAPHS_MAX {
            (0..=RUNS_BEFORE).for_each(|_| assert!(!step(&mut records, tokens)));
            // One that decodes all the time.
            let is_first = tokens == 1;
            assert!(step(&mut records, 1) || is_first, "{tokens}");
        }
        let kept = |tokens| records.records.entries.contains_key(&shape(tokens));
        assert_eq!(records.records.entries.len(), GRAPHS_MAX);
        let first = GRAPHS_MAX + 2;
        assert!(kept(1) && (first..=2 * GRAPHS_MAX).all(kept) && !(2..first).any(kept));
    }

    #[test]
    fn after_memory_has_moved_records_are_made_at_once() {
        let mut records = records();
        (0..=RUNS_BEFORE).for_each(|_| assert!(!step(&mut records, 1)));
        records.forget();
        assert_eq!(records.records.entries.len(), 0);
        assert_eq!(records.start(&shape(1)), Start::Record);
    }
    #[test]
    fn records_take_no_more_than_their_room() {
        let mut records = Records::new(10);
        for (tokens, bytes, used) in [(1, 4, 4), (2, 4, 8), (3, 4, 8), (4, 11, 8), (5, 10, 10)] {
            (0..RUNS_BEFORE).for_each(|_| assert_eq!(records.start(&shape(tokens)), Start::Launch));
            assert_eq!(records.start(&shape(tokens)), Start::Record);
            records.keep(shape(tokens), tokens, bytes);
            assert_eq!(records.used_bytes, used, "{tokens}");
        }
        assert_eq!(records.start(&shape(4)), Start::Launch, "too large");
        assert_eq!(records.start(&shape(5)), Start::Replay(&5));
        records.forget();
        assert_eq!(records.used_bytes, 0);
    }
}
