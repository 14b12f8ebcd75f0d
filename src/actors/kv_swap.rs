//! The KV swap actor: it answers for the one thread that copies KV blocks between tiers, beside the
//! steps. That thread's death takes the lower tiers with it: what lay there is computed again.

use super::FaultPoint;
use super::shared::Shared;
use super::swap_lane::{SwapLane, SwapResult};
use super::threads::{StopOnDrop, StopSignal, stop_signal};
use crossbeam_channel::select_biased;
use ractor::{Actor, ActorProcessingErr, ActorRef};
use std::sync::Arc;

/// What the KV swap actor hears.
#[derive(Debug)]
pub(super) enum KvSwapMessage {
    /// Its thread died.
    ThreadDied(String),
}

/// Counts the lower tiers as gone when the thread leaves, however it leaves.
struct SwapLife<'a>(&'a SwapLane);

impl Drop for SwapLife<'_> {
    fn drop(&mut self) {
        self.0.mover_is_gone();
    }
}

fn run_swap(shared: &Shared, stop: &StopSignal) -> Result<(), String> {
    let lane = &shared.swaps;
    let _life = SwapLife(lane);
    shared.loaded.get().into_iter().for_each(|loaded| loaded.keep_near_gpu());
    loop {
        let waiting = select_biased! {
            recv(stop) -> _ => return Ok(()),
            recv(lane.orders.1) -> order => Some(order.map_err(|_| "the swap lane is gone")?),
            default => None,
        };
        let mut order = match waiting {
            Some(order) => order,
            None if lane.prepare_ahead() => continue,
            None => select_biased! {
                recv(stop) -> _ => return Ok(()),
                recv(lane.orders.1) -> order => order.map_err(|_| "the swap lane is gone")?,
            },
        };
        shared.faults.pass(FaultPoint::KvSwapBeforeCopy);
        let start_us = shared.now_us();
        if !lane.perform(&mut order).map_err(|fault| fault.to_string())? {
            // Nobody waits for it.
            continue;
        }
        shared.faults.pass(FaultPoint::KvSwapAfterCopy);
        shared.metrics.swap_time.record(order.duration_us);
        shared.traces.push_copies(order.trace(start_us));
        select_biased! {
            recv(stop) -> _ => return Ok(()),
            send(lane.results.0, SwapResult::Done(order)) -> sent => {
                sent.map_err(|_| "the swap lane is gone")?;
            }
        }
    }
}

/// The actor.
pub(super) struct KvSwap;

impl Actor for KvSwap {
    type Msg = KvSwapMessage;
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
            let _ = myself.cast(KvSwapMessage::ThreadDied(reason));
        };
        let body_shared = Arc::clone(&shared);
        tokio::task::block_in_place(|| {
            shared.threads.start("tandem-swap", died, move || run_swap(&body_shared, &stop))
        })?;
        Ok(guard)
    }

    async fn handle(
        &self,
        _myself: ActorRef<Self::Msg>,
        KvSwapMessage::ThreadDied(reason): Self::Msg,
        _state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        Err(reason.into())
    }
}
