//! What a machine's parts reach, as it was measured and as it is kept. All rates are bytes, or
//! multiply-accumulates, per second.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// What was measured of a machine.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Host memory by the number of threads that read it, ascending.
    pub reads: Vec<ReadRate>,
    /// Arithmetic of all workers.
    pub cpu: MacRate,
    /// Products by block type.
    #[serde(default)]
    pub products: Vec<ProductRates>,
    /// How much of the shorter of reading weights and multiplying them comes on top of the longer,
    /// by [`TOKENS_MEASURED`]: 0 where one hides the other, 1 where they follow each other.
    #[serde(default)]
    pub unhidden: [f64; TOKENS_MEASURED.len()],
    /// Work on rows beside products.
    #[serde(default)]
    pub rows: RowRates,
    /// All workers at a barrier, spinning, in µs.
    #[serde(default)]
    pub meeting_us: f64,
    /// From the word to a thread that sleeps until it runs, in µs: the middle one of many.
    #[serde(default)]
    pub wake_us: f64,
    /// GPUs in the driver's order; those that could not be measured are left out.
    pub gpus: Vec<GpuRates>,
    /// Where a file was named.
    pub disk: Option<DiskRate>,
    /// What could not be measured, in words.
    pub notes: Vec<String>,
    /// How long all this took.
    pub seconds: f64,
}

/// Host memory that several threads read together, each its own part in order.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReadRate {
    /// On processors as compute workers get them.
    pub threads: usize,
    /// Of all of them together.
    pub bytes_per_second: f64,
}

/// Multiply-accumulates in registers, or of tensor cores. One is two operations.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MacRate {
    /// Of which numbers, and with which instructions.
    pub numbers: String,
    /// Per second, of all workers or all multiprocessors together.
    pub per_second: f64,
}

/// Work on rows beside products: elements per second of all workers together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RowRates {
    /// Added to the residual stream, normalised and rounded.
    pub norm: f64,
    /// Of a feed-forward network, activated, multiplied and rounded.
    pub gate: f64,
    /// Logits that a token is chosen from.
    pub logits: f64,
}

/// Tokens of the steps that products are measured for, ascending.
pub const TOKENS_MEASURED: [usize; 4] = [1, 8, 32, 256];

/// What products with weights of a type reach, where memory is no limit.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ProductRates {
    /// The type.
    pub dtype: String,
    /// Multiply-accumulates per second of all workers together, by [`TOKENS_MEASURED`].
    pub macs_per_second: [f64; TOKENS_MEASURED.len()],
}

impl ProductRates {
    /// With so many tokens; between numbers that were measured along a line.
    pub fn with_tokens(&self, tokens: f64) -> f64 {
        on_lines(TOKENS_MEASURED.into_iter().zip(self.macs_per_second), tokens)
    }
}

impl Measured {
    /// [`Measured::unhidden`] with so many tokens; between numbers that were measured along a line.
    pub fn unhidden_with(&self, tokens: f64) -> f64 {
        on_lines(TOKENS_MEASURED.into_iter().zip(self.unhidden), tokens)
    }
}

/// A figure of so many tokens from those that were measured, with ascending numbers of them; the
/// first or the last one beyond these.
fn on_lines(figures: impl Iterator<Item = (usize, f64)>, tokens: f64) -> f64 {
    let mut below: Option<(f64, f64)> = None;
    for (measured, figure) in figures.map(|(measured, figure)| (measured as f64, figure)) {
        match below {
            _ if tokens > measured => below = Some((measured, figure)),
            None => return figure,
            Some((less, before)) => {
                return before + (figure - before) * (tokens - less) / (measured - less);
            }
        }
    }
    below.map_or(0.0, |(_, figure)| figure)
}

/// Tokens of the steps that a GPU's products are measured for, ascending.
pub const GPU_TOKENS_MEASURED: [usize; 5] = [1, 8, 32, 64, 512];

/// What a GPU's products reach with weights of a type, which lie in its memory.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GpuProductRates {
    /// The type.
    pub dtype: String,
    /// Multiply-accumulates per second, by [`GPU_TOKENS_MEASURED`].
    pub macs_per_second: [f64; GPU_TOKENS_MEASURED.len()],
}

impl GpuProductRates {
    /// Seconds that a weight takes with so many tokens: between numbers that were measured along a
    /// line, with more in proportion.
    pub fn seconds_per_weight(&self, tokens: f64) -> f64 {
        let rates = GPU_TOKENS_MEASURED.into_iter().zip(self.macs_per_second);
        let seconds = on_lines(rates.map(|(tokens, rate)| (tokens, tokens as f64 / rate)), tokens);
        let most = GPU_TOKENS_MEASURED[GPU_TOKENS_MEASURED.len() - 1] as f64;
        seconds * (tokens / most).max(1.0)
    }
}

/// Copies between host and GPU, in bytes per second.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct CopyRates {
    /// From the host's memory to the GPU's.
    pub to_gpu: f64,
    /// From the GPU's memory to the host's.
    pub from_gpu: f64,
}

/// What a GPU and its link to the host reach.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GpuRates {
    /// Index in the driver's order.
    pub ordinal: usize,
    /// Its memory, read by all multiprocessors, in bytes per second.
    pub read_bytes_per_second: f64,
    /// Arithmetic of its tensor cores.
    pub macs: MacRate,
    /// Products by block type.
    #[serde(default)]
    pub products: Vec<GpuProductRates>,
    /// One way at a time, from and to memory that the GPU copies by itself.
    pub pinned: CopyRates,
    /// Both ways at once, each way's own rate.
    pub both_ways: CopyRates,
    /// One way at a time, from and to any memory.
    pub pageable: CopyRates,
    /// Copies to the GPU while all workers read host memory.
    pub beside_reads: BesideReads,
    /// From the start of a kernel with nearly nothing to do to the end of the wait, in µs:
    /// the middle one of many.
    pub crossing_us: f64,
}

/// Host memory that the GPU and the workers share, in bytes per second.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct BesideReads {
    /// What copies to the GPU get.
    pub to_gpu: f64,
    /// What the workers get.
    pub reads: f64,
}

/// A file that was read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DiskRate {
    /// Which.
    pub file: PathBuf,
    /// In large pieces, several at a time.
    pub bytes_per_second: f64,
    /// Whether the disk itself was read; otherwise the file may have been in memory, at least in
    /// part, since its file system knows no other way.
    pub is_direct: bool,
}
