//! What a GPU says about itself.

use crate::driver::DriverError;
use crate::holders::{MemoryHolder, memory_holders};
use crate::turns::Taker;
use cudarc::driver::sys::CUdevice_attribute_enum as Attribute;
use cudarc::driver::{CudaContext, result};
use std::ffi::CString;
use std::fmt;

/// The generation of a GPU's instruction set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ComputeCapability {
    /// Before the dot: the architecture.
    pub major: u32,
    /// After the dot: the variant.
    pub minor: u32,
}

impl fmt::Display for ComputeCapability {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}.{}", self.major, self.minor)
    }
}

/// One GPU as the driver describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceFacts {
    /// Index in the driver's order, which `CUDA_VISIBLE_DEVICES` changes.
    pub ordinal: usize,
    /// Product name.
    pub name: String,
    /// Where it is on the bus, as the system calls it: `domain:bus:slot.function`.
    pub pci_address: String,
    /// Memory of the device.
    pub memory_total_bytes: u64,
    /// Memory that is not in use, with one context of this process already counted as used.
    pub memory_free_bytes: u64,
    /// Generation.
    pub compute_capability: ComputeCapability,
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Who holds memory of it, those with most first: asked only where much is held.
    pub holders: Vec<MemoryHolder>,
}

/// Memory in use from which on it is asked who holds it: more than this process's own context.
const HELD_BYTES_MIN: usize = 1 << 30;

/// Asks device `ordinal` for its facts. Only a `Driver` may call this.
pub(crate) fn facts(ordinal: usize) -> Result<DeviceFacts, DriverError> {
    let refuse = |question: &'static str| {
        move |error: result::DriverError| DriverError::QueryFailed {
            ordinal,
            question,
            reason: error.to_string(),
        }
    };
    let _turn = Taker::new().turn();
    let context = CudaContext::new(ordinal).map_err(refuse("context"))?;
    let number = |attribute: Attribute| {
        let value = context.attribute(attribute).map_err(refuse("attributes"))?;
        Ok::<u32, DriverError>(u32::try_from(value).unwrap_or(0))
    };
    let (free, total) = context.mem_get_info().map_err(refuse("memory"))?;
    let domain = number(Attribute::CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID)?;
    let bus = number(Attribute::CU_DEVICE_ATTRIBUTE_PCI_BUS_ID)?;
    let slot = number(Attribute::CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID)?;
    let holders = match total.saturating_sub(free) {
        HELD_BYTES_MIN.. => {
            let address = CString::new(format!("{domain:08x}:{bus:02x}:{slot:02x}.0"));
            address.map(|address| memory_holders(&address)).unwrap_or_default()
        }
        _ => Vec::new(),
    };
    Ok(DeviceFacts {
        ordinal,
        holders,
        pci_address: format!("{domain:04x}:{bus:02x}:{slot:02x}.0"),
        name: context.name().map_err(refuse("name"))?,
        memory_total_bytes: total as u64,
        memory_free_bytes: free as u64,
        compute_capability: ComputeCapability {
            major: number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            minor: number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        },
        multiprocessors: number(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
    })
}
