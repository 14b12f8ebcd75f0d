//! Making room before it is needed. Copies take time, so whoever needs a block would wait for one
//! if they began only then.
//!
//! ```text
//! device   the blocks that the widest two steps take are free, or hold prefixes that are known in
//!          a lower tier as well; else the prefixes next to be evicted are copied down
//!          running sequences will not lack blocks for the next AHEAD_TOKENS tokens; else the worst
//!          ranked is swapped out
//! host     the same number of blocks is free, or known on disk; else the prefixes next to be
//!          evicted are copied to disk, and where there are none, the blocks of the sequence
//!          that will come back last move there
//! ```

use super::Scheduler;
use super::copies::Owner;
use super::sequence::State;
use crate::kv::blocks_for;
use crate::step::Tier;
use crate::units::SequenceId;

/// Steps of decoding that blocks are held ready for: a swap takes a few.
const AHEAD_TOKENS: usize = 4;
/// After so many failed copies in a row none begin ahead of need, until one succeeds: what failed
/// would be tried without an end.
const FAILED_COPIES_MAX: usize = 64;

impl Scheduler {
    /// Blocks that are to be at hand in a tier: those of the widest two steps, half of the tier at
    /// most.
    fn ready_blocks(&self, tier: Tier) -> usize {
        let step = self.options.chunks.step_tokens_max.div_ceil(self.options.block_tokens);
        (2 * step).min(self.tiers.pool(tier).len() / 2)
    }

    /// Tokens that admission leaves room for beyond those that a sequence has.
    pub(super) fn ahead_tokens(&self) -> usize {
        if self.tiers.lower_len() > 0 { AHEAD_TOKENS } else { 1 }
    }

    /// Swaps out running sequences, the worst ranked first, before the others lack blocks.
    pub(super) fn swap_ahead(&mut self) {
        if self.tiers.lower_len() == 0 {
            return;
        }
        while self.running.len() > 1 {
            let decoding = self.running.iter().filter(|id| self.sequences[*id].is_decoding());
            let soon: usize = decoding.map(|id| self.lacking_soon(*id)).sum();
            if soon <= self.tiers.device.available() + self.flights.leaving(&self.tiers) {
                return;
            }
            let Some(victim) = self.worst_running() else { return };
            if !self.swap_out(victim) {
                return;
            }
        }
    }

    /// Begins the copies that keep blocks ready in both upper tiers.
    pub(super) fn copy_ahead(&mut self) {
        let is_off = self.tiers.lower_len() == 0 || self.failed_copies >= FAILED_COPIES_MAX;
        if is_off || self.awaits_copies {
            return;
        }
        if self.hasher.is_some() {
            self.copy_prefixes_down(Tier::Device);
            self.copy_prefixes_down(Tier::Host);
        }
        if self.takes_swaps(Tier::Disk) {
            self.move_to_disk();
        }
    }

    /// Copies the prefixes of a tier that are next to be evicted.
    fn copy_prefixes_down(&mut self, tier: Tier) {
        let ready = self.ready_blocks(tier);
        loop {
            let at_hand = self.tiers.pool(tier).free() + self.flights.going_down(tier);
            // Of more than lower tiers hold, each copy would push out one that is looked for.
            let scan = ready.saturating_sub(at_hand).min(self.room_below(tier));
            let Some(block) = self.tiers.next_uncopied(tier, scan) else { return };
            let Some(lower) = self.tier_for_prefix(tier) else { return };
            let Some(copy) = self.tiers.begin_copy((tier, block), lower) else { return };
            self.flights.begin(copy, None);
        }
    }

    /// Names that the tiers below one can hold for certain: what is on disk may be in host memory
    /// as well.
    fn room_below(&self, tier: Tier) -> usize {
        let disk = if self.disk_stopped { 0 } else { self.tiers.pool(Tier::Disk).available() };
        match tier {
            Tier::Device => self.tiers.pool(Tier::Host).available().max(disk),
            Tier::Host => disk,
            Tier::Disk => 0,
        }
    }

    /// Where a prefix goes from a tier: to the host, unless it would push out one there that the
    /// disk has not, but could have.
    fn tier_for_prefix(&self, tier: Tier) -> Option<Tier> {
        let has = |tier| self.tiers.pool(tier).available() > 0 && self.costs.brings_up(tier);
        let (host, disk) = (tier == Tier::Device && has(Tier::Host), has(Tier::Disk));
        let disk = disk && !self.disk_stopped;
        let pushes_out = self.tiers.pool(Tier::Host).free() == 0
            && self.tiers.next_uncopied(Tier::Host, 1).is_some();
        match (host, disk) {
            (true, true) if pushes_out => Some(Tier::Disk),
            (true, _) => Some(Tier::Host),
            (false, true) => Some(Tier::Disk),
            (false, false) => None,
        }
    }

    /// Moves the host blocks of the sequence that will come back last to disk, where all fit there
    /// and the host tier has hardly any left.
    fn move_to_disk(&mut self) {
        let leaving = self.flights.going_down(Tier::Host);
        if self.tiers.pool(Tier::Host).available() + leaving >= self.ready_blocks(Tier::Host) {
            return;
        }
        let resting = self.queue.iter().map(|id| &self.sequences[id]).filter(|sequence| {
            sequence.state == State::Swapped
                && sequence.copies == 0
                && sequence.below.iter().any(|place| place.0 == Tier::Host)
        });
        let Some(last) = resting.max_by_key(|sequence| sequence.rank()) else { return };
        let id = last.new.id;
        let on_host = last.below.iter().filter(|place| place.0 == Tier::Host).count();
        if self.tiers.pool(Tier::Disk).available() < on_host {
            return;
        }
        self.order_move(id);
    }

    fn order_move(&mut self, id: SequenceId) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        for place in sequence.below.iter().filter(|place| place.0 == Tier::Host) {
            let copy = self.tiers.begin_copy(*place, Tier::Disk);
            self.flights.begin(copy.expect("there is room for all"), Some(Owner::of(sequence)));
            sequence.copies += 1;
        }
    }

    /// Whether swapped blocks may go to a tier.
    pub(super) fn takes_swaps(&self, tier: Tier) -> bool {
        let is_on = !(tier == Tier::Disk && self.disk_stopped);
        is_on && !self.tiers.pool(tier).is_empty() && self.costs.swaps(tier)
    }

    /// Blocks that a running sequence takes until it has a few tokens more.
    pub(super) fn lacking_soon(&self, id: SequenceId) -> usize {
        let sequence = &self.sequences[&id];
        self.blocks_ahead(id).saturating_sub(sequence.blocks.len())
    }

    /// Blocks of a sequence with the tokens that it has and a few more.
    pub(super) fn blocks_ahead(&self, id: SequenceId) -> usize {
        let sequence = &self.sequences[&id];
        let longest = sequence.new.prompt_tokens.saturating_add(sequence.new.max_tokens);
        let longest = longest.min(self.options.context_tokens);
        let tokens = sequence.new.tokens.len();
        let ahead = (tokens + self.ahead_tokens()).min(longest.max(tokens + 1));
        blocks_for(ahead, self.options.block_tokens)
    }
}
