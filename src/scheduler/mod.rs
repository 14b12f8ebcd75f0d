//! Owns the decision of what the next step computes: queue, running set, KV blocks, chunk sizes.
//! It must not know executors, channels or clocks: time is an argument, the same calls give the
//! same plans. The engine loop calls it: `plan_step` → the step runs → `apply`.
//!
//! ```text
//! plan_step:  end what is past its deadline
//!             admit from the queue while the whole prompt has room, beside what runs
//!             one token for every decoding sequence, best rank first; without a block, take one
//!             from the worst-ranked running sequence (to the host tier, else computed again)
//!             share the chunk budget (chunking.rs) among prompts: half to the best rank, then
//!             the more urgent and the shortest remaining first
//! apply:      computed += planned; full blocks become findable; tokens, ends and failures go out
//! ```
//! Rank is urgency, then age. Urgency is the priority asked for; batch sequences that were in the
//! queue too long are raised for good, so none starves. When blocks or slots are lacking, running
//! batch sequences yield to waiting interactive ones, and paused ones to any as urgent. Nothing is
//! ever both in the queue and running.

mod admission;
mod apply;
mod budget;
mod chunking;
mod options;
mod plan;
mod preemption;
mod sequence;

pub use budget::ChunkBudget;
pub use chunking::{ChunkController, ChunkLimits, StepMix};
pub use options::{KvBlocks, SchedulerOptions, SchedulerStats};
pub use sequence::{NewSequence, SequenceEvent, SequenceEventKind};

use crate::kv::{BlockPool, ChainHasher, HostPool};
use crate::request::{FinishReason, Priority};
use crate::units::{BlockId, SequenceId};
use plan::Share;
use sequence::{Flow, Sequence, State};
use std::collections::HashMap;

/// In-flight batching over paged KV. See the module's pseudo-code.
pub struct Scheduler {
    options: SchedulerOptions,
    hasher: Option<ChainHasher>,
    pool: BlockPool,
    host: HostPool,
    sequences: HashMap<SequenceId, Sequence>,
    /// Waiting and swapped, in no order; ranked when it is read.
    queue: Vec<SequenceId>,
    /// In order of admission.
    running: Vec<SequenceId>,
    chunks: ChunkController,
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
    /// Cached blocks that the sequence under consideration begins with.
    found: Vec<BlockId>,
    stats: SchedulerStats,
    /// Mean time between two ends, for `retry_after_ms`.
    end_interval_us: Option<f64>,
    last_end_us: Option<u64>,
}

impl Scheduler {
    /// A scheduler without sequences.
    pub fn new(options: SchedulerOptions) -> Self {
        Self {
            hasher: options.prefix_key.map(ChainHasher::new),
            pool: BlockPool::new(options.device_blocks, options.block_tokens),
            host: HostPool::new(options.host_blocks),
            sequences: HashMap::new(),
            queue: Vec::new(),
            running: Vec::new(),
            chunks: ChunkController::new(options.chunks),
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
        let blocks = self.pool.counts();
        SchedulerStats {
            waiting: count(State::Waiting),
            running: self.running.len(),
            swapped: count(State::Swapped),
            paused: self.sequences.values().filter(|s| s.flow == Flow::Paused).count(),
            blocks_used: blocks.used,
            blocks_cached: blocks.cached,
            blocks_free: blocks.free,
            host_blocks: self.host.len(),
            host_blocks_used: self.host.used(),
            ..self.stats
        }
    }

    /// Checks what must hold between any two calls; for tests and simulations.
    ///
    /// # Panics
    /// When it does not hold, with the values.
    pub fn check_invariants(&self) {
        self.pool.check_invariants();
        let mut references: HashMap<_, u32> = HashMap::new();
        let mut host_blocks = 0;
        for (id, sequence) in &self.sequences {
            let queued = self.queue.iter().filter(|other| *other == id).count();
            let running = self.running.iter().filter(|other| *other == id).count();
            let expected = if sequence.state == State::Running { (0, 1) } else { (1, 0) };
            assert_eq!((queued, running), expected, "{id:?} is {:?}", sequence.state);
            assert!(sequence.computed < sequence.new.tokens.len(), "{id:?} has nothing to do");
            let covered = match sequence.state {
                State::Running => sequence.blocks.len(),
                State::Swapped => sequence.host_blocks.len(),
                State::Waiting => 0,
            } * self.options.block_tokens;
            assert!(covered >= sequence.computed, "{id:?}: {covered} < {}", sequence.computed);
            host_blocks += sequence.host_blocks.len();
            for block in &sequence.blocks {
                *references.entry(*block).or_default() += 1;
            }
        }
        assert_eq!(self.queue.len() + self.running.len(), self.sequences.len());
        assert_eq!(self.pool.counts().used, references.len(), "blocks in use");
        assert_eq!(self.host.used(), host_blocks, "host blocks in use");
        for (block, count) in references {
            assert_eq!(self.pool.references(block), count, "references of {block:?}");
        }
    }

    /// Takes a sequence out, with everything it holds.
    fn remove(&mut self, id: SequenceId) -> Option<Sequence> {
        let mut sequence = self.sequences.remove(&id)?;
        self.queue.retain(|other| *other != id);
        self.running.retain(|other| *other != id);
        Self::release(&mut self.pool, &mut self.host, &mut sequence);
        Some(sequence)
    }

    /// Gives back all blocks of a sequence, last first, so that the cache evicts ends of prefixes
    /// before their beginnings.
    fn release(pool: &mut BlockPool, host: &mut HostPool, sequence: &mut Sequence) {
        for block in sequence.blocks.drain(..).rev() {
            pool.release(block);
        }
        for block in sequence.host_blocks.drain(..) {
            host.release(block);
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
