//! Weights in a GPU's memory. Quantised ones are taken apart into planes of chunks: a chunk is four
//! groups of 32 elements of a row, shared by four neighbouring threads as tensor cores want it.
//! Thread t has elements 4t .. 4t + 4 and 16 + 4t .. 16 + 4t + 4 of each group, in words in which a
//! byte belongs to one of four elements; fields of a byte count the two parts of the four groups.
//!
//! | type | quants of a thread, per chunk | highs | scales |
//! |---|---|---|---|
//! | Q4_0, IQ4_NL | 16 bytes: 4-bit fields | | d of each group |
//! | Q4_1 | 16 | | d, m |
//! | Q5_0, Q5_1 | 16 | 4: fifth bits | d (, m) |
//! | Q8_0 | 32 | | d |
//! | Q2_K | 8: 2-bit fields | | of 8 groups: 16 × (s, t), d, m |
//! | Q3_K | 8 | 4: third bits | of 8 groups: 12 bytes, d |
//! | Q4_K | 16 | | of 8 groups: d, m, 12 bytes |
//! | Q5_K | 16 | 4: fifth bits | of 8 groups: d, m, 12 bytes |
//! | Q6_K | 16 | 8: 2-bit fields | of 8 groups: 16 × i8, d |
//! | IQ4_XS | 16 | | of 8 groups: d, 6 bytes |
//! | INT4_128 | 16 | | of 4 groups: d, z, a byte of nothing |
//! | INT4_64 | 16 | | of 4 groups: 2 × d, 2 × z |
//! | INT4_32 | 16 | | of 4 groups: 4 × d, 4 nibbles z |
//! | E4M3_128, E4M3_32 | 32: e4m3 | | of 4 groups: s, or 4 × s |
//!
//! Rows lie in blocks of 16, or what is left of them: of a block chunk after chunk, of a chunk row
//! after row (of scales, block of groups after block), so that what a warp reads at a time lies in
//! one piece. A row's chunks a step apart would be as many places of the memory for each warp.
//!
//! Not a bit is added or lost, but that byte, and that rows whose length is no multiple of 128
//! elements are filled up to one with zeros. F32, F16 and BF16 lie as in their file. What that is
//! beside the bits of files is bounded in `tests/weight_bytes.rs`.

use crate::gpu::{DeviceMemory, Gpu, GpuError, Span};
use crate::products::{CHUNK, lower_name};
use cudarc::driver::DeviceRepr;
use std::ops::Range;
use tandem_cpu_kernels::blocks::GROUP;
use tandem_cpu_kernels::{DType, Layout};

/// Bytes of a file that are on their way at a time.
const STAGING_BYTES: usize = 32 << 20;
const PACK_THREADS: usize = 256;
/// Rows that the CPU's layout interleaves, and chunks that a block of `pack_rows16` takes of them.
const ROWS16: usize = 16;
const ROWS16_CHUNKS: usize = 8;
/// Planes start at multiples of this.
const PLANE_ALIGNMENT: usize = 256;

/// A matrix of weights in a GPU's memory, `[rows, cols]`.
pub struct DeviceMatrix {
    dtype: DType,
    rows: usize,
    cols: usize,
    memory: DeviceMemory,
    planes: [usize; 3],
    is_changing: bool,
}

/// Pointers to the planes, as kernels take them.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct Planes {
    pub quants: u64,
    pub highs: u64,
    pub scales: u64,
}

/// How many bytes a type has in each plane.
#[derive(Clone, Copy)]
struct PlaneBytes {
    /// Of a group.
    quants: usize,
    /// Of a group.
    highs: usize,
    /// Of `scale_groups` groups.
    scales: usize,
    scale_groups: usize,
}

/// Staging memory for uploads; one serves all matrices of a model.
pub struct Staging {
    memory: DeviceMemory,
}

impl Staging {
    /// Some megabytes on a GPU.
    ///
    /// # Errors
    /// No memory.
    pub fn new(gpu: &Gpu) -> Result<Staging, GpuError> {
        Ok(Staging { memory: gpu.alloc(STAGING_BYTES)? })
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct PackArgs {
    file: u64,
    planes: Planes,
    first_row: u64,
    rows: u64,
    groups: u32,
    all_rows: u32,
}

// SAFETY: plain numbers in the order of `PackArgs` in pack.cu.
unsafe impl DeviceRepr for PackArgs {}

fn plane_bytes(dtype: DType) -> Option<PlaneBytes> {
    let (quants, highs, scales, scale_groups) = match dtype {
        DType::Q4_0 | DType::IQ4_NL => (16, 0, 2, 1),
        DType::Q4_1 => (16, 0, 4, 1),
        DType::Q5_0 => (16, 4, 2, 1),
        DType::Q5_1 => (16, 4, 4, 1),
        DType::Q8_0 => (32, 0, 2, 1),
        DType::Q2_K => (8, 0, 20, 8),
        DType::Q3_K => (8, 4, 14, 8),
        DType::Q4_K => (16, 0, 16, 8),
        DType::Q5_K => (16, 4, 16, 8),
        DType::Q6_K => (16, 8, 18, 8),
        DType::IQ4_XS => (16, 0, 8, 8),
        DType::INT4_128 => (16, 0, 4, 4),
        DType::INT4_64 => (16, 0, 6, 4),
        DType::INT4_32 => (16, 0, 10, 4),
        DType::E4M3_128 => (32, 0, 4, 4),
        DType::E4M3_32 => (32, 0, 16, 4),
        DType::F32 | DType::F16 | DType::BF16 => return None,
    };
    Some(PlaneBytes { quants, highs, scales, scale_groups })
}

/// Whether a type is taken apart: floats lie row after row.
pub(crate) fn has_planes(dtype: DType) -> bool {
    plane_bytes(dtype).is_some()
}

/// Bytes of quants and high bits that a lane has of a chunk.
pub(crate) fn lane_bytes(dtype: DType) -> usize {
    plane_bytes(dtype).map_or(0, |bytes| bytes.quants + bytes.highs)
}

/// Bytes of the scales of a row's chunk, or of what more chunks share.
pub(crate) fn unit_bytes(dtype: DType) -> usize {
    let of = |bytes: PlaneBytes| bytes.scales * CHUNK.div_ceil(bytes.scale_groups);
    plane_bytes(dtype).map_or(0, of)
}

/// Where the planes of a matrix start, and its bytes.
fn places(dtype: DType, rows: usize, cols: usize) -> ([usize; 3], usize) {
    let Some(bytes) = plane_bytes(dtype) else {
        return ([0; 3], rows * dtype.row_bytes(cols).unwrap_or(0));
    };
    let groups = rows * cols.div_ceil(GROUP).next_multiple_of(CHUNK);
    let highs = (groups * bytes.quants).next_multiple_of(PLANE_ALIGNMENT);
    let scales = highs + (groups * bytes.highs).next_multiple_of(PLANE_ALIGNMENT);
    let end = scales + (groups / bytes.scale_groups * bytes.scales);
    ([0, highs, scales], end.next_multiple_of(PLANE_ALIGNMENT))
}

impl DeviceMatrix {
    /// Bytes that a matrix takes: those of its file, less than a KiB, and what fills up its rows.
    pub fn bytes_of(dtype: DType, rows: usize, cols: usize) -> usize {
        places(dtype, rows, cols).1
    }

    /// Copies a matrix that lies row by row in `file` to a GPU and takes it apart there.
    ///
    /// # Errors
    /// No memory, or what the driver refuses.
    ///
    /// # Panics
    /// When `file` is not `rows` rows of whole blocks, or a row of floats no multiple of 8.
    pub fn upload(
        gpu: &Gpu,
        staging: &Staging,
        dtype: DType,
        (rows, cols): (usize, usize),
        file: &[u8],
    ) -> Result<DeviceMatrix, GpuError> {
        let row_bytes = dtype.row_bytes(cols).expect("whole blocks");
        assert_eq!(file.len(), rows * row_bytes, "bytes of a matrix [{rows}, {cols}] of {dtype}");
        assert!(cols.is_multiple_of(8), "rows of floats are read in eights, got {cols}");
        let matrix = DeviceMatrix::empty(gpu, dtype, (rows, cols))?;
        if !has_planes(dtype) {
            gpu.upload(file, matrix.memory.span())?;
            return Ok(matrix);
        }
        let span = staging.memory.span();
        let rows_at_once = span.bytes() / row_bytes;
        assert!(rows_at_once > 0, "rows of {row_bytes} bytes");
        let mut first_row = 0;
        for part in file.chunks(rows_at_once * row_bytes) {
            gpu.upload(part, span)?;
            let rows = part.len() / row_bytes;
            matrix.pack(gpu, span, first_row..first_row + rows)?;
            first_row += rows;
        }
        // Products ask for weights before the kernels ahead of them are done.
        gpu.synchronize()?;
        Ok(matrix)
    }

    /// A matrix without contents, for [`DeviceMatrix::pack`].
    ///
    /// # Errors
    /// No memory.
    ///
    /// # Panics
    /// When a row is not of whole blocks.
    pub fn empty(
        gpu: &Gpu,
        dtype: DType,
        (rows, cols): (usize, usize),
    ) -> Result<DeviceMatrix, GpuError> {
        assert!(dtype.row_bytes(cols).is_some(), "rows of {cols} elements of {dtype}");
        let (planes, bytes) = places(dtype, rows, cols);
        let memory = gpu.alloc(bytes)?;
        Ok(DeviceMatrix { dtype, rows, cols, memory, planes, is_changing: false })
    }

    /// The same for contents that change between the products of a step, which wait for all kernels
    /// before them then.
    ///
    /// # Errors
    /// No memory.
    ///
    /// # Panics
    /// When a row is not of whole blocks.
    pub fn changing(
        gpu: &Gpu,
        dtype: DType,
        shape: (usize, usize),
    ) -> Result<DeviceMatrix, GpuError> {
        Ok(DeviceMatrix { is_changing: true, ..DeviceMatrix::empty(gpu, dtype, shape)? })
    }

    /// Takes some rows from where they lie on the GPU as in a file. Products of the same matrix
    /// may ask for weights before that is done, if it is not [made for
    /// this](DeviceMatrix::changing).
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// When there are no such rows, or `file` is shorter.
    pub fn pack(&self, gpu: &Gpu, file: Span<'_>, rows: Range<usize>) -> Result<(), GpuError> {
        let row_bytes = self.dtype.row_bytes(self.cols).expect("whole blocks");
        assert!(rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        if rows.is_empty() {
            return Ok(());
        }
        let bytes = rows.len() * row_bytes;
        let Some(plane_bytes) = plane_bytes(self.dtype) else {
            let to = self.memory.span().part(rows.start * row_bytes, bytes);
            return gpu.copy(file.part(0, bytes), to);
        };
        let block_groups = self.dtype.block_elements() / GROUP;
        debug_assert!(plane_bytes.scale_groups.is_multiple_of(block_groups));
        let arguments = self.pack_args(file.of(bytes, 1), rows.clone());
        let lanes = 4 * (self.cols / GROUP).div_ceil(CHUNK);
        let kernel = format!("pack_{}", lower_name(self.dtype));
        let grid = [(rows.len() * lanes).div_ceil(PACK_THREADS), 1, 1];
        // SAFETY: the file has these rows (asserted), and the planes have room for all rows.
        unsafe { gpu.launch(&kernel, (grid, PACK_THREADS, 0), &arguments) }
    }

    /// Takes some rows from where they lie on the GPU as `Layout::Rows16`, as
    /// [`DeviceMatrix::pack`] does from a file.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// When the type has no such layout, `packed` is shorter, there are no such rows, or they do
    /// not start and end with a group of 16 or the matrix.
    pub fn pack_rows16(
        &self,
        gpu: &Gpu,
        packed: Span<'_>,
        rows: Range<usize>,
    ) -> Result<(), GpuError> {
        assert!(self.dtype.is_quantized(), "{} has no Rows16 layout", self.dtype);
        assert!(rows.start <= rows.end && rows.end <= self.rows, "{rows:?} of {}", self.rows);
        let is_end = |row: usize| row == self.rows || row.is_multiple_of(ROWS16);
        assert!(is_end(rows.start) && is_end(rows.end), "rows {rows:?} cut a group of {ROWS16}");
        if rows.is_empty() {
            return Ok(());
        }
        // The kernel sees a matrix that begins with these rows.
        let arguments = PackArgs {
            planes: self.planes_from(rows.start),
            all_rows: (self.rows - rows.start) as u32,
            ..self.pack_args(packed.of(self.piece_bytes(Layout::Rows16, &rows), 1), 0..rows.len())
        };
        let tiles = self.cols.div_ceil(CHUNK * GROUP).div_ceil(ROWS16_CHUNKS);
        let kernel = format!("pack_rows16_{}", lower_name(self.dtype));
        let grid = [rows.len().div_ceil(ROWS16) * tiles, 1, 1];
        // SAFETY: the span has these rows (asserted), and the planes have room for all rows.
        unsafe { gpu.launch(&kernel, (grid, PACK_THREADS, 0), &arguments) }
    }

    /// Some rows, where rows lie one after the other: those of floats.
    pub(crate) fn float_rows(&self, rows: Range<usize>) -> Span<'_> {
        let row_bytes = self.dtype.row_bytes(self.cols).expect("whole blocks");
        self.memory.span().part(rows.start * row_bytes, rows.len() * row_bytes)
    }

    /// The planes from a row on that starts a block of 16: blocks lie one after the other.
    fn planes_from(&self, row: usize) -> Planes {
        let bytes = plane_bytes(self.dtype).expect("quantised types have planes");
        let groups = row * self.cols.div_ceil(GROUP).next_multiple_of(CHUNK);
        let Planes { quants, highs, scales } = self.planes();
        Planes {
            quants: quants + (groups * bytes.quants) as u64,
            highs: highs + (groups * bytes.highs) as u64,
            scales: scales + (groups / bytes.scale_groups * bytes.scales) as u64,
        }
    }

    /// Bytes of rows as they come from the CPU: interleaved ones in whole groups of 16.
    pub(crate) fn piece_bytes(&self, layout: Layout, rows: &Range<usize>) -> usize {
        let row_bytes = self.dtype.row_bytes(self.cols).expect("whole blocks");
        row_bytes
            * match layout {
                Layout::Rows16 => rows.len().next_multiple_of(ROWS16),
                Layout::RowMajor => rows.len(),
            }
    }

    fn pack_args(&self, file: u64, rows: Range<usize>) -> PackArgs {
        PackArgs {
            file,
            planes: self.planes(),
            first_row: rows.start as u64,
            rows: rows.len() as u64,
            groups: (self.cols / GROUP) as u32,
            all_rows: self.rows as u32,
        }
    }

    /// Whether its contents change between products of a step.
    pub(crate) fn is_changing(&self) -> bool {
        self.is_changing
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Rows: elements of the product.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements of a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.memory.bytes()
    }

    pub(crate) fn planes(&self) -> Planes {
        let start = self.memory.span().pointer;
        let [quants, highs, scales] = self.planes.map(|place| start + place as u64);
        Planes { quants, highs, scales }
    }

    pub(crate) fn span(&self) -> Span<'_> {
        self.memory.span()
    }
}
