//! Copies between tiers on their way from the engine loop to the swap thread and back, and what
//! that thread works with. Belongs to [`super::shared::Shared`] and outlives both.
//!
//! Every order is of an *epoch*. A new epoch begins when an engine loop, a stage or the swap thread
//! is replaced: what the scheduler knew of lower tiers holds no longer, and orders of earlier
//! epochs are not performed. An epoch begins under the lock that copies are performed under: when
//! it has begun, none of an earlier one touches a block.

use super::stage::{BlockMover, TierSource};
use super::stage_fault::StageFault;
use crate::step::{BlockCopy, CopyResult, Tier};
use crate::telemetry::CopyTrace;
use crossbeam_channel::{Receiver, Sender, bounded};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Orders under way at once: one is performed, one waits, and two are being told of.
const ORDERS_MAX: usize = 4;
/// Copies of one order: their blocks come free together. So few that the first ones are not kept
/// waiting by the last, so many that a wait for a device is shared.
const COPIES_MAX: usize = 32;

/// Copies from one tier to another, in order.
pub(super) struct SwapOrder {
    epoch: u64,
    copies: Vec<BlockCopy>,
    /// One per copy, when it was performed.
    pub(super) results: Vec<CopyResult>,
    pub(super) duration_us: u64,
    /// Nothing more is to go to the disk tier.
    pub(super) disk_stopped: bool,
}

impl SwapOrder {
    /// What is told of copies that began then, in microseconds, and have ended.
    pub(super) fn trace(&self, start_us: u64) -> CopyTrace {
        let tiers = self.copies.first().map(|copy| (copy.from.0, copy.to.0));
        let (from, to) = tiers.expect("an order has a copy");
        let (end_us, blocks) = (start_us + self.duration_us, self.copies.len());
        CopyTrace { start_us, end_us, from, to, blocks }
    }
}

/// What comes back.
pub(super) enum SwapResult {
    Done(Box<SwapOrder>),
    /// A new epoch has begun.
    Lost,
}

/// What the swap thread works with.
#[derive(Default)]
struct Workshop {
    /// Of the living stage.
    source: Option<Arc<dyn TierSource>>,
    mover: Option<Box<dyn BlockMover>>,
}

/// Engine loop to swap thread and back.
pub(super) struct SwapLane {
    pub(super) orders: (Sender<Box<SwapOrder>>, Receiver<Box<SwapOrder>>),
    pub(super) results: (Sender<SwapResult>, Receiver<SwapResult>),
    workshop: Mutex<Workshop>,
    epoch: AtomicU64,
    /// Threads that are about to begin an epoch: memory is not made ready before them.
    beginning: AtomicUsize,
}

impl Default for SwapLane {
    fn default() -> Self {
        Self {
            orders: bounded(ORDERS_MAX),
            results: bounded(2 * ORDERS_MAX),
            workshop: Mutex::default(),
            epoch: AtomicU64::new(1),
            beginning: AtomicUsize::new(0),
        }
    }
}

impl SwapLane {
    fn lock(&self) -> MutexGuard<'_, Workshop> {
        // A thread that died at a copy leaves a mover behind that nobody uses again.
        self.workshop.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The epoch that is.
    pub(super) fn epoch(&self) -> u64 {
        self.epoch.load(SeqCst)
    }

    /// Begins an epoch, when the copies that are being performed, or a piece of memory that is
    /// being made ready, have ended.
    fn begin_epoch(&self) -> MutexGuard<'_, Workshop> {
        self.beginning.fetch_add(1, SeqCst);
        let workshop = self.lock();
        self.beginning.fetch_sub(1, SeqCst);
        self.epoch.fetch_add(1, SeqCst);
        // A full lane wakes the loop as well.
        let _ = self.results.0.try_send(SwapResult::Lost);
        workshop
    }

    /// An engine loop starts, whose scheduler knows of no block.
    pub(super) fn loop_starts(&self) {
        drop(self.begin_epoch());
    }

    /// A stage has started: its blocks are what is copied from now on.
    ///
    /// # Errors
    /// Its lower tiers can't be made.
    pub(super) fn stage_starts(&self, source: Arc<dyn TierSource>) -> Result<(), StageFault> {
        let mut workshop = self.lock();
        workshop.mover = Some(source.tiers()?);
        workshop.source = Some(source);
        Ok(())
    }

    /// A stage has gone, and all tiers with it. When this returns nobody uses its blocks.
    pub(super) fn stage_is_gone(&self) {
        *self.begin_epoch() = Workshop::default();
    }

    /// The swap thread has gone, and the lower tiers with it.
    pub(super) fn mover_is_gone(&self) {
        self.begin_epoch().mover = None;
    }

    /// Performs an order of this epoch; whether it was one.
    ///
    /// # Errors
    /// The lower tiers that went with an earlier thread can't be made again.
    pub(super) fn perform(&self, order: &mut SwapOrder) -> Result<bool, StageFault> {
        let mut workshop = self.lock();
        if order.epoch != self.epoch() {
            return Ok(false);
        }
        let Workshop { source: Some(source), mover } = &mut *workshop else { return Ok(false) };
        let mover = match mover {
            Some(mover) => mover,
            empty => empty.insert(source.tiers()?),
        };
        let start = Instant::now();
        mover.perform(&order.copies, &mut order.results);
        order.duration_us = start.elapsed().as_micros() as u64;
        order.disk_stopped = mover.disk_stopped();
        Ok(true)
    }

    /// Makes some memory of the lower tiers ready, and whether there may be more to do. Nothing if
    /// an epoch is about to begin: the lock alone might go to this thread again and again.
    pub(super) fn prepare_ahead(&self) -> bool {
        if self.beginning.load(SeqCst) > 0 {
            return false;
        }
        self.lock().mover.as_mut().is_some_and(|mover| mover.prepare_ahead())
    }

    /// Drops what lies in lower tiers, and the orders and results that nobody waits for.
    pub(super) fn release(&self) {
        self.stage_is_gone();
        while self.orders.1.try_recv().is_ok() {}
        while self.results.1.try_recv().is_ok() {}
    }
}

/// The engine loop's side: what waits to be sent, and empty orders.
pub(super) struct SwapDesk {
    epoch: u64,
    /// Copies that the scheduler has begun: it has no more under way than there is room for here.
    pub(super) pending: VecDeque<BlockCopy>,
    #[allow(clippy::vec_box, reason = "orders travel in boxes")]
    empty: Vec<Box<SwapOrder>>,
}

impl SwapDesk {
    /// For a scheduler that has no more than `copies_max` copies under way.
    pub(super) fn new(lane: &SwapLane, copies_max: usize) -> Self {
        let pending = VecDeque::with_capacity(copies_max);
        let mut desk = Self { epoch: 0, pending, empty: Vec::new() };
        desk.reset(lane);
        desk
    }

    /// Whether lower tiers are still what the scheduler knows of them.
    pub(super) fn is_current(&self, lane: &SwapLane) -> bool {
        self.epoch == lane.epoch()
    }

    /// Forgets all orders and goes on in the epoch that is.
    pub(super) fn reset(&mut self, lane: &SwapLane) {
        self.epoch = lane.epoch();
        self.pending.clear();
        while lane.orders.1.try_recv().is_ok() {}
        let empty = || {
            Box::new(SwapOrder {
                epoch: self.epoch,
                copies: Vec::with_capacity(COPIES_MAX),
                results: Vec::with_capacity(COPIES_MAX),
                duration_us: 0,
                disk_stopped: false,
            })
        };
        self.empty = std::iter::repeat_with(empty).take(ORDERS_MAX).collect();
    }

    /// Sends what waits, as far as there are empty orders. Never waits: as many are under way as
    /// the lane holds at most.
    pub(super) fn send(&mut self, lane: &SwapLane) {
        let pair = |copy: &BlockCopy| -> (Tier, Tier) { (copy.from.0, copy.to.0) };
        while let Some(first) = self.pending.front().map(pair) {
            let Some(mut order) = self.empty.pop() else { return };
            while order.copies.len() < COPIES_MAX {
                match self.pending.pop_front_if(|copy| pair(copy) == first) {
                    Some(copy) => order.copies.push(copy),
                    None => break,
                }
            }
            if lane.orders.0.try_send(order).is_err() {
                unreachable!("the lane has room for all orders of an epoch");
            }
        }
    }

    /// The order that a result speaks of, if it is of this epoch.
    pub(super) fn open(&self, result: SwapResult) -> Option<Box<SwapOrder>> {
        match result {
            SwapResult::Done(order) if order.epoch == self.epoch => Some(order),
            _ => None,
        }
    }

    /// Takes an order back that was dealt with.
    pub(super) fn recycle(&mut self, mut order: Box<SwapOrder>) {
        order.copies.clear();
        order.results.clear();
        self.empty.push(order);
    }
}
