//! Rows on their way from the memory of one GPU to that of another: a copy that both streams wait
//! for, and no thread. The stream that sends waits until what was sent last has been used, the one
//! that receives until the rows have come.
//!
//! Where the driver lets one GPU write the other's memory, that is one copy, over NVLink or the
//! bus; else rows go through pinned host memory. Streams of one GPU copy inside it.

use crate::fate::OnGpu;
use crate::gpu::{Gpu, GpuError, Span};
use crate::pinned::PinnedMemory;
use cudarc::driver::{CudaEvent, result, sys};

/// What rows may take on their way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerCopies {
    /// A copy from GPU to GPU where the driver allows it.
    Allowed,
    /// Host memory between two GPUs, always.
    Off,
}

/// The way from one GPU's stream to another's.
pub struct PeerLane {
    // Dropped first: it waits for the GPU that receives, whose stream has waited for the other.
    host: Option<PinnedMemory>,
    /// On the sending stream, behind the last copy.
    sent: OnGpu<CudaEvent>,
    /// On the receiving stream, behind the last use of what came.
    used: OnGpu<CudaEvent>,
}

impl Gpu {
    /// A way to another GPU, or to another stream of this one, for up to `bytes` bytes at once.
    ///
    /// # Errors
    /// No host memory where it takes some, or what the driver refuses.
    pub fn lane_to(
        &self,
        to: &Gpu,
        bytes: usize,
        copies: PeerCopies,
    ) -> Result<PeerLane, GpuError> {
        let is_direct = self.ordinal() == to.ordinal()
            || copies == PeerCopies::Allowed && self.may_write_to(to)?;
        let host = (!is_direct).then(|| to.alloc_pinned(bytes)).transpose()?;
        let lane = PeerLane { host, sent: self.new_event()?, used: to.new_event()? };
        // The memory that rows come to may still be cleared there.
        lane.used(to)?;
        Ok(lane)
    }

    /// Has the driver let this GPU write all memory that is allocated on another. Whether it does.
    fn may_write_to(&self, to: &Gpu) -> Result<bool, GpuError> {
        to.bound()?;
        let _turn = self.turn();
        let [from, device] = [self, to].map(|gpu| gpu.stream().context().cu_device());
        let (mut can_write, mut pool) = (0, std::ptr::null_mut());
        // SAFETY: both are devices of the driver, and the result is written.
        unsafe { sys::cuDeviceCanAccessPeer(&raw mut can_write, from, device) }
            .result()
            .map_err(|error| self.failed("asking what it reaches", error))?;
        if can_write == 0 {
            return Ok(false);
        }
        let access = sys::CUmemAccessDesc {
            location: sys::CUmemLocation {
                type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE,
                id: from,
            },
            flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        // Memory comes from the device's pool, where there is one. Without one there are no such
        // copies.
        // SAFETY: the device is one of the driver's; the pool is its own if it was told.
        let allowed = unsafe {
            sys::cuDeviceGetMemPool(&raw mut pool, device)
                .result()
                .and_then(|()| sys::cuMemPoolSetAccess(pool, &raw const access, 1).result())
        };
        Ok(allowed.is_ok())
    }

    /// Has all that is started from now on wait for an event of another stream.
    fn wait_behind(&self, other: &Gpu, event: &CudaEvent) -> Result<(), GpuError> {
        self.bound()?;
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: both live.
        unsafe { result::stream::wait_event(self.stream().cu_stream(), event.cu_event(), flags) }
            .or_else(|error| {
                // It may be the other one that has failed.
                other.is_done()?;
                Err(self.failed("waiting for another stream", error))
            })
    }
}

impl PeerLane {
    /// Starts a copy of `rows` to `place`, behind all that was started on either stream; `place` is
    /// written when what was sent last [has been used](Self::used). From now on the stream of `to`
    /// waits for it. Both are those that the lane was made for.
    ///
    /// # Safety
    /// Both memories live until the stream of `to` has come past this, and nothing uses them that
    /// these two streams don't order.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// When the lengths differ, or are more than the lane was made for.
    pub unsafe fn send(
        &mut self,
        (from, rows): (&Gpu, Span<'_>),
        (to, place): (&Gpu, Span<'_>),
    ) -> Result<(), GpuError> {
        let bytes = rows.bytes();
        assert_eq!(bytes, place.bytes(), "lengths of a copy");
        from.wait_behind(to, &self.used)?;
        match &mut self.host {
            None => {
                let (place, rows) = (place.of(bytes, 1), rows.of(bytes, 1));
                // SAFETY: both have as many bytes; the rest is the caller's promise.
                unsafe { result::memcpy_dtod_async(place, rows, bytes, from.stream().cu_stream()) }
                    .map_err(|error| from.failed("copying to another GPU", error))?;
            }
            // SAFETY: the host's memory is used by these two streams alone: this waits for the
            // copy from it below, which comes before the last use of what came.
            Some(host) => unsafe { from.fetch(rows, host, bytes)? },
        }
        let sent = self.sent.record(from.stream());
        let sent = sent.map_err(|error| from.failed("marking its work", error));
        if let Err(error) = sent.and_then(|()| to.wait_behind(from, &self.sent)) {
            // Else `place` could be freed while the copy is on its way.
            from.synchronize()?;
            return Err(error);
        }
        if let Some(host) = &self.host {
            // SAFETY: nobody writes it before what is sent now has been used.
            unsafe { to.send(host, bytes, place)? };
        }
        Ok(())
    }

    /// All that was started until now on the stream that receives is the last to use what was sent.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn used(&self, to: &Gpu) -> Result<(), GpuError> {
        to.bound()?;
        self.used.record(to.stream()).map_err(|error| to.failed("marking its work", error))
    }

    /// Whether rows go through host memory.
    pub fn is_by_host(&self) -> bool {
        self.host.is_some()
    }
}
