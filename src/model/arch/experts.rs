//! What the families with experts share: the keys under `expert_`, and a layer's tensors.
//!
//! GGUF has one tensor for each of gate, up and down, whose third extent counts the experts. Both
//! families choose as [`ExpertsSpec`] says; keys that ask for another choice are refused.

use crate::formats::FormatError;
use crate::model::source::{Dimensions, Source};
use crate::model::{Activation, ExpertsSpec, FfnSpec};

/// Largest models have 512.
const EXPERTS_MAX: usize = 1024;
/// `expert_gating_func`: not given, and softmax over all experts.
const SOFTMAX_IDS: [u32; 2] = [0, 1];

/// The numbers of a mixture of experts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Experts {
    n_experts: usize,
    n_used: usize,
    weight_scale: f32,
}

/// Width of an expert where `expert_feed_forward_length` does not give it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DefaultWidth {
    /// `feed_forward_length`.
    Whole,
    /// `feed_forward_length`, shared out to the experts in use.
    Shared,
}

impl Experts {
    /// What the keys say; `None` of a dense model, which has no or 0 experts.
    pub fn read(source: &Source<'_>) -> Result<Option<Self>, FormatError> {
        let n_experts = source.count_opt("expert_count", 0..=EXPERTS_MAX)?.unwrap_or(0);
        if n_experts == 0 {
            return Ok(None);
        }
        refuse_other_choices(source)?;
        let n_used = source.count("expert_used_count", 1..=n_experts)?;
        let key = "expert_weights_scale";
        let weight_scale = match source.metadata().f32_opt(&source.key(key))? {
            // Converters write 0 for "unscaled".
            Some(0.0) | None => 1.0,
            Some(_) => source.positive_opt(key)?.unwrap_or(1.0),
        };
        Ok(Some(Self { n_experts, n_used, weight_scale }))
    }

    /// The experts of a layer.
    pub fn ffn(
        &self,
        source: &Source<'_>,
        dimensions: &Dimensions,
        layer: usize,
        default: DefaultWidth,
    ) -> Result<FfnSpec, FormatError> {
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        refuse_single_experts(source, layer)?;
        let n_ff = self.n_ff(source, dimensions.layers[layer].n_ff, default)?;
        let (n_experts, width) = (self.n_experts, dimensions.embedding_dim);
        Ok(FfnSpec::Experts(ExpertsSpec {
            n_experts,
            n_used: self.n_used,
            router: source.matrix(&name("ffn_gate_inp"), n_experts, width)?,
            gate: source.matrices(&name("ffn_gate_exps"), n_experts, [n_ff, width])?,
            up: source.matrices(&name("ffn_up_exps"), n_experts, [n_ff, width])?,
            down: source.matrices(&name("ffn_down_exps"), n_experts, [width, n_ff])?,
            activation: Activation::Silu,
            weight_scale: self.weight_scale,
        }))
    }

    fn n_ff(
        &self,
        source: &Source<'_>,
        whole: usize,
        default: DefaultWidth,
    ) -> Result<usize, FormatError> {
        let given = source.width_opt("expert_feed_forward_length")?;
        match (given.filter(|n_ff| *n_ff > 0), default) {
            (Some(n_ff), _) => Ok(n_ff),
            (None, DefaultWidth::Whole) => Ok(whole),
            (None, DefaultWidth::Shared) if whole.is_multiple_of(self.n_used) => {
                Ok(whole / self.n_used)
            }
            (None, DefaultWidth::Shared) => {
                let message = format!("{whole} is no multiple of the {} experts used", self.n_used);
                Err(source.refuse("feed_forward_length", message))
            }
        }
    }
}

/// Keys of other families that would change what is computed.
fn refuse_other_choices(source: &Source<'_>) -> Result<(), FormatError> {
    let metadata = source.metadata();
    let count = |key: &str| metadata.u32_opt(&source.key(key));
    let key = "expert_gating_func";
    if let Some(id) = count(key)?.filter(|id| !SOFTMAX_IDS.contains(id)) {
        return Err(source.refuse(key, format!("{id}; supported: 1, softmax")));
    }
    let key = "expert_weights_norm";
    if metadata.bool_opt(&source.key(key))? == Some(false) {
        return Err(source.refuse(key, "false; only normalised weights are supported"));
    }
    for (key, limit) in [("expert_shared_count", 0), ("expert_group_count", 1)] {
        if let Some(got) = count(key)?.filter(|got| *got > limit) {
            return Err(source.refuse(key, format!("{got}; supported: at most {limit}")));
        }
    }
    Ok(())
}

/// Files from before April 2024 have every expert in a tensor of its own.
fn refuse_single_experts(source: &Source<'_>, layer: usize) -> Result<(), FormatError> {
    let prefix = format!("blk.{layer}.ffn_gate.");
    let single = |name: &str| name.strip_prefix(&prefix).is_some_and(|rest| rest != "weight");
    match source.tensors().find(|info| single(info.name) && !info.name.ends_with("bias")) {
        None => Ok(()),
        Some(info) => {
            let message = "one tensor per expert, as files from before April 2024 have, is not \
                           supported; convert the model again";
            Err(source.refuse_tensor(&info, message))
        }
    }
}
