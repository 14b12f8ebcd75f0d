//! The last steps with their phases and the copies of KV blocks beside them, kept in rings and
//! exported in the Trace Event Format that Chrome's and Perfetto's viewers read.

use crate::step::Tier;
use crate::units::StepId;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

/// One step, with times in microseconds since the engine's start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepTrace {
    /// Which step.
    pub step: StepId,
    /// When planning began.
    pub plan_start_us: u64,
    /// When the plan was handed over.
    pub run_start_us: u64,
    /// When its output came back.
    pub run_end_us: u64,
    /// When the output was applied.
    pub apply_end_us: u64,
    /// Tokens of the step.
    pub tokens: usize,
    /// Sequences of the step.
    pub sequences: usize,
    /// KV copies between tiers under way when it was planned.
    pub copies: usize,
}

/// Copies of KV blocks that were performed together, with times in microseconds since the engine's
/// start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyTrace {
    /// When the first began.
    pub start_us: u64,
    /// When the last had ended.
    pub end_us: u64,
    /// Where the blocks lay.
    pub from: Tier,
    /// Where they were copied to.
    pub to: Tier,
    /// How many.
    pub blocks: usize,
}

/// Bounded rings of [`StepTrace`]s and [`CopyTrace`]s; of each the oldest is dropped.
#[derive(Debug)]
pub struct TraceRing {
    steps: Mutex<VecDeque<StepTrace>>,
    copies: Mutex<VecDeque<CopyTrace>>,
    capacity: usize,
}

impl TraceRing {
    /// At most `capacity` of each; their memory is taken here, once.
    pub fn new(capacity: usize) -> Self {
        let steps = Mutex::new(VecDeque::with_capacity(capacity));
        Self { steps, copies: Mutex::new(VecDeque::with_capacity(capacity)), capacity }
    }

    /// Adds a step.
    pub fn push(&self, step: StepTrace) {
        push(&self.steps, step, self.capacity);
    }

    /// Adds copies.
    pub fn push_copies(&self, copies: CopyTrace) {
        push(&self.copies, copies, self.capacity);
    }

    /// The steps, oldest first.
    pub fn steps(&self) -> Vec<StepTrace> {
        listed(&self.steps)
    }

    /// The copies, oldest first.
    pub fn copies(&self) -> Vec<CopyTrace> {
        listed(&self.copies)
    }

    /// The steps as a Trace Event Format document: `{"traceEvents": [...]}`, complete events (`X`)
    /// of four rows: plan, run, apply, KV copies.
    pub fn chrome_trace(&self) -> Value {
        let names = [(1, "plan"), (2, "run"), (3, "apply"), (4, "KV copies")];
        let mut events: Vec<_> = names.map(|(row, name)| thread_name(row, name)).into();
        for step in self.steps() {
            let phases = [
                (1, "plan", step.plan_start_us, step.run_start_us),
                (2, "run", step.run_start_us, step.run_end_us),
                (3, "apply", step.run_end_us, step.apply_end_us),
            ];
            events.extend(phases.map(|(row, name, start, end)| {
                json!({
                    "name": name, "cat": "step", "ph": "X", "pid": 1, "tid": row,
                    "ts": start, "dur": end.saturating_sub(start),
                    "args": {
                        "step": step.step, "tokens": step.tokens,
                        "sequences": step.sequences, "copies": step.copies,
                    },
                })
            }));
        }
        events.extend(self.copies().into_iter().map(|copies| {
            json!({
                "name": format!("{} to {}", copies.from, copies.to), "cat": "copies", "ph": "X",
                "pid": 1, "tid": 4, "ts": copies.start_us,
                "dur": copies.end_us.saturating_sub(copies.start_us),
                "args": { "blocks": copies.blocks },
            })
        }));
        json!({ "displayTimeUnit": "ms", "traceEvents": events })
    }
}

fn push<T>(ring: &Mutex<VecDeque<T>>, newest: T, capacity: usize) {
    let mut ring = ring.lock().unwrap_or_else(PoisonError::into_inner);
    if ring.len() == capacity {
        ring.pop_front();
    }
    ring.push_back(newest);
}

fn listed<T: Copy>(ring: &Mutex<VecDeque<T>>) -> Vec<T> {
    ring.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect()
}

fn thread_name(row: u32, name: &str) -> Value {
    json!({ "name": "thread_name", "ph": "M", "pid": 1, "tid": row, "args": { "name": name } })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ring_keeps_the_newest_steps() {
        let ring = TraceRing::new(2);
        for step in 1..=3 {
            ring.push(StepTrace { step: StepId(step), ..StepTrace::default() });
        }
        let kept: Vec<u64> = ring.steps().iter().map(|step| step.step.0).collect();
        assert_eq!(kept, [2, 3]);
    }

    #[test]
    fn a_trace_has_one_complete_event_per_phase() {
        let ring = TraceRing::new(4);
        let step =
            StepTrace { plan_start_us: 10, run_start_us: 12, run_end_us: 40, ..Default::default() };
        ring.push(step);
        let trace = ring.chrome_trace();
        let events = trace["traceEvents"].as_array().unwrap();
        let run = events.iter().find(|e| e["name"] == "run" && e["ph"] == "X").unwrap();
        assert_eq!((run["ts"].as_u64(), run["dur"].as_u64()), (Some(12), Some(28)));
    }

    #[test]
    fn copies_have_a_row_of_their_own_beside_the_steps() {
        let ring = TraceRing::new(2);
        let (from, to) = (Tier::Device, Tier::Host);
        for start_us in [5, 10, 20] {
            ring.push_copies(CopyTrace { start_us, end_us: 40, from, to, blocks: 32 });
        }
        let trace = ring.chrome_trace();
        let events = trace["traceEvents"].as_array().unwrap();
        let copies: Vec<_> = events.iter().filter(|event| event["cat"] == "copies").collect();
        assert_eq!(copies.len(), 2);
        assert_eq!(
            (copies[0]["name"].as_str(), copies[0]["dur"].as_u64()),
            (Some("device to host"), Some(30))
        );
        assert_eq!(copies[0]["args"]["blocks"], 32);
    }
}
