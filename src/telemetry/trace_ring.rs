//! The last steps with their phases, kept in a ring and exported in the Trace Event Format that
//! Chrome's and Perfetto's viewers read.

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

/// A bounded ring of [`StepTrace`]s; the oldest is dropped.
#[derive(Debug)]
pub struct TraceRing {
    steps: Mutex<VecDeque<StepTrace>>,
    capacity: usize,
}

impl TraceRing {
    /// A ring of at most `capacity` steps; its memory is taken here, once.
    pub fn new(capacity: usize) -> Self {
        Self { steps: Mutex::new(VecDeque::with_capacity(capacity)), capacity }
    }

    /// Adds a step.
    pub fn push(&self, step: StepTrace) {
        let mut steps = self.steps.lock().unwrap_or_else(PoisonError::into_inner);
        if steps.len() == self.capacity {
            steps.pop_front();
        }
        steps.push_back(step);
    }

    /// The steps, oldest first.
    pub fn steps(&self) -> Vec<StepTrace> {
        self.steps.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect()
    }

    /// The steps as a Trace Event Format document: `{"traceEvents": [...]}`, complete events (`X`)
    /// of three rows: plan, run, apply.
    pub fn chrome_trace(&self) -> Value {
        let mut events =
            vec![thread_name(1, "plan"), thread_name(2, "run"), thread_name(3, "apply")];
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
        json!({ "displayTimeUnit": "ms", "traceEvents": events })
    }
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
}
