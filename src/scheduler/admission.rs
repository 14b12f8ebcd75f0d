//! Who may queue, and who leaves the queue.

use super::copies::Owner;
use super::sequence::{Flow, NewSequence, Sequence, State};
use super::{Scheduler, SequenceEvent, SequenceEventKind};
use crate::kv::blocks_for;
use crate::request::{FinishReason, Priority, RequestError};
use crate::step::Tier;
use crate::units::SequenceId;

/// Queued sequences looked at in one step: bounds the time that looking up prefixes takes.
const ADMISSION_SCAN_MAX: usize = 64;
/// Bounds of `retry_after_ms`.
const RETRY_MS: std::ops::RangeInclusive<u64> = 50..=30_000;
/// `retry_after_ms` before two sequences have ended.
const RETRY_MS_UNKNOWN: u64 = 1_000;

impl Scheduler {
    /// Queues a sequence and tells how many go before it. One of the same id is replaced: its
    /// stream has started over.
    ///
    /// # Errors
    /// `InvalidParams` for an empty prompt, `ContextExceeded`, `InsufficientMemory` for one that
    /// could never run, `Overloaded` when the queue is full. One that comes back after a crash is
    /// never refused as `Overloaded`.
    pub fn add(&mut self, now_us: u64, new: NewSequence) -> Result<usize, RequestError> {
        let blocks_max = self.check_size(&new)?;
        self.remove(new.id);
        let returns = new.crashes > 0 || new.tokens.len() > new.prompt_tokens;
        if !returns && self.queue.len() >= self.options.queue_max {
            let queue_depth = self.queue.len();
            return Err(RequestError::Overloaded { queue_depth, retry_after_ms: self.retry_ms() });
        }
        if self.sequences.is_empty() {
            // What passed without work says nothing about how fast work goes.
            self.last_end_us = Some(now_us);
        }
        self.arrivals += 1;
        let mut sequence = Sequence::new(new, self.draft_max(), self.arrivals, now_us);
        let said_all = returns && sequence.is_full(self.options.context_tokens);
        if said_all && sequence.generated() > 0 && !sequence.is_scoring() {
            let kind =
                SequenceEventKind::Finished { reason: FinishReason::Length, cached_tokens: 0 };
            self.events.push(SequenceEvent { sequence: sequence.new.id, kind });
            return Ok(0);
        }
        if let Some(hasher) = &self.hasher {
            let tokens = &sequence.new.tokens;
            hasher.extend(&mut sequence.hashes, tokens, self.options.block_tokens);
        }
        // Steps are planned without allocating.
        sequence.blocks.reserve_exact(blocks_max);
        if self.tiers.lower_len() > 0 {
            sequence.below.reserve_exact(blocks_max);
        }
        let rank = sequence.rank();
        let before = self.queue.iter().filter(|id| self.sequences[*id].rank() < rank).count();
        self.queue.push(sequence.new.id);
        self.sequences.insert(sequence.new.id, sequence);
        Ok(before)
    }

    /// The blocks that a sequence takes at most, if it can run here at all.
    fn check_size(&self, new: &NewSequence) -> Result<usize, RequestError> {
        let options = &self.options;
        let prompt_tokens = new.prompt_tokens;
        if prompt_tokens == 0 || new.tokens.len() < prompt_tokens {
            return Err(RequestError::InvalidParams {
                field: "prompt".into(),
                got: format!("{} tokens, {prompt_tokens} of the prompt", new.tokens.len()),
                allowed: "at least 1 token".into(),
            });
        }
        let context_tokens = options.context_tokens;
        if prompt_tokens + usize::from(new.max_tokens > 0) > context_tokens {
            return Err(RequestError::ContextExceeded { prompt_tokens, context_tokens });
        }
        let longest = prompt_tokens.saturating_add(new.max_tokens).min(context_tokens);
        let blocks = blocks_for(longest.max(new.tokens.len()), options.block_tokens);
        if blocks > self.tiers.device.len() {
            return Err(RequestError::InsufficientMemory {
                device: "KV store".into(),
                need: blocks as u64 * options.block_bytes,
                free: self.tiers.device.len() as u64 * options.block_bytes,
                suggest: "lower max_tokens or raise kv.cache_bytes".into(),
            });
        }
        Ok(blocks)
    }

    fn retry_ms(&self) -> u64 {
        let interval_ms = self.end_interval_us.map(|us| (us / 1e3) as u64);
        interval_ms.unwrap_or(RETRY_MS_UNKNOWN).clamp(*RETRY_MS.start(), *RETRY_MS.end())
    }

    /// Ends everything that is past its deadline, and raises what has waited too long.
    pub(super) fn expire(&mut self) {
        let now_us = self.now_us;
        let mut late = std::mem::take(&mut self.ids);
        late.clear();
        for (id, sequence) in &mut self.sequences {
            if sequence.is_late(now_us) {
                late.push(*id);
            }
            let idle_us = now_us.saturating_sub(sequence.queued_us);
            let waited_us = match sequence.state {
                // Running, but in no step: its client could take more.
                State::Running if sequence.flow == Flow::Open => idle_us,
                State::Running => 0,
                _ => sequence.waited_us + idle_us,
            };
            if waited_us > self.options.batch_wait_us_max {
                sequence.urgency = Priority::Interactive;
            }
        }
        late.sort_unstable();
        for id in late.drain(..) {
            let event = self.end_late(id);
            self.events.push(event);
        }
        self.ids = late;
    }

    /// Ends one that is past a deadline: as it is, or as a failure if only the first token's is.
    fn end_late(&mut self, id: SequenceId) -> SequenceEvent {
        let sequence = &self.sequences[&id];
        if sequence.new.deadline_us.is_some_and(|at| at <= self.now_us) {
            return self.finish(self.now_us, id, FinishReason::Deadline);
        }
        let at_us = sequence.new.ttft_deadline_us.unwrap_or(self.now_us);
        let deadline_ms = at_us.saturating_sub(sequence.arrival_us).div_ceil(1000);
        self.remove(id);
        self.note_end(self.now_us);
        let error = RequestError::DeadlineExceeded { deadline_ms };
        SequenceEvent { sequence: id, kind: SequenceEventKind::Failed(error) }
    }

    /// Moves sequences from the queue to the running set while there is room for their whole
    /// prompts, best rank first. The first one without room, or whose blocks are still on their
    /// way, ends it, so that none is overtaken for ever; only those that wait for a prefix under
    /// computation are passed over.
    pub(super) fn admit(&mut self) {
        let mut ranked = std::mem::take(&mut self.ranked);
        ranked.clear();
        let queued = self.queue.iter().map(|id| &self.sequences[id]);
        let open = queued.filter(|sequence| sequence.flow == Flow::Open);
        ranked.extend(open.map(|sequence| (sequence.rank(), sequence.new.id)));
        ranked.sort_unstable();
        for (_, id) in ranked.iter().take(ADMISSION_SCAN_MAX) {
            if self.sequences[id].copies > 0 {
                break;
            }
            self.find_blocks(*id);
            if self.waits_for_prefix(*id) {
                continue;
            }
            if !self.has_room(*id) {
                break;
            }
            self.start(*id);
        }
        self.ranked = ranked;
    }

    /// Leaves where the blocks that a queued sequence begins with lie in `found`, without taking
    /// references: those of a swapped one, else cached ones as far as they come back sooner than
    /// they are computed.
    fn find_blocks(&mut self, id: SequenceId) {
        self.found.clear();
        let sequence = &self.sequences[&id];
        let block_tokens = self.options.block_tokens;
        let blocks = sequence.new.tokens.chunks_exact(block_tokens);
        let mut parent = None;
        let mut named = sequence
            .hashes
            .iter()
            .zip(blocks)
            .map(|(hash, tokens)| ((*hash, parent.replace(*hash)), tokens));
        if sequence.state == State::Swapped {
            // Others may write into a full block's place of a part: only full ones are looked up.
            let mut full = named.by_ref().take(sequence.computed / block_tokens);
            self.found.extend(sequence.below.iter().map(|place| {
                let on_device = full
                    .next()
                    .and_then(|(name, tokens)| self.tiers.find(&[Tier::Device], name, tokens));
                on_device.unwrap_or(*place)
            }));
            return;
        }
        if sequence.new.prompt_logprobs.is_some() {
            return;
        }
        let worth = [Tier::Device, Tier::Host, Tier::Disk].map(|tier| self.costs.brings_up(tier));
        let tiers: &[Tier] = match worth {
            [_, true, true] => &[Tier::Device, Tier::Host, Tier::Disk],
            [_, true, false] => &[Tier::Device, Tier::Host],
            _ => &[Tier::Device],
        };
        let found = named
            .take(sequence.usable_blocks(block_tokens))
            .map_while(|(name, tokens)| self.tiers.find(tiers, name, tokens));
        self.found.extend(found);
    }

    /// Whether another running sequence is computing the very block that this one needs next, and
    /// is at least as urgent; or a block of its prefix is being brought up for another.
    fn waits_for_prefix(&self, id: SequenceId) -> bool {
        let sequence = &self.sequences[&id];
        if sequence.state == State::Swapped || sequence.new.prompt_logprobs.is_some() {
            return false;
        }
        // A prefix comes up as one: its first block speaks for all.
        let lower = self.found.iter().find(|place| place.0 != Tier::Device);
        if lower.is_some_and(|place| self.flights.is_rising(*place)) {
            return true;
        }
        let at = self.found.len();
        let usable = sequence.usable_blocks(self.options.block_tokens);
        let Some(next) = sequence.hashes.get(at).filter(|_| at < usable) else { return false };
        self.running.iter().any(|other| {
            let other = &self.sequences[other];
            // A block's name stands for all before it, so it lies at the same place in both.
            other.hashes.get(at) == Some(next)
                && at >= other.published
                && other.flow == Flow::Open
                && other.remaining() > 1
                && other.urgency <= sequence.urgency
        })
    }

    /// Whether there is a slot and room for all tokens of a queued sequence, if need be at the cost
    /// of those that have to yield to it.
    fn has_room(&mut self, id: SequenceId) -> bool {
        loop {
            let device = &self.tiers.device;
            let total = self.blocks_ahead(id).min(device.len());
            let here = self.found.iter().filter(|place| place.0 == Tier::Device);
            let fresh = total.saturating_sub(here.clone().count());
            let idle = here.filter(|(_, block)| device.is_unreferenced(*block)).count();
            let needed = self.committed() + idle + fresh;
            let lacking = needed.saturating_sub(device.available());
            let has_slot = self.running.len() < self.options.sequences_max;
            if has_slot && lacking == 0 {
                return true;
            }
            let leaving = self.flights.leaving(&self.tiers);
            if has_slot && lacking <= leaving {
                // It will be there.
                self.awaits_copies = true;
                return false;
            }
            if !self.make_room_for(id, lacking.saturating_sub(leaving)) {
                return false;
            }
            // What was swapped out may have evicted prefixes from a lower tier.
            self.find_blocks(id);
        }
    }

    /// Gives a queued sequence its blocks, or begins the copies that bring them, and a place among
    /// the running.
    fn start(&mut self, id: SequenceId) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        sequence.waited_us += self.now_us.saturating_sub(sequence.queued_us);
        sequence.queued_us = self.now_us;
        // Before any is allocated, which could evict them.
        for place in self.found.iter().filter(|place| place.0 == Tier::Device) {
            self.tiers.retain(*place);
        }
        for place in &self.found {
            let (tier, block) = *place;
            if tier == Tier::Device {
                sequence.blocks.push(block);
                continue;
            }
            let copy = self.tiers.begin_copy(*place, Tier::Device);
            let copy = copy.expect("admission has seen that there is room");
            self.tiers.retain(copy.to);
            sequence.blocks.push(copy.to.1);
            self.flights.begin(copy, Some(Owner { id, order: sequence.order }));
            sequence.copies += 1;
        }
        if sequence.state == State::Swapped {
            // Nothing is offered to the index again: it may know the same content elsewhere.
            sequence.published = sequence.published.min(sequence.blocks.len());
        } else {
            sequence.computed = self.found.len() * self.options.block_tokens;
            sequence.published = self.found.len();
        }
        sequence.state = State::Running;
        let has_arrived = sequence.copies == 0;
        self.queue.retain(|other| *other != id);
        self.running.push(id);
        if has_arrived {
            self.arrive(self.now_us, id);
        }
    }

    /// Counts the prompt tokens that a sequence, which computes none yet, found.
    pub(super) fn count_hits(&mut self, id: SequenceId) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        if sequence.cached_tokens.is_none() {
            let prompt_hit = sequence.computed.min(sequence.new.prompt_tokens);
            sequence.cached_tokens = Some(prompt_hit);
            self.stats.prefix_hit_tokens += prompt_hit as u64;
        }
    }

    /// Blocks that running sequences will still need for the tokens they have.
    fn committed(&self) -> usize {
        self.running.iter().map(|id| self.lacking_soon(*id)).sum()
    }
}
