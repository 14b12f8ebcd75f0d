//! Taking device blocks from running sequences, worst rank first.

use super::Scheduler;
use super::sequence::{Flow, Sequence, State};
use crate::kv::blocks_for;
use crate::request::Priority;
use crate::step::{BlockCopy, StepPlan, Tier};
use crate::units::SequenceId;

impl Scheduler {
    /// Makes one more block available for `id`, which runs, at the cost of a running sequence of
    /// worse rank. False if `id` itself was the worst: then it has lost its blocks.
    pub(super) fn preempt_for(&mut self, id: SequenceId, plan: &mut StepPlan) -> bool {
        let Some(victim) = self.worst_running() else { return false };
        if victim == id || self.victim_key(victim) < self.victim_key(id) {
            self.preempt(id, plan);
            return false;
        }
        self.preempt(victim, plan);
        true
    }

    /// Makes a slot or some blocks available for a queued sequence, at the cost of a running one
    /// that has to yield to it. Takes nothing from anybody unless `blocks` more can be had so.
    pub(super) fn make_room_for(
        &mut self,
        id: SequenceId,
        blocks: usize,
        plan: &mut StepPlan,
    ) -> bool {
        let urgency = self.sequences[&id].urgency;
        let yielding = self.running.iter().map(|other| &self.sequences[other]);
        let yielding = yielding.filter(|other| yields_to(other, urgency));
        // Blocks that several of them share are counted twice: it errs for the urgent one.
        if yielding.map(|other| other.blocks.len()).sum::<usize>() < blocks {
            return false;
        }
        match self.worst_running() {
            Some(victim) if yields_to(&self.sequences[&victim], urgency) => {
                self.preempt(victim, plan);
                true
            }
            _ => false,
        }
    }

    /// Paused before open, then the worst rank; never one that this step computes already.
    fn worst_running(&self) -> Option<SequenceId> {
        let idle = self.running.iter().filter(|id| self.sequences[*id].planned_step != self.step);
        idle.copied().max_by_key(|id| self.victim_key(*id))
    }

    fn victim_key(&self, id: SequenceId) -> (bool, Priority, u64) {
        let sequence = &self.sequences[&id];
        let (priority, order) = sequence.rank();
        (sequence.flow == Flow::Paused, priority, order)
    }

    /// Puts a running sequence back into the queue: its blocks go to the host tier if that has
    /// room, else its tokens are computed again.
    fn preempt(&mut self, id: SequenceId, plan: &mut StepPlan) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        let kept = blocks_for(sequence.computed, self.options.block_tokens);
        self.stats.preemptions += 1;
        if kept > 0 && self.host.can_allocate(kept) {
            self.stats.swapped_out += 1;
            sequence.state = State::Swapped;
            sequence.queued_us = self.now_us;
            for from in &sequence.blocks[..kept] {
                let to = self.host.allocate().expect("can_allocate has said so");
                plan.copies.push(BlockCopy { from: (Tier::Device, *from), to: (Tier::Host, to) });
                sequence.host_blocks.push(to);
            }
        } else {
            sequence.requeue(self.now_us);
        }
        for block in sequence.blocks.drain(..).rev() {
            self.pool.release(block);
        }
        self.running.retain(|other| *other != id);
        self.queue.push(id);
    }
}

/// Whether a running sequence yields to a waiting one of that urgency: batch to interactive, and
/// one that is paused, so does nothing with its blocks, to any that is as urgent.
fn yields_to(running: &Sequence, urgency: Priority) -> bool {
    match running.flow {
        Flow::Paused => urgency <= running.urgency,
        Flow::Open => urgency < running.urgency,
    }
}
