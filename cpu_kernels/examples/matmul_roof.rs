//! Matmul over more weights than any cache holds, against the DRAM read roof of the same run.
//!
//! `cargo run --release -p tandem-cpu-kernels --example matmul_roof -- [threads] [isa]
//! [packed|row_major] [type|all] [columns of the matrix] [MiB of weights] [most columns]`
//!
//! Prints for each type and number of columns the weight bytes per second, their share of the
//! roof, and the cost against one column. Best of several passes, since other work disturbs.
#![allow(clippy::print_stdout)]

use std::ops::Range;
use std::time::Instant;
use tandem_cpu_kernels::*;

/// The number given as argument `index`.
fn number(index: usize, default: usize) -> usize {
    std::env::args().nth(index).map_or(default, |text| text.parse().expect("a number"))
}

fn cols() -> usize {
    number(5, 4096)
}

fn weight_bytes() -> usize {
    number(6, 320) << 20
}

const PASSES: usize = 4;

/// Bytes in huge pages and on cache lines, as an engine lays them: hardware fetches within a page,
/// and vector loads across two lines cost double.
struct Memory {
    allocated: Vec<u8>,
    start: usize,
    length: usize,
}

impl Memory {
    fn new(length: usize) -> Memory {
        const HUGE_PAGE: usize = 2 << 20;
        let mut allocated = vec![0; length + HUGE_PAGE];
        let start = allocated.as_ptr().align_offset(HUGE_PAGE);
        #[cfg(target_os = "linux")]
        {
            let first = allocated[start..].as_mut_ptr().cast();
            // SAFETY: advice about pages of our own that nobody has touched; it changes no byte.
            unsafe { libc::madvise(first, length, libc::MADV_HUGEPAGE) };
        }
        Memory { allocated, start, length }
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.allocated[self.start..][..self.length]
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let threads = number(1, 1);
    let isa = arguments.get(1).map_or(Isa::detect(), |name| name.parse().expect("an ISA"));
    let row_major = arguments.get(2).is_some_and(|layout| layout == "row_major");
    let kernels = Kernels::for_isa(isa).expect("an ISA of this CPU");
    let roof = read_roof(kernels, threads);
    println!("{isa}, {threads} thread(s), read roof {:.1} GB/s", roof / 1e9);
    println!("type     layout    columns   GB/s  % of roof  GMAC/s  cost of 1 column x");
    let only = arguments
        .get(3)
        .filter(|name| *name != "all")
        .map(|name| name.parse::<DType>().expect("a type"));
    for dtype in DType::ALL.into_iter().filter(|dtype| only.is_none_or(|only| only == *dtype)) {
        let layout = if row_major { Layout::RowMajor } else { layout_for(dtype, isa) };
        measure_type(kernels, (dtype, layout), threads, roof);
    }
}

fn measure_type(
    kernels: &'static Kernels,
    (dtype, layout): (DType, Layout),
    threads: usize,
    roof: f64,
) {
    let row_bytes = dtype.row_bytes(cols()).expect("whole blocks");
    let rows = weight_bytes() / row_bytes / 32 * 32;
    let mut memory = Memory::new(rows / 16 * 16 * row_bytes);
    let bytes = memory.bytes();
    fill(dtype, layout, bytes);
    let view = MatrixView::new(dtype, layout, rows, cols(), bytes).expect("a valid view");
    let mut single = 0.0;
    let most = number(7, 512);
    for columns in [1, 2, 4, 8, 16, 32, 64, 256, 512].into_iter().filter(|some| *some <= most) {
        let passes = if columns > 16 { 2 } else { PASSES };
        let seconds = multiply(kernels, &view, columns, (threads, passes));
        single = if columns == 1 { seconds } else { single };
        let rate = view.bytes().len() as f64 / seconds;
        println!(
            "{dtype:8} {layout:<9} {columns:7} {:6.1} {:10.1} {:7.0} {:8.2}",
            rate / 1e9,
            100.0 * rate / roof,
            (rows * cols() * columns) as f64 / seconds / 1e9,
            seconds / single,
            layout = format!("{layout:?}"),
        );
    }
}

/// 16 rows of ordinary values, repeated over the whole matrix.
fn fill(dtype: DType, layout: Layout, matrix: &mut [u8]) {
    let values: Vec<f32> =
        (0..16 * cols()).map(|i| ((i * 7919) % 2003) as f32 / 1000.0 - 1.0).collect();
    let mut group = vec![0; 16 * dtype.row_bytes(cols()).expect("whole blocks")];
    quantize_row(dtype, &values, &mut group);
    if layout == Layout::Rows16 {
        let source = group.clone();
        repack_row_group(dtype, cols(), &source, &mut group);
    }
    matrix.chunks_exact_mut(group.len()).for_each(|rows| rows.copy_from_slice(&group));
}

/// Seconds of the best pass.
fn multiply(
    kernels: &'static Kernels,
    view: &MatrixView<'_>,
    columns: usize,
    (threads, passes): (usize, usize),
) -> f64 {
    // On cache lines, as an engine would lay them: vector loads across two lines cost double.
    let mut x = vec![0.0; columns * cols() + 16];
    let start = x.as_ptr().align_offset(64);
    let x = &mut x[start..][..columns * cols()];
    x.iter_mut().enumerate().for_each(|(i, x)| *x = (i % 251) as f32 / 125.0 - 1.0);
    let mut buffer = ActivationBuffer::new(kernels.activation_form(), columns, cols());
    // SAFETY: one thread fills it before it is viewed.
    let target = unsafe { buffer.writer(columns, cols()) };
    for (column, values) in x.chunks_exact(cols()).enumerate() {
        kernels.quantize_activations(values, target, column, 0..cols());
    }
    let activations = target.view(x);
    let mut out = vec![0.0; columns * view.rows()];
    // SAFETY: the pointer is that of `out`; threads get disjoint rows.
    let out = unsafe { OutputColumns::new(out.as_mut_ptr(), columns, view.rows()) };
    best_of(passes, || {
        on_threads(threads, view.rows(), |rows| kernels.matmul(view, &activations, rows, out));
    })
}

fn read_roof(kernels: &'static Kernels, threads: usize) -> f64 {
    let mut memory = Memory::new(weight_bytes());
    let memory = memory.bytes();
    memory.fill(1);
    // SAFETY: any bytes are integers.
    let (_, memory, _) = unsafe { memory.align_to::<u64>() };
    let seconds = best_of(2 * PASSES, || {
        on_threads(threads, memory.len(), |range| {
            std::hint::black_box(kernels.read_words(&memory[range]));
        });
    });
    weight_bytes() as f64 / seconds
}

fn best_of(passes: usize, mut work: impl FnMut()) -> f64 {
    let mut best = f64::INFINITY;
    for _ in 0..passes {
        let start = Instant::now();
        work();
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}

/// Runs `work` on equal ranges of `0..length`, cut at multiples of 16.
fn on_threads(threads: usize, length: usize, work: impl Fn(Range<usize>) + Sync) {
    let cut =
        |index: usize| if index == threads { length } else { length * index / threads / 16 * 16 };
    std::thread::scope(|scope| {
        for index in 1..threads {
            let work = &work;
            scope.spawn(move || work(cut(index)..cut(index + 1)));
        }
        work(0..cut(1));
    });
}
