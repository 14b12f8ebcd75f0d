//! Logits to tokens: one sampler per worker, rows of a step shared among them. A row that is not
//! finite becomes a failure of its sequence alone.

use crate::sampling::{SampledToken, Sampler};
use crate::step::{
    LogitsRow, LogitsTask, RowFailure, RowOutput, StepOutput, StepPlan, TokenLogprob,
};
use crate::units::TokenId;
use std::sync::{Mutex, PoisonError};
use tandem_kernels::RowMeasure;

/// A row's number in the plan and what came of it.
type Outcome = (usize, Result<RowOutput, RowFailure>);

struct RowSampler {
    sampler: Sampler,
    outcomes: Vec<Outcome>,
}

/// One sampler per worker.
pub(super) struct RowSamplers {
    workers: Vec<Mutex<RowSampler>>,
    /// All outcomes of a step, to be put in order.
    gathered: Vec<Outcome>,
}

impl RowSamplers {
    /// Samplers for `threads` workers and steps of up to `rows_max` rows of logits.
    pub fn new(threads: usize, vocab_size: usize, rows_max: usize) -> Self {
        let worker = |_| {
            let outcomes = Vec::with_capacity(rows_max);
            Mutex::new(RowSampler { sampler: Sampler::new(vocab_size), outcomes })
        };
        let workers = (0..threads).map(worker).collect();
        Self { workers, gathered: Vec::with_capacity(rows_max) }
    }

    /// Does what the plan says about its `index`-th row of logits, `[vocab_size]`.
    pub fn take(&self, worker: usize, plan: &StepPlan, index: usize, logits: &mut [f32]) {
        let mut worker = self.workers[worker].lock().unwrap_or_else(PoisonError::into_inner);
        let row = &plan.logits[index];
        let (sequence, position) = (row.sequence, row.position);
        let sampled = match &row.task {
            LogitsTask::Sample { params, history, prompt_tokens } => {
                let history = &plan.history[history.clone()];
                worker.sampler.sample(logits, params, history, *prompt_tokens, position)
            }
            LogitsTask::Score { target, top_logprobs } => {
                worker.sampler.score(logits, *target, *top_logprobs)
            }
        };
        let outcome = match sampled {
            Ok(SampledToken { token, top }) => Ok(RowOutput { sequence, position, token, top }),
            Err(_) => Err(RowFailure { sequence, position }),
        };
        worker.outcomes.push((index, outcome));
    }

    /// Takes the best token of the plan's `index`-th row of logits, as a GPU measured it: its id
    /// and log-probability, or none if a logit was not finite.
    pub fn take_best(&mut self, plan: &StepPlan, index: usize, measure: Option<RowMeasure>) {
        let LogitsRow { sequence, position, .. } = plan.logits[index];
        let outcome = match measure {
            Some(RowMeasure { best, best_logprob, .. }) => {
                let token = TokenLogprob { id: TokenId(best), logprob: best_logprob };
                Ok(RowOutput { sequence, position, token, top: Vec::new() })
            }
            None => Err(RowFailure { sequence, position }),
        };
        self.gathered.push((index, outcome));
    }

    /// Moves all outcomes into the output, in the plan's order.
    pub fn gather(&mut self, output: &mut StepOutput) {
        for worker in &mut self.workers {
            let worker = worker.get_mut().unwrap_or_else(PoisonError::into_inner);
            self.gathered.append(&mut worker.outcomes);
        }
        self.gathered.sort_unstable_by_key(|(index, _)| *index);
        for (_, outcome) in self.gathered.drain(..) {
            match outcome {
                Ok(row) => output.rows.push(row),
                Err(failure) => output.failures.push(failure),
            }
        }
    }
}
