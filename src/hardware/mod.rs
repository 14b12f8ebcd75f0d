//! Owns the facts of the machine: processors, caches, memory, GPUs, and the pinning of threads.
//! It must not know models or what anybody does with the facts; it decides nothing, and measures
//! only when asked to ([`roofs`], [`Probe`]). Called by the command line and the engine at
//! start-up, and by the executor's workers, which pin themselves.

mod affinity;
mod cgroup;
mod disk;
mod gpu;
mod gpu_holders;
mod gpu_products;
mod measured;
mod overlap;
mod probe;
mod probe_cache;
mod product_rates;
pub mod roofs;
mod row_rates;
mod system_files;
mod topology;

pub use affinity::{
    PinError, choose_cpus, keep_current_thread_on, pin_current_thread, spread_cpus,
};
pub use disk::disk_read_rate;
pub use gpu::{ClosedGpu, Gpu, Gpus};
pub use gpu_holders::MemoryHolder;
pub use measured::{
    BesideReads, CopyRates, DiskRate, GPU_TOKENS_MEASURED, GpuProductRates, GpuRates, MacRate,
    Measured, ProductRates, ReadRate, RowRates, TOKENS_MEASURED,
};
pub use probe::Probe;
pub use probe_cache::{Fingerprint, load_measured, probe_file, store_measured};
pub use topology::{
    Cache, CacheKind, CoreKind, CpuId, LogicalCpu, NumaNode, Topology, TopologySource,
};

use crate::config::GpuChoice;
use serde::Serialize;
use std::path::Path;
use system_files::SystemFiles;

/// All that placement needs to know of a machine.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct HardwareProfile {
    /// Processors, caches and NUMA nodes.
    pub topology: Topology,
    /// Devices, or why there are none.
    pub gpus: Gpus,
    /// Host memory that this process may use: the machine's, or its control group's limit.
    pub memory_total_bytes: u64,
    /// Host memory that can be had now without pushing anybody out, counting reclaimable cache.
    pub memory_available_bytes: u64,
    /// What all of it reaches, where that was measured.
    pub measured: Option<Measured>,
}

impl HardwareProfile {
    /// The profile of this machine with all of its GPUs, as this process is allowed to use it.
    /// Never fails: what the system does not tell is filled with the least that must be there.
    /// Measures nothing.
    pub fn detect() -> HardwareProfile {
        Self::detect_for(&GpuChoice::All)
    }

    /// The same, but GPUs that may not be chosen are left alone: a look at one takes 0.3 s and half
    /// a GiB of its memory meanwhile.
    pub fn detect_for(choice: &GpuChoice) -> HardwareProfile {
        let files = SystemFiles::new(Path::new("/"));
        let (memory_total_bytes, memory_available_bytes) = cgroup::memory(&files);
        let (topology, mut gpus) = (Topology::detect(), Gpus::detect_for(choice));
        if topology.numa_nodes.len() > 1 {
            gpus.find_nodes(Path::new("/"));
        }
        HardwareProfile {
            topology,
            gpus,
            memory_total_bytes,
            memory_available_bytes,
            measured: None,
        }
    }

    /// What the processor calls itself; `None` where the system does not tell.
    pub fn cpu_name() -> Option<String> {
        let text = SystemFiles::new(Path::new("/")).text("proc/cpuinfo")?;
        let line = text.lines().find(|line| line.starts_with("model name"))?;
        line.split_once(':').map(|(_, name)| name.trim().to_owned())
    }

    /// `(total, available)` bytes of host memory by the `/proc` and `/sys` below `root`; 0 where
    /// nothing is known.
    pub fn read_memory(root: &Path) -> (u64, u64) {
        cgroup::memory(&SystemFiles::new(root))
    }
}
