//! The engine loop's side of the streams: which sequence answers on which lane, who is in flight,
//! and who has to pause because its lane is not read.

use super::flow::Flow;
use super::stream::StreamMessage;
use crate::config::DRAFT_MAX;
use crate::step::StepPlan;
use crate::units::SequenceId;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

/// Messages that a sequence's lane holds.
pub(super) const LANE_MESSAGES: usize = 64;
/// Fewer free places than this pause the sequence: room for what one step, the longest draft
/// included, and the end of a sequence say.
const FREE_MIN: usize = 20;
const _: () = assert!(FREE_MIN >= DRAFT_MAX + 4);
/// A stream task that has read its lane down to this asks for its sequence to be resumed.
pub(super) const RESUME_AT: usize = 16;

struct Link {
    lane: mpsc::Sender<StreamMessage>,
    flow: Arc<Flow>,
    /// What found no room in the lane. Bounded: what a step said is delivered while the next one
    /// runs, so a sequence that is paused then is in one more step. This is what two steps said of
    /// it, two prefill chunks' prompt scores at most.
    outbox: VecDeque<StreamMessage>,
    /// A step has worked on it.
    started: bool,
    /// Nothing follows what is in the outbox.
    ended: bool,
}

/// How a delivery left a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Delivery {
    Fine,
    /// Its lane is nearly full: pause it.
    Full,
    /// Nobody reads any more: abort it.
    Gone,
}

/// All sequences of one engine loop.
#[derive(Default)]
pub(super) struct Links {
    by_id: HashMap<SequenceId, Link>,
    /// Those marked as in flight.
    in_flight: Vec<SequenceId>,
}

impl Links {
    pub(super) fn add(
        &mut self,
        id: SequenceId,
        lane: mpsc::Sender<StreamMessage>,
        flow: Arc<Flow>,
    ) {
        self.in_flight.push(id);
        let outbox = VecDeque::new();
        self.by_id.insert(id, Link { lane, flow, outbox, started: false, ended: false });
    }

    /// Announces the first step that works on a sequence.
    pub(super) fn start(&mut self, id: SequenceId, at_us: u64) {
        let Some(link) = self.by_id.get_mut(&id) else { return };
        if !link.started {
            link.started = true;
            link.outbox.push_back(StreamMessage::Started { at_us });
            self.flush(id);
        }
    }

    /// Forgets a sequence that was aborted.
    pub(super) fn remove(&mut self, id: SequenceId) {
        self.by_id.remove(&id);
    }

    /// Marks exactly the plan's sequences as in flight. Those that were marked before and are not
    /// in the plan were planned around without harm.
    pub(super) fn mark(&mut self, plan: &StepPlan) {
        self.unmark();
        for planned in &plan.sequences {
            if let Some(link) = self.by_id.get(&planned.id) {
                link.flow.set_in_flight(true);
                self.in_flight.push(planned.id);
            }
        }
    }

    /// Marks none as in flight.
    pub(super) fn unmark(&mut self) {
        for id in self.in_flight.drain(..) {
            if let Some(link) = self.by_id.get(&id) {
                link.flow.set_in_flight(false);
            }
        }
    }

    /// Delivers a message that others follow. A sequence whose reader went when it was announced is
    /// unknown here, and still to be aborted.
    pub(super) fn deliver(&mut self, id: SequenceId, message: StreamMessage) -> Delivery {
        let Some(link) = self.by_id.get_mut(&id) else { return Delivery::Gone };
        link.outbox.push_back(message);
        self.flush(id)
    }

    /// Delivers a sequence's last message.
    pub(super) fn deliver_last(&mut self, id: SequenceId, message: StreamMessage) {
        let Some(link) = self.by_id.get_mut(&id) else { return };
        link.outbox.push_back(message);
        link.ended = true;
        self.flush(id);
    }

    /// Moves what fits from outbox to lane. Forgets a sequence that has ended or whose reader has
    /// gone.
    pub(super) fn flush(&mut self, id: SequenceId) -> Delivery {
        let Some(link) = self.by_id.get_mut(&id) else { return Delivery::Fine };
        let delivery = link.flush();
        if delivery == Delivery::Gone || (link.ended && link.outbox.is_empty()) {
            self.by_id.remove(&id);
        }
        delivery
    }
}

impl Link {
    fn flush(&mut self) -> Delivery {
        loop {
            if !self.fill_lane() {
                return Delivery::Gone;
            }
            let has_room = self.lane.capacity() >= FREE_MIN || self.ended;
            if self.outbox.is_empty() && has_room {
                return Delivery::Fine;
            }
            self.flow.set_paused();
            // The reader may have emptied the lane before it could see the flag; then it will not
            // ask for a resumption, and this goes on by itself.
            let unread = LANE_MESSAGES - self.lane.capacity();
            if unread > RESUME_AT || !self.flow.take_paused() {
                return Delivery::Full;
            }
        }
    }

    /// Moves what fits; whether somebody still reads.
    fn fill_lane(&mut self) -> bool {
        while let Some(message) = self.outbox.pop_front() {
            match self.lane.try_send(message) {
                Ok(()) => {}
                Err(TrySendError::Full(message)) => {
                    self.outbox.push_front(message);
                    return true;
                }
                Err(TrySendError::Closed(_)) => return false,
            }
        }
        true
    }
}
