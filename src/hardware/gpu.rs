//! The GPUs of the machine, through the guarded door of the kernels crate.

use super::gpu_holders::{MemoryHolder, others};
use super::system_files::SystemFiles;
use crate::config::GpuChoice;
use serde::Serialize;
use std::path::Path;
use tandem_kernels::{DeviceFacts, Driver, DriverError, UnusableDevice, driver};

/// One GPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Gpu {
    /// Index in the driver's order.
    pub ordinal: usize,
    /// Product name.
    pub name: String,
    /// Where it is on the bus, as `/sys` calls it.
    pub pci_address: String,
    /// NUMA node that it is attached to; looked up where there are several, `None` where the
    /// system does not tell.
    pub numa_node: Option<u32>,
    /// Memory of the device.
    pub memory_total_bytes: u64,
    /// Memory free at start-up, our own context already subtracted.
    pub memory_free_bytes: u64,
    /// Compute capability, such as `9.0`.
    pub compute_capability: String,
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Other processes that hold memory of it, those with most first, where the driver tells.
    pub holders: Vec<MemoryHolder>,
}

/// A GPU that the driver shows and that was not opened, or can't be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ClosedGpu {
    /// Index in the driver's order.
    pub ordinal: usize,
    /// Product name; empty where the driver does not tell.
    pub name: String,
    /// Why it can't be used now, in words for the user; `None` where it was not asked for.
    pub refusal: Option<String>,
    /// Other processes that hold memory of it, those with most first, where the driver tells.
    pub holders: Vec<MemoryHolder>,
}

/// The GPUs that can be used, or the reason why there are none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Gpus {
    /// Those that were asked for and can be used, in the driver's order.
    pub devices: Vec<Gpu>,
    /// The others, in the driver's order.
    pub closed: Vec<ClosedGpu>,
    /// Why the driver shows none, in words for the user.
    pub absence: Option<String>,
    /// Whether something can be mended for there to be some, such as a driver that is too old.
    /// Without a driver there is nothing to say.
    pub is_broken: bool,
    /// Whether nobody has asked the driver: no GPU is wanted.
    pub is_unasked: bool,
}

impl Gpus {
    /// Asks the driver for all GPUs. Never panics, whatever is or is not installed.
    pub fn detect() -> Gpus {
        Self::detect_for(&GpuChoice::All)
    }

    /// Asks the driver for the GPUs that may be chosen: others are not opened, and where none is
    /// wanted nothing is asked. Never panics.
    pub fn detect_for(choice: &GpuChoice) -> Gpus {
        if *choice == GpuChoice::Off {
            return Gpus { is_unasked: true, ..Gpus::default() };
        }
        match driver().and_then(|driver| Ok((driver.device_count()?, driver))) {
            Ok((count, driver)) => Self::opened(choice, count, &driver),
            Err(error) => Gpus {
                absence: Some(error.to_string()),
                is_broken: !matches!(error, DriverError::NoDriverLibrary | DriverError::NoDevice),
                ..Gpus::default()
            },
        }
    }

    fn opened(choice: &GpuChoice, count: usize, driver: &Driver) -> Gpus {
        let mut gpus = Gpus::default();
        for ordinal in 0..count {
            let is_wanted = match choice {
                GpuChoice::These(indices) => indices.contains(&ordinal),
                _ => true,
            };
            match is_wanted.then(|| driver.device(ordinal)) {
                Some(Ok(facts)) => gpus.devices.push(facts.into()),
                Some(Err(unusable)) => gpus.closed.push(unusable.into()),
                None => gpus.closed.push(ClosedGpu {
                    ordinal,
                    name: driver.device_name(ordinal).unwrap_or_default(),
                    refusal: None,
                    holders: Vec::new(),
                }),
            }
        }
        gpus
    }

    /// Names of all GPUs that the driver shows, in its order; none where nobody has asked it.
    pub fn names(&self) -> Option<Vec<String>> {
        let open = self.devices.iter().map(|gpu| (gpu.ordinal, &gpu.name));
        let closed = self.closed.iter().map(|gpu| (gpu.ordinal, &gpu.name));
        let mut names: Vec<_> = open.chain(closed).collect();
        names.sort();
        (!self.is_unasked).then(|| names.into_iter().map(|(_, name)| name.clone()).collect())
    }

    /// Looks up the NUMA node of each GPU in the `/sys` below `root`.
    pub fn find_nodes(&mut self, root: &Path) {
        let files = SystemFiles::new(root);
        for gpu in &mut self.devices {
            // Machines that do not know say −1.
            let node: Option<i64> =
                files.number(&format!("sys/bus/pci/devices/{}/numa_node", gpu.pci_address));
            gpu.numa_node = node.and_then(|node| u32::try_from(node).ok());
        }
    }
}

impl From<DeviceFacts> for Gpu {
    fn from(facts: DeviceFacts) -> Gpu {
        Gpu {
            ordinal: facts.ordinal,
            name: facts.name,
            pci_address: facts.pci_address,
            numa_node: None,
            memory_total_bytes: facts.memory_total_bytes,
            memory_free_bytes: facts.memory_free_bytes,
            compute_capability: facts.compute_capability.to_string(),
            multiprocessors: facts.multiprocessors,
            holders: others(&facts.holders, Path::new("/"), std::process::id()),
        }
    }
}

impl From<UnusableDevice> for ClosedGpu {
    fn from(unusable: UnusableDevice) -> ClosedGpu {
        ClosedGpu {
            ordinal: unusable.ordinal,
            refusal: Some(unusable.reason.to_string()),
            holders: others(&unusable.holders, Path::new("/"), std::process::id()),
            name: unusable.name,
        }
    }
}
