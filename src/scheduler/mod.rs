//! Stand-in with the agreed interface, until the branch `scheduler` is merged and replaces it: first
//! come first served, no prefix cache, no preemption. Without it the actors could not be run. Take
//! the other side when it conflicts.
#![allow(missing_docs, reason = "replaced as a whole")]
use crate::request::*;
use crate::step::*;
use crate::units::*;
use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
pub struct NewSequence {
    pub id: SequenceId,
    pub tokens: Vec<TokenId>,
    pub prompt_tokens: usize,
    pub sampling: Arc<SamplingParams>,
    pub max_tokens: usize,
    pub end_tokens: Arc<[TokenId]>,
    pub priority: Priority,
    pub deadline_us: Option<u64>,
    pub ttft_deadline_us: Option<u64>,
    pub top_logprobs: usize,
    pub prompt_logprobs: Option<usize>,
    pub crashes: u32,
}
#[derive(Debug)]
pub struct SequenceEvent {
    pub sequence: SequenceId,
    pub kind: SequenceEventKind,
}
#[derive(Debug)]
pub enum SequenceEventKind {
    Prefill { done: usize, total: usize, cached_tokens: usize },
    Token(RowOutput),
    PromptScore(RowOutput),
    Interrupted { crashes: u32 },
    Finished { reason: FinishReason, cached_tokens: usize },
    Failed(RequestError),
}
pub struct SchedulerOptions {
    pub crashes_max: u32,
}
struct Seq {
    n: NewSequence,
    computed: usize,
    slot: u32,
}
#[derive(Default, Clone, Copy)]
pub struct SchedulerStats {
    pub running: usize,
    pub waiting: usize,
    pub paused: usize,
}
pub struct Scheduler {
    seqs: VecDeque<Seq>,
    paused: HashSet<SequenceId>,
    step: u64,
    in_flight: Vec<SequenceId>,
    pending: Vec<SequenceEvent>,
    o: SchedulerOptions,
}
impl Scheduler {
    pub fn new(o: SchedulerOptions) -> Self {
        Self {
            seqs: VecDeque::new(),
            paused: HashSet::new(),
            step: 0,
            in_flight: vec![],
            pending: vec![],
            o,
        }
    }
    pub fn is_empty(&self) -> bool {
        self.seqs.is_empty()
    }
    pub fn add(&mut self, _now: u64, n: NewSequence) -> Result<usize, RequestError> {
        let p = self.seqs.len();
        let slot = (0..).find(|k| self.seqs.iter().all(|s| s.slot != *k)).unwrap_or(0);
        self.seqs.push_back(Seq { n, computed: 0, slot });
        Ok(p)
    }
    pub fn abort(&mut self, id: SequenceId) {
        self.seqs.retain(|s| s.n.id != id);
        self.paused.remove(&id);
    }
    pub fn pause(&mut self, id: SequenceId) {
        if self.seqs.iter().any(|s| s.n.id == id) {
            self.paused.insert(id);
        }
    }
    pub fn resume(&mut self, id: SequenceId) {
        self.paused.remove(&id);
    }
    pub fn plan_step(&mut self, now: u64, plan: &mut StepPlan) {
        plan.clear();
        self.step += 1;
        plan.step = StepId(self.step);
        self.in_flight.clear();
        let mut ended = vec![];
        for s in &mut self.seqs {
            if s.n.deadline_us.is_some_and(|d| d <= now) {
                ended.push(s.n.id);
                continue;
            }
            if self.paused.contains(&s.n.id) || plan.sequences.len() >= 16 {
                continue;
            }
            let start = plan.tokens.len();
            plan.tokens.extend_from_slice(&s.n.tokens[s.computed..]);
            let table = plan.block_tables.len();
            plan.block_tables.extend((0..64).map(|k| BlockId(s.slot * 64 + k)));
            plan.sequences.push(PlannedSequence {
                id: s.n.id,
                tokens: start..plan.tokens.len(),
                position_start: s.computed,
                block_table: table..table + 64,
            });
            let h = plan.history.len();
            plan.history.extend_from_slice(&s.n.tokens);
            plan.logits.push(LogitsRow {
                sequence: s.n.id,
                row: plan.tokens.len() - 1,
                position: s.n.tokens.len(),
                task: LogitsTask::Sample {
                    params: s.n.sampling.clone(),
                    history: h..plan.history.len(),
                    prompt_tokens: s.n.prompt_tokens,
                },
            });
            self.in_flight.push(s.n.id);
        }
        for id in ended {
            self.abort(id);
            self.pending.push(SequenceEvent {
                sequence: id,
                kind: SequenceEventKind::Finished {
                    reason: FinishReason::Deadline,
                    cached_tokens: 0,
                },
            });
        }
    }
    pub fn apply(
        &mut self,
        _now: u64,
        _plan: &StepPlan,
        out: &StepOutput,
        events: &mut Vec<SequenceEvent>,
    ) {
        for row in &out.rows {
            let Some(s) = self.seqs.iter_mut().find(|s| s.n.id == row.sequence) else { continue };
            let id = row.sequence;
            if s.computed == 0 {
                let total = s.n.prompt_tokens;
                let kind = SequenceEventKind::Prefill { done: total, total, cached_tokens: 0 };
                events.push(SequenceEvent { sequence: id, kind });
            }
            s.computed = s.n.tokens.len();
            let mut reason = None;
            if s.n.end_tokens.contains(&row.token.id) {
                reason = Some(FinishReason::Stop);
            } else {
                s.n.tokens.push(row.token.id);
                events.push(SequenceEvent {
                    sequence: id,
                    kind: SequenceEventKind::Token(row.clone()),
                });
                if s.n.tokens.len() - s.n.prompt_tokens >= s.n.max_tokens {
                    reason = Some(FinishReason::Length);
                }
            }
            if let Some(reason) = reason {
                self.abort(id);
                let kind = SequenceEventKind::Finished { reason, cached_tokens: 0 };
                events.push(SequenceEvent { sequence: id, kind });
            }
        }
        self.in_flight.clear();
    }
    pub fn executor_lost(&mut self, _now: u64, events: &mut Vec<SequenceEvent>) {
        for s in &mut self.seqs {
            s.computed = 0;
        }
        for id in std::mem::take(&mut self.in_flight) {
            let Some(s) = self.seqs.iter_mut().find(|s| s.n.id == id) else { continue };
            s.n.crashes += 1;
            let crashes = s.n.crashes;
            if crashes >= self.o.crashes_max {
                self.abort(id);
                let kind = SequenceEventKind::Failed(RequestError::PoisonRequest { crashes });
                events.push(SequenceEvent { sequence: id, kind });
            } else {
                events.push(SequenceEvent {
                    sequence: id,
                    kind: SequenceEventKind::Interrupted { crashes },
                });
            }
        }
    }
    pub fn drain_events(&mut self, e: &mut Vec<SequenceEvent>) {
        e.append(&mut self.pending);
    }
    pub fn stats(&self) -> SchedulerStats {
        SchedulerStats { running: self.seqs.len(), waiting: 0, paused: self.paused.len() }
    }
}
