//! The root of the tree: starts the other actors linked to itself, restarts the dead, and gives the
//! engine up when one dies too often. It keeps nothing that must survive: that is in
//! [`super::shared::Shared`], so that the supervisor can be replaced as well.

use super::executor::Executor;
use super::kv_swap::KvSwap;
use super::restarts::{RestartWindow, Verdict};
use super::scheduler::SchedulerActor;
use super::shared::Shared;
use super::tokenizer::Tokenizer;
use super::{EngineError, FaultPoint};
use crate::telemetry::Counter;
use ractor::{Actor, ActorCell, ActorId, ActorProcessingErr, ActorRef, SpawnErr, SupervisionEvent};
use std::collections::HashMap;
use std::sync::Arc;

/// The supervisor hears of its children's lives only; it has no messages of its own.
#[derive(Debug)]
pub(super) enum SupervisorMessage {}

/// Which child.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Child {
    Executor,
    KvSwap,
    Scheduler,
    Tokenizer(usize),
}

impl Child {
    fn name(self) -> String {
        match self {
            Self::Executor => "executor".into(),
            Self::KvSwap => "kv_swap".into(),
            Self::Scheduler => "scheduler".into(),
            Self::Tokenizer(number) => format!("tokenizer {number}"),
        }
    }

    fn restarts(self, shared: &Shared) -> &Counter {
        match self {
            Self::Executor => &shared.restarts.executor,
            Self::KvSwap => &shared.restarts.kv_swap,
            Self::Scheduler => &shared.restarts.scheduler,
            Self::Tokenizer(_) => &shared.restarts.tokenizer,
        }
    }
}

/// The living children and the restarts of all.
pub(super) struct SupervisorState {
    shared: Arc<Shared>,
    living: HashMap<ActorId, Child>,
    windows: HashMap<Child, RestartWindow>,
}

impl SupervisorState {
    async fn spawn(&mut self, myself: &ActorCell, child: Child) -> Result<(), SpawnErr> {
        // No names: ractor's registry of names belongs to the whole process.
        let (root, shared) = (myself.clone(), Arc::clone(&self.shared));
        let id = match child {
            Child::Executor => Actor::spawn_linked(None, Executor, shared, root).await?.0.get_id(),
            Child::KvSwap => Actor::spawn_linked(None, KvSwap, shared, root).await?.0.get_id(),
            Child::Scheduler => {
                Actor::spawn_linked(None, SchedulerActor, shared, root).await?.0.get_id()
            }
            Child::Tokenizer(number) => {
                Actor::spawn_linked(None, Tokenizer, (shared, number), root).await?.0.get_id()
            }
        };
        self.living.insert(id, child);
        Ok(())
    }

    /// Restarts a dead child, again if it dies of starting, or gives the engine up. An engine that
    /// ends needs none.
    async fn restart(&mut self, myself: &ActorCell, child: Child, reason: String) {
        let mut reason = reason;
        while !self.shared.is_ending() {
            let now_ms = self.shared.now_us() / 1000;
            let limits = &self.shared.config.supervision;
            let window = self.windows.entry(child).or_insert_with(|| {
                RestartWindow::new(limits.restarts_max, limits.restart_window_ms)
            });
            if let Verdict::GiveUp { restarts } = window.death(now_ms) {
                self.shared.die(EngineError::Dead { actor: child.name(), restarts, reason });
                myself.stop(None);
                return;
            }
            tracing::warn!(actor = child.name(), %reason, "an actor died and is restarted");
            child.restarts(&self.shared).add(1);
            match self.spawn(myself, child).await {
                Ok(()) => return,
                Err(error) => reason = error.to_string(),
            }
        }
    }
}

/// The actor.
pub(super) struct Supervisor;

impl Actor for Supervisor {
    type Msg = SupervisorMessage;
    type State = SupervisorState;
    type Arguments = Arc<Shared>;

    async fn pre_start(
        &self,
        myself: ActorRef<Self::Msg>,
        shared: Arc<Shared>,
    ) -> Result<SupervisorState, ActorProcessingErr> {
        let workers = shared.config.tokenizer.workers;
        let (living, windows) = (HashMap::new(), HashMap::new());
        let mut state = SupervisorState { shared, living, windows };
        let cell = myself.get_cell();
        // The scheduler last: its first order must meet a living stage.
        for child in [Child::Executor, Child::KvSwap] {
            state.spawn(&cell, child).await?;
        }
        for number in 0..workers {
            state.spawn(&cell, Child::Tokenizer(number)).await?;
        }
        state.spawn(&cell, Child::Scheduler).await?;
        Ok(state)
    }

    async fn handle_supervisor_evt(
        &self,
        myself: ActorRef<Self::Msg>,
        event: SupervisionEvent,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        let (id, reason) = match event {
            SupervisionEvent::ActorFailed(cell, error) => (cell.get_id(), error.to_string()),
            SupervisionEvent::ActorTerminated(cell, _, reason) => {
                (cell.get_id(), reason.unwrap_or_else(|| "it stopped".into()))
            }
            _ => return Ok(()),
        };
        if let Some(child) = state.living.remove(&id) {
            state.shared.faults.pass(FaultPoint::SupervisorBeforeRestart);
            state.restart(&myself.get_cell(), child, reason).await;
        }
        Ok(())
    }
}
