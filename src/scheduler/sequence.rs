//! What the scheduler is given and what it tells: sequences come in, events go out.

use crate::kv::{BlockHash, Place};
use crate::request::{FinishReason, Priority, RequestError, SamplingParams};
use crate::speculative::Draft;
use crate::step::RowOutput;
use crate::units::{BlockId, SequenceId, TokenId};
use std::sync::Arc;

/// A sequence to be continued. After a crash it comes again with the tokens emitted so far.
#[derive(Clone, Debug)]
pub struct NewSequence {
    /// Its name, unique over the engine's life.
    pub id: SequenceId,
    /// Prompt and, after a crash, what was generated already.
    pub tokens: Vec<TokenId>,
    /// How many of `tokens` are the prompt.
    pub prompt_tokens: usize,
    /// How the next token is chosen; the seed is resolved.
    pub sampling: Arc<SamplingParams>,
    /// New tokens in all, counting those in `tokens`; 0 computes the prompt only.
    pub max_tokens: usize,
    /// Tokens that end the answer without being part of it.
    pub end_tokens: Arc<[TokenId]>,
    /// Queue class.
    pub priority: Priority,
    /// When the answer ends as it is.
    pub deadline_us: Option<u64>,
    /// When it fails unless a token was generated.
    pub ttft_deadline_us: Option<u64>,
    /// `Some(k)`: every prompt token from the second on is scored, with `k` alternatives.
    pub prompt_logprobs: Option<usize>,
    /// At how many crashes it was in flight.
    pub crashes: u32,
}

/// Something that happened to a sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct SequenceEvent {
    /// Whose event.
    pub sequence: SequenceId,
    /// What.
    pub kind: SequenceEventKind,
}

/// What can happen to a sequence.
#[derive(Clone, Debug, PartialEq)]
pub enum SequenceEventKind {
    /// Prompt tokens computed.
    Prefill {
        /// So far.
        done: usize,
        /// Of so many.
        total: usize,
        /// Found in the prefix cache.
        cached_tokens: usize,
    },
    /// Drafted tokens were in a step, whose tokens follow.
    Drafted {
        /// So many.
        tokens: usize,
        /// Of these, tokens that are what was sampled, as were all before them.
        accepted: usize,
    },
    /// A new token.
    Token(RowOutput),
    /// The log-probability of a prompt token.
    PromptScore(RowOutput),
    /// It was in flight when the executor died, and is computed again.
    Interrupted {
        /// Crashes it was in flight at.
        crashes: u32,
    },
    /// It ended.
    Finished {
        /// Why.
        reason: FinishReason,
        /// Prompt tokens found in the prefix cache.
        cached_tokens: usize,
    },
    /// It failed.
    Failed(RequestError),
}

/// Where a sequence stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// In the queue, without blocks.
    Waiting,
    /// In the queue, its blocks in lower tiers or on their way there.
    Swapped,
    /// With blocks of the device tier, or on their way there.
    Running,
}

/// Whether flow control lets a sequence run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flow {
    Open,
    Paused,
}

/// A sequence in the scheduler.
#[derive(Clone, Debug)]
pub(super) struct Sequence {
    pub new: NewSequence,
    pub state: State,
    pub flow: Flow,
    /// Queue class: as asked, or raised because it waited long. Never lowered.
    pub urgency: Priority,
    /// When it last came into the queue or was in a step, and how long it was in the queue before.
    pub queued_us: u64,
    pub waited_us: u64,
    /// Arrival number: the smaller, the older.
    pub order: u64,
    pub arrival_us: u64,
    /// Tokens whose keys and values lie in blocks.
    pub computed: usize,
    /// Device blocks of positions `0 ..`.
    pub blocks: Vec<BlockId>,
    /// Where its blocks lie in lower tiers, from it was swapped out until they are back.
    pub below: Vec<Place>,
    /// Copies under way of its blocks. With any it neither starts nor is in a step.
    pub copies: usize,
    /// Names of the full blocks of `new.tokens`, as far as known.
    pub hashes: Vec<BlockHash>,
    /// How many of `blocks` were offered to the prefix index or came from it.
    pub published: usize,
    /// Prompt tokens found in the prefix cache when it first had all blocks of them.
    pub cached_tokens: Option<usize>,
    /// Prompt positions below this were scored.
    pub scored: usize,
    /// What is proposed to follow `new.tokens`, and how much of it is in the step in flight.
    pub draft: Draft,
    /// Tokens in the step in flight, and which step that is.
    pub planned_tokens: usize,
    pub planned_step: u64,
}

impl Sequence {
    /// A waiting sequence whose drafts have up to `draft_max` tokens.
    pub fn new(new: NewSequence, draft_max: usize, order: u64, arrival_us: u64) -> Self {
        Self {
            state: State::Waiting,
            flow: Flow::Open,
            urgency: new.priority,
            queued_us: arrival_us,
            waited_us: 0,
            order,
            arrival_us,
            computed: 0,
            blocks: Vec::new(),
            below: Vec::new(),
            copies: 0,
            hashes: Vec::new(),
            published: 0,
            cached_tokens: None,
            scored: 1,
            draft: Draft::with_room(draft_max),
            planned_tokens: 0,
            planned_step: 0,
            new,
        }
    }

    /// Whether prompt tokens are still to be scored.
    pub fn is_scoring(&self) -> bool {
        self.new.prompt_logprobs.is_some() && self.scored < self.new.prompt_tokens
    }

    /// Puts it back into the queue, its tokens to be computed again.
    pub fn requeue(&mut self, now_us: u64) {
        self.state = State::Waiting;
        self.computed = 0;
        self.published = 0;
        self.draft.clear();
        self.queued_us = now_us;
    }

    /// Tokens that have to be computed before the next one can be sampled.
    pub fn remaining(&self) -> usize {
        self.new.tokens.len() - self.computed
    }

    pub fn generated(&self) -> usize {
        self.new.tokens.len() - self.new.prompt_tokens
    }

    /// Whether no further token may be said: there are as many as were asked for, or as the context
    /// holds.
    pub fn is_full(&self, context_tokens: usize) -> bool {
        self.generated() >= self.new.max_tokens || self.new.tokens.len() >= context_tokens
    }

    /// Whether a deadline has passed.
    pub fn is_late(&self, now_us: u64) -> bool {
        let passed = |deadline: Option<u64>| deadline.is_some_and(|at| at <= now_us);
        let first_token = self.new.ttft_deadline_us.filter(|_| self.generated() == 0);
        passed(self.new.deadline_us) || passed(first_token)
    }

    /// How many of its full blocks can come from the cache: the last token is always computed.
    pub fn usable_blocks(&self, block_tokens: usize) -> usize {
        (self.new.tokens.len() - 1) / block_tokens
    }

    /// Whether it may be in a step.
    pub fn is_ready(&self) -> bool {
        self.state == State::Running && self.flow == Flow::Open && self.copies == 0
    }

    /// Whether the next step samples a token that is not its first.
    pub fn is_decoding(&self) -> bool {
        self.is_ready() && self.remaining() == 1 && self.generated() > 0
    }

    /// Smaller goes first.
    pub fn rank(&self) -> (Priority, u64) {
        (self.urgency, self.order)
    }
}
