//! Which processes hold memory of a GPU, where the driver's management library tells. It is loaded
//! at run time, as the driver is, and all that it refuses is an empty answer: nobody needs it.

use libloading::Library;
use std::ffi::{CStr, c_char, c_void};

/// Processes that are told at most, of each kind.
const PROCESSES_MAX: usize = 128;
/// `NVML_VALUE_NOT_AVAILABLE`
const NOT_AVAILABLE: u64 = u64::MAX;

/// A process that holds memory of a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryHolder {
    /// Its number, as this process's namespace has it or the host's.
    pub pid: u32,
    /// Bytes, if the driver tells.
    pub bytes: Option<u64>,
}

/// `nvmlProcessInfo_t`
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct ProcessInfo {
    pid: u32,
    used_bytes: u64,
    gpu_instance: u32,
    compute_instance: u32,
}

type Call = unsafe extern "C" fn() -> i32;
type FindDevice = unsafe extern "C" fn(*const c_char, *mut *mut c_void) -> i32;
type ListProcesses = unsafe extern "C" fn(*mut c_void, *mut u32, *mut ProcessInfo) -> i32;

/// Processes on the GPU of a PCI address such as `00000000:3B:00.0`, this one included, those that
/// hold most first; empty where nobody tells.
pub(crate) fn memory_holders(pci_address: &CStr) -> Vec<MemoryHolder> {
    // SAFETY: its constructors have no preconditions. It is closed after the last use of what it
    // gave.
    let Ok(library) = (unsafe { Library::new("libnvidia-ml.so.1") }) else { return Vec::new() };
    let call = |name: &[u8]| {
        // SAFETY: both functions that are called so have this signature.
        unsafe { library.get::<Call>(name).map(|function| function()) }
    };
    if !matches!(call(b"nvmlInit_v2\0"), Ok(0)) {
        return Vec::new();
    }
    let mut holders = listed(&library, pci_address).unwrap_or_default();
    // What an end of a library fails with is nobody's news.
    let _ = call(b"nvmlShutdown\0");
    holders.sort_by_key(|holder| std::cmp::Reverse(holder.bytes));
    holders.dedup_by_key(|holder| holder.pid);
    holders
}

fn listed(library: &Library, pci_address: &CStr) -> Option<Vec<MemoryHolder>> {
    let mut device = std::ptr::null_mut();
    // SAFETY: the C signature; the address ends with 0, and `device` outlives the call.
    let found = unsafe {
        let find = library.get::<FindDevice>(b"nvmlDeviceGetHandleByPciBusId_v2\0").ok()?;
        find(pci_address.as_ptr(), &raw mut device)
    };
    if found != 0 {
        return None;
    }
    let mut holders = Vec::new();
    for name in [
        &b"nvmlDeviceGetComputeRunningProcesses_v3\0"[..],
        &b"nvmlDeviceGetGraphicsRunningProcesses_v3\0"[..],
    ] {
        let mut infos = [ProcessInfo::default(); PROCESSES_MAX];
        let mut count = PROCESSES_MAX as u32;
        // SAFETY: the C signature of both; there is room for as many as `count` says.
        let told = unsafe {
            let list = library.get::<ListProcesses>(name).ok()?;
            list(device, &raw mut count, infos.as_mut_ptr())
        };
        let count = if told == 0 { PROCESSES_MAX.min(count as usize) } else { 0 };
        holders.extend(infos[..count].iter().map(|info| MemoryHolder {
            pid: info.pid,
            bytes: Some(info.used_bytes).filter(|bytes| *bytes != NOT_AVAILABLE),
        }));
    }
    Some(holders)
}
