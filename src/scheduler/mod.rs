//! Owns the decision of what the next step computes: queue, running set, KV blocks, chunk sizes.
//! It must not know executors, channels or clocks: time is an argument, the same calls give the
//! same plans. The engine loop calls it: `plan_step` → the step runs → `apply`.
//!
//! ```text
//! plan_step:  end what is past its deadline
//!             swap out ahead of need (demotion.rs)
//!             admit from the queue while the whole prompt has room, beside what runs: with cached
//!             and swapped blocks, which copies bring up from lower tiers (copies.rs)
//!             draft tokens behind those of decoding sequences where that pays (drafting.rs)
//!             one token for every decoding sequence, best rank first; without a block, take one
//!             from the worst-ranked running sequence (to a lower tier, else computed again)
//!             share the chunk budget (chunking.rs) among prompts: half to the best rank, then
//!             the more urgent and the shortest remaining first
//!             copy prefixes down that are next to be evicted
//! copied:     blocks change hands; who has all of its blocks may be in the next step
//! apply:      computed += planned, of drafts what was accepted; full blocks become findable;
//!             tokens, ends and failures go out
//! ```
//! Rank is urgency, then age. Urgency is the priority asked for; batch sequences that were in the
//! queue too long are raised for good, so none starves. When blocks or slots are lacking, running
//! batch sequences yield to waiting interactive ones, and paused ones to any as urgent. Nothing is
//! ever both in the queue and running.

mod admission;
mod apply;
mod budget;
mod chunking;
mod copies;
mod demotion;
mod drafting;
mod options;
mod plan;
mod preemption;
mod rates;
mod sequence;

pub use budget::ChunkBudget;
pub use chunking::{ChunkController, ChunkLimits, StepMix};
pub use options::{KvStore, SchedulerOptions, SchedulerStats};
pub use rates::TierRates;
pub use sequence::{NewSequence, SequenceEvent, SequenceEventKind};

use crate::kv::{ChainHasher, Place, Tiers};
use crate::request::{FinishReason, Priority};
use crate::step::Tier;
use crate::units::SequenceId;
use copies::{Flights, Owner};
use drafting::Speculation;
use plan::Share;
use rates::SwapCosts;
use sequence::{Flow, Sequence, State};
use std::collections::HashMap;

/// In-flight batching over paged KV. See the module's pseudo-code.
pub struct Scheduler {
    options: SchedulerOptions,
    hasher: Option<ChainHasher>,
    tiers: Tiers,
    flights: Flights,
    costs: SwapCosts,
    /// Nothing more goes to the disk tier.
    disk_stopped: bool,
    /// Copies that have failed since the last that did not.
    failed_copies: usize,
    /// Whether the executor has waited for the step before: one without logits is only begun.
    was_waited_for: bool,
    /// Somebody waits in this step for blocks that copies hold: none more begin ahead of need.
    awaits_copies: bool,
    sequences: HashMap<SequenceId, Sequence>,
    /// Waiting and swapped, in no order; ranked when it is read.
    queue: Vec<SequenceId>,
    /// In order of admission.
    running: Vec<SequenceId>,
    chunks: ChunkController,
    speculation: Option<Speculation>,
    mix: StepMix,
    step: u64,
    /// When the step was planned.
    now_us: u64,
    arrivals: u64,
    events: Vec<SequenceEvent>,
    /// Scratch of `plan_step`.
    ids: Vec<SequenceId>,
    ranked: Vec<((Priority, u64), SequenceId)>,
    shares: Vec<Share>,
    /// Where the blocks lie that the sequence under consideration begins with.
    found: Vec<Place>,
    stats: SchedulerStats,
    /// Mean time between two ends, for `retry_after_ms`.
    end_interval_us: Option<f64>,
    last_end_us: Option<u64>,
}

impl Scheduler {
    /// A scheduler without sequences.
    pub fn new(options: SchedulerOptions) -> Self {
        let blocks = options.blocks;
        let lower = blocks.host + blocks.disk;
        Self {
            hasher: options.prefix_key.map(ChainHasher::new),
            tiers: Tiers::new(blocks, options.block_tokens),
            // A device block goes down for itself and as a prefix at most, or comes up; a host
            // block goes on.
            flights: Flights::new(if lower > 0 { 2 * blocks.device + blocks.host } else { 0 }),
            costs: SwapCosts::new(options.rates, options.block_bytes, options.block_tokens),
            disk_stopped: false,
            failed_copies: 0,
            was_waited_for: false,
            awaits_copies: false,
            sequences: HashMap::new(),
            queue: Vec::new(),
            running: Vec::new(),
            chunks: ChunkController::new(options.chunks).expecting(options.rates.prompt_tokens),
            speculation: options.speculation.map(Speculation::new),
            mix: StepMix::default(),
            step: 0,
            now_us: 0,
            arrivals: 0,
            events: Vec::new(),
            ids: Vec::new(),
            ranked: Vec::new(),
            shares: Vec::new(),
            found: Vec::new(),
            stats: SchedulerStats::default(),
            end_interval_us: None,
            last_end_us: None,
            options,
        }
    }

    /// Whether there is no sequence at all.
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    /// Forgets a sequence, without an event. An unknown one is none of our business: it may have
    /// ended meanwhile.
    pub fn abort(&mut self, id: SequenceId) {
        self.remove(id);
    }

    /// Holds a sequence back until [`Scheduler::resume`]. It keeps its blocks unless others need
    /// them.
    pub fn pause(&mut self, id: SequenceId) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.flow = Flow::Paused;
        }
    }

    /// Lets a paused sequence go on.
    pub fn resume(&mut self, id: SequenceId) {
        let now_us = self.now_us;
        let sequence = self.sequences.get_mut(&id).filter(|s| s.flow != Flow::Open);
        if let Some(sequence) = sequence {
            sequence.flow = Flow::Open;
            if sequence.state == State::Running {
                // It did not wait for us.
                sequence.queued_us = now_us;
            }
        }
    }

    /// Moves events that happened outside `apply` (deadlines) to `events`.
    pub fn drain_events(&mut self, events: &mut Vec<SequenceEvent>) {
        events.append(&mut self.events);
    }

    /// All figures.
    pub fn stats(&self) -> SchedulerStats {
        let count = |state| self.sequences.values().filter(|s| s.state == state).count();
        let [device, host, disk] =
            [Tier::Device, Tier::Host, Tier::Disk].map(|tier| self.tiers.pool(tier).counts());
        SchedulerStats {
            waiting: count(State::Waiting),
            running: self.running.len(),
            swapped: count(State::Swapped),
            paused: self.sequences.values().filter(|s| s.flow == Flow::Paused).count(),
            block_bytes: self.options.block_bytes,
            device,
            host,
            disk,
            disk_stopped: self.disk_stopped,
            copies_under_way: self.flights.len(),
            ..self.stats
        }
    }

    /// Checks what must hold between any two calls; for tests and simulations.
    ///
    /// # Panics
    /// When it does not hold, with the values.
    pub fn check_invariants(&self) {
        self.tiers.check_invariants();
        let mut references: HashMap<Place, u32> = HashMap::new();
        for (id, sequence) in &self.sequences {
            let queued = self.queue.iter().filter(|other| *other == id).count();
            let running = self.running.iter().filter(|other| *other == id).count();
            let expected = if sequence.state == State::Running { (0, 1) } else { (1, 0) };
            assert_eq!((queued, running), expected, "{id:?} is {:?}", sequence.state);
            assert!(sequence.computed < sequence.new.tokens.len(), "{id:?} has nothing to do");
            let covered = match sequence.state {
                State::Running => sequence.blocks.len(),
                State::Swapped => sequence.below.len(),
                State::Waiting => 0,
            } * self.options.block_tokens;
            assert!(covered >= sequence.computed, "{id:?}: {covered} < {}", sequence.computed);
            assert_eq!(sequence.copies, self.flights.of(Owner::of(sequence)), "copies of {id:?}");
            assert!(sequence.below.iter().all(|place| place.0 != Tier::Device));
            let blocks = sequence.blocks.iter().map(|block| (Tier::Device, *block));
            for place in blocks.chain(sequence.below.iter().copied()) {
                *references.entry(place).or_default() += 1;
            }
        }
        assert_eq!(self.queue.len() + self.running.len(), self.sequences.len());
        for place in self.flights.places() {
            *references.entry(place).or_default() += 1;
        }
        for tier in [Tier::Device, Tier::Host, Tier::Disk] {
            let used = references.keys().filter(|place| place.0 == tier).count();
            assert_eq!(self.tiers.pool(tier).counts().used, used, "blocks in use of {tier:?}");
        }
        for ((tier, block), count) in references {
            let counted = self.tiers.pool(tier).references(block);
            assert_eq!(counted, count, "references of {tier:?} {block:?}");
        }
    }

    /// Takes a sequence out, with everything it holds.
    fn remove(&mut self, id: SequenceId) -> Option<Sequence> {
        let mut sequence = self.sequences.remove(&id)?;
        self.queue.retain(|other| *other != id);
        self.running.retain(|other| *other != id);
        Self::release(&mut self.tiers, &mut sequence);
        Some(sequence)
    }

    /// Gives back all blocks of a sequence, last first, so that the cache evicts ends of prefixes
    /// before their beginnings. Those that copies work on stay until these end.
    fn release(tiers: &mut Tiers, sequence: &mut Sequence) {
        for block in sequence.blocks.drain(..).rev() {
            tiers.device.release(block);
        }
        for place in sequence.below.drain(..).rev() {
            tiers.release(place);
        }
    }

    /// Ends a sequence with a reason.
    fn finish(&mut self, now_us: u64, id: SequenceId, reason: FinishReason) -> SequenceEvent {
        let sequence = self.remove(id);
        self.note_end(now_us);
        let cached_tokens = sequence.and_then(|sequence| sequence.cached_tokens).unwrap_or(0);
        SequenceEvent { sequence: id, kind: SequenceEventKind::Finished { reason, cached_tokens } }
    }

    fn note_end(&mut self, now_us: u64) {
        if let Some(last_us) = self.last_end_us {
            let interval_us = now_us.saturating_sub(last_us) as f64;
            let mean = self.end_interval_us.unwrap_or(interval_us);
            self.end_interval_us = Some(mean + 0.2 * (interval_us - mean));
        }
        self.last_end_us = Some(now_us);
    }
}
