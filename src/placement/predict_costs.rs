//! Seconds of a step, from the work of its parts and the measured rates of what does it. The
//! formulas are told in `predict.rs`.

use super::predict_cpu::CpuRates;
use super::predict_gpu;
use super::predict_work::{Parts, attention_parts, network_parts, output_parts};
use super::{CROSSING_TOKENS_MAX, Device, Placement, SharedTimes, Spill, StagePlacement};
use crate::hardware::{GpuRates, Measured};
use crate::model::{LayerSpec, ModelSpec};
use crate::tensor::DType;
use serde::Serialize;
use std::collections::HashMap;
use std::ops::Add;

/// Layers that a ring holds which did not have to be made smaller.
const RING_LAYERS: f64 = 4.0 / 3.0;
/// Threads that sleep and are woken, one after the other, between two steps.
const WAKES: f64 = 2.0;

/// Seconds of a step, or of several, by what takes them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct StepSeconds {
    /// Products of the weights that the device holds which runs the model; on a GPU all that
    /// it computes beside them as well.
    pub products: f64,
    /// Keys and values, and on a CPU the arithmetic of attention.
    pub attention: f64,
    /// What spilled weights add: the CPU's part, streams and crossings.
    pub spilled: f64,
    /// A CPU's norms of the residual stream.
    pub norms: f64,
    /// Workers of a CPU that meet, because one reads what another wrote, and that wait for the
    /// last one's last piece.
    pub meetings: f64,
    /// From a step's end to the next one's start.
    pub between: f64,
}

impl StepSeconds {
    /// Of all together.
    pub fn total(self) -> f64 {
        let Self { products, attention, spilled, norms, meetings, between } = self;
        products + attention + spilled + norms + meetings + between
    }
}

impl Add for StepSeconds {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            products: self.products + other.products,
            attention: self.attention + other.attention,
            spilled: self.spilled + other.spilled,
            norms: self.norms + other.norms,
            meetings: self.meetings + other.meetings,
            between: self.between + other.between,
        }
    }
}

/// What is done.
#[derive(Clone, Copy, Debug)]
pub(super) struct Usage {
    /// Tokens that each decoding stream attends to.
    pub context_tokens: usize,
    /// Of the widest step.
    pub step_tokens_max: usize,
}

/// The work of a stage's layers in a step.
#[derive(Default)]
struct Spilled {
    /// Of what lies on the device that runs them.
    resident: Parts,
    /// Layers with spilled weights.
    layers: usize,
    /// What is spilled of one of them, in the mean.
    mean: Parts,
    /// Bytes of its weights.
    bytes: f64,
    /// Its crossings, and the bytes that cross.
    crossing: [f64; 2],
    /// Elements of a token that its network gates, if that is dense.
    gated: f64,
}

/// What a placed model costs.
pub(super) struct Costs<'a> {
    spec: &'a ModelSpec,
    placement: &'a Placement,
    usage: Usage,
    cpu: CpuRates<'a>,
    /// In the order of the layers; `None` where the CPU computes them.
    stages: Vec<(&'a StagePlacement, Option<&'a GpuRates>)>,
    /// Seconds from a step's end to the next one's start.
    between: f64,
}

impl<'a> Costs<'a> {
    /// `None` where a rate that it takes was not measured. A GPU that was not has the rates of the
    /// first.
    pub fn new(
        spec: &'a ModelSpec,
        placement: &'a Placement,
        measured: &'a Measured,
        usage: Usage,
    ) -> Option<Self> {
        let cpu = CpuRates::of(measured, placement.workers.threads)?;
        let rates = |device: &Device| match device {
            Device::Cpu => None,
            Device::Gpu(index) => measured.gpus.iter().find(|gpu| gpu.ordinal == *index),
        };
        let first = rates(placement.device());
        if first.is_none() && *placement.device() != Device::Cpu {
            return None;
        }
        let stages = placement.stages.iter().map(|stage| (stage, rates(&stage.device).or(first)));
        let between = WAKES * measured.wake_us * 1e-6;
        Some(Self { spec, placement, usage, cpu, stages: stages.collect(), between })
    }

    /// Of a step of so many streams.
    pub fn decode(&self, streams: usize) -> StepSeconds {
        let seen = |window: Option<usize>| {
            let seen = self.usage.context_tokens;
            window.unwrap_or(seen).min(seen)
        };
        let bytes = |layer: &LayerSpec| {
            let tokens = streams * seen(layer.attention.window);
            layer.kv_bytes_per_token(self.placement.kv_dtype) as f64 * tokens as f64
        };
        let attention = self.stages.iter().map(|(stage, gpu)| {
            let bytes = self.spec.layers[stage.layers.clone()].iter().map(bytes).sum::<f64>();
            match gpu {
                Some(gpu) => predict_gpu::kv_seconds(gpu, bytes),
                None => {
                    let layers = &self.spec.layers[stage.layers.clone()];
                    let macs = attention_macs(layers, streams, &|window| seen(window) as f64);
                    self.cpu.kv_seconds(bytes).max(self.cpu.attention_seconds(macs))
                }
            }
        });
        StepSeconds { attention: attention.sum(), ..self.step(streams, streams) }
    }

    /// Of prompts of so many tokens each, behind `depth` tokens that are known, side by side in as
    /// few steps as there can be. Stages are at work at once then, each at another step, where the
    /// CPU has no part in it: for each step but the last the slowest one takes its time.
    pub fn prompts(&self, count: usize, length: usize, depth: usize) -> StepSeconds {
        let (most, tokens) = (self.usage.step_tokens_max, count * length);
        let overlaps = self.placement.spill.is_none() || most > CROSSING_TOKENS_MAX;
        let seen = |window: Option<usize>| mean_seen((depth, length), window);
        let attention = |(stage, gpu): &(&StagePlacement, Option<&GpuRates>)| {
            let macs = attention_macs(&self.spec.layers[stage.layers.clone()], tokens, &seen);
            match gpu {
                Some(gpu) => predict_gpu::attention_seconds(gpu, macs),
                None => self.cpu.attention_seconds(macs),
            }
        };
        let attention: Vec<f64> = self.stages.iter().map(attention).collect();
        // Most steps are alike.
        let mut known = HashMap::<_, Vec<_>>::new();
        let steps = (0..tokens).step_by(most).map(|start| {
            let end = tokens.min(start + most);
            // Prompts that end in it.
            let logits = end / length - start / length;
            let share = (end - start) as f64 / tokens as f64;
            let step = (end - start, logits);
            let stages =
                known.entry(step).or_insert_with(|| self.of_stages(step.0, logits).collect());
            let stages = stages.iter().zip(&attention);
            let stages =
                stages.map(|(stage, all)| StepSeconds { attention: share * all, ..*stage });
            let step = if end == tokens || !overlaps {
                stages.fold(StepSeconds::default(), Add::add)
            } else {
                stages.max_by(|a, b| a.total().total_cmp(&b.total())).unwrap_or_default()
            };
            StepSeconds { between: self.between, ..step }
        });
        steps.fold(StepSeconds::default(), Add::add)
    }

    /// Of a step without its keys and values; `logits` of its tokens get logits. Its stages follow
    /// each other.
    fn step(&self, tokens: usize, logits: usize) -> StepSeconds {
        let all = self.of_stages(tokens, logits).fold(StepSeconds::default(), Add::add);
        StepSeconds { between: self.between, ..all }
    }

    /// The same of each stage, without what is between steps.
    fn of_stages(&self, tokens: usize, logits: usize) -> impl Iterator<Item = StepSeconds> {
        let last = self.stages.len() - 1;
        self.stages.iter().enumerate().map(move |(at, (stage, gpu))| {
            let logits = if at == last { logits } else { 0 };
            self.of_stage((stage, *gpu), tokens, logits)
        })
    }

    fn of_stage(
        &self,
        (stage, gpu): (&StagePlacement, Option<&GpuRates>),
        tokens: usize,
        logits: usize,
    ) -> StepSeconds {
        let spilled = self.spilled((stage, gpu), tokens);
        let Spilled { mut resident, mean, layers, crossing, .. } = spilled;
        resident += output_parts(self.spec, logits, &self.seconds_per_weight(gpu));
        let model = (self.spec, &self.spec.layers[stage.layers.clone()]);
        let Some(gpu) = gpu else {
            return self.cpu.layers(model, resident.all(), (tokens, logits));
        };
        let products = predict_gpu::seconds(gpu, model, tokens, resident);
        if layers == 0 {
            return StepSeconds { products, ..StepSeconds::default() };
        }
        let apart = predict_gpu::apart_seconds(gpu, layers, tokens);
        let times = self.shared_times(gpu, &spilled, tokens);
        let crossing = crossing[0] * gpu.crossing_us * 1e-6 + crossing[1] / gpu.pinned.to_gpu;
        let with_streamed = |streamed: usize| {
            let here = (layers - streamed) as f64;
            let mut on_gpu = resident;
            on_gpu += mean * streamed as f64;
            let on_gpu = predict_gpu::seconds(gpu, model, tokens, on_gpu) + apart;
            let both = times.seconds(here, streamed as f64) + here * crossing;
            // Nobody waits for the CPU: what comes and what is computed overlap.
            if here == 0.0 { on_gpu.max(both) } else { on_gpu + both }
        };
        let fewest = if tokens > CROSSING_TOKENS_MAX { layers } else { 0 };
        let all = (fewest..=layers).map(with_streamed).fold(f64::INFINITY, f64::min);
        let products = products + apart;
        StepSeconds { products, spilled: all - products, ..StepSeconds::default() }
    }

    /// Of the CPU, and of a GPU if that runs the stage.
    fn seconds_per_weight(&self, gpu: Option<&GpuRates>) -> impl Fn(DType, f64) -> [f64; 2] {
        move |dtype, tokens| {
            let on_gpu = gpu.map_or(0.0, |gpu| predict_gpu::seconds_per_weight(gpu, dtype, tokens));
            [self.cpu.seconds_per_weight(dtype, tokens), on_gpu]
        }
    }

    /// Divides the work of a stage's layers.
    fn spilled(
        &self,
        (stage, gpu): (&StagePlacement, Option<&GpuRates>),
        tokens: usize,
    ) -> Spilled {
        let nothing = Spill::default();
        let spill = stage.spill.as_ref().unwrap_or(&nothing);
        let mut all = Spilled::default();
        let seconds = self.seconds_per_weight(gpu);
        for at in stage.layers.clone() {
            let layer = &self.spec.layers[at];
            let of = |layers: &[usize]| layers.contains(&at);
            for (is_spilled, parts) in [
                (of(&spill.attention_layers), attention_parts(&layer.attention, tokens, &seconds)),
                (of(&spill.layers), network_parts(&layer.ffn, tokens, &seconds)),
            ] {
                *if is_spilled { &mut all.mean } else { &mut all.resident } += parts;
            }
            if let Some(ffn) = layer.ffn.dense().filter(|_| of(&spill.layers)) {
                all.gated += ffn.up.weight.rows as f64;
            }
            let units = spill.units_of(at, layer);
            all.layers += usize::from(!units.is_empty());
            for unit in units {
                all.bytes += unit.streamed_bytes() as f64;
                all.crossing[0] += 1.0;
                all.crossing[1] += unit.crossed_bytes() as f64 * tokens as f64;
            }
        }
        let share = 1.0 / all.layers.max(1) as f64;
        all.mean = all.mean * share;
        all.bytes *= share;
        all.gated *= share;
        all.crossing = all.crossing.map(|all| all * share);
        all
    }

    /// Of what is spilled of a layer, in the mean. A stream carries all experts.
    fn shared_times(&self, gpu: &GpuRates, spilled: &Spilled, tokens: usize) -> SharedTimes {
        let (work, bytes) = (spilled.mean.all(), spilled.bytes);
        let units = (spilled.crossing[0], spilled.gated);
        let beside = self.cpu.reading_at_most(gpu.beside_reads.reads);
        let to_gpu_beside = gpu.beside_reads.to_gpu.min(gpu.pinned.to_gpu);
        SharedTimes {
            cpu: self.cpu.spilled(work, units, tokens),
            cpu_beside: beside.spilled(work, units, tokens),
            stream: bytes / gpu.pinned.to_gpu,
            stream_beside: bytes / to_gpu_beside,
            ahead: RING_LAYERS,
        }
    }
}

/// How many others each token of a prompt of `length` tokens behind `depth` others sees, in the
/// mean: one at p sees p, or those of the window.
fn mean_seen((depth, length): (usize, usize), window: Option<usize>) -> f64 {
    let (first, end) = (depth as f64, (depth + length) as f64);
    let window = window.map_or(end, |window| window as f64);
    // Up to the window each sees one more than the one before it.
    let full = window.clamp(first, end);
    let growing = (full - first) * (full + first) / 2.0;
    (growing + (end - full) * window) / length.max(1) as f64
}

/// Of attention's products, where each of some tokens sees as many others as `seen` of a layer's
/// window.
fn attention_macs(layers: &[LayerSpec], tokens: usize, seen: &dyn Fn(Option<usize>) -> f64) -> f64 {
    let macs = layers.iter().map(|layer| {
        let attention = &layer.attention;
        let width = (attention.n_heads * attention.head_dim) as f64;
        2.0 * width * seen(attention.window) * tokens as f64
    });
    macs.sum()
}
