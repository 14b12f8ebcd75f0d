//! How fast a placed model will be, from what was measured of the machine: tokens per second of
//! decoding and of prompts, and what one GiB more of each GPU's memory would buy.
//!
//! ```text
//! CPU step     = products + work on rows + meetings and last pieces of the workers
//!                + max(KV / (DRAM · share), attention's operations / (CPU · its share))
//!                where products = longer + what is not hidden · shorter of weights read / DRAM and
//!                operations / rate of their type
//! GPU step     = products at the rates of their types + layers · rest + rows / VRAM
//!                + KV / (VRAM · share)
//! without such rates = reads + operations / (tensor cores · share) + KV / VRAM
//!                where reads = layers · wait + weights read / (VRAM · share)
//! its prompt   = max(reads, operations / (tensor cores · share))
//! spilled step = GPU step + min over streamed layers (CPU's beside streams + crossings)
//!                where all are streamed: max(weights / pinned copies, GPU step or prompt)
//! several GPUs = sum over GPUs of the step of each one's layers; of a prompt's steps, of which the
//!                CPU has no part, all but the last take as long as the slowest GPU
//! ```
//! Shares and the rest are what kernels reach of their roofs on one kind of machine, told with
//! their reasons in `predict_cpu.rs` and `predict_gpu.rs`. Of experts a step of m tokens reads
//! n·(1 − (1 − k/n)^m), as many as m independent choices of k of n touch.
//!
//! Against `docs/performance.md`: dense models on a GPU within 15 %, half in host memory within
//! 25 %; on the CPU products of many tokens within 12 %, and the rest as far off as memory is from
//! what it gave to the probe. Not modelled: prompts of small experts on a GPU, a third slower than
//! predicted; kernels of GPUs before Hopper; weights in floats on the CPU where products were not
//! measured; `gpu.spill_streamed`; time between GPUs; and KV blocks that lie on other NUMA nodes
//! than their readers. Between two steps, two threads are woken, one after the other.

use super::predict_costs::{Costs, StepSeconds, Usage};
use super::{Device, Placement};
use crate::config::Config;
use crate::hardware::HardwareProfile;
use crate::model::ModelSpec;
use serde::Serialize;

/// Streams and lengths of prompts that are predicted, where they fit.
const STREAMS: [usize; 3] = [1, 8, 32];
const PROMPTS: [usize; 2] = [512, 2048];
/// Tokens of context that each stream is predicted with, at most the placement's.
const CONTEXT_TOKENS: usize = 512;
const GIB: u64 = 1 << 30;

/// How fast a placed model will be.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Prediction {
    /// Tokens of context that each stream of `decode` has.
    pub context_tokens: usize,
    /// By ascending number of streams; those that the KV store and a step hold.
    pub decode: Vec<DecodeSpeed>,
    /// By ascending length; those that the context holds.
    pub prompt: Vec<PromptSpeed>,
    /// Tokens per second of one stream if each GPU's memory had one GiB more for the model. `None`
    /// where nothing is spilled.
    pub gib_more: Option<f64>,
}

/// Prompts that are read, and what then is generated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Job {
    /// Sequences side by side.
    pub streams: usize,
    /// Tokens of each one's prompt.
    pub prompt: usize,
    /// Tokens that each generates.
    pub generated: usize,
    /// Tokens that each has seen before.
    pub depth: usize,
}

/// Sequences that are decoded together.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct DecodeSpeed {
    /// How many.
    pub streams: usize,
    /// Of all of them together.
    pub tokens_per_second: f64,
    /// Where the time of a step goes.
    pub step: StepSeconds,
}

/// A prompt that is read alone.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct PromptSpeed {
    /// How long it is.
    pub tokens: usize,
    /// Until its first answer token.
    pub tokens_per_second: f64,
    /// Where the time of its steps goes.
    pub steps: StepSeconds,
}

impl Prediction {
    /// Predicts a placement that was planned with this machine and configuration; `None` where the
    /// machine, or its GPU, was not measured.
    pub fn of(
        spec: &ModelSpec,
        placement: &Placement,
        hardware: &HardwareProfile,
        config: &Config,
    ) -> Option<Self> {
        let context_tokens = CONTEXT_TOKENS.min(placement.context_tokens);
        let step_tokens_max = placement.step_tokens_max;
        let usage = Usage { context_tokens, step_tokens_max };
        let costs = Costs::new(spec, placement, hardware.measured.as_ref()?, usage)?;
        let kv_tokens = placement.device_blocks * placement.block_tokens;
        let most = config.scheduler.sequences_max.min(step_tokens_max);
        let fits = |streams: &usize| *streams <= most && streams * context_tokens <= kv_tokens;
        let decode = STREAMS.into_iter().filter(fits).map(|streams| {
            let step = costs.decode(streams);
            let tokens_per_second = streams as f64 / step.total();
            DecodeSpeed { streams, tokens_per_second, step }
        });
        let prompts = PROMPTS.into_iter().filter(|tokens| *tokens <= placement.context_tokens);
        let prompt = prompts.map(|tokens| {
            let steps = costs.prompts(1, tokens, 0);
            let tokens_per_second = tokens as f64 / steps.total();
            PromptSpeed { tokens, tokens_per_second, steps }
        });
        Some(Self {
            context_tokens,
            decode: decode.collect(),
            prompt: prompt.collect(),
            gib_more: gib_more(spec, placement, (hardware, config), usage),
        })
    }
}

/// Tokens per second of one stream on GPUs with one GiB more each.
fn gib_more(
    spec: &ModelSpec,
    placement: &Placement,
    (hardware, config): (&HardwareProfile, &Config),
    usage: Usage,
) -> Option<f64> {
    placement.spill.as_ref()?;
    let (mut hardware, mut config) = (hardware.clone(), config.clone());
    hardware.gpus.devices.iter_mut().for_each(|gpu| gpu.memory_free_bytes += GIB);
    if config.gpu.vram_limit.0 > 0 {
        config.gpu.vram_limit.0 += GIB;
    }
    let more = Placement::plan(spec, &hardware, &config).ok()?;
    if *more.device() == Device::Cpu {
        return None;
    }
    let usage = Usage { step_tokens_max: more.step_tokens_max, ..usage };
    let costs = Costs::new(spec, &more, hardware.measured.as_ref()?, usage)?;
    Some(1.0 / costs.decode(1).total())
}

impl Job {
    /// Seconds on a placed model; `None` where the machine, or its GPU, was not measured.
    pub fn seconds(
        &self,
        spec: &ModelSpec,
        placement: &Placement,
        hardware: &HardwareProfile,
    ) -> Option<f64> {
        let Self { streams, prompt, generated, depth } = *self;
        let context_tokens = depth + prompt + generated.div_ceil(2);
        let usage = Usage { context_tokens, step_tokens_max: placement.step_tokens_max };
        let costs = Costs::new(spec, placement, hardware.measured.as_ref()?, usage)?;
        let prompts = match streams * prompt {
            0 => 0.0,
            _ => costs.prompts(streams, prompt, depth).total(),
        };
        Some(prompts + generated as f64 * costs.decode(streams).total())
    }
}
