//! Where the time of measured steps went, beside where it was predicted to go: a row for each stage
//! of a step.

use serde::Serialize;
use tandem::actors::{Engine, StepOps};
use tandem::executor::OpTime;
use tandem::placement::{Device, Placement, StepSeconds};
use tandem::telemetry::StepTrace;

/// Ops that multiply by weights.
const PRODUCTS: [&str; 7] = [
    "query, key, value",
    "attention output",
    "gate, up",
    "down",
    "experts' gate, up",
    "experts' down",
    "logits, sampling",
];
const ATTENTION: [&str; 2] = ["rotate, write KV", "attention"];

/// A stage of some steps.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StageTime {
    /// Which steps, such as `8 streams`.
    pub of: String,
    /// What takes the time.
    pub stage: String,
    /// Seconds of a step, or of all steps of a prompt; `None` of what is not predicted.
    pub predicted_seconds: Option<f64>,
    /// The same as it was measured.
    pub measured_seconds: f64,
}

/// Steps as they run while nobody counts.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Untimed {
    /// Mean seconds in the stages.
    pub run: f64,
    /// Mean seconds from the end of one to the start of the next, where one followed another.
    pub between: Option<f64>,
    /// How many.
    pub steps: usize,
}

impl Untimed {
    /// Of the steps after `start_us` that had as many tokens, or any number.
    pub fn of(engine: &Engine, start_us: u64, tokens: Option<usize>) -> Self {
        Self::of_steps(&engine.step_traces(), start_us, tokens)
    }

    fn of_steps(steps: &[StepTrace], start_us: u64, tokens: Option<usize>) -> Self {
        let is_one = |step: &StepTrace| {
            step.run_start_us > start_us && tokens.is_none_or(|tokens| step.tokens == tokens)
        };
        let runs: Vec<_> = steps.iter().filter(|step| is_one(step)).collect();
        let pairs = steps.windows(2).filter(|pair| is_one(&pair[0]) && is_one(&pair[1]));
        let gaps: Vec<_> = pairs.map(|pair| pair[1].run_start_us - pair[0].run_end_us).collect();
        let mean = |sum: u64, count: usize| sum as f64 / 1e6 / count.max(1) as f64;
        let run = runs.iter().map(|step| step.run_end_us - step.run_start_us).sum();
        let between = (!gaps.is_empty()).then(|| mean(gaps.iter().sum(), gaps.len()));
        Self { run: mean(run, runs.len()), between, steps: runs.len() }
    }
}

/// The rows of steps `of` which `predicted` tells, that took so long while nobody counted, and
/// whose ops were counted in others like them. All steps of a prompt are one.
pub fn rows(
    of: &str,
    (placement, predicted): (&Placement, StepSeconds),
    untimed: Untimed,
    ops: &[StepOps],
) -> Vec<StageTime> {
    let steps: u64 = ops.iter().map(|ops| ops.steps).sum();
    if steps == 0 || untimed.steps == 0 {
        return Vec::new();
    }
    let sum = |time: &dyn Fn(&OpTime) -> f64| {
        let all = ops.iter().flat_map(|ops| &ops.times);
        all.map(time).sum::<f64>() / 1e9 / steps as f64
    };
    let of_kinds =
        |kinds: &[&str]| sum(&|time| if kinds.contains(&time.op) { time.work_ns } else { 0.0 });
    let row = |stage: &str, predicted_seconds, measured_seconds| StageTime {
        of: of.to_owned(),
        stage: stage.to_owned(),
        predicted_seconds,
        measured_seconds,
    };
    let mut rows = Vec::new();
    match placement.device() {
        Device::Cpu => {
            let products = of_kinds(&PRODUCTS);
            let attention = of_kinds(&ATTENTION);
            let waits = sum(&|time| time.wait_ns);
            rows.push(row("products", Some(predicted.products), products));
            rows.push(row("attention", Some(predicted.attention), attention));
            rows.push(row("workers' meetings", Some(predicted.meetings), waits));
            let others = sum(&|time| time.work_ns) - products - attention;
            rows.push(row("norms and others", Some(predicted.norms), others));
        }
        gpu => {
            let spilled =
                sum(&|time| if time.is_spilled() { time.work_ns + time.wait_ns } else { 0.0 });
            let rest = untimed.run - spilled;
            rows.push(row(&gpu.to_string(), Some(predicted.products + predicted.attention), rest));
            if placement.spill.is_some() {
                let name = "spilled: CPU, streams, crossings";
                rows.push(row(name, Some(predicted.spilled), spilled));
            }
        }
    }
    if let Some(between) = untimed.between {
        rows.push(row("between steps", Some(predicted.between), between));
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_told_from_the_time_until_the_next() {
        let step = |tokens, run_start_us, run_end_us| StepTrace {
            tokens,
            run_start_us,
            run_end_us,
            ..StepTrace::default()
        };
        let steps = [step(8, 50, 90), step(64, 100, 500), step(8, 600, 700), step(8, 730, 850)];
        let untimed = Untimed::of_steps(&steps, 95, Some(8));
        assert_eq!((untimed.steps, untimed.run, untimed.between), (2, 110e-6, Some(30e-6)));
        assert_eq!(Untimed::of_steps(&steps, 95, None).steps, 3);
        assert_eq!(Untimed::of_steps(&steps, 900, None), Untimed::default());
    }
}
