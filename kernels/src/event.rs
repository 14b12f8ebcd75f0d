//! Events of a step, which GPU and CPU wait for. A step has a number to count from, its *base*,
//! which lies in the GPU's memory while the step runs, so that recorded launches can be replayed;
//! event `index` has the number `base + index + 1`. A flag holds the number of the last event that
//! took place. Numbers wrap around: one is reached by all that are less than 2^31 ahead of it.
//!
//! So the base has to grow from step to step by no less than the events of a step, and by less than
//! 2^31 between two steps that use the same flags; flags begin at 0.

use crate::fate::OnGpu;
use crate::gpu::{Gpu, GpuError, Span};
use cudarc::driver::{CudaEvent, CudaStream, DeviceRepr};
use std::sync::Arc;

/// The number of event `index` of the step with some base.
pub fn event_number(base: u32, index: usize) -> u32 {
    base.wrapping_add(index as u32).wrapping_add(1)
}

/// Whether a flag's value says that an event took place.
pub(crate) fn has_reached(value: u32, number: u32) -> bool {
    value.wrapping_sub(number).cast_signed() >= 0
}

#[repr(C)]
#[derive(Clone, Copy)]
struct EventArgs {
    flag: u64,
    released: u64,
    base: u64,
    index: u32,
    unused: u32,
}

// SAFETY: plain numbers in the order of `EventArgs` in event.cu.
unsafe impl DeviceRepr for EventArgs {}

impl Gpu {
    /// A stream of its own for work beside that of its first.
    ///
    /// # Errors
    /// What the driver refuses.
    pub(crate) fn new_stream(&self) -> Result<OnGpu<Arc<CudaStream>>, GpuError> {
        let _turn = self.turn();
        let stream = self.stream().context().new_stream();
        let stream = stream.map_err(|error| self.failed("making a stream", error))?;
        Ok(OnGpu::new(stream, self))
    }

    /// A mark in the order of a stream that another can wait for.
    ///
    /// # Errors
    /// What the driver refuses.
    pub(crate) fn new_event(&self) -> Result<OnGpu<CudaEvent>, GpuError> {
        let _turn = self.turn();
        let event = self.stream().context().new_event(None);
        let event = event.map_err(|error| self.failed("marking its work", error))?;
        Ok(OnGpu::new(event, self))
    }

    /// Starts a kernel that waits until a flag has reached event `index`, or another is not 0.
    ///
    /// # Safety
    /// Both are flags that the GPU can read until it has come past this.
    ///
    /// # Errors
    /// What the driver refuses.
    pub(crate) unsafe fn await_event(
        &self,
        (flag, released): (u64, u64),
        (base, index): (Span<'_>, usize),
    ) -> Result<(), GpuError> {
        // SAFETY: as the caller promises.
        unsafe { self.launch_event("await_event", (flag, released), (base, index)) }
    }

    /// Starts a kernel that sets a flag to event `index`.
    ///
    /// # Safety
    /// It is a flag that the GPU can write until it has come past this.
    ///
    /// # Errors
    /// What the driver refuses.
    pub(crate) unsafe fn raise_event(
        &self,
        flag: u64,
        (base, index): (Span<'_>, usize),
    ) -> Result<(), GpuError> {
        // SAFETY: as the caller promises; the kernel reads no other flag.
        unsafe { self.launch_event("raise_event", (flag, 0), (base, index)) }
    }

    /// # Safety
    /// As of the two above.
    unsafe fn launch_event(
        &self,
        kernel: &str,
        (flag, released): (u64, u64),
        (base, index): (Span<'_>, usize),
    ) -> Result<(), GpuError> {
        let base = base.of(1, size_of::<u32>());
        let arguments = EventArgs { flag, released, base, index: index as u32, unused: 0 };
        // SAFETY: as the caller promises; the base was checked.
        unsafe { self.launch(kernel, ([1, 1, 1], 1, 0), &arguments) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_reached_across_the_end_of_their_range() {
        let base = u32::MAX - 2;
        assert_eq!([0, 1, 2].map(|index| event_number(base, index)), [u32::MAX - 1, u32::MAX, 0]);
        assert!(has_reached(0, u32::MAX) && has_reached(7, 7) && has_reached(1 << 31, 1));
        assert!(!has_reached(u32::MAX, 0) && !has_reached(6, 7) && !has_reached(0, 1 << 31));
    }
}
