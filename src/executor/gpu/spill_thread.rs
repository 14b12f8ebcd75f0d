//! The thread on which the CPU computes what GPUs have spilled: one for all stages of a model, with
//! one pool of workers. Inside a step it meets each GPU by flags in memory that both see, so it has
//! nothing to do with the driver; it gets an order for each stage of a step, in the order of the
//! stages, as the stages follow each other.

use super::order_thread::{OrderResult, OrderThread};
use super::weights::{GpuWeights, width_of};
use crate::executor::program::{Buffer, Op, Program, SpilledUnit};
use crate::executor::spill::{CrossedPieces, SpillStep};
use crate::executor::{ExecutorError, Stage, StageOptions, Weights};
use crate::placement::CROSSING_TOKENS_MAX;
use crate::step::StepPlan;
use crate::units::TokenId;
use crossbeam_channel::{Receiver, RecvError, Sender, TryRecvError};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tandem_kernels::Crossing;

/// How long workers stay awake between two steps: the rest of a step on the GPU, and what the host
/// does between steps. A service that nobody asks anything parks them after it.
const AWAKE: Duration = Duration::from_millis(3);

/// The CPU's part of one step of a stage.
pub(super) struct SpillOrder {
    /// The stage's place among those with spilled weights.
    pub lane: usize,
    /// The number that events are counted from.
    pub base: u32,
    pub tokens: usize,
    /// By layer with spilled weights: whether the CPU computes its units.
    pub is_here: Arc<[bool]>,
}

/// What joins the CPU's stage to one of the GPUs'.
struct Lane {
    /// Used by the GPU in the order of its stream, and by the thread in the order of its orders.
    crossing: Crossing,
    /// Of all units the first one of the stage.
    first: SpilledUnit,
    /// Tokens whose rows cross at once.
    tokens_max: usize,
}

/// What both threads hold.
struct Shared {
    lanes: Vec<Lane>,
    /// Set when a step can't come to its end: workers that wait for a GPU end.
    is_abandoned: Arc<AtomicBool>,
    wait_max: Duration,
}

impl Shared {
    /// Ends all waits of both sides: the step's rows have no meaning then.
    fn give_up(&self) {
        self.is_abandoned.store(true, Ordering::Release);
        self.lanes.iter().for_each(|lane| lane.crossing.host().release());
    }
}

/// Gives up when its thread leaves, however it leaves.
struct Leaving<'a>(&'a Shared);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.0.give_up();
    }
}

/// A running thread.
pub(super) struct SpillThread {
    // Dropped before what it works on.
    thread: OrderThread<SpillOrder, Duration>,
    shared: Arc<Shared>,
}

impl SpillThread {
    /// Starts the thread for the stages of a model, and has it make its own; none where they have
    /// spilled nothing.
    ///
    /// # Errors
    /// Memory or threads refused, or what the driver refuses.
    pub fn start(
        stages: &[Arc<GpuWeights>],
        options: &StageOptions,
    ) -> Result<Option<Arc<Self>>, ExecutorError> {
        let spilling = || stages.iter().filter_map(|stage| Some((stage, stage.spilled()?)));
        let Some((of_gpu, from)) = spilling().next() else { return Ok(None) };
        // In a step the GPUs wait for the host, so nothing in it may wait for a GPU.
        stages.iter().try_for_each(|stage| stage.gpu().load_kernels())?;
        let widths = spilling().map(|(stage, _)| crossing_widths(stage.program()));
        let widths = widths.reduce(|a, b| [a[0].max(b[0]), a[1].max(b[1])]).unwrap_or_default();
        let lanes = spilling().map(|(stage, spilled)| {
            // Where weights can't stream wider steps cross as well, in pieces.
            let tokens_max = options.step_tokens_max.min(CROSSING_TOKENS_MAX);
            let crossing = stage.gpu().crossing(widths.map(|width| tokens_max * width))?;
            Ok(Lane { crossing, first: spilled.first(), tokens_max })
        });
        let lanes = lanes.collect::<Result<Vec<_>, ExecutorError>>()?;
        let step_tokens_max = lanes.iter().map(|lane| lane.tokens_max).max().unwrap_or(0);
        let mut options = StageOptions { step_tokens_max, ..from.stage_options(options) };
        options.pool.spin_us = options.pool.spin_us.max(AWAKE.as_micros() as u64);
        let (is_abandoned, wait_max) = (Arc::default(), of_gpu.gpu().wait_max());
        let shared = Arc::new(Shared { lanes, is_abandoned, wait_max });
        let (body_shared, weights) = (Arc::clone(&shared), Arc::clone(from.weights()));
        let orders_max = shared.lanes.len();
        let thread = OrderThread::start(("tandem-spill", orders_max), move |orders, results| {
            serve(&body_shared, (weights, &options), orders, results);
        })?;
        let started = Self { thread, shared };
        // That the stage is made.
        started.thread.finish()?;
        Ok(Some(Arc::new(started)))
    }

    /// Orders, each for the CPU's part of a step of a stage, and how long they took. Where one
    /// failed, the GPUs have got rows of no meaning.
    pub fn orders(&self) -> &OrderThread<SpillOrder, Duration> {
        &self.thread
    }

    /// Where the rows of a lane cross.
    pub fn crossing(&self, lane: usize) -> &Crossing {
        &self.shared.lanes[lane].crossing
    }

    /// Tokens whose rows cross there at once.
    pub fn tokens_max(&self, lane: usize) -> usize {
        self.shared.lanes[lane].tokens_max
    }

    /// Set when a step can't come to its end, for all that wait in it.
    pub fn is_abandoned(&self) -> &Arc<AtomicBool> {
        &self.shared.is_abandoned
    }
}

impl Drop for SpillThread {
    fn drop(&mut self) {
        // Before the thread is waited for.
        self.shared.give_up();
    }
}

/// The thread's life: makes the stage, answers, and answers each order.
fn serve(
    shared: &Shared,
    (weights, options): (Arc<Weights>, &StageOptions),
    orders: &Receiver<SpillOrder>,
    results: &Sender<OrderResult<Duration>>,
) {
    let _leaving = Leaving(shared);
    let made = Stage::restart(weights, options).and_then(|mut stage| {
        stage.warm_up(options.huge_pages())?;
        Ok(stage)
    });
    let mut stage = match made {
        Ok(stage) => stage,
        Err(error) => {
            let _ = results.send(Err(error));
            return;
        }
    };
    if results.send(Ok(Duration::ZERO)).is_err() {
        return;
    }
    let mut plan = StepPlan::default();
    while let Ok(SpillOrder { lane, base, tokens, is_here }) = next(orders) {
        let started = Instant::now();
        let Lane { crossing, first, tokens_max } = &shared.lanes[lane];
        let waits = (&*shared.is_abandoned, shared.wait_max);
        let units = (base, *first, &*is_here);
        let pieces = CrossedPieces::of(tokens, *tokens_max);
        // SAFETY: this thread alone works on the host's side, one step after the other, and the
        // GPU of the lane, the only one that uses it, keeps to the order of events.
        let step = unsafe { SpillStep::new(crossing.host(), pieces, units, waits) };
        let result = compute(&mut stage, &mut plan, (step, pieces));
        if result.is_err() {
            shared.give_up();
        }
        if results.send(result.map(|()| started.elapsed())).is_err() {
            return;
        }
    }
}

/// Computes a step: at once, or where its rows cross in several pieces, each unit piece by piece.
fn compute(
    stage: &mut Stage,
    plan: &mut StepPlan,
    (step, pieces): (SpillStep<'_>, CrossedPieces),
) -> Result<(), ExecutorError> {
    let weights = Arc::clone(stage.weights());
    let mut run = |step, piece| {
        plan.tokens.resize(pieces.tokens(piece).len(), TokenId(0));
        stage.run_spilled(plan, step)
    };
    if pieces.count() == 1 {
        return run(step, 0);
    }
    let units = weights.program().ops.iter().filter_map(|op| match op {
        Op::SpillStart { unit, .. } if step.computes(*unit) => Some(*unit),
        _ => None,
    });
    for unit in units {
        (0..pieces.count()).try_for_each(|piece| run(step.of_piece(unit, piece), piece))?;
    }
    Ok(())
}

/// The next order. The thread stays awake for a while, as its workers do.
fn next(orders: &Receiver<SpillOrder>) -> Result<SpillOrder, RecvError> {
    let started = Instant::now();
    while started.elapsed() < AWAKE {
        match orders.try_recv() {
            Ok(order) => return Ok(order),
            Err(TryRecvError::Disconnected) => return Err(RecvError),
            Err(TryRecvError::Empty) => std::hint::spin_loop(),
        }
    }
    orders.recv()
}

/// Elements of a token that cross to the CPU and back. The CPU may have a second row of queries,
/// keys and values (`buffers.rs`).
pub(super) fn crossing_widths(program: &Program) -> [usize; 2] {
    let widths = |op: &Op| match op {
        Op::SpillStart { input, .. } => [width_of(program, *input), 0],
        Op::SpillEnd { output: Buffer::Heads, .. } => [0, 2 * width_of(program, Buffer::Heads)],
        Op::SpillEnd { output, .. } => [0, width_of(program, *output)],
        _ => [0; 2],
    };
    let most = |[a, b]: [usize; 2], [c, d]: [usize; 2]| [a.max(c), b.max(d)];
    program.ops.iter().map(widths).fold([0; 2], most)
}
