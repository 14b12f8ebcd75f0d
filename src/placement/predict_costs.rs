//! Seconds of a step, from the work of its parts and the measured rates of what does it. The
//! formulas are told in `predict.rs`.

use super::predict_work::{Parts, Work, attention_parts, network_parts, output_parts};
use super::{CROSSING_TOKENS_MAX, Device, Placement, SharedTimes, Spill, StagePlacement};
use crate::hardware::{GpuRates, Measured, ProductRates};
use crate::model::{LayerSpec, ModelSpec};
use crate::tensor::DType;
use serde::Serialize;
use std::ops::Add;

/// Seconds of a layer in which the kernels of a step on a GPU wait for each other: one of 50 µs
/// reads for 27 at the roof (`docs/performance.md`, "One H200"). It does not grow with the layer: a
/// Llama of 70B, with layers of three and a half times the bytes, decodes at 80 % of the roof and
/// one of 8B at 55 %.
const LAYER_WAIT: f64 = 23e-6;
/// Share of the memory's rate at which a GPU reads weights beside that, by the tokens of a step:
/// one; up to eight, which are multiplied in 8 bits; more. As of 3,529 and 7,535 tokens/s with 8
/// and 32 streams there.
const VRAM_SHARES: [(usize, f64); 3] = [(1, 1.0), (8, 0.7), (usize::MAX, 0.4)];
/// The same of experts, whose kernels have less to do each.
const VRAM_SHARE_EXPERTS: f64 = 0.4;
/// Share of the tensor cores' rate that steps reach: prompts of 8B 453 of 902 TFLOP/s, attention
/// and norms included; experts 179 to 245.
const TENSOR_SHARE: f64 = 0.5;
const TENSOR_SHARE_EXPERTS: f64 = 0.2;
/// Tokens from which reading and arithmetic overlap on a GPU: wider products have enough to do.
const OVERLAP_TOKENS: usize = 129;
/// Share of the CPU's rate in registers that products reach ("Sixteen cores"): 8-bit ones 1.6 to
/// 2.0 of 4.1 T multiply-adds/s. Tiles of AMX in bf16 wait for weights to be decoded: 3.0 to 3.3 of
/// 11.5.
const CPU_SHARE: f64 = 0.4;
const CPU_SHARE_TILES: f64 = 0.25;
/// Layers that a ring holds which did not have to be made smaller.
const RING_LAYERS: f64 = 4.0 / 3.0;
/// Share of memory's rate at which streams' attention reads keys and values: half to two thirds
/// ("Predicted stage by stage").
const KV_SHARE: f64 = 0.62;
/// What the probe calls the numbers that tiles multiply.
const TILE_NUMBERS: &str = "bf16";

/// Share of the CPU's rate in registers at which attention multiplies, which does so in floats:
/// 80 to 96 of 465 G multiply-adds/s on two threads of Zen 4. Tiles have three times that rate.
const ATTENTION_SHARE: f64 = 0.18;
const ATTENTION_SHARE_TILES: f64 = 0.06;
/// How often workers meet in a layer: in steps of a few tokens, and in wider ones.
const MEETINGS: [f64; 2] = [5.0, 8.0];
/// Tokens of the widest step whose rows each worker normalises for itself.
const NARROW_TOKENS: usize = 16;
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
    /// Workers of a CPU that meet, because one reads what another wrote.
    pub meetings: f64,
    /// From a step's end to the next one's start.
    pub between: f64,
}

impl StepSeconds {
    /// Of all together.
    pub fn total(self) -> f64 {
        let Self { products, attention, spilled, meetings, between } = self;
        products + attention + spilled + meetings + between
    }
}

impl Add for StepSeconds {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            products: self.products + other.products,
            attention: self.attention + other.attention,
            spilled: self.spilled + other.spilled,
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

/// What the workers reach.
#[derive(Clone, Copy)]
struct CpuRates<'a> {
    /// Bytes of host memory read per second.
    read: f64,
    /// Multiply-accumulates of products per second, where their type was not measured.
    macs: f64,
    /// Those of types that were, of all workers of the probe.
    products: &'a [ProductRates],
    /// Part of these workers that there are.
    part: f64,
    /// Multiply-accumulates of attention per second.
    attention_macs: f64,
    /// Seconds of a meeting of all workers.
    meeting: f64,
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

impl<'a> CpuRates<'a> {
    /// Of so many threads; between numbers that were measured along a line.
    fn of(measured: &'a Measured, threads: usize) -> Option<Self> {
        let last = measured.reads.last()?;
        let above = measured.reads.iter().position(|read| read.threads >= threads);
        let read = match above {
            None => last.bytes_per_second,
            Some(0) => measured.reads[0].bytes_per_second,
            Some(above) => {
                let (low, high) = (&measured.reads[above - 1], &measured.reads[above]);
                let part = (threads - low.threads) as f64 / (high.threads - low.threads) as f64;
                low.bytes_per_second + part * (high.bytes_per_second - low.bytes_per_second)
            }
        };
        let is_tiles = measured.cpu.numbers == TILE_NUMBERS;
        let share = if is_tiles { CPU_SHARE_TILES } else { CPU_SHARE };
        let part = threads.min(last.threads) as f64 / last.threads as f64;
        let attention_share = if is_tiles { ATTENTION_SHARE_TILES } else { ATTENTION_SHARE };
        let all = measured.cpu.per_second * part;
        let (macs, attention_macs) = (all * share, all * attention_share);
        let (products, meeting) = (&measured.products[..], measured.meeting_us * 1e-6);
        Some(Self { read, macs, products, part, attention_macs, meeting })
    }

    fn seconds_per_mac(&self, dtype: DType, tokens: f64) -> f64 {
        let products = self.products.iter().find(|products| products.dtype == dtype.name());
        let measured = products.map(|products| products.with_tokens(tokens) * self.part);
        1.0 / measured.filter(|rate| *rate > 0.0).unwrap_or(self.macs)
    }

    fn seconds(&self, work: Work) -> f64 {
        (work.bytes / self.read).max(work.cpu_seconds)
    }
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
                Some(gpu) => bytes / gpu.read_bytes_per_second,
                None => (bytes / (self.cpu.read * KV_SHARE))
                    .max(self.attention_seconds(streams, &|window| seen(window) as f64)),
            }
        });
        StepSeconds { attention: attention.sum(), ..self.step(streams, streams) }
    }

    /// Of a prompt of so many tokens in as few steps as there can be. Stages are at work at once
    /// then, each at another step, where the CPU has no part in it: for each step but the last the
    /// slowest one takes its time.
    pub fn prompt(&self, tokens: usize) -> StepSeconds {
        let most = self.usage.step_tokens_max;
        let overlaps = self.placement.spill.is_none() || most > CROSSING_TOKENS_MAX;
        let steps = (0..tokens).step_by(most).map(|start| {
            let end = tokens.min(start + most);
            let is_last = end == tokens;
            if is_last || !overlaps {
                return self.step(end - start, usize::from(is_last));
            }
            let stages = self.of_stages(end - start, 0);
            let slowest = stages.max_by(|a, b| a.total().total_cmp(&b.total()));
            StepSeconds { between: self.between, ..slowest.unwrap_or_default() }
        });
        let steps = steps.fold(StepSeconds::default(), Add::add);
        // A token at p sees p others, or those of the window.
        let seen = |window: Option<usize>| match window {
            Some(window) if window < tokens => {
                window as f64 * (1.0 - window as f64 / (2.0 * tokens as f64))
            }
            _ => tokens as f64 / 2.0,
        };
        let is_cpu = *self.placement.device() == Device::Cpu;
        let attention = if is_cpu { self.attention_seconds(tokens, &seen) } else { 0.0 };
        StepSeconds { attention, ..steps }
    }

    /// Of the arithmetic of attention on the CPU, where each token sees as many others as `seen` of
    /// a layer's window.
    fn attention_seconds(&self, tokens: usize, seen: &dyn Fn(Option<usize>) -> f64) -> f64 {
        let macs = self.spec.layers.iter().map(|layer| {
            let attention = &layer.attention;
            let width = (attention.n_heads * attention.head_dim) as f64;
            2.0 * width * seen(attention.window) * tokens as f64
        });
        macs.sum::<f64>() / self.cpu.attention_macs
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
        let Spilled { mut resident, mean, layers, bytes, crossing } = self.spilled(stage, tokens);
        resident += output_parts(self.spec, logits, &|dtype, tokens| {
            self.cpu.seconds_per_mac(dtype, tokens)
        });
        let n_layers = stage.layers.len();
        let Some(gpu) = gpu else {
            let products = self.cpu.seconds(resident.all());
            let at_layer = MEETINGS[usize::from(tokens > NARROW_TOKENS)];
            let meetings = at_layer * n_layers as f64 * self.cpu.meeting;
            return StepSeconds { products, meetings, ..StepSeconds::default() };
        };
        let products = gpu_seconds(gpu, (tokens, n_layers), resident);
        if layers == 0 {
            return StepSeconds { products, ..StepSeconds::default() };
        }
        let times = self.shared_times(gpu, (mean.all(), bytes));
        let crossing = crossing[0] * gpu.crossing_us * 1e-6 + crossing[1] / gpu.pinned.to_gpu;
        let with_streamed = |streamed: usize| {
            let here = (layers - streamed) as f64;
            let mut on_gpu = resident;
            on_gpu += mean * streamed as f64;
            let on_gpu = gpu_seconds(gpu, (tokens, n_layers), on_gpu);
            let both = times.seconds(here, streamed as f64) + here * crossing;
            // Nobody waits for the CPU: what comes and what is computed overlap.
            if here == 0.0 { on_gpu.max(both) } else { on_gpu + both }
        };
        let fewest = if tokens > CROSSING_TOKENS_MAX { layers } else { 0 };
        let all = (fewest..=layers).map(with_streamed).fold(f64::INFINITY, f64::min);
        StepSeconds { products, spilled: all - products, ..StepSeconds::default() }
    }

    /// Divides the work of a stage's layers.
    fn spilled(&self, stage: &StagePlacement, tokens: usize) -> Spilled {
        let nothing = Spill::default();
        let spill = stage.spill.as_ref().unwrap_or(&nothing);
        let mut all = Spilled::default();
        let seconds = |dtype, tokens| self.cpu.seconds_per_mac(dtype, tokens);
        for at in stage.layers.clone() {
            let layer = &self.spec.layers[at];
            let of = |layers: &[usize]| layers.contains(&at);
            for (is_spilled, parts) in [
                (of(&spill.attention_layers), attention_parts(&layer.attention, tokens, &seconds)),
                (of(&spill.layers), network_parts(&layer.ffn, tokens, &seconds)),
            ] {
                *if is_spilled { &mut all.mean } else { &mut all.resident } += parts;
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
        all.crossing = all.crossing.map(|all| all * share);
        all
    }

    /// Of a layer of this work, whose weights have so many bytes. A stream carries all experts.
    fn shared_times(&self, gpu: &GpuRates, (work, bytes): (Work, f64)) -> SharedTimes {
        let beside = CpuRates { read: gpu.beside_reads.reads.min(self.cpu.read), ..self.cpu };
        let to_gpu_beside = gpu.beside_reads.to_gpu.min(gpu.pinned.to_gpu);
        SharedTimes {
            cpu: self.cpu.seconds(work),
            cpu_beside: beside.seconds(work),
            stream: bytes / gpu.pinned.to_gpu,
            stream_beside: bytes / to_gpu_beside,
            ahead: RING_LAYERS,
        }
    }
}

/// Seconds of what a GPU computes in a step of some tokens, which go through some layers.
fn gpu_seconds(gpu: &GpuRates, (tokens, layers): (usize, usize), parts: Parts) -> f64 {
    let share = VRAM_SHARES.iter().find(|(most, _)| tokens <= *most).map_or(1.0, |s| s.1);
    let Parts { dense, experts } = parts;
    let (vram, macs) = (gpu.read_bytes_per_second, gpu.macs.per_second);
    let wait = LAYER_WAIT * layers as f64;
    let reads = wait + dense.bytes / (vram * share);
    let arithmetic = dense.macs / (macs * TENSOR_SHARE);
    let dense = match tokens {
        OVERLAP_TOKENS.. => reads.max(arithmetic),
        _ => reads + arithmetic,
    };
    dense
        + experts.bytes / (vram * VRAM_SHARE_EXPERTS)
        + experts.macs / (macs * TENSOR_SHARE_EXPERTS)
}
