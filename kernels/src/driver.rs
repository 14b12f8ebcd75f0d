//! The guarded door: is the library there, does it initialise, is it recent enough.

use crate::device::{self, DeviceFacts, UnusableDevice};
use cudarc::driver::{result, sys};
use std::fmt;

/// The oldest driver that has every function of our bindings and loads our compiled kernels.
const WANTED: CudaVersion = CudaVersion { major: 13, minor: 0 };

/// `CUDA_ERROR_NO_DEVICE`.
const NO_DEVICE: i32 = 100;

/// A version of CUDA, as a driver reports what it supports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct CudaVersion {
    /// Before the dot.
    pub major: u32,
    /// After the dot.
    pub minor: u32,
}

impl CudaVersion {
    /// Decodes `1000·major + 10·minor`, the driver's form; a negative number is version 0.
    pub fn from_driver_number(number: i32) -> CudaVersion {
        let number = u32::try_from(number).unwrap_or(0);
        CudaVersion { major: number / 1000, minor: number % 1000 / 10 }
    }
}

impl fmt::Display for CudaVersion {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}.{}", self.major, self.minor)
    }
}

/// Why no GPU can be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DriverError {
    /// The machine has no NVIDIA driver, or the process cannot see it.
    #[error("no NVIDIA driver: the library libcuda was not found")]
    NoDriverLibrary,
    /// The library is there and lacks a function that every driver has.
    #[error("the driver library has no function {function}: {reason}")]
    MissingFunction {
        /// Name of the function.
        function: &'static str,
        /// What the loader said.
        reason: String,
    },
    /// A call of the initialisation failed.
    #[error("{function} failed with CUDA error {code}{}", meaning(*code))]
    InitFailed {
        /// Name of the function.
        function: &'static str,
        /// `CUresult` as a number: newer drivers have codes that no header of ours names.
        code: i32,
    },
    /// The driver works and manages no GPU that this process may use.
    #[error("the NVIDIA driver reports no GPU")]
    NoDevice,
    /// The driver cannot run our kernels.
    #[error("the NVIDIA driver supports CUDA {found}, and {wanted} is needed: update the driver")]
    DriverTooOld {
        /// What the driver supports.
        found: CudaVersion,
        /// What is needed.
        wanted: CudaVersion,
    },
    /// Asking a GPU about itself failed.
    #[error("{question} of GPU {ordinal}: {reason}")]
    QueryFailed {
        /// Index of the device.
        ordinal: usize,
        /// What was asked.
        question: &'static str,
        /// What the driver said.
        reason: String,
    },
}

/// What the initialisation's usual failures mean, in words that help.
fn meaning(code: i32) -> &'static str {
    match code {
        3 => " (not initialised)",
        34 => " (this libcuda is the stub of the toolkit, not a driver)",
        35 => " (driver older than the runtime)",
        46 => " (device unavailable: in use or in an exclusive mode)",
        802 => " (system not ready: the fabric manager may not be running)",
        803 => " (kernel module and libcuda have different versions: reboot after the update)",
        804 => " (forward compatibility is not supported on this GPU)",
        999 => " (unknown: the kernel module may not be loaded, or the device nodes are missing)",
        _ => "",
    }
}

/// An initialised driver with at least one device. Copies are free; making one is the check.
#[derive(Clone, Copy, Debug)]
pub struct Driver {
    version: CudaVersion,
}

/// Opens the door to the CUDA driver. Never panics, whatever is installed.
///
/// # Errors
/// [`DriverError`] says which of the conditions fails.
pub fn driver() -> Result<Driver, DriverError> {
    // SAFETY: opening libcuda runs its constructors, which have no preconditions.
    if !unsafe { sys::is_culib_present() } {
        return Err(DriverError::NoDriverLibrary);
    }
    // The bindings return an enum that has no value for an unknown code, so ask in plain numbers
    // until the driver is known to be healthy.
    match init()? {
        0 => {}
        NO_DEVICE => return Err(DriverError::NoDevice),
        code => return Err(DriverError::InitFailed { function: "cuInit", code }),
    }
    let version = version()?;
    if version < WANTED {
        return Err(DriverError::DriverTooOld { found: version, wanted: WANTED });
    }
    let driver = Driver { version };
    if driver.device_count()? == 0 { Err(DriverError::NoDevice) } else { Ok(driver) }
}

impl Driver {
    /// The CUDA version that the driver supports.
    pub fn version(&self) -> CudaVersion {
        self.version
    }

    /// Number of GPUs that this process may use.
    ///
    /// # Errors
    /// [`DriverError::QueryFailed`] when the driver does not say.
    pub fn device_count(&self) -> Result<usize, DriverError> {
        let refuse = |reason: String| DriverError::QueryFailed {
            ordinal: 0,
            question: "number of devices",
            reason,
        };
        let count = result::device::get_count().map_err(|error| refuse(error.to_string()))?;
        usize::try_from(count).map_err(|_| refuse(format!("{count} devices")))
    }

    /// A GPU's product name. Nothing is opened for it.
    ///
    /// # Errors
    /// [`DriverError::QueryFailed`] where there is no such GPU, or it does not answer.
    pub fn device_name(&self, ordinal: usize) -> Result<String, DriverError> {
        device::name(ordinal)
    }

    /// Facts of one GPU.
    ///
    /// Free memory can only be read inside a context: where the process has none yet, one is made
    /// for the question and released after it (0.3 s and half a GiB meanwhile).
    ///
    /// # Errors
    /// The first question that it does not answer, with who holds its memory. Other GPUs may be
    /// well.
    pub fn device(&self, ordinal: usize) -> Result<DeviceFacts, UnusableDevice> {
        device::facts(ordinal)
    }
}

/// Calls `cuInit(0)` and returns its code.
fn init() -> Result<i32, DriverError> {
    type Init = unsafe extern "C" fn(u32) -> i32;
    // SAFETY: the library is present, and this is the C signature of `cuInit`; flags must be 0.
    unsafe {
        let function = sys::culib().get::<Init>(b"cuInit\0").map_err(missing("cuInit"))?;
        Ok(function(0))
    }
}

/// The version that the driver supports.
fn version() -> Result<CudaVersion, DriverError> {
    type GetVersion = unsafe extern "C" fn(*mut i32) -> i32;
    let (name, mut number) = ("cuDriverGetVersion", 0i32);
    // SAFETY: the library is present, and this is the C signature; `number` outlives the call.
    let code = unsafe {
        let symbol = sys::culib().get::<GetVersion>(b"cuDriverGetVersion\0");
        symbol.map_err(missing(name))?(&mut number)
    };
    match code {
        0 => Ok(CudaVersion::from_driver_number(number)),
        code => Err(DriverError::InitFailed { function: name, code }),
    }
}

fn missing<E: fmt::Display>(function: &'static str) -> impl FnOnce(E) -> DriverError {
    move |error| DriverError::MissingFunction { function, reason: error.to_string() }
}
