//! What a GPU can do at most, measured: bytes that are read from its memory, and
//! multiply-accumulates of its tensor cores in f16 with sums in f32.

use crate::gpu::{Gpu, GpuError, Span};
use cudarc::driver::DeviceRepr;

const READ_THREADS: usize = 512;
const READ_WARPS: usize = READ_THREADS / 32;
/// Blocks of readers per multiprocessor: as many as run at once.
const READ_BLOCKS: usize = 4;
/// How often the passes over the memory are measured; the best counts, since others only ever take
/// away. Several passes are measured at once, so that the host's part in a start is little of them.
const READ_MEASURES: usize = 12;
const READ_PASSES: usize = 4;
/// Bytes of noise that all memory is filled with.
const NOISE_BYTES: usize = 16 << 20;

const MAC_THREADS: usize = 256;
const MAC_ROWS: usize = 128;
const MAC_DEPTH: usize = 64;
/// Columns of the second matrix, blocks per multiprocessor and bytes of shared memory with wgmma
/// and without.
const MAC_SHAPE_WGMMA: (usize, usize, usize) = (256, 1, 256 * MAC_DEPTH * 2 + 1024);
const MAC_SHAPE: (usize, usize, usize) = (32, 2, 0);
/// Bursts of arithmetic, and how long each lasts: past the start, short of the clock's retreat.
const MAC_BURSTS: usize = 20;
const MAC_BURST_US: f64 = 10_000.0;
/// Rounds of the first burst, which says how many fill the time.
const MAC_ROUNDS_FIRST: usize = 1000;

#[repr(C)]
#[derive(Clone, Copy)]
struct ReadArgs {
    from: u64,
    found: u64,
    count: u64,
}

// SAFETY: plain numbers in the order of `RoofReadArgs` in roof.cu.
unsafe impl DeviceRepr for ReadArgs {}

#[repr(C)]
#[derive(Clone, Copy)]
struct MacArgs {
    sums: u64,
    rounds: u32,
}

// SAFETY: plain numbers in the order of `RoofMacArgs` in roof.cu.
unsafe impl DeviceRepr for MacArgs {}

/// The matrices that [`Gpu::multiply_rounds`] multiplies, and how many blocks do it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoofMatrices {
    /// Rows of the first.
    pub rows: usize,
    /// Rows of the second.
    pub columns: usize,
    /// Elements of a row of either.
    pub depth: usize,
    /// Blocks.
    pub blocks: usize,
}

impl RoofMatrices {
    fn macs(&self, rounds: usize) -> f64 {
        (self.rows * self.columns * self.depth * self.blocks) as f64 * rounds as f64
    }
}

impl Gpu {
    /// Bytes per second that all multiprocessors read together from `bytes` bytes of memory, which
    /// are allocated for it: at least 16 MiB, and far more than the caches hold, or their speed is
    /// what comes out.
    ///
    /// # Errors
    /// No memory, or what the driver refuses.
    pub fn read_bytes_per_second(&self, bytes: usize) -> Result<f64, GpuError> {
        let bytes = bytes.max(NOISE_BYTES) / NOISE_BYTES * NOISE_BYTES;
        let (memory, found) = (self.alloc(bytes)?, self.alloc(self.found_bytes())?);
        let noise: Vec<u32> = (0..NOISE_BYTES as u32 / 4).map(noise).collect();
        self.upload(&noise, memory.span())?;
        for start in (NOISE_BYTES..bytes).step_by(NOISE_BYTES) {
            let part = |start| memory.span().part(start, NOISE_BYTES);
            self.copy(part(0), part(start))?;
        }
        let mut best_us = f64::INFINITY;
        for _ in 0..READ_MEASURES {
            let mut passes = 0..READ_PASSES;
            let pass = |_| self.read_words(memory.span(), found.span());
            let us = self.time(|| passes.try_for_each(pass))?;
            best_us = best_us.min(us / READ_PASSES as f64);
        }
        Ok(bytes as f64 / best_us * 1e6)
    }

    /// Multiply-accumulates per second of all tensor cores together, on numbers of
    /// [`Gpu::mac_numbers`].
    ///
    /// # Errors
    /// No memory, or what the driver refuses.
    pub fn macs_per_second(&self) -> Result<f64, GpuError> {
        let shape = self.roof_matrices();
        let sums = self.alloc(shape.blocks * shape.rows * size_of::<f32>())?;
        let burst = |rounds| self.time(|| self.multiply_rounds(rounds, sums.span()));
        let mut best = 0.0f64;
        let mut rounds = MAC_ROUNDS_FIRST;
        for _ in 0..=MAC_BURSTS {
            let us = burst(rounds)?;
            best = best.max(shape.macs(rounds) / us * 1e6);
            rounds = ((rounds as f64 * MAC_BURST_US / us) as usize).max(1);
        }
        Ok(best)
    }

    /// Which arithmetic [`Gpu::macs_per_second`] measures.
    pub fn mac_numbers(&self) -> &'static str {
        if self.has_wgmma() { "f16 (wgmma)" } else { "f16 (mma.sync)" }
    }

    /// Microseconds that the GPU takes for what `start` starts.
    fn time(&self, start: impl FnOnce() -> Result<(), GpuError>) -> Result<f64, GpuError> {
        let before = self.mark()?;
        start()?;
        let after = self.mark()?;
        self.synchronize()?;
        before.us_until(&after)
    }

    /// Bytes that [`Gpu::read_words`] writes.
    pub fn found_bytes(&self) -> usize {
        self.multiprocessors() * READ_BLOCKS * READ_WARPS * size_of::<u32>()
    }

    /// Reads all words of a span, whose length is a multiple of 16 bytes. `found` gets u32 whose
    /// XOR is that of all words.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// When `found` is too short.
    pub fn read_words(&self, from: Span<'_>, found: Span<'_>) -> Result<(), GpuError> {
        let blocks = self.multiprocessors() * READ_BLOCKS;
        let count = from.bytes() / 16;
        let arguments = ReadArgs {
            from: from.of(count, 16),
            found: found.of(blocks * READ_WARPS, size_of::<u32>()),
            count: count as u64,
        };
        // SAFETY: both spans were checked.
        unsafe { self.launch("read_words", ([blocks, 1, 1], READ_THREADS, 0), &arguments) }
    }

    /// What [`Gpu::multiply_rounds`] multiplies.
    pub fn roof_matrices(&self) -> RoofMatrices {
        let (columns, blocks_each, _) = self.mac_shape();
        let blocks = self.multiprocessors() * blocks_each;
        RoofMatrices { rows: MAC_ROWS, columns, depth: MAC_DEPTH, blocks }
    }

    fn mac_shape(&self) -> (usize, usize, usize) {
        if self.has_wgmma() { MAC_SHAPE_WGMMA } else { MAC_SHAPE }
    }

    /// Multiplies two matrices `rounds` times in every block, and adds up: `sums` gets
    /// `[blocks, rows]` f32, the sum over each row of `rounds · a · bᵀ`. Element `i` of both, `a`'s
    /// before `b`'s, is what `roof_element` of `roof.cu` says.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// When `sums` is too short.
    pub fn multiply_rounds(&self, rounds: usize, sums: Span<'_>) -> Result<(), GpuError> {
        let shape = self.roof_matrices();
        let arguments = MacArgs {
            sums: sums.of(shape.blocks * shape.rows, size_of::<f32>()),
            rounds: u32::try_from(rounds).unwrap_or(u32::MAX),
        };
        let launch = ([shape.blocks, 1, 1], MAC_THREADS, self.mac_shape().2);
        // SAFETY: the span was checked.
        unsafe { self.launch("multiply_rounds", launch, &arguments) }
    }
}

/// Words without a pattern (Knuth's multiplicative hash, folded).
fn noise(index: u32) -> u32 {
    let hash = index.wrapping_mul(2_654_435_761);
    hash ^ hash >> 15
}
