//! How many compute workers, and on which processors: a pure function of the machine and the
//! configuration, with its reasons in words.
//!
//! One worker per physical core: the second thread of a core shares the units that the first keeps
//! busy. On machines that mix two kinds of cores, only the performance cores: a small core's share
//! of a loop takes two to three times as long. As many as the control group's quota grants, rounded
//! down: one more and all of them stand still at the end of each period.

use crate::config::{ConfigError, CpuConfig};
use crate::hardware::{CoreKind, CpuId, LogicalCpu, Topology, choose_cpus};
use serde::Serialize;
use std::collections::BTreeSet;
use std::fmt;

/// One processor of so many is left to the threads that serve a GPU.
const GPU_DIVISOR: usize = 8;
/// Fewer workers share their processors with those threads.
const GPU_WORKERS_MIN: usize = 4;

/// Threads and their processors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Workers {
    /// Compute workers, the executor's own thread included; at least 1.
    pub threads: usize,
    /// Processor of each worker; empty when they are not pinned.
    pub cpus: Vec<CpuId>,
    /// A processor for the engine's loop that no worker has. Without one the loop is not pinned:
    /// it runs while the workers wait for it, and the system knows best which of them sleeps.
    pub engine_loop: Option<CpuId>,
    /// Why so many and why there.
    pub why: String,
}

/// What the machine offers to workers.
struct Offer {
    /// Logical processors that this process may run on.
    usable: usize,
    /// Physical cores of the better kind among them.
    cores: usize,
    /// Physical cores of the lesser kind that are left out.
    small_cores: usize,
    /// Whole processors' worth of time that the control group grants, if that is fewer than
    /// `cores`.
    granted: Option<usize>,
}

impl Workers {
    /// Chooses them.
    ///
    /// # Errors
    /// `cpu.threads` beyond the processors that this process may run on: workers that wait for
    /// each other's time slices take many times as long.
    pub fn choose(topology: &Topology, config: &CpuConfig) -> Result<Self, ConfigError> {
        let offer = Offer::of(topology);
        if config.threads > offer.usable {
            return Err(ConfigError {
                field: "cpu.threads".to_owned(),
                got: config.threads.to_string(),
                allowed: format!(
                    "1 to {}, the processors that this process may run on, or 0 for the best",
                    offer.usable
                ),
            });
        }
        let threads = match config.threads {
            0 => offer.granted.unwrap_or(offer.cores),
            threads => threads,
        };
        let unpinned = if !config.pin {
            Some("not pinned, as cpu.pin says")
        } else if offer.granted.is_some() {
            // Pinned, two such groups would meet on the same processors while others idle.
            Some("not pinned, since a quota is time on any processor")
        } else {
            None
        };
        let mut why = vec![offer.why(config.threads)];
        if let Some(reason) = unpinned {
            why.push(reason.to_owned());
            return Ok(Self { threads, cpus: vec![], engine_loop: None, why: why.join("; ") });
        }
        let mut cpus = choose_cpus(topology, threads + 1);
        let engine_loop = if cpus.len() > threads { cpus.pop() } else { None };
        Ok(Self { threads, cpus, engine_loop, why: why.join("; ") })
    }

    /// As many as leave room for the threads that serve a GPU beside them, unless a number was
    /// asked for. A worker whose processor another thread has for a moment holds up all of them,
    /// and memory is as fast with the rest.
    pub(super) fn beside_gpu(&self, config: &CpuConfig) -> Self {
        if config.threads > 0 || self.threads < GPU_WORKERS_MIN {
            return self.clone();
        }
        let left = (self.threads / GPU_DIVISOR).max(1);
        let threads = self.threads - left;
        let mut cpus = self.cpus.clone();
        cpus.truncate(threads);
        let why = format!("{}; {left} less, for threads that serve the GPU", self.why);
        Self { threads, cpus, why, ..self.clone() }
    }

    /// Processors of the workers as a pool wants them.
    pub fn cores(&self) -> Vec<usize> {
        self.cpus.iter().map(|cpu| cpu.0 as usize).collect()
    }
}

impl fmt::Display for Workers {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = if self.threads == 1 { "" } else { "s" };
        write!(to, "{} thread{plural}", self.threads)?;
        if !self.cpus.is_empty() {
            let cpus: Vec<String> = self.cpus.iter().map(ToString::to_string).collect();
            write!(to, " on processor{plural} {}", cpus.join(", "))?;
        }
        write!(to, ": {}", self.why)
    }
}

impl Offer {
    fn of(topology: &Topology) -> Self {
        let cores = |kind: CoreKind| {
            let of_kind = |cpu: &&LogicalCpu| cpu.kind == kind;
            topology.usable_cpus().filter(of_kind).map(|cpu| cpu.core).collect::<BTreeSet<_>>()
        };
        let (large, small) = (cores(CoreKind::Performance), cores(CoreKind::Efficiency));
        let (cores, small_cores) = match large.len() {
            0 => (small.len(), 0),
            count => (count, small.len()),
        };
        Self {
            usable: topology.usable_cpus().count(),
            cores,
            small_cores,
            granted: topology.quota_threads().filter(|granted| *granted < cores),
        }
    }

    /// Why so many threads, where `asked` (0 for none) were asked for.
    fn why(&self, asked: usize) -> String {
        let granted = self.granted.map(|granted| {
            let plural = if granted == 1 { "" } else { "s" };
            format!("the control group's quota grants {granted} whole processor{plural}")
        });
        if asked > 0 {
            let beyond = granted.filter(|_| self.granted < Some(asked));
            return match beyond {
                Some(granted) => format!("as cpu.threads says, although {granted}"),
                None => "as cpu.threads says".to_owned(),
            };
        }
        if let Some(granted) = granted {
            return granted;
        }
        match self.small_cores {
            0 => "one per physical core".to_owned(),
            1 => "one per performance core; 1 efficiency core is left out".to_owned(),
            count => format!("one per performance core; {count} efficiency cores are left out"),
        }
    }
}
