//! Logits to tokens: one sampler per worker, rows of a step shared among them. A row that is not
//! finite becomes a failure of its sequence alone.

use crate::sampling::{SampledToken, Sampler, Shortlist};
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

/// What a GPU found of a row of logits.
pub(super) struct FoundRow<'a> {
    pub measure: RowMeasure,
    /// The given token, or one drawn from all, with its logit.
    pub token: Option<(TokenId, f32)>,
    pub list: Option<Shortlist<'a>>,
}

impl FoundRow<'_> {
    /// The token that a row's task asks for, and the most likely ones, if they can be told.
    fn sampled(
        &self,
        row: &LogitsRow,
        sampler: &mut Sampler,
    ) -> Option<(TokenLogprob, Vec<TokenLogprob>)> {
        let RowMeasure { best, best_logprob, log_sum } = self.measure;
        let (params, count) = match &row.task {
            LogitsTask::Sample { params, .. } => (Some(params), params.top_logprobs),
            LogitsTask::Score { top_logprobs, .. } => (None, *top_logprobs),
        };
        let list = self.list.as_ref();
        let top = match count {
            0 => Vec::new(),
            _ => list?.top(count, (sampler.vocab_size(), log_sum))?,
        };
        let token = match (self.token, params) {
            (Some((id, logit)), _) => TokenLogprob { id, logprob: logit - log_sum },
            (None, Some(params)) if !params.takes_best() => {
                let id = sampler.choose_listed(list?, params, row.position)?;
                TokenLogprob { id, logprob: list?.logit(id)? - log_sum }
            }
            (None, _) => TokenLogprob { id: TokenId(best), logprob: best_logprob },
        };
        Some((token, top))
    }
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

    /// Does it for some rows of the plan, `logits` `[rows, vocab_size]`; the workers share them.
    pub fn take_all(&self, plan: &StepPlan, rows: &[usize], logits: &mut [f32]) {
        let Some(vocab_size) = logits.len().checked_div(rows.len()) else { return };
        let share = rows.len().div_ceil(self.workers.len());
        let take = |worker: usize, rows: &[usize], logits: &mut [f32]| {
            for (index, logits) in rows.iter().zip(logits.chunks_exact_mut(vocab_size)) {
                self.take(worker, plan, *index, logits);
            }
        };
        let (rows, others) = rows.split_at(share);
        let (logits, others_logits) = logits.split_at_mut(share * vocab_size);
        std::thread::scope(|scope| {
            let others = others.chunks(share).zip(others_logits.chunks_mut(share * vocab_size));
            for (worker, (rows, logits)) in (1..).zip(others) {
                scope.spawn(move || take(worker, rows, logits));
            }
            take(0, rows, logits);
        });
    }

    /// Does it with what a GPU found of a row; false where that does not suffice.
    pub fn take_found(&mut self, plan: &StepPlan, index: usize, found: &FoundRow<'_>) -> bool {
        let worker = self.workers[0].get_mut().unwrap_or_else(PoisonError::into_inner);
        let row = &plan.logits[index];
        let Some((token, top)) = found.sampled(row, &mut worker.sampler) else { return false };
        let LogitsRow { sequence, position, .. } = *row;
        self.gathered.push((index, Ok(RowOutput { sequence, position, token, top })));
        true
    }

    /// A row of the plan that is not finite.
    pub fn fail(&mut self, plan: &StepPlan, index: usize) {
        let LogitsRow { sequence, position, .. } = plan.logits[index];
        self.gathered.push((index, Err(RowFailure { sequence, position })));
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
