//! Weights that stream from the host's memory inside a step, against the same ones that stay on the
//! GPU, whose products `gpu_products.rs` holds against the specification.

#![allow(clippy::print_stdout, reason = "tests say what they skip, and what they measure")]

mod gpu;
#[path = "gpu_spill/measured.rs"]
mod measured;

use gpu::specification::{file_bytes, round};
use gpu::{EightBitMemory, Random, cases, from_gpu, gpu, on_gpu};
use std::ops::Range;
use std::thread;
use std::time::Duration;
use tandem_cpu_kernels::{DType, Layout, packed_bytes, repack_row_group};
use tandem_kernels::{
    Columns, DeviceMatrix, DeviceMemory, Gate, Gated, Gpu, GpuError, Product, Span, Staging,
    WeightRing, half_bytes,
};

/// Bases of steps one after the other: they wrap around, also inside a step.
const BASES: [u32; 6] = [0, 1024, 0x7000_0000, 0xe000_0000, 0xffff_fffd, 16];

/// Activations in the form that products take.
struct Activations {
    values: DeviceMemory,
    eight_bits: EightBitMemory,
    halves: DeviceMemory,
    shape: (usize, usize),
}

impl Activations {
    fn new(gpu: &Gpu, (columns, cols): (usize, usize), random: &mut Random) -> Self {
        let values = on_gpu(gpu, &random.floats(columns * cols));
        let made = Self {
            values,
            eight_bits: EightBitMemory::new(gpu, columns, cols, false),
            halves: gpu.alloc(half_bytes(columns, cols)).expect("memory"),
            shape: (columns, cols),
        };
        gpu.round_rows(&round(&made.view(gpu))).expect("rounding");
        made
    }

    fn view(&self, gpu: &Gpu) -> Columns<'_> {
        let (columns, cols) = self.shape;
        let is_narrow = columns <= gpu.narrow_max();
        let eight_bits = is_narrow.then(|| self.eight_bits.view());
        let halves = (!is_narrow).then(|| self.halves.span());
        Columns { columns, cols, values: Some(self.values.span()), eight_bits, halves }
    }
}

fn product<'a>(matrix: &'a DeviceMatrix, out: Span<'a>) -> Product<'a> {
    Product { matrix, bias: None, out, stride: matrix.rows() }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// The products of a matrix with some activations.
fn products(gpu: &Gpu, matrix: &DeviceMatrix, x: &Activations) -> Vec<u32> {
    let count = x.shape.0 * matrix.rows();
    let out = on_gpu(gpu, &vec![f32::NAN; count]);
    gpu.multiply(&[product(matrix, out.span())], &x.view(gpu)).expect("products");
    bits(&from_gpu(gpu, &out, count))
}

/// Layouts in which the CPU may hold a type, the usual one first.
fn layouts(dtype: DType) -> &'static [Layout] {
    if dtype.is_quantized() { &[Layout::Rows16, Layout::RowMajor] } else { &[Layout::RowMajor] }
}

/// A matrix of a file as the CPU holds it.
fn as_the_cpu_has(
    (dtype, layout): (DType, Layout),
    (rows, cols): (usize, usize),
    file: &[u8],
) -> Vec<u8> {
    if layout == Layout::RowMajor {
        return file.to_vec();
    }
    let row_bytes = dtype.row_bytes(cols).expect("whole blocks");
    let bytes = packed_bytes(dtype, Layout::Rows16, rows, cols).expect("a size");
    let mut packed = vec![0xa5; bytes];
    for (file, packed) in file.chunks(16 * row_bytes).zip(packed.chunks_mut(16 * row_bytes)) {
        repack_row_group(dtype, cols, file, packed);
    }
    packed
}

#[test]
fn rows_in_pieces_are_taken_apart_as_those_of_a_file() {
    let Some(gpu) = gpu() else { return };
    let staging = Staging::new(&gpu).expect("staging memory");
    let mut random = Random(1);
    let all = DType::ALL.into_iter();
    let all = all.flat_map(|dtype| layouts(dtype).iter().map(move |layout| (dtype, *layout)));
    for (dtype, layout) in all {
        let block = dtype.block_elements().max(32);
        let shapes = [(1, block), (16, 3 * block), (37, 768), (300, 2304), (45, 5 * block)];
        for (rows, cols) in cases(shapes, 2) {
            let file = file_bytes(dtype, rows, cols, &mut random);
            let wanted = DeviceMatrix::upload(&gpu, &staging, dtype, (rows, cols), &file);
            let wanted = wanted.expect("an upload");
            let packed = on_gpu(&gpu, &as_the_cpu_has((dtype, layout), (rows, cols), &file));
            let got = DeviceMatrix::changing(&gpu, dtype, (rows, cols)).expect("memory");
            // In two pieces, of which the second comes first.
            let middle = (rows / 2).next_multiple_of(16).min(rows);
            let bytes = middle * dtype.row_bytes(cols).expect("whole blocks");
            let second = packed.span().part(bytes, packed.bytes() - bytes);
            for (piece, rows) in [(second, middle..rows), (packed.span(), 0..middle)] {
                match layout {
                    Layout::Rows16 => got.pack_rows16(&gpu, piece, rows).expect("a launch"),
                    Layout::RowMajor => got.pack(&gpu, piece, rows).expect("a launch"),
                }
            }
            for columns in [1, 12] {
                let x = Activations::new(&gpu, (columns, cols), &mut random);
                let same = products(&gpu, &got, &x) == products(&gpu, &wanted, &x);
                assert!(same, "{dtype} {layout:?} [{rows}, {cols}] × {columns}");
            }
        }
    }
}

#[test]
fn a_released_ring_waits_for_no_piece_and_no_slot() {
    let Some(gpu) = gpu() else { return };
    let (shape, base) = ((16, 64), gpu.alloc(16).expect("memory"));
    let matrix = DeviceMatrix::changing(&gpu, DType::Q4_0, shape).expect("memory");
    let bytes = vec![0; 2 * 16 * 18];
    let ring = gpu.weight_ring(1, bytes.len()).expect("memory");
    assert!(ring.bytes() >= bytes.len());
    gpu.upload(&[0u32], base.span()).expect("an upload");
    thread::scope(|scope| {
        let ring = &ring;
        scope.spawn(move || {
            thread::sleep(Duration::from_millis(30));
            ring.release();
        });
        // A piece that never comes, one that nobody takes, and one that has no slot.
        let rows = (&matrix, Layout::Rows16, 0..shape.0);
        ring.take(&gpu, rows, (base.span(), 2)).expect("launches");
        // SAFETY: the ring is waited for below.
        unsafe { ring.send(&gpu, 0, [&bytes[..]; 2], || false).expect("an end") };
        gpu.synchronize().expect("a wait that ends");
        ring.synchronize(&gpu).expect("a wait that ends");
    });
}

/// Memory of whole pages: what is registered shares none with others.
struct Pages {
    memory: Vec<u8>,
    start: usize,
    bytes: usize,
}

impl Pages {
    fn new(bytes: usize) -> Pages {
        let bytes = bytes.next_multiple_of(4096);
        let memory = vec![0; bytes + 4096];
        let start = memory.as_ptr().align_offset(4096);
        Pages { memory, start, bytes }
    }

    fn bytes(&self) -> &[u8] {
        &self.memory[self.start..][..self.bytes]
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..][..self.bytes]
    }
}

/// Matrices of one type, layout and shape that follow each other through a ring, other ones in
/// every second step.
struct Pieces {
    dtype: DType,
    layout: Layout,
    shape: (usize, usize),
    /// As the CPU has them, one behind the other.
    host: Pages,
    /// The same ones on the GPU.
    resident: Vec<DeviceMatrix>,
}

const PIECES: usize = 5;

impl Pieces {
    fn new(
        gpu: &Gpu,
        (dtype, layout): (DType, Layout),
        shape: (usize, usize),
        random: &mut Random,
    ) -> Pieces {
        let staging = Staging::new(gpu).expect("staging memory");
        let files: Vec<_> =
            (0..2 * PIECES).map(|_| file_bytes(dtype, shape.0, shape.1, random)).collect();
        let upload = |file: &Vec<u8>| DeviceMatrix::upload(gpu, &staging, dtype, shape, file);
        let resident = files.iter().map(|file| upload(file).expect("an upload")).collect();
        let on_host = |file: &Vec<u8>| as_the_cpu_has((dtype, layout), shape, file);
        let bytes = on_host(&files[0]).len();
        let mut host = Pages::new(2 * PIECES * bytes);
        for (file, place) in files.iter().zip(host.bytes_mut().chunks_mut(bytes)) {
            place.copy_from_slice(&on_host(file));
        }
        Pieces { dtype, layout, shape, host, resident }
    }

    fn piece_bytes(&self) -> usize {
        packed_bytes(self.dtype, self.layout, self.shape.0, self.shape.1).expect("a size")
    }

    /// Where one of them comes to, as a ring takes it.
    fn all_of<'m>(&self, matrix: &'m DeviceMatrix) -> (&'m DeviceMatrix, Layout, Range<usize>) {
        (matrix, self.layout, 0..self.shape.0)
    }

    /// Sends those of a step, each when there is room.
    ///
    /// # Safety
    /// The step is waited for while this lives.
    unsafe fn send(&self, gpu: &Gpu, ring: &WeightRing, (step, base): (usize, u32)) {
        let bytes = self.piece_bytes();
        let pieces = (0..PIECES)
            .map(|index| &self.host.bytes()[(step % 2 * PIECES + index) * bytes..][..bytes]);
        // SAFETY: as the caller promises.
        unsafe { ring.send(gpu, base, pieces, || false).expect("copies") };
    }
}

/// Steps of which the last is launched and the others are replayed: `start` takes the pieces of a
/// step in their order, `check` looks at what the step with its number has made.
fn in_steps(
    gpu: &Gpu,
    (pieces, ring, base): (&Pieces, &WeightRing, Span<'_>),
    start: impl Fn() -> Result<(), GpuError>,
    check: impl Fn(usize),
) {
    // This loads the kernels, which might wait for the GPU once it waits for pieces.
    let graph = gpu.record(&start).expect("a record").expect("a graph");
    for (step, step_base) in BASES.into_iter().enumerate() {
        gpu.upload(&[step_base], base).expect("an upload");
        thread::scope(|scope| {
            // SAFETY: the step is waited for below.
            scope.spawn(move || unsafe { pieces.send(gpu, ring, (step, step_base)) });
            match BASES.get(step + 1) {
                // SAFETY: all that was recorded is still there.
                Some(_) => unsafe { gpu.replay(&graph).expect("a launch") },
                None => start().expect("launches"),
            }
            gpu.synchronize().expect("a step");
        });
        ring.synchronize(gpu).expect("a step");
        check(step);
    }
}

#[test]
fn products_of_streamed_weights_are_those_of_resident_ones_in_every_step() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random(3);
    let base = gpu.alloc(16).expect("memory");
    for (dtype, shape) in [
        (DType::Q4_0, (4096, 1024)),
        (DType::Q4_0, (37, 320)),
        (DType::Q6_K, (37, 768)),
        (DType::Q4_K, (1600, 2048)),
        (DType::E4M3_128, (200, 512)),
        (DType::E4M3_32, (1000, 1056)),
        (DType::F32, (37, 96)),
        (DType::F16, (51, 256)),
        (DType::BF16, (4096, 1024)),
    ] {
        let pieces = Pieces::new(&gpu, (dtype, layouts(dtype)[0]), shape, &mut random);
        // SAFETY: the pieces live as long.
        let registered = unsafe { gpu.register(pieces.host.bytes()) }.expect("memory");
        assert_eq!(registered.bytes(), pieces.host.bytes().len());
        let matrix = DeviceMatrix::changing(&gpu, dtype, shape).expect("memory");
        for columns in [1, 6, 40, 150] {
            let ring = gpu.weight_ring(2, pieces.piece_bytes()).expect("memory");
            let x = Activations::new(&gpu, (columns, shape.1), &mut random);
            let outs: Vec<_> =
                (0..PIECES).map(|_| on_gpu(&gpu, &vec![f32::NAN; columns * shape.0])).collect();
            let start = || {
                for (index, out) in outs.iter().enumerate() {
                    ring.take(&gpu, pieces.all_of(&matrix), (base.span(), index))?;
                    gpu.multiply(&[product(&matrix, out.span())], &x.view(&gpu))?;
                }
                Ok(())
            };
            let wanted: Vec<_> =
                pieces.resident.iter().map(|matrix| products(&gpu, matrix, &x)).collect();
            in_steps(&gpu, (&pieces, &ring, base.span()), start, |step| {
                for (index, out) in outs.iter().enumerate() {
                    let got = bits(&from_gpu(&gpu, out, columns * shape.0));
                    let same = got == wanted[step % 2 * PIECES + index];
                    assert!(same, "{dtype} {shape:?} × {columns}, step {step}, piece {index}");
                }
            });
        }
    }
}

/// The gate is the piece before: both are streamed, and multiplied at once.
#[test]
fn gated_products_of_streamed_weights_are_those_of_resident_ones() {
    let Some(gpu) = gpu() else { return };
    let (mut random, dtype, shape) = (Random(4), DType::Q4_0, (4096, 1024));
    let base = gpu.alloc(16).expect("memory");
    let pieces = Pieces::new(&gpu, (dtype, Layout::Rows16), shape, &mut random);
    let matrices = [0, 1].map(|_| DeviceMatrix::changing(&gpu, dtype, shape).expect("memory"));
    let counters = gpu.alloc(Gated::counter_bytes(shape.0)).expect("memory");
    for columns in [1, 5] {
        let ring = gpu.weight_ring(3, pieces.piece_bytes()).expect("memory");
        let x = Activations::new(&gpu, (columns, shape.1), &mut random);
        let outs = [0, 1].map(|_| on_gpu(&gpu, &vec![f32::NAN; columns * shape.0]));
        let target = EightBitMemory::new(&gpu, columns, shape.0, false);
        let multiply = |gate, up| {
            let gated = Gated {
                gate: product(gate, outs[0].span()),
                up: product(up, outs[1].span()),
                activation: Gate::Silu,
                out: None,
                eight_bits: Some(target.view()),
                halves: None,
                counters: counters.span(),
            };
            gpu.multiply_gated(None, &gated, &x.view(&gpu)).map(|_| ())
        };
        let start = || {
            ring.take(&gpu, pieces.all_of(&matrices[0]), (base.span(), 0))?;
            for index in 1..PIECES {
                let matrix = &matrices[index % 2];
                ring.take(&gpu, pieces.all_of(matrix), (base.span(), index))?;
                multiply(&matrices[1 - index % 2], &matrices[index % 2])?;
            }
            Ok(())
        };
        in_steps(&gpu, (&pieces, &ring, base.span()), start, |step| {
            let got = target.bytes(&gpu);
            let last = step % 2 * PIECES + PIECES - 1;
            multiply(&pieces.resident[last - 1], &pieces.resident[last]).expect("a product");
            assert!(got == target.bytes(&gpu), "{columns} columns, step {step}");
        });
    }
}
