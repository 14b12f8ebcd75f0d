//! The scheduler actor: it answers for the thread of the engine loop. Its death is a resubmission
//! by every stream task, so it keeps nothing.

use super::engine_loop::EngineLoop;
use super::shared::Shared;
use super::threads::{StopOnDrop, stop_signal};
use ractor::{Actor, ActorProcessingErr, ActorRef};
use std::sync::Arc;

/// What the scheduler actor hears.
#[derive(Debug)]
pub(super) enum SchedulerMessage {
    /// The engine loop died.
    ThreadDied(String),
}

/// The actor.
pub(super) struct SchedulerActor;

impl Actor for SchedulerActor {
    type Msg = SchedulerMessage;
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
            let _ = myself.cast(SchedulerMessage::ThreadDied(reason));
        };
        let body_shared = Arc::clone(&shared);
        tokio::task::block_in_place(|| {
            shared
                .threads
                .start("tandem-engine", died, move || EngineLoop::new(body_shared, stop)?.run())
        })?;
        Ok(guard)
    }

    async fn handle(
        &self,
        _myself: ActorRef<Self::Msg>,
        SchedulerMessage::ThreadDied(reason): Self::Msg,
        _state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        Err(reason.into())
    }
}
