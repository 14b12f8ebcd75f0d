//! Seconds of what a GPU does in a step. The formulas are told in `predict.rs`.

use super::predict_work::Parts;
use crate::hardware::GpuRates;
use crate::model::{LayerSpec, ModelSpec};
use crate::tensor::DType;

/// Seconds of a layer in which the kernels of a step on a GPU wait for each other, where products
/// were not measured, or experts have small ones: one of 50 µs reads for 27 at the roof
/// (`docs/performance.md`, "One H200"). It does not grow with the layer: a Llama of 70B, with
/// layers of three and a half times the bytes, decodes at 80 % of the roof and one of 8B at 55 %.
const LAYER_WAIT: f64 = 23e-6;
/// Seconds of a layer beside products that were measured: with one token, whose norms and rounding
/// are parts of the products, and with more.
const LAYER_REST: [f64; 2] = [10e-6, 22e-6];
/// Seconds more of a layer with spilled weights in a step of one token: its norms are kernels of
/// their own, and none of its kernels starts while the CPU is at work. A layer whose network the
/// CPU computes takes 45 µs for the rest, with one token and with eight.
const LAYER_APART: f64 = 22e-6;
/// How often rows as long as the residual stream and the network's are read or written in f32
/// between products, at the memory's rate: a token of a layer of 8B takes 0.27 µs.
const ROW_PASSES: f64 = 17.0;
/// Share of the memory's rate at which streams' attention reads keys and values, and of the tensor
/// cores' rate at which that of prompts multiplies, where products were measured.
const KV_SHARE: f64 = 0.4;
const ATTENTION_SHARE: f64 = 0.16;
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

/// Of a weight of a type in a product with so many tokens: by the roofs where others were measured
/// and this type was not, and nothing where none was.
pub(super) fn seconds_per_weight(gpu: &GpuRates, dtype: DType, tokens: f64) -> f64 {
    if gpu.products.is_empty() {
        return 0.0;
    }
    let products = gpu.products.iter().find(|products| products.dtype == dtype.name());
    products.map(|products| products.seconds_per_weight(tokens)).unwrap_or_else(|| {
        let bytes = dtype.block_bytes() as f64 / dtype.block_elements() as f64;
        by_roofs(gpu, 0.0, (bytes, tokens), tokens as usize)
    })
}

/// Of waiting, then reading so many bytes of weights, and of so many multiply-accumulates.
fn by_roofs(gpu: &GpuRates, wait: f64, (bytes, macs): (f64, f64), tokens: usize) -> f64 {
    let share = VRAM_SHARES.iter().find(|(most, _)| tokens <= *most).map_or(1.0, |s| s.1);
    let reads = wait + bytes / (gpu.read_bytes_per_second * share);
    let arithmetic = macs / (gpu.macs.per_second * TENSOR_SHARE);
    match tokens {
        OVERLAP_TOKENS.. => reads.max(arithmetic),
        _ => reads + arithmetic,
    }
}

/// Of keys and values of so many bytes that streams attend to.
pub(super) fn kv_seconds(gpu: &GpuRates, bytes: f64) -> f64 {
    let share = if gpu.products.is_empty() { 1.0 } else { KV_SHARE };
    bytes / (gpu.read_bytes_per_second * share)
}

/// Of the attention of prompts, with so many multiply-accumulates: a part of the tensor cores'
/// share where no products were measured.
pub(super) fn attention_seconds(gpu: &GpuRates, macs: f64) -> f64 {
    if gpu.products.is_empty() { 0.0 } else { macs / (gpu.macs.per_second * ATTENTION_SHARE) }
}

/// Of what a GPU computes in a step of some tokens, which go through some layers.
pub(super) fn seconds(
    gpu: &GpuRates,
    (spec, layers): (&ModelSpec, &[LayerSpec]),
    tokens: usize,
    parts: Parts,
) -> f64 {
    let Parts { dense, experts } = parts;
    let (vram, macs) = (gpu.read_bytes_per_second, gpu.macs.per_second);
    let dense = if gpu.products.is_empty() {
        let wait = LAYER_WAIT * layers.len() as f64;
        by_roofs(gpu, wait, (dense.bytes, dense.macs), tokens)
    } else {
        dense.gpu_seconds + beside_products(gpu, (spec, layers), tokens)
    };
    dense
        + experts.bytes / (vram * VRAM_SHARE_EXPERTS)
        + experts.macs / (macs * TENSOR_SHARE_EXPERTS)
}

/// Of so many layers with spilled weights, more than of others.
pub(super) fn apart_seconds(gpu: &GpuRates, layers: usize, tokens: usize) -> f64 {
    let is_single = tokens == 1 && !gpu.products.is_empty();
    if is_single { layers as f64 * LAYER_APART } else { 0.0 }
}

/// Of what layers take beside products that were measured.
fn beside_products(
    gpu: &GpuRates,
    (spec, layers): (&ModelSpec, &[LayerSpec]),
    tokens: usize,
) -> f64 {
    let of_layer = |layer: &LayerSpec| match layer.ffn.dense() {
        None => LAYER_WAIT,
        Some(ffn) => {
            let elements = (spec.embedding_dim + ffn.up.weight.rows) * tokens;
            let passes = if tokens > 1 { ROW_PASSES } else { 0.0 };
            let bytes = passes * (elements * size_of::<f32>()) as f64;
            LAYER_REST[usize::from(tokens > 1)] + bytes / gpu.read_bytes_per_second
        }
    };
    layers.iter().map(of_layer).sum()
}
