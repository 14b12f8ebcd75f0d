//! How many compute workers, and on which processors: a pure function of the machine and the
//! configuration, with its reasons in words.
//!
//! One worker per physical core: the second thread of a core shares the units that the first keeps
//! busy. On machines that mix two kinds of cores, only the performance cores: a small core's share
//! of a loop takes two to three times as long. As many as the control group's quota grants, rounded
//! down: one more and all of them stand still at the end of each period.
//!
//! Where several NUMA nodes have processors, workers are spread over all of them in proportion:
//! each node's memory is then read by its own workers, and all of them together read as much as
//! all memory gives.

use super::NodeTeams;
use crate::config::{ConfigError, CpuConfig, NumaChoice};
use crate::hardware::{CoreKind, CpuId, LogicalCpu, Topology, choose_cpus, spread_cpus};
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
    /// Which of them belong to which NUMA node, and whose memory is used. One team where there is
    /// one node.
    pub nodes: NodeTeams,
    /// Processors for the threads that serve a GPU, near to it; empty where they may run on any.
    pub gpu_threads: Vec<CpuId>,
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
        let numa = config.numa_choice()?;
        let isolated;
        let topology = if numa == NumaChoice::Isolate && config.pin {
            isolated = of_one_node(topology);
            &isolated
        } else {
            topology
        };
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
            let nodes = match numa {
                NumaChoice::Auto => memory_nodes(topology, &mut why),
                NumaChoice::Off | NumaChoice::Isolate => Vec::new(),
            };
            let (why, nodes) = (why.join("; "), NodeTeams::in_turn(nodes));
            let (cpus, gpu_threads) = (vec![], vec![]);
            return Ok(Self { threads, cpus, nodes, gpu_threads, engine_loop: None, why });
        }
        let (mut cpus, mut nodes) = (choose_cpus(topology, threads), NodeTeams::default());
        if numa == NumaChoice::Auto && memory_nodes(topology, &mut why).len() > 1 {
            cpus = spread_cpus(topology, threads);
            nodes = teams(topology, &cpus);
        }
        let mut all = choose_cpus(topology, usize::MAX).into_iter();
        let engine_loop = all.find(|cpu| !cpus.contains(cpu));
        let why = why.join("; ");
        Ok(Self { threads, cpus, nodes, gpu_threads: vec![], engine_loop, why })
    }

    /// As many as leave room for the threads that serve a GPU beside them, unless a number was
    /// asked for. A worker whose processor another thread has for a moment holds up all of them,
    /// and memory is as fast with the rest. Of several NUMA nodes the GPU's gives them up, if it
    /// is known.
    pub(super) fn beside_gpu(&self, config: &CpuConfig, gpu_node: Option<u32>) -> Self {
        if config.threads > 0 || self.threads < GPU_WORKERS_MIN {
            return self.clone();
        }
        let left = (self.threads / GPU_DIVISOR).max(1);
        let threads = self.threads - left;
        let (mut cpus, mut nodes) = (self.cpus.clone(), self.nodes.clone());
        for _ in 0..left.min(cpus.len()) {
            let (fewer, worker) = nodes.one_less(cpus.len(), gpu_node);
            nodes = fewer;
            cpus.remove(worker);
        }
        let why = format!("{}; {left} less, for threads that serve the GPU", self.why);
        Self { threads, cpus, nodes, why, ..self.clone() }
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
        write!(to, ": {}", self.why)?;
        let nodes = self.nodes.nodes().iter();
        if self.nodes.are_divided() {
            let of_node = |(team, node): (usize, &u32)| {
                format!("{} on NUMA node {node}", self.nodes.workers(team, self.threads).len())
            };
            let teams: Vec<String> = nodes.enumerate().map(of_node).collect();
            write!(to, "; {}, each node with its rows of all weights", teams.join(", "))?;
        } else if !self.nodes.nodes().is_empty() {
            let nodes: Vec<String> = nodes.map(ToString::to_string).collect();
            write!(to, "; pages of weights lie on NUMA nodes {} in turn", nodes.join(", "))?;
        }
        Ok(())
    }
}

/// Nodes with usable processors, in ascending order; none, and why, where this process may not have
/// memory of all of them.
fn memory_nodes(topology: &Topology, why: &mut Vec<String>) -> Vec<u32> {
    let used: BTreeSet<u32> = topology.usable_cpus().map(|cpu| cpu.numa_node).collect();
    let is_refused = |node: &&u32| {
        topology.numa_nodes.iter().any(|known| known.id == **node && !known.is_allowed)
    };
    match used.iter().find(is_refused) {
        Some(node) => {
            why.push(format!(
                "memory is left to the system, since this process may have none of NUMA node {node}"
            ));
            Vec::new()
        }
        None => used.into_iter().collect(),
    }
}

/// Teams of workers on these processors.
fn teams(topology: &Topology, cpus: &[CpuId]) -> NodeTeams {
    let node_of = |id: &CpuId| topology.cpus.iter().find(|cpu| cpu.id == *id);
    let nodes: Vec<u32> = cpus.iter().filter_map(node_of).map(|cpu| cpu.numa_node).collect();
    NodeTeams::of_workers(&nodes)
}

/// The same machine with processors of one node alone: of the one whose come first.
fn of_one_node(topology: &Topology) -> Topology {
    let first = choose_cpus(topology, 1);
    let node = topology.cpus.iter().find(|cpu| first.contains(&cpu.id)).map(|cpu| cpu.numa_node);
    let mut topology = topology.clone();
    topology.cpus.iter_mut().for_each(|cpu| cpu.usable &= Some(cpu.numa_node) == node);
    topology
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
