//! The executor actor: it answers for one thread that owns the stage and runs the plans that the
//! engine loop hands over. A thread that dies takes the KV with it, never the weights.

use super::FaultPoint;
use super::shared::Shared;
use super::stage_fault::StageFault;
use super::threads::{StopOnDrop, StopSignal, stop_signal};
use crate::placement::Phase;
use crate::step::{StepOutput, StepPlan};
use crossbeam_channel::{Receiver, Sender, bounded, select_biased};
use ractor::{Actor, ActorProcessingErr, ActorRef};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What the executor actor hears.
#[derive(Debug)]
pub(super) enum ExecutorMessage {
    /// Its thread died.
    ThreadDied(String),
}

/// A plan on its way down, with the buffers for the answer.
pub(super) struct Order {
    /// Never repeated, so that the answer to a dead engine loop's order is not taken for another.
    pub(super) ticket: u64,
    /// Which stage's KV the plan speaks of.
    pub(super) generation: u64,
    pub(super) plan: Box<StepPlan>,
    pub(super) output: Box<StepOutput>,
}

/// What comes back.
pub(super) enum StepResult {
    Done(Order),
    /// The order was for the KV of an earlier stage; nothing was run.
    Stale(Order),
    /// The stage died, and the order in its hands with it.
    Lost,
}

/// Engine loop to executor and back. Outlives both.
pub(super) struct StepLane {
    pub(super) orders: (Sender<Order>, Receiver<Order>),
    pub(super) results: (Sender<StepResult>, Receiver<StepResult>),
    generation: AtomicU64,
    tickets: AtomicU64,
}

impl Default for StepLane {
    fn default() -> Self {
        Self {
            // One order at a time is in flight; a dead engine loop's may lie before it.
            orders: bounded(2),
            results: bounded(8),
            generation: AtomicU64::new(1),
            tickets: AtomicU64::new(1),
        }
    }
}

impl StepLane {
    /// Which stage's KV is the living one. Grows when a stage dies, before anyone is told.
    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::SeqCst)
    }

    pub(super) fn next_ticket(&self) -> u64 {
        self.tickets.fetch_add(1, Ordering::SeqCst)
    }

    fn stage_is_gone(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        // A full lane has enough losses in it: the generation says it all.
        let _ = self.results.0.try_send(StepResult::Lost);
    }
}

/// Counts a stage as gone when its thread leaves, however it leaves.
struct StageLife<'a>(&'a Shared);

impl Drop for StageLife<'_> {
    fn drop(&mut self) {
        // Before the loss is told: no copy of this stage's blocks is under way then.
        self.0.swaps.stage_is_gone();
        self.0.steps.stage_is_gone();
    }
}

/// The thread's life. A GPU that is gone for this process ends the engine: no other stage could be
/// made, and the weights lie there. So does too little memory for a stage.
fn live(shared: &Shared, stop: &StopSignal) -> Result<(), String> {
    // Gone is told after the engine's end: then no request takes it for a crash of its own.
    let _life = StageLife(shared);
    run_stage(shared, stop).map_err(|fault| {
        let loaded = shared.loaded.get();
        let end = loaded.and_then(|loaded| {
            let restarts = shared.restarts.executor.get();
            fault.end(restarts, Phase::Starting, (&loaded.placement, &shared.config))
        });
        end.into_iter().for_each(|error| shared.die(error));
        fault.to_string()
    })
}

fn run_stage(shared: &Shared, stop: &StopSignal) -> Result<(), StageFault> {
    let lane = &shared.steps;
    let generation = lane.generation();
    let loaded = shared.loaded.get().ok_or("no model is loaded")?;
    shared.faults.pass(FaultPoint::ExecutorBeforeStart);
    // Before the stage starts threads of its own, which run where this one may.
    loaded.keep_near_gpu();
    let mut stage = loaded.stages.start()?;
    shared.swaps.stage_starts(stage.tiers())?;
    shared.become_ready();
    loop {
        let mut order = select_biased! {
            recv(stop) -> _ => return Ok(()),
            recv(lane.orders.1) -> order => order.map_err(|_| "the step lane is gone")?,
        };
        let result = if order.generation == generation {
            shared.faults.pass(FaultPoint::ExecutorBeforeRun);
            order.output.clear();
            shared.op_clock.run(&mut *stage, &order.plan, &mut order.output)?;
            shared.faults.pass(FaultPoint::ExecutorAfterRun);
            StepResult::Done(order)
        } else {
            StepResult::Stale(order)
        };
        // Full only if nobody listens any more: then the answer is of no use.
        let _ = lane.results.0.try_send(result);
    }
}

/// The actor.
pub(super) struct Executor;

impl Actor for Executor {
    type Msg = ExecutorMessage;
    type State = StopOnDrop;
    type Arguments = Arc<Shared>;

    async fn pre_start(
        &self,
        myself: ActorRef<Self::Msg>,
        shared: Arc<Shared>,
    ) -> Result<StopOnDrop, ActorProcessingErr> {
        let (guard, stop) = stop_signal();
        let died = move |reason| {
            // The actor may be gone already; then its thread's death is nobody's news.
            let _ = myself.cast(ExecutorMessage::ThreadDied(reason));
        };
        let body_shared = Arc::clone(&shared);
        tokio::task::block_in_place(|| {
            shared.threads.start("tandem-executor", died, move || live(&body_shared, &stop))
        })?;
        Ok(guard)
    }

    async fn handle(
        &self,
        _myself: ActorRef<Self::Msg>,
        ExecutorMessage::ThreadDied(reason): Self::Msg,
        _state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        Err(reason.into())
    }
}
