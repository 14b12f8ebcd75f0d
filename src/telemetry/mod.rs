//! Owns what is measured while the engine runs: counters and histograms, the rings of traces,
//! and the set-up of logging. Must not know who measures: no model, no actor, no socket. The actors
//! write into it, `stats` and the command line read from it; only the binary sets logging up.

mod histogram;
mod logging;
mod metrics;
mod trace_ring;

pub use histogram::{Histogram, HistogramSnapshot};
pub use logging::{LogFormat, LoggingError, start_logging};
pub use metrics::{Counter, Gauge, Metrics, MetricsSnapshot};
pub use trace_ring::{CopyTrace, StepTrace, TraceRing};
