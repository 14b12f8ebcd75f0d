//! What a model that must be spilled is placed on: which GPUs have it, how its layers are cut over
//! them, or whether the CPU alone does.

use super::predict::Job;
use super::spill::Spilling;
use super::spill_cuts::Shares;
use super::spill_ways::Ways;
use super::{Device, Placement, Workers};
use crate::config::Config;
use crate::hardware::{Gpu, HardwareProfile};
use crate::model::ModelSpec;
use crate::request::RequestError;
use std::cell::OnceCell;
use std::cmp::Reverse;

/// Part of a predicted time below which another one counts as equally long.
const PRECISION: f64 = 1e-3;

/// What one of some sets of GPUs would have.
struct Candidate<'a> {
    spilling: Spilling<'a>,
    /// Those with the fewest spilled bytes.
    shares: Shares,
    placed: Result<Placement, RequestError>,
}

/// How much longer the requests take than on the placement with the fewest spilled bytes, in
/// steps of `PRECISION`, and spilled bytes.
type Value = (i64, u64);

impl<'a> Candidate<'a> {
    /// None where spilling does not help.
    fn new(spilling: Spilling<'a>, notes: &[String]) -> Option<Self> {
        let shares = spilling.shares()?;
        let placed = spilling.placed(&shares, notes.to_vec())?;
        Some(Self { spilling, shares, placed })
    }

    /// What is less where less has to be spilled, or as much with a longer context.
    fn spilled(&self) -> impl Ord + use<> {
        let placed = self.placed.as_ref().ok();
        let spilled = placed.map(|placed| (placed.spilled_bytes(), Reverse(placed.context_tokens)));
        (spilled.is_none(), spilled)
    }

    /// Its placement of least value among those of its cuts, with that value.
    fn best(
        self,
        value: impl Fn(&Placement) -> Option<Value>,
        notes: &[String],
    ) -> Option<(Value, Placement)> {
        let placed = |shares: &Shares| self.spilling.placed(shares, notes.to_vec())?.ok();
        let shares = match self.spilling.gpus {
            [_] => self.shares,
            _ => {
                let of_shares = |shares: &Shares| value(&placed(shares)?);
                self.spilling.task().best(&self.shares, of_shares)
            }
        };
        let placed = placed(&shares)?;
        Some((value(&placed)?, placed))
    }
}

impl Placement {
    /// Places a model on one of some sets of GPUs; none where spilling helps nowhere, or less than
    /// the `whole` without it. It is the set beside which the fewest bytes have to be spilled, and
    /// of equals with the longest context. Where the machine was measured, a set and a cut of the
    /// layers are taken with which the expected requests are predicted to end sooner, with no
    /// shorter a context; of equals those that spill the fewest bytes.
    pub(super) fn spilling<'a>(
        spec: &'a ModelSpec,
        (hardware, config): (&HardwareProfile, &Config),
        (workers, candidates, ways): (&Workers, &[Vec<&Gpu>], &OnceCell<Ways<'a>>),
        (whole, notes): (Option<&Self>, &[String]),
    ) -> Option<Result<Self, RequestError>> {
        let ways = ways.get_or_init(|| Ways::new(spec, workers.nodes.clone()));
        let spilling = |gpus| Spilling::new(ways, (hardware, gpus, workers), config);
        let sets = candidates.iter().map(Vec::as_slice);
        let mut sets: Vec<_> =
            sets.filter_map(|gpus| Candidate::new(spilling(gpus), notes)).collect();
        // Of equals the first: the fewest GPUs.
        let fewest = (0..sets.len()).min_by_key(|set| sets[*set].spilled())?;
        let fewest = match &sets[fewest].placed {
            Ok(placed) => placed.clone(),
            Err(_) => return Some(sets.swap_remove(fewest).placed),
        };
        // A longer context is worth some networks, not those of a GPU that is left alone.
        let is_worth = |whole: &Self| {
            whole.stages.len() <= fewest.stages.len()
                && whole.context_tokens < fewest.context_tokens
        };
        if !whole.is_none_or(is_worth) {
            return None;
        }
        let job = Job::expected(&config.placement, fewest.context_tokens);
        let seconds = |placed: &Self| job.seconds(spec, placed, hardware);
        let (mut chosen, why) = match seconds(&fewest) {
            None => (fewest, "no less would be spilled"),
            Some(all) => {
                let value = |placed: &Self| {
                    let is_like = placed.context_tokens >= fewest.context_tokens;
                    // Of a ratio: where that placement is slow, a thousandth of its time is much.
                    let steps = (seconds(placed)? / all).ln() / PRECISION.ln_1p();
                    is_like.then(|| (steps.round() as i64, placed.spilled_bytes()))
                };
                let best = sets.into_iter().filter_map(|set| set.best(value, notes));
                let best = best.min_by_key(|(value, _)| *value).map(|(_, placed)| placed);
                (best.unwrap_or(fewest), "requests are predicted to take no less time")
            }
        };
        let most = candidates.iter().map(Vec::len).max().unwrap_or(0);
        if chosen.stages.len() < most {
            let names = chosen.stages.iter().filter_map(|stage| match stage.device {
                Device::Gpu(index) => Some(index.to_string()),
                Device::Cpu => None,
            });
            let names = names.collect::<Vec<_>>().join(", ");
            let note = format!("GPUs other than {names} are not used: with them {why}");
            chosen.notes.insert(notes.len(), note);
        }
        Some(Ok(chosen))
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
