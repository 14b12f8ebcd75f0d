//! How fast bytes travel between host memory and a GPU, measured: each way alone and both at once,
//! from memory that the GPU copies by itself (pinned) and from any other (pageable).

use crate::fate::OnGpu;
use crate::gpu::{DeviceMemory, Gpu, GpuError};
use crate::pinned::PinnedMemory;
use cudarc::driver::{CudaEvent, CudaStream, result, sys};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// Between two looks at a copy: whoever measures memory meanwhile needs all processors.
const SLEEP: Duration = Duration::from_micros(100);
/// Longest time of copies that go well.
const COPIES_MAX: Duration = Duration::from_secs(10);

/// Which way bytes travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyWay {
    /// From the host to the GPU.
    ToGpu,
    /// From the GPU to the host.
    FromGpu,
}

/// Memory on both sides, and a stream of its own, for copies one way.
struct Lane {
    // Dropped first: it waits for all copies.
    host: PinnedMemory,
    device: DeviceMemory,
    stream: OnGpu<Arc<CudaStream>>,
}

/// A lane for each way.
pub struct CopyLanes<'g> {
    gpu: &'g Gpu,
    to_gpu: Lane,
    from_gpu: Lane,
    bytes: usize,
}

impl Gpu {
    /// Lanes of `bytes` bytes: as much pinned and as much of the GPU's memory for each way.
    ///
    /// # Errors
    /// No memory, or what the driver refuses.
    pub fn copy_lanes(&self, bytes: usize) -> Result<CopyLanes<'_>, GpuError> {
        let lanes =
            CopyLanes { gpu: self, to_gpu: self.lane(bytes)?, from_gpu: self.lane(bytes)?, bytes };
        // The lanes' streams don't wait for the one that zeroes their memory.
        self.synchronize()?;
        Ok(lanes)
    }

    fn lane(&self, bytes: usize) -> Result<Lane, GpuError> {
        let (host, device) = (self.alloc_pinned(bytes)?, self.alloc(bytes)?);
        Ok(Lane { host, device, stream: self.new_stream()? })
    }
}

impl CopyLanes<'_> {
    /// Bytes per second of `rounds` copies of pinned memory, one after the other.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn pinned(&mut self, way: CopyWay, rounds: usize) -> Result<f64, GpuError> {
        let copies = self.start(way, rounds)?;
        self.rate(way, &copies, rounds)
    }

    /// The same both ways at once: to the GPU, from the GPU.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn pinned_both_ways(&mut self, rounds: usize) -> Result<(f64, f64), GpuError> {
        let to_gpu = self.start(CopyWay::ToGpu, rounds)?;
        let from_gpu = self.start(CopyWay::FromGpu, rounds)?;
        let to_gpu = self.rate(CopyWay::ToGpu, &to_gpu, rounds)?;
        Ok((to_gpu, self.rate(CopyWay::FromGpu, &from_gpu, rounds)?))
    }

    /// Bytes per second of one copy of pageable memory, by the clock.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// When `host` is longer than the lanes.
    pub fn pageable(&mut self, way: CopyWay, host: &mut [u8]) -> Result<f64, GpuError> {
        let span = match way {
            CopyWay::ToGpu => self.to_gpu.device.span().part(0, host.len()),
            CopyWay::FromGpu => self.from_gpu.device.span().part(0, host.len()),
        };
        let started = Instant::now();
        match way {
            CopyWay::ToGpu => self.gpu.upload(host, span)?,
            CopyWay::FromGpu => self.gpu.download(span, host)?,
        }
        self.gpu.synchronize()?;
        Ok(host.len() as f64 / started.elapsed().as_secs_f64().max(1e-9))
    }

    fn lane(&self, way: CopyWay) -> &Lane {
        match way {
            CopyWay::ToGpu => &self.to_gpu,
            CopyWay::FromGpu => &self.from_gpu,
        }
    }

    /// Starts copies between two events.
    fn start(&mut self, way: CopyWay, rounds: usize) -> Result<[CudaEvent; 2], GpuError> {
        self.gpu.bound()?;
        let before = self.event(way)?;
        let lane = match way {
            CopyWay::ToGpu => &mut self.to_gpu,
            CopyWay::FromGpu => &mut self.from_gpu,
        };
        let (stream, there) = (lane.stream.cu_stream(), lane.device.span().of(self.bytes, 1));
        for _ in 0..rounds {
            // SAFETY: both sides have as many bytes, and live until the copies are done: dropping
            // the host's, which comes first, waits for them. Nobody uses either meanwhile.
            let copied = unsafe {
                match way {
                    CopyWay::ToGpu => result::memcpy_htod_async(there, &lane.host[..], stream),
                    CopyWay::FromGpu => {
                        result::memcpy_dtoh_async(&mut lane.host[..], there, stream)
                    }
                }
            };
            copied.map_err(|error| self.gpu.failed("copying", error))?;
        }
        Ok([before, self.event(way)?])
    }

    fn event(&self, way: CopyWay) -> Result<CudaEvent, GpuError> {
        let flags = sys::CUevent_flags::CU_EVENT_DEFAULT;
        let event = self.lane(way).stream.record_event(Some(flags));
        event.map_err(|error| self.gpu.failed("marking its work", error))
    }

    /// Waits for copies; bytes per second of them.
    fn rate(
        &self,
        way: CopyWay,
        [before, after]: &[CudaEvent; 2],
        rounds: usize,
    ) -> Result<f64, GpuError> {
        let failed = |error| self.gpu.failed("copying", error);
        let started = Instant::now();
        while !after.try_is_complete().map_err(failed)? && started.elapsed() < COPIES_MAX {
            thread::sleep(SLEEP);
        }
        // Copies that do not end are the end of this wait.
        self.gpu.stream().join(&self.lane(way).stream).map_err(failed)?;
        self.gpu.synchronize()?;
        let ms = before.elapsed_ms(after).map_err(failed)?;
        Ok((self.bytes * rounds) as f64 / f64::from(ms).max(1e-6) * 1e3)
    }
}
