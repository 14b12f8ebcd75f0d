//! Which processor each worker gets, and the pinning of a thread to its processor.

use super::topology::{CpuId, Topology};

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
    let usable: Vec<_> = topology.usable_cpus().collect();
    let in_node = |node| usable.iter().filter(|cpu| cpu.numa_node == node).count();
    let mut ranked: Vec<_> = usable
        .iter()
        .map(|cpu| {
            let siblings_before =
                usable.iter().filter(|other| other.core == cpu.core && other.id < cpu.id).count();
            let node = (std::cmp::Reverse(in_node(cpu.numa_node)), cpu.numa_node);
            (siblings_before, cpu.kind, node, cpu.id)
        })
        .collect();
    ranked.sort();
    ranked.into_iter().map(|(_, _, _, id)| id).take(workers).collect()
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
