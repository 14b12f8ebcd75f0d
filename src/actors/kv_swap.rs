//! The KV swap actor keeps the books of the host tier: how many blocks of preempted sequences went
//! out and came back. The copies themselves are orders of a step and performed by the stage that
//! owns the bytes; this actor hears of them after the step, and its death delays the books only.

use super::FaultPoint;
use super::shared::Shared;
use crate::step::{StepPlan, Tier};
use ractor::{Actor, ActorProcessingErr, ActorRef};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// What the KV swap actor hears.
#[derive(Debug)]
pub(super) enum KvSwapMessage {
    /// The ledger has copies that are not booked. The permit bounds the mailbox.
    Book(OwnedSemaphorePermit),
}

/// Copies that were performed and not booked yet. Outlives the actor.
pub(super) struct SwapLedger {
    out_blocks: AtomicU64,
    in_blocks: AtomicU64,
    /// One: while a `Book` is in the mailbox, a second would say nothing new.
    permits: Arc<Semaphore>,
    actor: Mutex<Option<ActorRef<KvSwapMessage>>>,
}

impl Default for SwapLedger {
    fn default() -> Self {
        Self {
            out_blocks: AtomicU64::new(0),
            in_blocks: AtomicU64::new(0),
            permits: Arc::new(Semaphore::new(1)),
            actor: Mutex::new(None),
        }
    }
}

impl SwapLedger {
    /// Reports the copies of a step that was run. Never waits.
    pub(super) fn report(&self, plan: &StepPlan) {
        let count = |from: Tier, to: Tier| {
            plan.copies.iter().filter(|copy| (copy.from.0, copy.to.0) == (from, to)).count() as u64
        };
        let (out_blocks, in_blocks) =
            (count(Tier::Device, Tier::Host), count(Tier::Host, Tier::Device));
        if out_blocks + in_blocks > 0 {
            self.out_blocks.fetch_add(out_blocks, Relaxed);
            self.in_blocks.fetch_add(in_blocks, Relaxed);
            self.wake();
        }
    }

    fn wake(&self) {
        let Ok(permit) = Arc::clone(&self.permits).try_acquire_owned() else { return };
        let actor = self.actor.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(actor) = actor {
            // A dead actor's successor books what is left when it starts.
            let _ = actor.cast(KvSwapMessage::Book(permit));
        }
    }

    fn book(&self, shared: &Shared) {
        shared.metrics.blocks_swapped_out.add(self.out_blocks.swap(0, Relaxed));
        shared.metrics.blocks_swapped_in.add(self.in_blocks.swap(0, Relaxed));
    }
}

/// The actor.
pub(super) struct KvSwap;

impl Actor for KvSwap {
    type Msg = KvSwapMessage;
    type State = Arc<Shared>;
    type Arguments = Arc<Shared>;

    async fn pre_start(
        &self,
        myself: ActorRef<Self::Msg>,
        shared: Arc<Shared>,
    ) -> Result<Arc<Shared>, ActorProcessingErr> {
        let actor = Some(myself);
        *shared.swaps.actor.lock().unwrap_or_else(PoisonError::into_inner) = actor;
        shared.swaps.book(&shared);
        Ok(shared)
    }

    async fn handle(
        &self,
        _myself: ActorRef<Self::Msg>,
        KvSwapMessage::Book(permit): Self::Msg,
        shared: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        drop(permit);
        shared.faults.pass(FaultPoint::KvSwapBeforeReport);
        shared.swaps.book(shared);
        Ok(())
    }
}
