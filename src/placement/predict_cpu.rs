//! Seconds of what the CPU's workers do in a step. The formulas are told in `predict.rs`.

use super::predict_costs::StepSeconds;
use super::predict_work::Work;
use crate::hardware::{Measured, ProductRates, RowRates};
use crate::model::{LayerSpec, ModelSpec};
use crate::tensor::DType;

/// Share of the CPU's rate in registers that products reach ("Sixteen cores"): 8-bit ones 1.6 to
/// 2.0 of 4.1 T multiply-adds/s. Tiles of AMX in bf16 wait for weights to be decoded: 3.0 to 3.3 of
/// 11.5.
const CPU_SHARE: f64 = 0.4;
const CPU_SHARE_TILES: f64 = 0.25;
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
/// The same in a unit that a GPU has spilled.
const UNIT_MEETINGS: [f64; 2] = [2.0, 3.0];
/// Tokens of the widest step whose rows each worker normalises for itself.
const NARROW_TOKENS: usize = 16;

/// Bytes of memory for each logit: its line is fetched and written back, and read when a token is
/// chosen, behind weights that push it out of caches.
const LOGIT_BYTES: f64 = 3.0 * 4.0;

/// What the workers reach.
#[derive(Clone, Copy)]
pub(super) struct CpuRates<'a> {
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
    /// Work on rows, of all workers of the probe.
    rows: RowRates,
    /// Seconds of a meeting of all workers.
    meeting: f64,
    /// How many there are.
    threads: f64,
    /// Of what [`Measured::unhidden_with`] is asked.
    measured: &'a Measured,
}

impl<'a> CpuRates<'a> {
    /// Of so many threads; between numbers that were measured along a line.
    pub fn of(measured: &'a Measured, threads: usize) -> Option<Self> {
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
        let (rows, threads) = (measured.rows, threads as f64);
        let rates =
            Self { read, macs, products, part, attention_macs, rows, meeting, threads, measured };
        Some(rates)
    }

    /// The same where others read host memory as well.
    pub fn reading_at_most(self, bytes_per_second: f64) -> Self {
        Self { read: bytes_per_second.min(self.read), ..self }
    }

    /// Of all workers where memory is no limit.
    pub fn seconds_per_weight(&self, dtype: DType, tokens: f64) -> f64 {
        let products = self.products.iter().find(|products| products.dtype == dtype.name());
        let measured = products.map(|products| products.with_tokens(tokens) * self.part);
        tokens / measured.filter(|rate| *rate > 0.0).unwrap_or(self.macs)
    }

    /// Of products with so many tokens each.
    pub fn seconds(&self, (bytes, cpu_seconds): (f64, f64), tokens: usize) -> f64 {
        let reading = bytes / self.read;
        let unhidden = self.measured.unhidden_with(tokens as f64);
        reading.max(cpu_seconds) + unhidden * reading.min(cpu_seconds)
    }

    /// Of what a GPU has spilled of a layer: with this work of products, in so many units, which
    /// gate so many elements of a token.
    pub fn spilled(&self, work: Work, (units, gated): (f64, f64), tokens: usize) -> f64 {
        let gates = self.row_seconds((gated * tokens as f64) as usize, self.rows.gate);
        let meetings = UNIT_MEETINGS[usize::from(tokens > NARROW_TOKENS)] * units * self.meeting;
        let products = self.seconds((work.bytes, work.cpu_seconds), tokens);
        products + gates + meetings + self.waits(work, tokens)
    }

    /// Of work on rows at a rate of all workers of the probe.
    fn row_seconds(&self, elements: usize, rate: f64) -> f64 {
        if rate > 0.0 { elements as f64 / (rate * self.part) } else { 0.0 }
    }

    /// Until the last worker is through with its last piece, in the mean; a part of the share of
    /// the roof where no product was measured.
    fn waits(&self, work: Work, tokens: usize) -> f64 {
        if self.products.is_empty() {
            return 0.0;
        }
        let [bytes, cpu_seconds] = work.pieces;
        self.seconds((bytes, cpu_seconds), tokens) * (self.threads - 1.0) / 2.0
    }

    /// Of keys and values of so many bytes that streams attend to.
    pub fn kv_seconds(&self, bytes: f64) -> f64 {
        bytes / (self.read * KV_SHARE)
    }

    /// Of attention's arithmetic.
    pub fn attention_seconds(&self, macs: f64) -> f64 {
        macs / self.attention_macs
    }

    /// Of layers with this work of products, in a step of some tokens of which some get logits.
    pub fn layers(
        &self,
        (spec, layers): (&ModelSpec, &[LayerSpec]),
        work: Work,
        (tokens, logits): (usize, usize),
    ) -> StepSeconds {
        let is_wide = tokens > NARROW_TOKENS;
        let gated = |layer: &LayerSpec| layer.ffn.dense().map_or(0, |ffn| ffn.up.weight.rows);
        let gated: usize = layers.iter().map(gated).sum();
        let gates = self.row_seconds(gated * tokens, self.rows.gate);
        let choices = logits * spec.vocab_size;
        let choices =
            self.row_seconds(choices, self.rows.logits) + choices as f64 * LOGIT_BYTES / self.read;
        // In a narrow step each worker does all rows.
        let repeated = if is_wide { 1.0 } else { self.threads };
        let normed: usize = layers.iter().map(norms).sum();
        let normed = self.row_seconds(normed * tokens * spec.embedding_dim, self.rows.norm);
        let meetings = MEETINGS[usize::from(is_wide)] * layers.len() as f64 * self.meeting;
        StepSeconds {
            products: self.seconds((work.bytes, work.cpu_seconds), tokens) + gates + choices,
            norms: repeated * normed,
            meetings: meetings + self.waits(work, tokens),
            ..StepSeconds::default()
        }
    }
}

/// How often a layer normalises or rounds a row of the residual stream.
fn norms(layer: &LayerSpec) -> usize {
    let rounded_twice = usize::from(layer.attention.wants_sixteen_bits());
    let after = [&layer.attention_post_norm, &layer.ffn_post_norm];
    2 + rounded_twice + after.into_iter().flatten().count()
}
