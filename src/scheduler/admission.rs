//! Who may queue, and who leaves the queue.

use super::sequence::{Flow, NewSequence, Sequence, State};
use super::{Scheduler, SequenceEvent, SequenceEventKind};
use crate::kv::blocks_for;
use crate::request::{FinishReason, Priority, RequestError};
use crate::step::{BlockCopy, StepPlan, Tier};
use crate::units::{BlockId, SequenceId};

/// Queued sequences looked at in one step: bounds the time that looking up prefixes takes.
const ADMISSION_SCAN_MAX: usize = 64;
/// Bounds of `retry_after_ms`.
const RETRY_MS: std::ops::RangeInclusive<u64> = 50..=30_000;
/// `retry_after_ms` before two sequences have ended.
const RETRY_MS_UNKNOWN: u64 = 1_000;

impl Scheduler {
    /// Queues a sequence and tells how many go before it.
    ///
    /// # Errors
    /// `ContextExceeded`, `InsufficientMemory` for one that could never run, `Overloaded` when the
    /// queue is full. One that comes back after a crash is never refused as `Overloaded`.
    pub fn add(&mut self, now_us: u64, new: NewSequence) -> Result<usize, RequestError> {
        let options = &self.options;
        let prompt_tokens = new.prompt_tokens;
        if new.tokens.is_empty() {
            return Err(RequestError::InvalidParams {
                field: "prompt".into(),
                got: "0 tokens".into(),
                allowed: "at least 1 token".into(),
            });
        }
        let needed = prompt_tokens + usize::from(new.max_tokens > 0);
        if needed > options.context_tokens {
            let context_tokens = options.context_tokens;
            return Err(RequestError::ContextExceeded { prompt_tokens, context_tokens });
        }
        let longest = (prompt_tokens + new.max_tokens).min(options.context_tokens);
        let blocks = blocks_for(longest, options.block_tokens);
        if blocks > self.pool.len() {
            return Err(RequestError::InsufficientMemory {
                device: "KV store".into(),
                need: blocks as u64,
                free: self.pool.len() as u64,
                suggest: format!(
                    "these are blocks of {} tokens; lower max_tokens or raise kv.cache_bytes",
                    options.block_tokens
                ),
            });
        }
        let returns = new.crashes > 0 || new.tokens.len() > prompt_tokens;
        if !returns && self.queue.len() >= options.queue_max {
            let queue_depth = self.queue.len();
            return Err(RequestError::Overloaded { queue_depth, retry_after_ms: self.retry_ms() });
        }
        self.arrivals += 1;
        let sequence = Sequence::new(new, self.arrivals, now_us);
        let rank = sequence.rank();
        let before = self.queue.iter().filter(|id| self.sequences[*id].rank() < rank).count();
        self.queue.push(sequence.new.id);
        self.sequences.insert(sequence.new.id, sequence);
        Ok(before)
    }

    fn retry_ms(&self) -> u64 {
        let interval_ms = self.end_interval_us.map(|us| (us / 1e3) as u64);
        interval_ms.unwrap_or(RETRY_MS_UNKNOWN).clamp(*RETRY_MS.start(), *RETRY_MS.end())
    }

    /// Ends everything that is past its deadline.
    pub(super) fn expire(&mut self, now_us: u64) {
        let mut late: Vec<(SequenceId, Option<u64>)> = Vec::new();
        for (id, sequence) in &self.sequences {
            let passed = |deadline: Option<u64>| deadline.filter(|at| *at <= now_us);
            if passed(sequence.new.deadline_us).is_some() {
                late.push((*id, None));
            } else if sequence.generated() == 0
                && let Some(at) = passed(sequence.new.ttft_deadline_us)
            {
                late.push((*id, Some(at.saturating_sub(sequence.arrival_us))));
            }
        }
        late.sort_unstable();
        for (id, first_token) in late {
            let event = match first_token {
                None => self.finish(now_us, id, FinishReason::Deadline),
                Some(waited_us) => {
                    self.remove(id);
                    let deadline_ms = waited_us.div_ceil(1000);
                    let error = RequestError::DeadlineExceeded { deadline_ms };
                    SequenceEvent { sequence: id, kind: SequenceEventKind::Failed(error) }
                }
            };
            self.events.push(event);
        }
    }

    /// Moves sequences from the queue to the running set while there is room for their whole
    /// prompts, best rank first. The first one without room ends it, so that none is overtaken
    /// for ever; only those that wait for a prefix under computation are passed over.
    pub(super) fn admit(&mut self, now_us: u64, plan: &mut StepPlan) {
        if self.queue.is_empty() {
            return;
        }
        let mut ids = std::mem::take(&mut self.ids);
        ids.clear();
        ids.extend(self.queue.iter().filter(|id| self.sequences[*id].flow == Flow::Open));
        ids.sort_unstable_by_key(|id| self.queue_rank(now_us, *id));
        ids.truncate(ADMISSION_SCAN_MAX);
        for id in ids.drain(..) {
            if self.running.len() >= self.options.sequences_max {
                break;
            }
            if self.waits_for_prefix(id) {
                continue;
            }
            if !self.start(id, plan) {
                break;
            }
        }
        self.ids = ids;
    }

    fn queue_rank(&self, now_us: u64, id: SequenceId) -> (Priority, u64) {
        let sequence = &self.sequences[&id];
        let waited_us = now_us.saturating_sub(sequence.arrival_us);
        let (priority, order) = sequence.rank();
        match waited_us > self.options.batch_wait_us_max {
            true => (Priority::Interactive, order),
            false => (priority, order),
        }
    }

    /// Whether another running sequence is computing the very block that this one needs next.
    fn waits_for_prefix(&mut self, id: SequenceId) -> bool {
        let found = self.cached_blocks(id).len();
        let sequence = &self.sequences[&id];
        if sequence.state == State::Swapped || sequence.new.prompt_logprobs.is_some() {
            return false;
        }
        // The last token is always computed, so a block that ends with it is not waited for.
        let usable = (sequence.new.tokens.len() - 1) / self.options.block_tokens;
        let Some(next) = sequence.hashes.get(found).filter(|_| found < usable).copied() else {
            return false;
        };
        self.running.iter().any(|other| {
            let other = &self.sequences[other];
            let unfinished = other.hashes.get(other.published..).unwrap_or_default();
            other.flow == Flow::Open && other.remaining() > 1 && unfinished.contains(&next)
        })
    }

    /// Cached blocks that the sequence's tokens begin with, without taking references.
    fn cached_blocks(&mut self, id: SequenceId) -> Vec<BlockId> {
        let block_tokens = self.options.block_tokens;
        let (Some(hasher), Some(sequence)) = (&self.hasher, self.sequences.get_mut(&id)) else {
            return Vec::new();
        };
        hasher.extend(&mut sequence.hashes, &sequence.new.tokens, block_tokens);
        if sequence.new.prompt_logprobs.is_some() || sequence.state == State::Swapped {
            return Vec::new();
        }
        let usable = (sequence.new.tokens.len() - 1) / block_tokens;
        let mut parent = None;
        let mut found = Vec::new();
        let blocks = sequence.new.tokens.chunks_exact(block_tokens);
        for (hash, tokens) in sequence.hashes.iter().zip(blocks).take(usable) {
            let Some(block) = self.pool.find(*hash, parent, tokens) else { break };
            found.push(block);
            parent = Some(*hash);
        }
        found
    }

    /// Gives a queued sequence its cached or swapped blocks, if its whole prompt has room.
    fn start(&mut self, id: SequenceId, plan: &mut StepPlan) -> bool {
        let cached = self.cached_blocks(id);
        loop {
            let sequence = &self.sequences[&id];
            let total = blocks_for(sequence.new.tokens.len() + 1, self.options.block_tokens);
            let fresh = total.min(self.pool.len()) - cached.len();
            let from_cache = cached.iter().filter(|b| self.pool.is_unreferenced(**b)).count();
            let room = self.pool.available().saturating_sub(self.committed() + from_cache);
            if self.running.is_empty() || room >= fresh {
                break;
            }
            if !self.make_room_for(id, plan) {
                return false;
            }
        }
        for block in &cached {
            self.pool.retain(*block);
        }
        let Some(sequence) = self.sequences.get_mut(&id) else { return false };
        if sequence.state == State::Waiting {
            let tokens = cached.len() * self.options.block_tokens;
            sequence.computed = tokens;
            sequence.published = cached.len();
            sequence.blocks = cached;
            if sequence.cached_tokens.is_none() {
                sequence.cached_tokens = Some(tokens);
                self.stats.prefix_hit_tokens += tokens as u64;
            }
        } else {
            Self::swap_in(&mut self.pool, &mut self.host, sequence, plan);
        }
        sequence.state = State::Running;
        self.queue.retain(|other| *other != id);
        self.running.push(id);
        true
    }

    /// Blocks that running sequences will still need for the tokens they have.
    fn committed(&self) -> usize {
        let needs = self.running.iter().map(|id| {
            let sequence = &self.sequences[id];
            let total = blocks_for(sequence.new.tokens.len() + 1, self.options.block_tokens);
            total.saturating_sub(sequence.blocks.len())
        });
        needs.sum()
    }

    /// Brings a swapped sequence's blocks back. The caller has seen that there is room.
    fn swap_in(
        pool: &mut crate::kv::BlockPool,
        host: &mut crate::kv::HostPool,
        sequence: &mut Sequence,
        plan: &mut StepPlan,
    ) {
        for from in sequence.host_blocks.drain(..) {
            let to = pool.allocate().expect("admission has seen that there is room");
            plan.copies.push(BlockCopy { from: (Tier::Host, from), to: (Tier::Device, to) });
            sequence.blocks.push(to);
            host.release(from);
        }
        // Nothing is offered to the index again: it may know the same content under other ids.
        sequence.published = sequence.published.min(sequence.blocks.len());
    }
}
