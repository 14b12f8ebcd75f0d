//! Loops that workers share out while they run. Each worker begins with a share of its own, in
//! order, and takes from the others' when it is through: cores are not equally fast, least of all
//! where other programs or other guests of the same machine use them too, and without this every
//! loop would last as long as its slowest worker. Where workers are of several NUMA nodes it takes
//! from those of its own node first, whose weights are near, and from others when nothing is left
//! there.
//!
//! A worker's share is one atomic word: which loop it belongs to, the next unclaimed unit and the
//! end. Whoever claims a piece moves `next` by compare-and-swap. A word that belongs to an earlier
//! loop stands for a share that nobody has touched, so a loop needs no preparation and no barrier
//! of its own: workers leave a loop only when all of its units are claimed, and then overwriting
//! its words loses nothing.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bits of a unit's index in a word.
const UNIT_BITS: u32 = 22;
/// The most units that one loop can have.
pub(super) const UNITS_MAX: usize = (1 << UNIT_BITS) - 1;
/// A claim takes this part of what is left of a share: large pieces first, so that few claims are
/// made, and small ones last, so that workers end together.
const CLAIM_PART: usize = 3;

/// What is left of one worker's share, on cache lines of its own (processors fetch them in pairs).
#[repr(align(128))]
#[derive(Debug, Default)]
pub(super) struct Share(AtomicU64);

impl Share {
    /// Forgets the loops of the job before. Only while no worker runs.
    pub fn reset(&self) {
        self.0.store(0, Ordering::Relaxed);
    }
}

/// One worker's way through a loop: pieces that no other worker gets.
#[derive(Debug)]
pub struct Deal<'p, C> {
    shares: &'p [Share],
    /// Where the share of each worker begins, in units; of `shares.len()`, where the last ends.
    cut: C,
    /// The worker whose pieces these are.
    worker: usize,
    /// Workers from whom it takes first, itself among them.
    team: &'p Range<usize>,
    /// Which loop of the job, from 1.
    number: u64,
    /// Units of the smallest claim.
    grain: usize,
}

impl<'p, C: Fn(usize) -> usize> Deal<'p, C> {
    pub(super) fn new(
        shares: &'p [Share],
        (worker, team): (usize, &'p Range<usize>),
        (number, grain): (u64, usize),
        cut: C,
    ) -> Self {
        assert!(cut(shares.len()) <= UNITS_MAX, "a loop of more than {UNITS_MAX} units");
        debug_assert!(number < 1 << (64 - 2 * UNIT_BITS), "loop {number} of one job");
        Self { shares, cut, worker, team, number, grain: grain.max(1) }
    }

    /// The unclaimed units of a share whose word is `word`.
    fn left(&self, owner: usize, word: u64) -> Range<usize> {
        let (number, next, end) = unpack(word);
        match number.cmp(&self.number) {
            std::cmp::Ordering::Less => (self.cut)(owner)..(self.cut)(owner + 1),
            std::cmp::Ordering::Equal => next..end,
            // Somebody has left this loop, so all of it is claimed.
            std::cmp::Ordering::Greater => 0..0,
        }
    }

    /// A piece of the share of `owner`, if anything is left of it.
    fn claim(&self, owner: usize) -> Option<Range<usize>> {
        let share = &self.shares[owner].0;
        let mut word = share.load(Ordering::Relaxed);
        loop {
            let left = self.left(owner, word);
            if left.is_empty() {
                return None;
            }
            let count = (left.len() / CLAIM_PART).max(self.grain).min(left.len());
            let rest = pack(self.number, left.start + count..left.end);
            // The order of claims is all that matters: what the pieces hold was published by the
            // barrier before, and will be by the one after.
            match share.compare_exchange_weak(word, rest, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Some(left.start..left.start + count),
                Err(newer) => word = newer,
            }
        }
    }

    /// From whom to take: who has most left of this worker's team, else of all.
    fn victim(&self) -> Option<usize> {
        let near = self.richest(self.team.clone());
        if near.is_some() || self.team.len() == self.shares.len() {
            return near;
        }
        self.richest(0..self.shares.len())
    }

    /// Who of some workers has most left, other than this one.
    fn richest(&self, owners: Range<usize>) -> Option<usize> {
        let left =
            |owner: usize| self.left(owner, self.shares[owner].0.load(Ordering::Relaxed)).len();
        let others = owners.filter(|owner| *owner != self.worker);
        let richest = others.map(|owner| (left(owner), owner)).max()?;
        (richest.0 > 0).then_some(richest.1)
    }
}

impl<C: Fn(usize) -> usize> Iterator for Deal<'_, C> {
    type Item = Range<usize>;

    fn next(&mut self) -> Option<Range<usize>> {
        if let Some(piece) = self.claim(self.worker) {
            return Some(piece);
        }
        loop {
            if let Some(piece) = self.claim(self.victim()?) {
                return Some(piece);
            }
        }
    }
}

fn pack(number: u64, units: Range<usize>) -> u64 {
    number << (2 * UNIT_BITS) | (units.start as u64) << UNIT_BITS | units.end as u64
}

fn unpack(word: u64) -> (u64, usize, usize) {
    let units = UNITS_MAX as u64;
    (word >> (2 * UNIT_BITS), (word >> UNIT_BITS & units) as usize, (word & units) as usize)
}
