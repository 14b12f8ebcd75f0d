//! A lock-free histogram of durations with a fixed relative error.

use serde::Serialize;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Buckets per power of two: a quantile is at most 1/8 above the true value.
const SUB_BUCKETS: u64 = 8;
/// Values below this have a bucket of their own.
const EXACT_BELOW: u64 = SUB_BUCKETS;
/// Powers of two above [`EXACT_BELOW`] that are kept apart: up to 2^40 us, twelve days.
const POWERS: u64 = 37;
const BUCKETS: usize = (EXACT_BELOW + POWERS * SUB_BUCKETS) as usize;

/// Counts of values in microseconds, in buckets that grow by an eighth of a power of two.
///
/// ```
/// let histogram = tandem::telemetry::Histogram::default();
/// (1..=100).for_each(|us| histogram.record(us * 1000));
/// let half = histogram.snapshot().p50_us;
/// assert!((50_000..=56_250).contains(&half));
/// ```
#[derive(Debug)]
pub struct Histogram {
    /// [BUCKETS] counts.
    counts: Box<[AtomicU64]>,
    sum_us: AtomicU64,
    max_us: AtomicU64,
}

/// What a [`Histogram`] held at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, schemars::JsonSchema)]
pub struct HistogramSnapshot {
    /// Number of values.
    pub count: u64,
    /// Their mean in microseconds; 0 when there are none.
    pub mean_us: f64,
    /// Median, at most 1/8 too high.
    pub p50_us: u64,
    /// 95th percentile, at most 1/8 too high.
    pub p95_us: u64,
    /// 99th percentile, at most 1/8 too high.
    pub p99_us: u64,
    /// Largest value, exact.
    pub max_us: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        let counts = (0..BUCKETS).map(|_| AtomicU64::new(0)).collect();
        Self { counts, sum_us: AtomicU64::new(0), max_us: AtomicU64::new(0) }
    }
}

fn bucket_of(value_us: u64) -> usize {
    if value_us < EXACT_BELOW {
        return value_us as usize;
    }
    let power = u64::from(value_us.ilog2()) - 3;
    let sub = (value_us >> power) - SUB_BUCKETS;
    ((EXACT_BELOW + power * SUB_BUCKETS + sub) as usize).min(BUCKETS - 1)
}

/// The largest value that falls into a bucket.
fn bucket_end_us(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < EXACT_BELOW {
        return bucket;
    }
    let (power, sub) = ((bucket - EXACT_BELOW) / SUB_BUCKETS, bucket % SUB_BUCKETS);
    ((SUB_BUCKETS + sub + 1) << power) - 1
}

impl Histogram {
    /// Counts one value.
    pub fn record(&self, value_us: u64) {
        self.counts[bucket_of(value_us)].fetch_add(1, Relaxed);
        self.sum_us.fetch_add(value_us, Relaxed);
        self.max_us.fetch_max(value_us, Relaxed);
    }

    /// Quantiles of what was recorded so far. Values recorded meanwhile may or may not be in it.
    pub fn snapshot(&self) -> HistogramSnapshot {
        let counts: Vec<u64> = self.counts.iter().map(|count| count.load(Relaxed)).collect();
        let count: u64 = counts.iter().sum();
        if count == 0 {
            return HistogramSnapshot::default();
        }
        let max_us = self.max_us.load(Relaxed);
        let quantile = |share: f64| {
            let rank = ((count as f64 * share).ceil() as u64).max(1);
            let mut seen = 0;
            let reached = counts.iter().position(|bucket| {
                seen += bucket;
                seen >= rank
            });
            reached.map_or(max_us, bucket_end_us).min(max_us)
        };
        HistogramSnapshot {
            count,
            mean_us: self.sum_us.load(Relaxed) as f64 / count as f64,
            p50_us: quantile(0.50),
            p95_us: quantile(0.95),
            p99_us: quantile(0.99),
            max_us,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_lies_in_its_bucket() {
        for value in (0..5000).chain([1 << 20, (1 << 39) + 7]) {
            let bucket = bucket_of(value);
            assert!(value <= bucket_end_us(bucket), "{value}");
            assert!(bucket == 0 || value > bucket_end_us(bucket - 1), "{value}");
        }
    }

    #[test]
    fn values_without_end_fall_into_the_last_bucket() {
        let histogram = Histogram::default();
        histogram.record(u64::MAX >> 1);
        assert_eq!(histogram.snapshot().max_us, u64::MAX >> 1);
    }
}
