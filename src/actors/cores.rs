//! Which thread runs on which core: the compute workers get one each, and the engine loop one that
//! they leave. Without such a core the loop is not pinned: it runs while the workers wait for it,
//! and the system knows best which of them sleeps.

use crate::config::CpuConfig;
use crate::hardware::{CpuId, Topology, choose_cpus};

/// Cores by the system's numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Cores {
    /// Compute workers, the executor's own thread included; at least 1.
    pub(super) threads: usize,
    /// Their cores; empty when nothing is to be pinned.
    pub(super) workers: Vec<usize>,
    pub(super) engine_loop: Option<CpuId>,
}

impl Cores {
    pub(super) fn new(topology: &Topology, config: &CpuConfig) -> Self {
        let threads = if config.threads == 0 { topology.usable_cores() } else { config.threads };
        if !config.pin {
            return Self { threads, ..Self::default() };
        }
        let mut chosen = choose_cpus(topology, threads + 1);
        let engine_loop = if chosen.len() > threads { chosen.pop() } else { None };
        Self { threads, workers: chosen.iter().map(|cpu| cpu.0 as usize).collect(), engine_loop }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn the_engine_loop_gets_a_core_that_no_worker_has_or_none() {
        let topology = Topology::detect();
        let usable = topology.usable_cpus().count();
        let mut config = Config::default().cpu;
        for threads in 1..=usable + 1 {
            config.threads = threads;
            let cores = Cores::new(&topology, &config);
            assert_eq!(cores.threads, threads);
            assert_eq!(cores.engine_loop.is_some(), threads < usable, "{threads} of {usable}");
            let taken = cores.engine_loop.map(|cpu| cpu.0 as usize);
            assert!(taken.is_none_or(|cpu| !cores.workers.contains(&cpu)));
        }
    }

    #[test]
    fn nothing_is_pinned_when_pinning_is_off() {
        let mut config = Config::default().cpu;
        config.pin = false;
        let cores = Cores::new(&Topology::detect(), &config);
        assert!(cores.threads >= 1 && cores.workers.is_empty() && cores.engine_loop.is_none());
    }
}
