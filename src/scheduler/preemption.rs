//! Taking device blocks from running sequences, worst rank first.

use super::Scheduler;
use super::sequence::{Flow, State};
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

    /// Makes room for a queued interactive sequence at the cost of a running batch sequence.
    pub(super) fn make_room_for(&mut self, id: SequenceId, plan: &mut StepPlan) -> bool {
        let Some(victim) = self.worst_running() else { return false };
        let worse = self.sequences[&victim].new.priority == Priority::Batch;
        if self.sequences[&id].new.priority != Priority::Interactive || !worse {
            return false;
        }
        self.preempt(victim, plan);
        true
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
            for from in &sequence.blocks[..kept] {
                let to = self.host.allocate().expect("can_allocate has said so");
                plan.copies.push(BlockCopy { from: (Tier::Device, *from), to: (Tier::Host, to) });
                sequence.host_blocks.push(to);
            }
        } else {
            sequence.state = State::Waiting;
            sequence.computed = 0;
            sequence.published = 0;
        }
        for block in sequence.blocks.drain(..).rev() {
            self.pool.release(block);
        }
        self.running.retain(|other| *other != id);
        self.queue.push(id);
    }
}
