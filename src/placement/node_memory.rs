//! What a placement means for the memory of several NUMA nodes: how much of each one's is wanted,
//! and which processors are left to the threads that serve a GPU.

use super::{Device, NodeTeams, Placement};
use crate::hardware::{CpuId, Gpu, HardwareProfile, Topology};
use crate::units::ByteSize;
use std::collections::BTreeSet;

impl Placement {
    /// Adds what depends on the machine's nodes: notes about those whose memory is too little, and
    /// the processors of threads that serve a GPU.
    pub(super) fn by_node(mut self, hardware: &HardwareProfile) -> Self {
        let teams = &self.workers.nodes;
        let notes = self.node_bytes().into_iter().filter_map(|(node, bytes)| {
            let known = hardware.topology.numa_nodes.iter().find(|known| known.id == node)?;
            let free = known.memory_free_bytes;
            let (need, free_size) = (ByteSize(bytes), ByteSize(free));
            (free > 0 && bytes > free).then(|| {
                format!(
                    "NUMA node {node} has {free_size} free of the {need} that lie there by \
                     cpu.numa: what does not fit lies on other nodes"
                )
            })
        });
        let notes: Vec<_> = notes.collect();
        if teams.are_divided() {
            self.workers.gpu_threads = self.gpu_threads(hardware);
        }
        self.notes.extend(notes);
        self
    }

    /// Nodes of which memory is wanted, and bytes of weights and KV that are to lie there. Empty
    /// where memory is left to the system.
    pub fn node_bytes(&self) -> Vec<(u32, u64)> {
        let teams: &NodeTeams = &self.workers.nodes;
        let (weights, kv) = match (self.device(), &self.spill) {
            (Device::Cpu, _) => {
                let sum = |bytes: fn(&super::StagePlacement) -> u64| {
                    self.stages.iter().map(bytes).sum::<u64>()
                };
                (sum(|stage| stage.weight_bytes), sum(|stage| stage.kv_bytes))
            }
            (Device::Gpu(_), Some(spill)) => (spill.weight_bytes, 0),
            (Device::Gpu(_), None) => return Vec::new(),
        };
        let (nodes, even) = (teams.nodes(), kv / teams.nodes().len().max(1) as u64);
        let bytes = |index: usize| teams.portion(index, weights) + even;
        nodes.iter().enumerate().map(|(index, node)| (*node, bytes(index))).collect()
    }

    /// Processors of the node that all GPUs of the placement are attached to, if they are to one:
    /// those whose cores no worker has, else those that no worker has.
    fn gpu_threads(&self, hardware: &HardwareProfile) -> Vec<CpuId> {
        let of_stage = |device: &Device| -> Option<&Gpu> {
            let Device::Gpu(index) = device else { return None };
            hardware.gpus.devices.iter().find(|gpu| gpu.ordinal == *index)
        };
        let nodes = self.stages.iter().map(|stage| of_stage(&stage.device)?.numa_node);
        let nodes: BTreeSet<Option<u32>> = nodes.collect();
        let (Some(Some(node)), 1) = (nodes.first(), nodes.len()) else { return Vec::new() };
        let busy = if self.spill.is_some() { &self.workers.cpus[..] } else { &[] };
        left_over(&hardware.topology, *node, busy)
    }
}

/// Processors of a node that threads other than workers have for themselves.
fn left_over(topology: &Topology, node: u32, busy: &[CpuId]) -> Vec<CpuId> {
    let of_node = || topology.usable_cpus().filter(|cpu| cpu.numa_node == node);
    let busy_cores: BTreeSet<u32> =
        of_node().filter(|cpu| busy.contains(&cpu.id)).map(|cpu| cpu.core).collect();
    let mut left: Vec<CpuId> =
        of_node().filter(|cpu| !busy_cores.contains(&cpu.core)).map(|cpu| cpu.id).collect();
    if left.is_empty() {
        left.extend(of_node().map(|cpu| cpu.id).filter(|cpu| !busy.contains(cpu)));
    }
    left
}
