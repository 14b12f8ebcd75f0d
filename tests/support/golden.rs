//! Golden answers: real models against an exact forward pass (all weights dequantised, all
//! arithmetic in 32-bit floats), with teacher forcing.

use super::stage::{Model, plan_tokens, score_next};
use serde::Deserialize;
use std::path::Path;
use tandem::step::{RowOutput, StepPlan};
use tandem::units::TokenId;

#[derive(Deserialize)]
pub struct Golden {
    pub model: String,
    llama_cpp_mean_abs_dlogprob_from_exact: f64,
    cases: Vec<Case>,
}

/// A prompt and what greedy decoding gave, with the exact distribution of each step.
#[derive(Deserialize)]
struct Case {
    kind: String,
    prompt_tokens: Vec<TokenId>,
    ids: Vec<TokenId>,
    exact_logprobs: Vec<f64>,
    exact_top_ids: Vec<Vec<TokenId>>,
    exact_top_logprobs: Vec<Vec<f64>>,
}

/// How often the best token was the exact one where that leads clearly, and how far we are off.
#[derive(Default)]
struct Tally {
    steps: usize,
    clear: usize,
    same: usize,
    distance: f64,
}

/// An exact best token that leads by so many nats is clearly the best.
const CLEAR_LEAD: f64 = 0.3;

impl Tally {
    fn add(&mut self, case: &Case, step: usize, ours: &RowOutput) {
        self.steps += 1;
        self.distance += (f64::from(ours.token.logprob) - case.exact_logprobs[step]).abs();
        let exact = &case.exact_top_logprobs[step];
        if exact[0] - exact[1] > CLEAR_LEAD {
            self.clear += 1;
            self.same += usize::from(ours.top[0].id == case.exact_top_ids[step][0]);
        }
    }
}

/// Positions of a case that are computed in a step each, after all before in one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Steps {
    /// All tokens at once.
    #[allow(dead_code, reason = "each test file uses a part")]
    Whole,
    /// The prompt, and then token by token.
    #[allow(dead_code, reason = "each test file uses a part")]
    Single,
}

impl Golden {
    /// The answers of a file of `tests/data/golden`, and its model where that was fetched.
    pub fn read(file: &str) -> Option<(Golden, Model)> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden").join(file);
        let golden: Golden = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let model = Model::fetched(&golden.model)?;
        Some((golden, model))
    }

    /// Checks what `run` answers. `allowed` is how far off that may be, as a multiple of
    /// llama.cpp's distance.
    pub fn check(
        &self,
        name: &str,
        (steps, allowed): (Steps, f64),
        mut run: impl FnMut(&StepPlan) -> Vec<RowOutput>,
    ) {
        let mut tally = Tally::default();
        for case in &self.cases {
            let before = tally.distance;
            let rows: Vec<_> = case.plans(steps).iter().flat_map(&mut run).collect();
            rows.iter().enumerate().for_each(|(step, row)| tally.add(case, step, row));
            let distance = (tally.distance - before) / rows.len() as f64;
            println!("{name} {}: {} steps, {distance:.4} nats off", case.kind, rows.len());
        }
        let distance = tally.distance / tally.steps as f64;
        let share = tally.same as f64 / tally.clear as f64;
        let bound = self.llama_cpp_mean_abs_dlogprob_from_exact * allowed;
        println!(
            "{name}: {}/{} clear steps ({:.2} %), {distance:.4} nats off (bound {bound})",
            tally.same,
            tally.clear,
            100.0 * share
        );
        assert!(share >= 0.995, "{name}: best token in {share} of clear steps");
        assert!(distance <= bound, "{name}: {distance} nats off, allowed {bound}");
    }
}

impl Case {
    fn plans(&self, steps: Steps) -> Vec<StepPlan> {
        let mut tokens = self.prompt_tokens.clone();
        tokens.extend(&self.ids);
        let (first, last) = (self.prompt_tokens.len() - 1, tokens.len() - 1);
        let next = score_next(&tokens, 10);
        let plan = |range| {
            let mut plan = StepPlan::default();
            plan_tokens(&mut plan, (1, 0), &tokens, range, |position| {
                next(position).filter(|_| position >= first)
            });
            plan
        };
        match steps {
            Steps::Whole => vec![plan(0..last)],
            Steps::Single => {
                let singles = (first..last).map(|position| position..position + 1);
                std::iter::once(0..first).chain(singles).map(plan).collect()
            }
        }
    }
}
