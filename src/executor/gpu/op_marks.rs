//! How long each op of a program takes on a GPU, by marks between them. Steps are then launched op
//! by op, so these times hold what a recorded step saves: starts, and gaps between kernels that
//! would overlap. What the host does between two marks counts for what lies between them.

use super::GpuStage;
use crate::executor::ExecutorError;
use crate::executor::op_times::{OpTime, by_kind, labels};
use crate::executor::program::Program;
use std::time::Duration;
use tandem_kernels::{Gpu, Mark};

/// What comes before the first op: copies of KV blocks, and what the host prepares and sends.
const INPUTS: &str = "inputs";
/// All else of a step, before its first mark and behind its last.
const HOST: &str = "host";

/// Marks of one step, and the times of those that were counted.
pub(super) struct OpMarks {
    /// At the start, behind the inputs, behind each op, and at the end, which is the last op's.
    marks: Vec<Mark>,
    /// Of what lies between one mark and the next.
    labels: Vec<&'static str>,
    work_us: Vec<f64>,
    host_us: f64,
}

impl OpMarks {
    fn new(gpu: &Gpu, program: &Program) -> Result<Self, ExecutorError> {
        let ops = labels(program);
        let mut labels: Vec<_> = std::iter::once(INPUTS).chain(ops).collect();
        labels.extend(labels.last().copied());
        let marks = (0..=labels.len()).map(|_| gpu.mark()).collect::<Result<_, _>>()?;
        Ok(Self { marks, work_us: vec![0.0; labels.len()], labels, host_us: 0.0 })
    }

    fn times(&self) -> Vec<OpTime> {
        let works = self.labels.iter().zip(&self.work_us);
        let all = works.chain([(&HOST, &self.host_us)]);
        by_kind(all.map(|(op, us)| OpTime { op, work_ns: 1e3 * us, wait_ns: 0.0 }))
    }
}

impl GpuStage {
    /// From now on steps are launched op by op, and every op's time is counted, from 0.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn start_op_times(&mut self) -> Result<(), ExecutorError> {
        self.op_marks = Some(OpMarks::new(self.weights.gpu(), self.weights.program())?);
        Ok(())
    }

    /// Ends the counting; the times since [`GpuStage::start_op_times`], if it was called.
    pub fn take_op_times(&mut self) -> Option<Vec<OpTime>> {
        self.op_marks.take().map(|marks| marks.times())
    }

    /// Marks the start of a step.
    pub(super) fn mark_start(&self) -> Result<(), ExecutorError> {
        self.mark(0)
    }

    /// Marks that the inputs are on their way.
    pub(super) fn mark_inputs(&self) -> Result<(), ExecutorError> {
        self.mark(1)
    }

    /// Marks the end of an op of the program.
    pub(super) fn mark_op(&self, op: usize) -> Result<(), ExecutorError> {
        self.mark(2 + op)
    }

    fn mark(&self, index: usize) -> Result<(), ExecutorError> {
        match &self.op_marks {
            Some(marks) => Ok(self.weights.gpu().mark_again(&marks.marks[index])?),
            None => Ok(()),
        }
    }

    /// Counts a step that has come to its end, and took so long in all.
    pub(super) fn count_ops(&mut self, took: Duration) -> Result<(), ExecutorError> {
        let gpu = self.weights.gpu();
        let Some(OpMarks { marks, work_us, host_us, .. }) = &mut self.op_marks else {
            return Ok(());
        };
        let (Some(first), Some(last)) = (marks.first(), marks.last()) else { return Ok(()) };
        gpu.mark_again(last)?;
        gpu.synchronize()?;
        for (pair, us) in marks.windows(2).zip(work_us) {
            *us += pair[0].us_until(&pair[1])?;
        }
        *host_us += (took.as_secs_f64() * 1e6 - first.us_until(last)?).max(0.0);
        Ok(())
    }
}
