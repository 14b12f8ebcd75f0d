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
        let rates = TOKENS_MEASURED.into_iter().zip(self.macs_per_second);
        let mut below: Option<(f64, f64)> = None;
        for (measured, rate) in rates.map(|(measured, rate)| (measured as f64, rate)) {
            match below {
                _ if tokens > measured => below = Some((measured, rate)),
                None => return rate,
                Some((less, slower)) => {
                    return slower + (rate - slower) * (tokens - less) / (measured - less);
                }
            }
        }
        below.map_or(0.0, |(_, rate)| rate)
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
