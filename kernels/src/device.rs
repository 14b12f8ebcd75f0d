//! What a GPU says about itself.

use crate::driver::DriverError;
use crate::holders::{MemoryHolder, memory_holders};
use crate::turns::Taker;
use cudarc::driver::sys::{self, CUdevice_attribute_enum as Attribute};
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

/// A GPU that this process can't use now: its memory is full, another process has it to itself, or
/// it does not answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct UnusableDevice {
    /// Index in the driver's order.
    pub ordinal: usize,
    /// Product name; empty where the driver does not tell.
    pub name: String,
    /// What was asked, and what the driver said.
    pub reason: DriverError,
    /// Who holds memory of it, those with most first.
    pub holders: Vec<MemoryHolder>,
}

/// Memory in use from which on it is asked who holds it: more than this process's own context.
const HELD_BYTES_MIN: u64 = 1 << 30;

/// A device that the driver shows. It is asked without a context, but for its free memory.
struct Device {
    ordinal: usize,
    handle: sys::CUdevice,
}

impl Device {
    fn find(ordinal: usize) -> Result<Device, DriverError> {
        let index = i32::try_from(ordinal).unwrap_or(i32::MAX);
        let handle = result::device::get(index).map_err(refuse(ordinal, "handle"))?;
        Ok(Device { ordinal, handle })
    }

    fn name(&self) -> Result<String, DriverError> {
        result::device::get_name(self.handle).map_err(refuse(self.ordinal, "name"))
    }

    fn number(&self, attribute: Attribute) -> Result<u32, DriverError> {
        // SAFETY: the handle is one of the driver's devices.
        let value = unsafe { result::device::get_attribute(self.handle, attribute) };
        let value = value.map_err(refuse(self.ordinal, "attributes"))?;
        Ok(u32::try_from(value).unwrap_or(0))
    }

    /// `(domain, bus, slot)`
    fn place(&self) -> Result<[u32; 3], DriverError> {
        Ok([
            self.number(Attribute::CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID)?,
            self.number(Attribute::CU_DEVICE_ATTRIBUTE_PCI_BUS_ID)?,
            self.number(Attribute::CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID)?,
        ])
    }

    /// `(free, total)` bytes of memory, read in a context that ends with the question: this process
    /// is then no holder of memory by it.
    fn memory(&self) -> Result<(u64, u64), DriverError> {
        let _turn = Taker::new().turn();
        let context = CudaContext::new(self.ordinal).map_err(refuse(self.ordinal, "context"))?;
        let (free, total) = context.mem_get_info().map_err(refuse(self.ordinal, "memory"))?;
        Ok((free as u64, total as u64))
    }

    fn facts(&self) -> Result<DeviceFacts, DriverError> {
        let [domain, bus, slot] = self.place()?;
        let (memory_free_bytes, memory_total_bytes) = self.memory()?;
        let is_held = memory_total_bytes.saturating_sub(memory_free_bytes) >= HELD_BYTES_MIN;
        Ok(DeviceFacts {
            ordinal: self.ordinal,
            name: self.name()?,
            pci_address: format!("{domain:04x}:{bus:02x}:{slot:02x}.0"),
            memory_total_bytes,
            memory_free_bytes,
            compute_capability: ComputeCapability {
                major: self.number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                minor: self.number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            },
            multiprocessors: self.number(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            holders: if is_held { self.holders() } else { Vec::new() },
        })
    }

    fn holders(&self) -> Vec<MemoryHolder> {
        let Ok([domain, bus, slot]) = self.place() else { return Vec::new() };
        let address = CString::new(format!("{domain:08x}:{bus:02x}:{slot:02x}.0"));
        address.map(|address| memory_holders(&address)).unwrap_or_default()
    }
}

fn refuse(ordinal: usize, question: &'static str) -> impl Fn(result::DriverError) -> DriverError {
    move |error| {
        let reason = error.to_string();
        DriverError::QueryFailed { ordinal, question, reason }
    }
}

/// Asks device `ordinal` for its name alone, which needs no memory there. Only a `Driver` may call
/// this.
pub(crate) fn name(ordinal: usize) -> Result<String, DriverError> {
    Device::find(ordinal)?.name()
}

/// Asks device `ordinal` for its facts. Only a `Driver` may call this.
pub(crate) fn facts(ordinal: usize) -> Result<DeviceFacts, UnusableDevice> {
    let found = Device::find(ordinal);
    let told = found.as_ref().map_err(Clone::clone).and_then(Device::facts);
    told.map_err(|reason| UnusableDevice {
        ordinal,
        name: found.as_ref().ok().and_then(|device| device.name().ok()).unwrap_or_default(),
        reason,
        holders: found.map(|device| device.holders()).unwrap_or_default(),
    })
}
