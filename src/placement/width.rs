//! How many tokens the widest step has, where the configuration leaves that open.
//!
//! Activations take memory by it. Beside weights that stream to a GPU a wide step reads a prompt
//! faster, and a narrow one leaves room for weights that need not stream: which is better depends
//! on the requests that are expected.

use super::predict::Job;
use super::{Device, Placement};
use crate::config::{Config, PlacementConfig};
use crate::hardware::HardwareProfile;
use crate::model::ModelSpec;
use crate::request::RequestError;
use std::cell::OnceCell;

/// What is taken unless there is a reason: GPUs and CPUs compute at their best with it.
const USUAL: usize = 512;
/// What else is tried, ascending.
const WIDTHS: [usize; 4] = [128, 256, 1024, 2048];

/// Places a model with the configured width, or with the best one. That is the usual one, but where
/// a GPU has to spill weights the one with which the expected requests are predicted to be done
/// first, among those with no shorter a context, and where the usual one does not fit, the widest
/// that does.
///
/// # Errors
/// As of [`Placement::plan`], for the usual width.
pub(super) fn plan(
    spec: &ModelSpec,
    hardware: &HardwareProfile,
    config: &Config,
) -> Result<Placement, RequestError> {
    let ways = OnceCell::new();
    if config.scheduler.step_tokens_max > 0 {
        return Placement::of_width(spec, (hardware, config), &ways);
    }
    let of_width = |tokens: usize| {
        let mut config = config.clone();
        config.scheduler.step_tokens_max = tokens;
        Placement::of_width(spec, (hardware, &config), &ways)
    };
    let usual = match of_width(USUAL) {
        Ok(placed) if placed.spill.is_some() => placed,
        Err(error @ RequestError::InsufficientMemory { .. }) => {
            let narrower = WIDTHS.into_iter().rev().filter(|tokens| *tokens < USUAL);
            return narrower.map(of_width).find_map(Result::ok).ok_or(error);
        }
        placed => return placed,
    };
    let job = Job::expected(&config.placement, usual.context_tokens);
    let seconds = |placed: &Placement| job.seconds(spec, placed, hardware);
    let Some(usual_seconds) = seconds(&usual) else { return Ok(usual) };
    let is_like = |placed: &Placement| {
        placed.context_tokens >= usual.context_tokens && *placed.device() != Device::Cpu
    };
    let others = WIDTHS.into_iter().filter_map(|tokens| of_width(tokens).ok());
    let timed = others.filter(is_like).filter_map(|placed| Some((seconds(&placed)?, placed)));
    let best = timed.min_by(|a, b| a.0.total_cmp(&b.0));
    match best {
        Some((best_seconds, best)) if best_seconds < usual_seconds => Ok(best),
        _ => Ok(usual),
    }
}

impl Placement {
    /// The configuration with what it left open: the width of steps.
    pub fn settled(&self, config: &Config) -> Config {
        let mut config = config.clone();
        config.scheduler.step_tokens_max = self.step_tokens_max;
        config
    }
}

impl Job {
    /// The requests that a placement is made for, as far as a context of so many tokens holds them.
    pub(super) fn expected(expected: &PlacementConfig, context_tokens: usize) -> Self {
        let PlacementConfig { streams, prompt_tokens, generated_tokens } = *expected;
        let prompt = prompt_tokens.min(context_tokens.saturating_sub(1)).max(1);
        let generated = generated_tokens.min(context_tokens - prompt).max(1);
        Self { streams, prompt, generated, depth: 0 }
    }
}
