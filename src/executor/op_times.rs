//! How long each op of a program takes: on every worker of a CPU the time that it works and the
//! time that it waits for the others (`gpu/op_marks.rs` has a GPU's). A stage without it pays one
//! branch per op.

use super::program::{Buffer, Op, Program};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Time spent in all ops of one kind, the mean over the workers, or a GPU's: the sum over all kinds
/// is the time of the steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OpTime {
    /// Which ops.
    pub op: &'static str,
    /// Nanoseconds of work.
    pub work_ns: f64,
    /// Nanoseconds at barriers: what uneven shares and the barrier itself cost.
    pub wait_ns: f64,
}

/// One op on one worker. Only that worker writes it.
#[derive(Debug, Default)]
struct Cell {
    work_ns: AtomicU64,
    wait_ns: AtomicU64,
}

/// A worker's cells, on cache lines of their own.
#[derive(Debug)]
#[repr(align(128))]
struct WorkerCells {
    /// By index of the op in the program.
    ops: Vec<Cell>,
    /// Waits inside the op that runs.
    waited_ns: AtomicU64,
}

/// The clocks of a stage's workers.
#[derive(Debug)]
pub(super) struct OpClocks {
    labels: Vec<&'static str>,
    workers: Vec<WorkerCells>,
}

fn add(cell: &AtomicU64, time: Duration) {
    // There is one writer, so nothing is lost between the load and the store.
    let sum = cell.load(Ordering::Relaxed) + time.as_nanos() as u64;
    cell.store(sum, Ordering::Relaxed);
}

impl OpClocks {
    pub fn new(program: &Program, threads: usize) -> Self {
        let labels = labels(program);
        let worker = |_| WorkerCells {
            ops: labels.iter().map(|_| Cell::default()).collect(),
            waited_ns: AtomicU64::new(0),
        };
        let workers = (0..threads).map(worker).collect();
        Self { labels, workers }
    }

    /// Counts a wait of a worker inside an op.
    pub fn wait(&self, worker: usize, wait: impl FnOnce()) {
        let started = Instant::now();
        wait();
        add(&self.workers[worker].waited_ns, started.elapsed());
    }

    /// Counts an op that has just ended on a worker, its waits included in `took`.
    pub fn ended(&self, worker: usize, op: usize, took: Duration) {
        let worker = &self.workers[worker];
        let waited = Duration::from_nanos(worker.waited_ns.swap(0, Ordering::Relaxed));
        add(&worker.ops[op].wait_ns, waited);
        add(&worker.ops[op].work_ns, took.saturating_sub(waited));
    }

    /// Sums by kind, in the program's order, in means over the workers.
    pub fn times(&self) -> Vec<OpTime> {
        let mean = |cell: &dyn Fn(&WorkerCells) -> u64| {
            self.workers.iter().map(cell).sum::<u64>() as f64 / self.workers.len() as f64
        };
        let of = |(index, op): (usize, &&'static str)| OpTime {
            op,
            work_ns: mean(&|worker| worker.ops[index].work_ns.load(Ordering::Relaxed)),
            wait_ns: mean(&|worker| worker.ops[index].wait_ns.load(Ordering::Relaxed)),
        };
        by_kind(self.labels.iter().enumerate().map(of))
    }
}

/// Sums of the times that have one name, in the order in which the names come.
pub(super) fn by_kind(all: impl Iterator<Item = OpTime>) -> Vec<OpTime> {
    let mut times: Vec<OpTime> = Vec::new();
    for OpTime { op, work_ns, wait_ns } in all {
        match times.iter_mut().find(|time| time.op == op) {
            Some(time) => {
                (time.work_ns, time.wait_ns) = (time.work_ns + work_ns, time.wait_ns + wait_ns);
            }
            None => times.push(OpTime { op, work_ns, wait_ns }),
        }
    }
    times
}

/// What an op is called in reports.
fn label(op: &Op) -> &'static str {
    match op {
        Op::Embed { .. } => "embed",
        Op::Receive => "receive",
        Op::Norm { .. } => "norm",
        Op::Project { input: Buffer::Attended, .. } => "attention output",
        Op::Project { input: Buffer::Hidden, .. } => "down",
        Op::Project { .. } => "query, key, value",
        Op::Rotate { .. } => "rotate, write KV",
        Op::Attend { .. } => "attention",
        Op::Gate { .. } => "gate, up",
        Op::Route { .. } => "route",
        Op::GateExperts { .. } => "experts' gate, up",
        Op::DownExperts { .. } => "experts' down",
        Op::SpillStart { .. } => TO_CPU,
        Op::SpillEnd { .. } => FROM_CPU,
        Op::Send { .. } => "send",
        Op::Select { .. } => "last norm",
        Op::Logits { .. } => "logits, sampling",
    }
}

/// What each op of a program is called in reports, where those of spilled units are told from
/// others: a GPU that computes one waits for its weights meanwhile.
pub(super) fn labels(program: &Program) -> Vec<&'static str> {
    let mut is_spilled = false;
    let named = |op: &Op| {
        is_spilled = match op {
            Op::SpillStart { .. } => true,
            Op::SpillEnd { .. } => false,
            _ => is_spilled,
        };
        match label(op) {
            "attention output" if is_spilled => "spilled attention output",
            "down" if is_spilled => "spilled down",
            "query, key, value" if is_spilled => "spilled query, key, value",
            "gate, up" if is_spilled => "spilled gate, up",
            "route" if is_spilled => "spilled route",
            "experts' gate, up" if is_spilled => "spilled experts' gate, up",
            "experts' down" if is_spilled => "spilled experts' down",
            other => other,
        }
    };
    program.ops.iter().map(named).collect()
}

impl OpTime {
    /// Whether it is spent on spilled weights, by a GPU that waits for what the CPU makes of them
    /// or for themselves.
    pub fn is_spilled(&self) -> bool {
        self.op.starts_with("spilled ") || self.op == TO_CPU || self.op == FROM_CPU
    }
}

const TO_CPU: &str = "rows to the CPU";
const FROM_CPU: &str = "rows from the CPU";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_are_told_from_work_and_kinds_are_added_up() {
        let worker = |_| WorkerCells {
            ops: (0..3).map(|_| Cell::default()).collect(),
            waited_ns: AtomicU64::new(0),
        };
        let labels = vec!["norm", "down", "norm"];
        let clocks = OpClocks { labels, workers: (0..2).map(worker).collect() };
        clocks.workers[0].waited_ns.store(30, Ordering::Relaxed);
        clocks.ended(0, 0, Duration::from_nanos(100));
        clocks.ended(1, 0, Duration::from_nanos(50));
        clocks.ended(0, 1, Duration::from_nanos(8));
        clocks.ended(1, 2, Duration::from_nanos(10));
        clocks.wait(1, || {});
        clocks.ended(1, 1, Duration::ZERO);
        let [norm, down] = clocks.times()[..] else { panic!("two kinds") };
        assert_eq!((norm.op, norm.work_ns, norm.wait_ns), ("norm", 65.0, 15.0));
        assert_eq!((down.op, down.work_ns), ("down", 4.0));
    }
}
