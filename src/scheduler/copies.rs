//! Copies between tiers while they are under way. They are performed in the order in which they
//! were begun, beside the steps, and each ends once: until then its source and its destination
//! belong to it (`kv::Tiers`), and a sequence with copies under way is in no step.

use super::Scheduler;
use super::sequence::{Sequence, State};
use crate::kv::{Place, Tiers};
use crate::step::{BlockCopy, CopyOutcome, CopyResult, Tier};
use crate::units::SequenceId;
use std::collections::VecDeque;

/// Whose copy it is: a sequence by its arrival, since another may come under its id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Owner {
    pub id: SequenceId,
    pub order: u64,
}

impl Owner {
    pub fn of(sequence: &Sequence) -> Self {
        Self { id: sequence.new.id, order: sequence.order }
    }
}

#[derive(Clone, Copy, Debug)]
struct Flight {
    copy: BlockCopy,
    /// `None` for a prefix that goes down ahead of time.
    owner: Option<Owner>,
}

/// Copies under way, in the order of their beginnings.
#[derive(Clone, Debug)]
pub(super) struct Flights {
    flights: VecDeque<Flight>,
    /// Those of them that the engine loop has not taken yet.
    orders: Vec<BlockCopy>,
    /// How many there may be.
    most: usize,
}

impl Flights {
    /// Room for so many: there are never more.
    pub fn new(most: usize) -> Self {
        Self { flights: VecDeque::with_capacity(most), orders: Vec::with_capacity(most), most }
    }

    pub fn len(&self) -> usize {
        self.flights.len()
    }

    /// # Panics
    /// When as many are under way as there may be.
    pub fn begin(&mut self, copy: BlockCopy, owner: Option<Owner>) {
        assert!(self.len() < self.most, "{copy:?} beside {} others, all there may be", self.most);
        self.flights.push_back(Flight { copy, owner });
        self.orders.push(copy);
    }

    /// Device blocks that nobody but a copy refers to: they come free when it ends.
    pub fn leaving(&self, tiers: &Tiers) -> usize {
        let sides = self.flights.iter().flat_map(|flight| [flight.copy.from, flight.copy.to]);
        let device = sides.filter(|(tier, _)| *tier == Tier::Device);
        device.filter(|(_, block)| tiers.device.references(*block) == 1).count()
    }

    /// Prefixes on their way down from a tier.
    pub fn going_down(&self, tier: Tier) -> usize {
        self.flights.iter().filter(|f| f.owner.is_none() && f.copy.from.0 == tier).count()
    }

    /// Whether a block is being brought up.
    pub fn is_rising(&self, place: Place) -> bool {
        self.flights.iter().any(|f| f.copy.from == place && f.copy.to.0 == Tier::Device)
    }

    /// How many copies of a sequence are under way; for the invariants.
    pub fn of(&self, owner: Owner) -> usize {
        self.flights.iter().filter(|flight| flight.owner == Some(owner)).count()
    }

    /// The places that copies refer to; for the invariants.
    pub fn places(&self) -> impl Iterator<Item = Place> {
        self.flights.iter().flat_map(|flight| [flight.copy.from, flight.copy.to])
    }

    pub fn clear(&mut self) {
        self.flights.clear();
        self.orders.clear();
    }
}

impl Scheduler {
    /// Moves the copies that were begun since the last call to `copies`. They may start at once,
    /// beside the step that was planned with them, and are performed in order.
    pub fn take_copies(&mut self, copies: &mut impl Extend<BlockCopy>) {
        copies.extend(self.flights.orders.drain(..));
    }

    /// How many copies can be under way at once, taken or not: blocks are in few of them each.
    pub fn copies_max(&self) -> usize {
        self.flights.most
    }

    /// Copies under way.
    pub fn copies_under_way(&self) -> usize {
        self.flights.len()
    }

    /// Takes in what became of the oldest copies under way; together they took `duration_us`.
    ///
    /// # Panics
    /// When the results are not those of the oldest copies, in order.
    pub fn copied(&mut self, now_us: u64, results: &[CopyResult], duration_us: u64) {
        for result in results {
            let flight = self.flights.flights.pop_front();
            let flight = flight.filter(|flight| flight.copy == result.copy);
            let flight = flight.unwrap_or_else(|| panic!("nobody has ordered {:?}", result.copy));
            self.failed_copies = match result.outcome {
                CopyOutcome::Done => 0,
                CopyOutcome::Failed => self.failed_copies + 1,
            };
            self.end_copy(now_us, flight, result.outcome);
        }
        let lower = |copy: &BlockCopy| copy.from.0.max(copy.to.0);
        let Some(first) = results.first().map(|result| lower(&result.copy)) else { return };
        let speaks = |r: &CopyResult| r.outcome == CopyOutcome::Done && lower(&r.copy) == first;
        if results.iter().all(speaks) {
            self.costs.learn_copies(first, results.len(), duration_us);
        }
    }

    fn end_copy(&mut self, now_us: u64, flight: Flight, outcome: CopyOutcome) {
        let Flight { copy, owner } = flight;
        let is_done = outcome == CopyOutcome::Done;
        self.stats.count_copy(&copy, outcome);
        let owner = owner
            .filter(|owner| self.sequences.get(&owner.id).is_some_and(|s| s.order == owner.order));
        if let Some(Owner { id, .. }) = owner {
            let sequence = self.sequences.get_mut(&id).expect("it was just found");
            sequence.copies -= 1;
            match (copy.from.0, copy.to.0) {
                (Tier::Host, Tier::Disk) if is_done => self.moved(id, copy),
                (Tier::Host, Tier::Disk) => {}
                _ if !is_done => self.compute_again(now_us, id),
                _ if sequence.copies == 0 && sequence.state == State::Running => {
                    self.arrive(now_us, id);
                }
                _ => {}
            }
        }
        self.tiers.end_copy(copy, outcome);
    }

    /// A swapped sequence's block lies in another tier now.
    fn moved(&mut self, id: SequenceId, copy: BlockCopy) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        let entry = sequence.below.iter_mut().find(|place| **place == copy.from);
        // It may be computed again by now.
        if let Some(entry) = entry {
            *entry = copy.to;
            self.tiers.retain(copy.to);
            self.tiers.release(copy.from);
        }
    }

    /// All blocks of a sequence are on the device.
    pub(super) fn arrive(&mut self, now_us: u64, id: SequenceId) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        sequence.queued_us = now_us;
        for place in sequence.below.drain(..) {
            self.tiers.release(place);
        }
        self.count_hits(id);
    }

    /// Puts a sequence whose blocks were lost back to where it holds none.
    fn compute_again(&mut self, now_us: u64, id: SequenceId) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        let since_us = match sequence.state {
            State::Waiting => return,
            State::Swapped => sequence.queued_us,
            State::Running => now_us,
        };
        if sequence.state == State::Running {
            self.running.retain(|other| *other != id);
            self.queue.push(id);
        }
        sequence.requeue(since_us);
        Self::release(&mut self.tiers, sequence);
        self.stats.swaps_lost += 1;
    }

    /// Whoever performs the copies died, and all lower tiers with it: sequences that have blocks
    /// there, or copies under way, are computed again. Nobody is to blame.
    pub fn tiers_lost(&mut self, now_us: u64) {
        let mut ids = std::mem::take(&mut self.ids);
        ids.clear();
        let stricken = self.sequences.iter().filter(|(_, s)| s.copies > 0 || !s.below.is_empty());
        ids.extend(stricken.map(|(id, _)| *id));
        ids.sort_unstable();
        for id in ids.drain(..) {
            self.compute_again(now_us, id);
            if let Some(sequence) = self.sequences.get_mut(&id) {
                sequence.copies = 0;
            }
        }
        self.ids = ids;
        for place in self.flights.places().filter(|(tier, _)| *tier == Tier::Device) {
            self.tiers.release(place);
        }
        self.flights.clear();
        self.tiers.clear_below();
        self.disk_stopped = false;
    }

    /// Nothing more goes to the disk tier; what lies there may still come back.
    pub fn stop_disk(&mut self) {
        self.disk_stopped = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::BlockId;

    #[test]
    #[should_panic(expected = "all there may be")]
    fn no_more_copies_are_under_way_than_there_is_room_for() {
        let mut flights = Flights::new(2);
        for block in 0..3 {
            assert!(flights.len() < 3 && flights.orders.capacity() == 2);
            let [from, to] = [Tier::Device, Tier::Host].map(|tier| (tier, BlockId(block)));
            flights.begin(BlockCopy { from, to }, None);
        }
    }
}
