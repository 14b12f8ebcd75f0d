//! Owns what a machine's processors are and how they share caches and memory. It must not know
//! who runs on them. Called by `hardware`; filled from `/sys`, or from hwloc where that is built
//! in.

#[cfg(feature = "hwloc")]
mod hwloc;
mod sys;

use super::cgroup;
use super::system_files::SystemFiles;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;

/// A logical processor, by the operating system's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct CpuId(pub u32);

impl fmt::Display for CpuId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}", self.0)
    }
}

/// The kind of a core on machines that mix two, ordered by speed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CoreKind {
    /// A fast core, or any core of a machine whose cores are alike.
    Performance,
    /// A small core.
    Efficiency,
}

/// One hardware thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct LogicalCpu {
    /// The operating system's number.
    pub id: CpuId,
    /// Physical core, counted over the whole machine from 0.
    pub core: u32,
    /// Physical package (socket).
    pub package: u32,
    /// NUMA node whose memory is near.
    pub numa_node: u32,
    /// Kind of the core.
    pub kind: CoreKind,
    /// Whether this process may run on it.
    pub usable: bool,
}

/// What a cache holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheKind {
    /// Data only.
    Data,
    /// Instructions only.
    Instruction,
    /// Both.
    Unified,
}

/// One cache.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Cache {
    /// 1 is nearest to the core.
    pub level: u32,
    /// What it holds.
    pub kind: CacheKind,
    /// Size.
    pub size_bytes: u64,
    /// Processors that share it.
    pub cpus: BTreeSet<CpuId>,
}

/// One NUMA node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NumaNode {
    /// The operating system's number.
    pub id: u32,
    /// Processors near it.
    pub cpus: BTreeSet<CpuId>,
    /// Its memory; 0 when the system does not tell.
    pub memory_bytes: u64,
    /// Memory of it that can be had now without pushing anybody out; 0 when the system does not
    /// tell.
    pub memory_free_bytes: u64,
    /// Whether this process may have memory of it; looked up where there are several nodes.
    pub is_allowed: bool,
}

/// Bytes of a node's memory.
#[derive(Clone, Copy, Default)]
struct NodeMemory {
    total_bytes: u64,
    free_bytes: u64,
}

/// Where a topology was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum TopologySource {
    /// `/sys` and `/proc`.
    Sys,
    /// libhwloc; limits still come from `/proc` and the control group.
    Hwloc,
}

/// Processors, caches and memory nodes of a machine, and what this process may use of them.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Topology {
    /// Online processors in ascending order; at least one.
    pub cpus: Vec<LogicalCpu>,
    /// Caches by level, kind and processors; empty when the system does not tell.
    pub caches: Vec<Cache>,
    /// Memory nodes in ascending order; at least one.
    pub numa_nodes: Vec<NumaNode>,
    /// Processors' worth of time that the control group grants; `None` without a limit.
    pub cpu_quota: Option<f64>,
    /// Where all this was read.
    pub source: TopologySource,
}

impl Topology {
    /// The topology of this machine, from hwloc where it is built in and works, else from `/sys`.
    pub fn detect() -> Topology {
        let topology = Topology::read(Path::new("/"));
        #[cfg(feature = "hwloc")]
        let topology = hwloc::refine(topology);
        topology
    }

    /// The topology that the `/proc` and `/sys` below `root` describe. Missing files never fail:
    /// without any, it is the number of processors that the standard library sees, all alike.
    pub fn read(root: &Path) -> Topology {
        let files = SystemFiles::new(root);
        let mut topology = sys::read(&files);
        topology.cpu_quota = cgroup::cpu_quota(&files);
        topology
    }

    /// Processors that this process may run on.
    pub fn usable_cpus(&self) -> impl Iterator<Item = &LogicalCpu> {
        self.cpus.iter().filter(|cpu| cpu.usable)
    }

    /// Whole processors' worth of time that the control group grants, at least 1; `None` without a
    /// limit. A fraction is rounded down, since a thread beyond the quota makes all of them wait at
    /// the end of each period.
    pub fn quota_threads(&self) -> Option<usize> {
        self.cpu_quota.map(|quota| (quota as usize).max(1))
    }

    /// Distinct physical cores, usable or not.
    pub fn core_count(&self) -> usize {
        self.cpus.iter().map(|cpu| cpu.core).collect::<BTreeSet<u32>>().len()
    }

    /// Bytes of all data and unified caches of `level` together; 0 when unknown.
    pub fn cache_bytes(&self, level: u32) -> u64 {
        let holds_data =
            |cache: &&Cache| cache.level == level && cache.kind != CacheKind::Instruction;
        self.caches.iter().filter(holds_data).map(|cache| cache.size_bytes).sum()
    }
}

/// NUMA nodes as the processors name them; those without a processor are not of interest.
fn nodes_of(cpus: &[LogicalCpu], memory: impl Fn(u32) -> NodeMemory) -> Vec<NumaNode> {
    let mut nodes: BTreeMap<u32, BTreeSet<CpuId>> = BTreeMap::new();
    for cpu in cpus {
        nodes.entry(cpu.numa_node).or_default().insert(cpu.id);
    }
    let node = |(id, cpus)| {
        let NodeMemory { total_bytes, free_bytes } = memory(id);
        NumaNode {
            id,
            cpus,
            memory_bytes: total_bytes,
            memory_free_bytes: free_bytes,
            is_allowed: true,
        }
    };
    nodes.into_iter().map(node).collect()
}
