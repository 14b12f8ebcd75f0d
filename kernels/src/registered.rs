//! Host memory of others that the GPU copies from by itself.

use crate::fate::Fate;
use crate::gpu::{Gpu, GpuError};
use cudarc::driver::{CudaContext, sys};
use std::ops::Range;
use std::sync::Arc;

/// Memory is registered in pieces that end at multiples of this. A copy must not cross these ends.
const PIECE_BYTES: usize = 256 << 20;
/// Pages of all that our drivers run on.
const PAGE_BYTES: usize = 4096;
/// That contexts of other GPUs know it as well.
const FOR_ALL_GPUS: u32 = sys::CU_MEMHOSTREGISTER_PORTABLE;

/// Host memory registered with the driver, so that copies from it are asynchronous and fast, of all
/// GPUs. When dropped, after all copies, it is host memory like any other again; of a GPU that is
/// lost it stays registered.
pub struct RegisteredMemory {
    /// Addresses that were registered.
    pieces: Vec<usize>,
    bytes: usize,
    context: Arc<CudaContext>,
    fate: Arc<Fate>,
}

impl Gpu {
    /// Registers the pages that some bytes lie on.
    ///
    /// # Safety
    /// The memory stays mapped while the value lives.
    ///
    /// # Errors
    /// [`GpuError::HostOutOfMemory`], or [`GpuError::Failed`] with the driver's word, when it
    /// refuses a piece; then none is registered.
    pub unsafe fn register(&self, bytes: &[u8]) -> Result<RegisteredMemory, GpuError> {
        // SAFETY: as the caller promises.
        unsafe { self.register_pieces(bytes, pieces(pages(bytes))) }
    }

    /// The same in one piece: copies may cross all of it.
    ///
    /// # Safety
    /// The memory stays mapped while the value lives.
    ///
    /// # Errors
    /// As of [`Gpu::register`].
    pub unsafe fn register_whole(&self, bytes: &[u8]) -> Result<RegisteredMemory, GpuError> {
        // SAFETY: as the caller promises.
        unsafe { self.register_pieces(bytes, Some(pages(bytes)).filter(|pages| !pages.is_empty())) }
    }

    /// # Safety
    /// As of [`Gpu::register`]; the pieces are whole pages of these bytes.
    unsafe fn register_pieces(
        &self,
        bytes: &[u8],
        pieces: impl IntoIterator<Item = Range<usize>>,
    ) -> Result<RegisteredMemory, GpuError> {
        self.bound()?;
        let mut registered = RegisteredMemory {
            pieces: Vec::new(),
            bytes: bytes.len(),
            context: Arc::clone(self.stream().context()),
            fate: Arc::clone(self.fate()),
        };
        for piece in pieces {
            let at = bytes.as_ptr().with_addr(piece.start).cast_mut().cast();
            let _turn = self.turn();
            // SAFETY: the pages are mapped, as the caller promises for as long as it takes.
            unsafe { sys::cuMemHostRegister_v2(at, piece.len(), FOR_ALL_GPUS) }
                .result()
                .map_err(|error| self.not_locked("registering host memory", piece.len(), error))?;
            registered.pieces.push(piece.start);
        }
        Ok(registered)
    }
}

/// Addresses of the pages that some bytes lie on: a page is mapped as a whole.
fn pages(bytes: &[u8]) -> Range<usize> {
    let start = bytes.as_ptr().addr();
    start / PAGE_BYTES * PAGE_BYTES
        ..(start + bytes.len()).next_multiple_of(PAGE_BYTES) * usize::from(!bytes.is_empty())
}

/// Addresses cut where pieces of registered memory end.
pub(crate) fn pieces(addresses: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let first = addresses.start / PIECE_BYTES;
    let pieces = first..addresses.end.div_ceil(PIECE_BYTES);
    pieces.map(move |index| {
        let start = (index * PIECE_BYTES).max(addresses.start);
        start..((index + 1) * PIECE_BYTES).min(addresses.end)
    })
}

impl RegisteredMemory {
    /// Bytes that were registered.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for RegisteredMemory {
    fn drop(&mut self) {
        if let Some(_turn) = self.fate.at_rest(&self.context) {
            for piece in &self.pieces {
                let at = std::ptr::without_provenance_mut::<u8>(*piece).cast();
                // SAFETY: it was registered, and is given back once. A failure has no one to be
                // told to.
                let _ = unsafe { sys::cuMemHostUnregister(at) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_end_at_multiples_of_their_size_and_cover_all() {
        let ends = |piece: Range<usize>| (piece.start, piece.end);
        let cut = |addresses| pieces(addresses).map(ends).collect::<Vec<_>>();
        let end = 3 * PIECE_BYTES;
        assert_eq!(cut(4096..8192), [(4096, 8192)]);
        assert_eq!(cut(end - 64..end), [(end - 64, end)]);
        assert_eq!(cut(end - 64..end + 64), [(end - 64, end), (end, end + 64)]);
        let next = end + PIECE_BYTES;
        assert_eq!(cut(end..next + 1), [(end, next), (next, next + 1)]);
        assert_eq!(cut(0..0), []);
    }
}
