//! Marks in a GPU's stream, to measure what lies between.

use crate::fate::failure;
use crate::gpu::{Gpu, GpuError};
use cudarc::driver::{CudaEvent, sys};

/// A point in the order of a GPU's work.
pub struct Mark {
    event: CudaEvent,
    ordinal: usize,
}

impl Gpu {
    /// A mark behind all that was started.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn mark(&self) -> Result<Mark, GpuError> {
        self.bound()?;
        let flags = sys::CUevent_flags::CU_EVENT_DEFAULT;
        let event = self.stream().record_event(Some(flags));
        let event = event.map_err(|error| self.failed("marking its work", error))?;
        Ok(Mark { event, ordinal: self.ordinal() })
    }

    /// Moves a mark behind all that was started.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn mark_again(&self, mark: &Mark) -> Result<(), GpuError> {
        self.bound()?;
        mark.event.record(self.stream()).map_err(|error| self.failed("marking its work", error))
    }
}

impl Mark {
    /// Microseconds from this mark to a later one, which is waited for.
    ///
    /// # Errors
    /// What any kernel before has failed with.
    pub fn us_until(&self, later: &Mark) -> Result<f64, GpuError> {
        let ms = self.event.elapsed_ms(&later.event);
        let ms = ms.map_err(|error| failure(self.ordinal, "measuring its work", error, || None))?;
        Ok(f64::from(ms) * 1000.0)
    }
}
