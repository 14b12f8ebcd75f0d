//! Which processor each worker gets, and the pinning of a thread to its processor.

use super::topology::{CoreKind, CpuId, LogicalCpu, Topology};
use rustix::thread::{CpuSet, sched_setaffinity};
use std::cmp::Reverse;
use std::collections::BTreeMap;

/// Processors that the system's set type can hold; one beyond it cannot be pinned to.
const PINNABLE_CPUS: u32 = 1024;

/// Why a thread runs unpinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PinError {
    /// The number does not fit the system's processor sets.
    #[error("processor {cpu} is beyond the {PINNABLE_CPUS} that a thread can be pinned to")]
    OutOfRange {
        /// The processor asked for.
        cpu: CpuId,
    },
    /// The system refused: the processor is offline or not allowed to this process.
    #[error("the system does not let this thread be pinned to processor {cpu}")]
    Refused {
        /// The processor asked for.
        cpu: CpuId,
    },
}

/// Processors for `workers` workers, best first: one per physical core before any second thread of
/// a core, performance cores before efficiency cores, and NUMA nodes one after the other, those
/// with most usable processors first. Shorter than asked when fewer processors are usable.
pub fn choose_cpus(topology: &Topology, workers: usize) -> Vec<CpuId> {
    ranked(topology).into_iter().map(|(_, _, cpu)| cpu.id).take(workers).collect()
}

/// Processors for `workers` workers, those of a NUMA node side by side: as good ones as
/// [`choose_cpus`] chooses, but of each kind as many of a node as its part of all such is (the
/// largest remainders are rounded up). The nodes' order is that of [`choose_cpus`].
pub fn spread_cpus(topology: &Topology, workers: usize) -> Vec<CpuId> {
    let mut chosen = Vec::new();
    let ranked = ranked(topology);
    let of_one_kind = |a: &Ranked<'_>, b: &Ranked<'_>| a.0 == b.0;
    for kind in ranked.chunk_by(of_one_kind) {
        let left = workers.saturating_sub(chosen.len()).min(kind.len());
        let nodes: Vec<_> = kind.chunk_by(|a, b| a.1 == b.1).collect();
        let counts = proportional(left, &nodes.iter().map(|node| node.len()).collect::<Vec<_>>());
        chosen.extend(nodes.iter().zip(counts).flat_map(|(node, count)| &node[..count]));
    }
    // By node alone: a stable sort keeps the better ones first in each.
    chosen.sort_by_key(|(_, node, _)| *node);
    chosen.into_iter().map(|(_, _, cpu)| cpu.id).collect()
}

/// `count` divided in proportion to `sizes`, whose sum it does not exceed.
fn proportional(count: usize, sizes: &[usize]) -> Vec<usize> {
    let all = sizes.iter().sum::<usize>().max(1);
    let mut counts: Vec<_> = sizes.iter().map(|size| count * size / all).collect();
    let mut by_rest: Vec<_> = (0..sizes.len()).collect();
    by_rest.sort_by_key(|index| Reverse(count * sizes[*index] % all));
    let missing = count - counts.iter().sum::<usize>();
    by_rest.into_iter().take(missing).for_each(|index| counts[index] += 1);
    counts
}

/// Number of threads of the same core before and kind; the node, those with most processors first;
/// and the processor.
type Ranked<'t> = ((usize, CoreKind), (Reverse<usize>, u32), &'t LogicalCpu);

/// Usable processors, the best first.
fn ranked(topology: &Topology) -> Vec<Ranked<'_>> {
    let usable: Vec<_> = topology.usable_cpus().collect();
    let mut in_node = BTreeMap::new();
    usable.iter().for_each(|cpu| *in_node.entry(cpu.numa_node).or_insert(0) += 1);
    let rank = |cpu: &LogicalCpu| {
        let siblings_before =
            usable.iter().filter(|other| other.core == cpu.core && other.id < cpu.id).count();
        ((siblings_before, cpu.kind), (Reverse(in_node[&cpu.numa_node]), cpu.numa_node))
    };
    let mut ranked: Vec<Ranked<'_>> = Vec::with_capacity(usable.len());
    for cpu in &usable {
        let (kind, node) = rank(cpu);
        ranked.push((kind, node, *cpu));
    }
    ranked.sort_by_key(|(kind, node, cpu)| (*kind, *node, cpu.id));
    ranked
}

/// Pins the calling thread to one processor. A failure is no reason to stop: the caller tells the
/// user and runs unpinned.
///
/// # Errors
/// [`PinError`] with the processor.
pub fn pin_current_thread(cpu: CpuId) -> Result<(), PinError> {
    if cpu.0 >= PINNABLE_CPUS {
        return Err(PinError::OutOfRange { cpu });
    }
    let id = core_affinity::CoreId { id: cpu.0 as usize };
    if core_affinity::set_for_current(id) { Ok(()) } else { Err(PinError::Refused { cpu }) }
}

/// Lets the calling thread, and those that it starts, run on some processors alone. A failure is no
/// reason to stop, as of [`pin_current_thread`].
///
/// # Errors
/// [`PinError`] with the first of the processors that is too large a number, or with the first of
/// all.
pub fn keep_current_thread_on(cpus: &[CpuId]) -> Result<(), PinError> {
    let Some(first) = cpus.first() else { return Ok(()) };
    let mut set = CpuSet::new();
    for cpu in cpus {
        if cpu.0 >= PINNABLE_CPUS {
            return Err(PinError::OutOfRange { cpu: *cpu });
        }
        set.set(cpu.0 as usize);
    }
    sched_setaffinity(None, &set).map_err(|_| PinError::Refused { cpu: *first })
}
