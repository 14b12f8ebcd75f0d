//! What a model that must be spilled is placed on: which GPUs have it, how its layers are cut over
//! them, or whether the CPU alone does.

use super::predict::Job;
use super::spill::Spilling;
use super::spill_cuts::Shares;
use super::spill_ways::Ways;
use super::{Placement, Workers};
use crate::config::Config;
use crate::hardware::{Gpu, HardwareProfile};
use crate::model::ModelSpec;
use crate::request::RequestError;
use std::cmp::Reverse;

/// Part of the predicted time below which two cuts count as equally fast.
const PRECISION: f64 = 1e-3;

impl Placement {
    /// Places a model on that of some sets of GPUs beside which the fewest bytes have to be
    /// spilled, and of equals with the longest context; none where spilling helps nowhere. Its
    /// layers are cut as is predicted to be fastest.
    pub(super) fn spilling(
        spec: &ModelSpec,
        (hardware, config): (&HardwareProfile, &Config),
        (workers, candidates): (&Workers, &[Vec<&Gpu>]),
        notes: &[String],
    ) -> Option<Result<Self, RequestError>> {
        let ways = Ways::new(spec, &workers.nodes);
        let most = candidates.iter().map(Vec::len).max().unwrap_or(0);
        let placed = candidates.iter().filter_map(|gpus| {
            let mut notes = notes.to_vec();
            if gpus.len() < most {
                let names = gpus.iter().map(|gpu| gpu.ordinal.to_string()).collect::<Vec<_>>();
                notes.push(format!(
                    "GPUs other than {} are not used: with them no less would be spilled",
                    names.join(", ")
                ));
            }
            let spilling = Spilling::new(&ways, (hardware, gpus, workers), config);
            let shares = spilling.shares()?;
            let placed = spilling.placed(&shares, notes.clone())?;
            Some((placed, spilling, shares, notes))
        });
        // Of equals the first: the fewest GPUs.
        let (placed, spilling, shares, notes) = placed.min_by_key(|(placed, ..)| {
            let placed = placed.as_ref().ok();
            let spilled =
                placed.map(|placed| (placed.spilled_bytes(), Reverse(placed.context_tokens)));
            (spilled.is_none(), spilled)
        })?;
        Some(placed.map(|placed| placed.or_cut_faster(spec, config, (&spilling, &shares, &notes))))
    }

    /// This placement on several GPUs, or one whose layers are cut so that the expected requests
    /// are predicted to end sooner, with no shorter a context; of equals the one that spills the
    /// fewest bytes. Where nothing was measured, this one.
    fn or_cut_faster(
        self,
        spec: &ModelSpec,
        config: &Config,
        (spilling, shares, notes): (&Spilling<'_>, &Shares, &[String]),
    ) -> Self {
        let job = Job::expected(&config.placement, self.context_tokens);
        let seconds = |placed: &Self| job.seconds(spec, placed, spilling.hardware);
        let unit = match seconds(&self) {
            Some(seconds) if spilling.gpus.len() > 1 => seconds * PRECISION,
            _ => return self,
        };
        let placed = |shares: &Shares| spilling.placed(shares, notes.to_vec())?.ok();
        let value = |shares: &Shares| {
            let placed = placed(shares)?;
            let is_like = placed.context_tokens >= self.context_tokens;
            let units = (seconds(&placed)? / unit).round() as u64;
            is_like.then(|| (units, placed.spilled_bytes()))
        };
        placed(&spilling.task().best(shares, value)).unwrap_or(self)
    }

    /// Bytes of weights in host memory, where GPUs run the model.
    fn spilled_bytes(&self) -> u64 {
        self.spill.as_ref().map_or(0, |spill| spill.weight_bytes)
    }

    /// This placement on a GPU, or the other one on the CPU where that is predicted to be faster;
    /// where nothing was measured, this one.
    pub(super) fn or_faster(
        self,
        other: Option<Self>,
        spec: &ModelSpec,
        (hardware, config): (&HardwareProfile, &Config),
    ) -> Self {
        let Some(mut other) = other else { return self };
        let context_tokens = self.context_tokens.min(other.context_tokens);
        let job = Job::expected(&config.placement, context_tokens);
        let seconds = |placement: &Self| job.seconds(spec, placement, hardware);
        match (seconds(&self), seconds(&other)) {
            (Some(on_gpu), Some(on_cpu)) if on_cpu < on_gpu => {
                let why = format!(
                    "with what must be spilled of the model a request is predicted to take \
                     {on_gpu:.1} s, on the CPU alone {on_cpu:.1} s"
                );
                other.notes.insert(0, format!("no GPU is used: {why}"));
                other.why_cpu = Some(why);
                other
            }
            _ => self,
        }
    }
}
