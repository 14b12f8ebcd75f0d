//! Taking device blocks from running sequences, worst rank first.

use super::Scheduler;
use super::copies::Owner;
use super::sequence::{Flow, Sequence, State};
use crate::kv::blocks_for;
use crate::request::Priority;
use crate::step::Tier;
use crate::units::SequenceId;

/// What came of asking for a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Room {
    /// There is one now.
    Made,
    /// There will be one when a copy has ended.
    Coming,
    /// The one who asked has lost its own blocks, or nobody has one to give.
    None,
}

impl Scheduler {
    /// Makes one more block available for `id`, which runs, at the cost of a running sequence of
    /// worse rank, or of `id` itself if there is none.
    pub(super) fn preempt_for(&mut self, id: SequenceId) -> Room {
        if self.flights.leaving(&self.tiers) > 0 {
            return Room::Coming;
        }
        let Some(victim) = self.worst_running() else { return Room::None };
        if victim == id || self.victim_key(victim) < self.victim_key(id) {
            let mut others = self.running.iter().filter(|other| self.sequences[*other].copies > 0);
            if others.any(|other| self.victim_key(*other) > self.victim_key(id)) {
                // One that is coming in yields when it is there.
                return Room::Coming;
            }
            self.preempt(id);
            return Room::None;
        }
        self.preempt(victim);
        Room::Made
    }

    /// Makes a slot or some blocks available for a queued sequence, at the cost of a running one
    /// that has to yield to it. Takes nothing from anybody unless `blocks` more can be had so.
    pub(super) fn make_room_for(&mut self, id: SequenceId, blocks: usize) -> bool {
        let urgency = self.sequences[&id].urgency;
        let yielding = self.running.iter().map(|other| &self.sequences[other]);
        let yielding = yielding.filter(|other| yields_to(other, urgency));
        // Blocks that several of them share are counted twice: it errs for the urgent one.
        if yielding.map(|other| other.blocks.len()).sum::<usize>() < blocks {
            return false;
        }
        match self.worst_running() {
            Some(victim) if yields_to(&self.sequences[&victim], urgency) => {
                self.preempt(victim);
                true
            }
            _ => false,
        }
    }

    /// Paused before open, then the worst rank; never one that this step computes already, nor one
    /// whose blocks are on their way.
    pub(super) fn worst_running(&self) -> Option<SequenceId> {
        let idle = self.running.iter().filter(|id| {
            let sequence = &self.sequences[*id];
            sequence.planned_step != self.step && sequence.copies == 0
        });
        idle.copied().max_by_key(|id| self.victim_key(*id))
    }

    fn victim_key(&self, id: SequenceId) -> (bool, Priority, u64) {
        let sequence = &self.sequences[&id];
        let (priority, order) = sequence.rank();
        (sequence.flow == Flow::Paused, priority, order)
    }

    /// Puts a running sequence back into the queue: its blocks go to a lower tier if that is worth
    /// it and has room, else its tokens are computed again.
    pub(super) fn preempt(&mut self, id: SequenceId) {
        if self.swap_out(id) {
            return;
        }
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        self.stats.preemptions += 1;
        sequence.requeue(self.now_us);
        Self::release(&mut self.tiers, sequence);
        self.running.retain(|other| *other != id);
        self.queue.push(id);
    }

    /// Puts a running sequence back into the queue and its blocks into lower tiers; does nothing
    /// unless all of them find room there and come back sooner than they are computed.
    pub(super) fn swap_out(&mut self, id: SequenceId) -> bool {
        let [host, disk] = [Tier::Host, Tier::Disk].map(|tier| self.takes_swaps(tier));
        let Some(sequence) = self.sequences.get_mut(&id) else { return false };
        let kept = blocks_for(sequence.computed, self.options.block_tokens);
        if kept == 0 || !(host || disk) {
            return false;
        }
        // What is known below already is only referred to. Blocks of its own follow.
        for block in &sequence.blocks[..kept] {
            let known = self.tiers.copy_below((Tier::Device, *block));
            known.into_iter().for_each(|place| self.tiers.retain(place));
            sequence.below.push(known.unwrap_or((Tier::Device, *block)));
        }
        sequence.draft.clear();
        let missing = sequence.below.iter().filter(|place| place.0 == Tier::Device).count();
        let room = |tier, is_on| if is_on { self.tiers.pool(tier).available() } else { 0 };
        if room(Tier::Host, host) + room(Tier::Disk, disk) < missing {
            for place in sequence.below.drain(..).filter(|place| place.0 != Tier::Device) {
                self.tiers.release(place);
            }
            return false;
        }
        for place in sequence.below.iter_mut().filter(|place| place.0 == Tier::Device) {
            let on_host = host.then(|| self.tiers.begin_copy(*place, Tier::Host)).flatten();
            let copy = on_host.or_else(|| self.tiers.begin_copy(*place, Tier::Disk));
            let copy = copy.expect("there is room for all");
            self.tiers.retain(copy.to);
            *place = copy.to;
            self.flights.begin(copy, Some(Owner { id, order: sequence.order }));
            sequence.copies += 1;
        }
        sequence.state = State::Swapped;
        sequence.queued_us = self.now_us;
        for block in sequence.blocks.drain(..).rev() {
            self.tiers.device.release(block);
        }
        self.stats.preemptions += 1;
        self.stats.swapped_out += 1;
        self.running.retain(|other| *other != id);
        self.queue.push(id);
        true
    }
}

/// Whether a running sequence yields to a waiting one of that urgency: batch to interactive, and
/// one that is paused, so does nothing with its blocks, to any that is as urgent. One whose blocks
/// are on their way yields when they are there.
fn yields_to(running: &Sequence, urgency: Priority) -> bool {
    let yields = match running.flow {
        Flow::Paused => urgency <= running.urgency,
        Flow::Open => urgency < running.urgency,
    };
    yields && running.copies == 0
}
