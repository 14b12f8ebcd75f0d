//! Blocks that lie in several planes of one shape, and copies of whole blocks: inside the GPU, and
//! between it and host memory on a stream of their own.
//!
//! ```text
//! planes  [planes][blocks] { block_bytes }    a plane starts at a multiple of 256 bytes
//! host    [planes] { block_bytes }            a block's bytes of all planes, without gaps
//! ```
//! Since planes are equally far apart, a block of all of them is one rectangle, and one call of the
//! driver copies it. Where they are too far apart for that, each plane is a copy.

use crate::fate::OnGpu;
use crate::gpu::{DeviceMemory, Gpu, GpuError, Span};
use cudarc::driver::{CudaEvent, CudaStream, DriverError, sys};
use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

/// Planes start at multiples of this, as memory of their own would.
const PLANE_ALIGNMENT: usize = 256;
/// Between two looks at copies: far less than they take, and other threads need the processor.
const LOOK_EVERY: Duration = Duration::from_micros(20);

/// Memory of blocks that lie in planes of one shape.
pub struct BlockPlanes {
    memory: DeviceMemory,
    planes: usize,
    blocks: usize,
    block_bytes: usize,
    /// Bytes from one plane to the next.
    pitch: usize,
    /// Planes that one copy takes.
    planes_at_once: usize,
}

/// One end of a copy of a rectangle: rows of a plane each.
#[derive(Clone, Copy)]
enum Place {
    Device(u64, usize),
    Host(*mut u8, usize),
}

/// A stream of its own for copies of blocks. It waits for no step and no step waits for it: whoever
/// orders copies knows that nobody uses the blocks.
pub struct BlockCopies {
    stream: OnGpu<Arc<CudaStream>>,
    /// Behind what the GPU had been given when [`BlockCopies::follow`] was called.
    followed: OnGpu<CudaEvent>,
}

impl Gpu {
    /// Zeroed memory of `planes` planes, each of `blocks` blocks of `block_bytes` bytes.
    ///
    /// # Errors
    /// No memory, or what the driver refuses.
    pub fn block_planes(
        &self,
        planes: usize,
        (blocks, block_bytes): (usize, usize),
    ) -> Result<BlockPlanes, GpuError> {
        let pitch = pitch((blocks, block_bytes));
        let memory = self.alloc(planes * pitch)?;
        let most = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_PITCH;
        let most = self.stream().context().attribute(most);
        let most = most.map_err(|error| self.failed("what it has", error))?;
        let planes_at_once = if pitch <= most as usize { planes.max(1) } else { 1 };
        Ok(BlockPlanes { memory, planes, blocks, block_bytes, pitch, planes_at_once })
    }

    /// A stream for copies of blocks.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn block_copies(&self) -> Result<BlockCopies, GpuError> {
        let copies = BlockCopies { stream: self.new_stream()?, followed: self.new_event()? };
        // Memory may still be cleared.
        copies.follow(self)?;
        Ok(copies)
    }
}

/// Bytes from one plane to the next.
fn pitch((blocks, block_bytes): (usize, usize)) -> usize {
    (blocks * block_bytes).next_multiple_of(PLANE_ALIGNMENT)
}

impl BlockPlanes {
    /// Bytes of `planes` planes, each of some blocks of so many bytes.
    pub fn bytes_of(planes: usize, of_plane: (usize, usize)) -> usize {
        planes * pitch(of_plane)
    }

    /// All blocks of one plane.
    ///
    /// # Panics
    /// When there is no such plane.
    pub fn plane(&self, plane: usize) -> Span<'_> {
        assert!(plane < self.planes, "plane {plane} of {}", self.planes);
        self.memory.span().part(plane * self.pitch, self.blocks * self.block_bytes)
    }

    /// Bytes of a block in all planes.
    pub fn block_bytes(&self) -> usize {
        self.planes * self.block_bytes
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.memory.bytes()
    }

    /// Copies a block over another, in the order of the GPU's steps.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// When there is no such block.
    pub fn copy_block(&self, gpu: &Gpu, from: usize, to: usize) -> Result<(), GpuError> {
        gpu.bound()?;
        let (from, to) = (self.place(from), self.place(to));
        // SAFETY: both are blocks of this memory.
        unsafe { self.start(gpu.stream(), from, to) }
            .map_err(|error| gpu.failed("copying inside it", error))
    }

    /// Where a block begins.
    fn place(&self, block: usize) -> Place {
        assert!(block < self.blocks, "block {block} of {}", self.blocks);
        Place::Device(self.memory.span().pointer + (block * self.block_bytes) as u64, self.pitch)
    }

    /// Starts the copy of a block.
    ///
    /// # Safety
    /// Both places have the block's bytes of all planes, until the GPU has come past this.
    unsafe fn start(&self, stream: &CudaStream, from: Place, to: Place) -> Result<(), DriverError> {
        for first in (0..self.planes).step_by(self.planes_at_once) {
            let planes = self.planes_at_once.min(self.planes - first);
            let (from, to) = (from.beyond(first), to.beyond(first));
            let copy = rectangle(from, to, (self.block_bytes, planes));
            // SAFETY: the rectangle lies in both places.
            unsafe { sys::cuMemcpy2DAsync_v2(&raw const copy, stream.cu_stream()) }.result()?;
        }
        Ok(())
    }
}

impl Place {
    /// The place of the planes from `plane` on.
    fn beyond(self, plane: usize) -> Place {
        match self {
            Place::Device(start, pitch) => Place::Device(start + (plane * pitch) as u64, pitch),
            Place::Host(start, pitch) => Place::Host(start.wrapping_add(plane * pitch), pitch),
        }
    }

    /// As the driver takes it: kind, host's and GPU's address, and pitch. That of a single row does
    /// not count, but would be refused beyond a limit.
    fn parts(self, (width, rows): (usize, usize)) -> (sys::CUmemorytype, *mut c_void, u64, usize) {
        let pitched = |pitch| if rows == 1 { width } else { pitch };
        match self {
            Place::Device(start, pitch) => {
                (sys::CUmemorytype::CU_MEMORYTYPE_DEVICE, null_mut(), start, pitched(pitch))
            }
            Place::Host(start, pitch) => {
                (sys::CUmemorytype::CU_MEMORYTYPE_HOST, start.cast(), 0, pitched(pitch))
            }
        }
    }
}

/// A copy of `rows` rows of `width` bytes.
fn rectangle(from: Place, to: Place, (width, rows): (usize, usize)) -> sys::CUDA_MEMCPY2D {
    let (from_kind, from_host, from_device, from_pitch) = from.parts((width, rows));
    let (to_kind, to_host, to_device, to_pitch) = to.parts((width, rows));
    sys::CUDA_MEMCPY2D {
        srcXInBytes: 0,
        srcY: 0,
        srcMemoryType: from_kind,
        srcHost: from_host,
        srcDevice: from_device,
        srcArray: null_mut(),
        srcPitch: from_pitch,
        dstXInBytes: 0,
        dstY: 0,
        dstMemoryType: to_kind,
        dstHost: to_host,
        dstDevice: to_device,
        dstArray: null_mut(),
        dstPitch: to_pitch,
        WidthInBytes: width,
        Height: rows,
    }
}

impl BlockCopies {
    /// Copies that are started from now on begin after all that the GPU has been given so far. For
    /// the thread that gives it steps, behind one that it did not wait for.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn follow(&self, gpu: &Gpu) -> Result<(), GpuError> {
        gpu.bound()?;
        let marked = self.followed.record(gpu.stream());
        marked.map_err(|error| gpu.failed("marking its work", error))
    }

    /// Makes the copies to come keep to [`BlockCopies::follow`].
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn begin(&self, gpu: &Gpu) -> Result<(), GpuError> {
        gpu.bound()?;
        let ordered = self.stream.wait(&self.followed);
        ordered.map_err(|error| gpu.failed("ordering its work", error))
    }

    /// Starts a copy of a block to host memory.
    ///
    /// # Safety
    /// The host's bytes are [registered](Gpu::register_whole) and not used until
    /// [`BlockCopies::wait`] has returned.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// When there is no such block, or the host's bytes are not as many as the block's.
    pub unsafe fn fetch(
        &self,
        gpu: &Gpu,
        (planes, block): (&BlockPlanes, usize),
        to: &mut [u8],
    ) -> Result<(), GpuError> {
        assert_eq!(to.len(), planes.block_bytes(), "bytes of a block");
        gpu.bound()?;
        let to = Place::Host(to.as_mut_ptr(), planes.block_bytes);
        // SAFETY: both hold a block's bytes; the caller leaves the host's alone.
        unsafe { planes.start(&self.stream, planes.place(block), to) }
            .map_err(|error| gpu.failed("copying from it", error))
    }

    /// Starts a copy of a block from host memory.
    ///
    /// # Safety
    /// The host's bytes are [registered](Gpu::register_whole) and not written until
    /// [`BlockCopies::wait`] has returned.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// As of [`BlockCopies::fetch`].
    pub unsafe fn send(
        &self,
        gpu: &Gpu,
        from: &[u8],
        (planes, block): (&BlockPlanes, usize),
    ) -> Result<(), GpuError> {
        assert_eq!(from.len(), planes.block_bytes(), "bytes of a block");
        gpu.bound()?;
        let from = Place::Host(from.as_ptr().cast_mut(), planes.block_bytes);
        // SAFETY: both hold a block's bytes, and the host's are only read; the caller keeps them.
        unsafe { planes.start(&self.stream, from, planes.place(block)) }
            .map_err(|error| gpu.failed("copying to it", error))
    }

    /// Waits for all copies. The thread sleeps meanwhile, and waits for nothing in the driver.
    ///
    /// # Errors
    /// What the copies failed with, or [`GpuError::Hung`].
    pub fn wait(&self, gpu: &Gpu) -> Result<(), GpuError> {
        gpu.bound()?;
        gpu.wait_until(|| gpu.is_idle(&self.stream), |_| thread::sleep(LOOK_EVERY))
    }
}
