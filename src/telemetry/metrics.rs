//! Every counter of one engine, shared by `Arc`: no registry, no global.

use super::{Histogram, HistogramSnapshot};
use serde::Serialize;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds to it.
    pub fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Relaxed);
    }

    /// Its value.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// A number that goes up and down.
#[derive(Debug, Default)]
pub struct Gauge(AtomicI64);

impl Gauge {
    /// Sets it.
    pub fn set(&self, value: i64) {
        self.0.store(value, Relaxed);
    }

    /// Adds to it; a negative amount lowers it.
    pub fn add(&self, amount: i64) {
        self.0.fetch_add(amount, Relaxed);
    }

    /// Its value.
    pub fn get(&self) -> i64 {
        self.0.load(Relaxed)
    }
}

macro_rules! metrics {
    ($($(#[$doc:meta])* $name:ident: $kind:ident => $value:ty,)*) => {
        /// Everything that one engine counts.
        #[derive(Debug, Default)]
        pub struct Metrics { $($(#[$doc])* pub $name: $kind,)* }

        /// What [`Metrics`] held at one moment.
        #[derive(Clone, Debug, Default, PartialEq, Serialize, schemars::JsonSchema)]
        pub struct MetricsSnapshot { $($(#[$doc])* pub $name: $value,)* }

        impl Metrics {
            /// Copies every value. The values are not of one instant, each is of its own.
            pub fn snapshot(&self) -> MetricsSnapshot {
                MetricsSnapshot { $($name: metrics!(@read self.$name, $kind),)* }
            }
        }
    };
    (@read $field:expr, Histogram) => { $field.snapshot() };
    (@read $field:expr, $kind:ident) => { $field.get() };
}

metrics! {
    /// Requests that were admitted.
    requests_started: Counter => u64,
    /// Requests that ended with `done`, cancelled ones included.
    requests_done: Counter => u64,
    /// Requests that ended with an error.
    requests_failed: Counter => u64,
    /// Requests refused because the engine was full.
    requests_overloaded: Counter => u64,
    /// Requests that are alive.
    requests_live: Gauge => i64,
    /// Requests whose sequences pause because the client reads too slowly.
    streams_paused: Counter => u64,
    /// Prompt tokens of admitted requests.
    prompt_tokens: Counter => u64,
    /// Prompt tokens that the prefix cache saved.
    cached_tokens: Counter => u64,
    /// Tokens generated.
    completion_tokens: Counter => u64,
    /// Drafted tokens that were in steps.
    draft_tokens: Counter => u64,
    /// Of these, tokens that were accepted: so many steps fewer.
    draft_tokens_accepted: Counter => u64,
    /// Steps that the executor finished.
    steps: Counter => u64,
    /// Tokens of those steps, prefill and decode.
    step_tokens: Counter => u64,
    /// KV blocks copied from the device to a lower tier: of preempted sequences, and of prefixes
    /// before they are evicted.
    blocks_swapped_out: Counter => u64,
    /// KV blocks copied from a lower tier to the device.
    blocks_swapped_in: Counter => u64,
    /// KV blocks copied from the host tier to the disk tier.
    blocks_moved_to_disk: Counter => u64,
    /// Copies of KV blocks that failed; what they were for is computed again.
    block_copies_failed: Counter => u64,
    /// Requests that were submitted again after the scheduler had failed.
    resubmissions: Counter => u64,
    /// Bytes of the prompts encoded.
    encoded_bytes: Counter => u64,
    /// Time of planning one step.
    plan_time: Histogram => HistogramSnapshot,
    /// Time of one step in the executor.
    step_time: Histogram => HistogramSnapshot,
    /// Time from a step's end to the next step's start, while there is work.
    step_gap: Histogram => HistogramSnapshot,
    /// Time of up to 32 copies of KV blocks between two tiers, beside the steps.
    swap_time: Histogram => HistogramSnapshot,
    /// Time of encoding one prompt, its wait in the queue included.
    encode_time: Histogram => HistogramSnapshot,
    /// Submission to the first step that works on the request.
    queue_time: Histogram => HistogramSnapshot,
    /// Submission to the first token.
    first_token_time: Histogram => HistogramSnapshot,
    /// One token of an answer to its next, or to the next ones where a step gave several.
    inter_token_time: Histogram => HistogramSnapshot,
}
