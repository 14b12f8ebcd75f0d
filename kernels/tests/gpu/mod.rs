//! What the tests on a GPU share.
#![allow(dead_code, reason = "each test file uses a part")]

pub mod kept;
pub mod specification;
#[path = "../../../tests/support/turn.rs"]
mod turn;
pub mod world;

use std::process::Command;
use std::time::Duration;
use tandem_cpu_kernels::{ActivationBuffer, Isa, Kernels};
use tandem_kernels::{DeviceMemory, EightBits, Gpu, driver};

/// The first GPU, or a message why the test is skipped. Where `TANDEM_REQUIRE_GPU` is set there
/// must be one.
pub fn gpu() -> Option<Gpu> {
    turn::take_turn();
    let opened =
        driver().map_err(tandem_kernels::GpuError::from).and_then(|driver| Gpu::open(&driver, 0));
    match opened {
        Ok(gpu) => {
            if has_few_cases() {
                gpu.limit_waits(PATIENCE);
            }
            Some(gpu)
        }
        Err(error) if std::env::var_os("TANDEM_REQUIRE_GPU").is_none() => {
            println!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// What a product of a large matrix may take under a race detector, beside others.
const PATIENCE: Duration = Duration::from_secs(600);

/// Whether tests leave cases out: a race detector takes a hundred times as long.
fn has_few_cases() -> bool {
    std::env::var_os("TANDEM_FEW_CASES").is_some()
}

/// All cases of a test, or each `nth` where `TANDEM_FEW_CASES` is set.
pub fn cases<T>(all: impl IntoIterator<Item = T>, nth: usize) -> impl Iterator<Item = T> {
    all.into_iter().step_by(if has_few_cases() { nth } else { 1 })
}

/// A block's shared memory on smaller GPUs: of generations 8.6, 8.9 and 12.0, and of 7.5.
const SMALLER_KIB: [usize; 2] = [99, 64];

/// A GPU, and the same where a block has as little shared memory as on smaller ones.
pub fn with_smaller_ones() -> Vec<Gpu> {
    let smaller = SMALLER_KIB.into_iter().filter_map(|kib| {
        let mut gpu = gpu()?;
        gpu.limit_shared_bytes(kib << 10);
        Some(gpu)
    });
    gpu().into_iter().chain(smaller).collect()
}

/// Numbers that look random (splitmix64).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// In ±1.
    pub fn floats(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0).collect()
    }
}

pub fn scalar() -> &'static Kernels {
    Kernels::for_isa(Isa::Scalar).expect("scalar is everywhere")
}

/// Numbers on the GPU.
pub fn on_gpu<T: tandem_kernels::Plain>(gpu: &Gpu, numbers: &[T]) -> DeviceMemory {
    let memory = gpu.alloc(size_of_val(numbers)).expect("memory");
    gpu.upload(numbers, memory.span()).expect("an upload");
    memory
}

/// The first `count` numbers of some memory.
pub fn from_gpu(gpu: &Gpu, memory: &DeviceMemory, count: usize) -> Vec<f32> {
    let mut numbers = vec![f32::NAN; count];
    gpu.download(memory.span(), &mut numbers).expect("a download");
    numbers
}

/// Memory of `[rows, cols]` activations in 8 bits.
pub struct EightBitMemory {
    quants: DeviceMemory,
    scales: DeviceMemory,
    passes: usize,
    shape: (usize, usize),
}

impl EightBitMemory {
    pub fn new(gpu: &Gpu, rows: usize, cols: usize, second: bool) -> Self {
        let passes = if second { 2 } else { 1 };
        // What nobody wrote must not be taken for a number.
        let poisoned = |bytes: usize| on_gpu(gpu, &vec![0xffu8; bytes]);
        Self {
            quants: poisoned(EightBits::quant_bytes(rows, cols, passes)),
            scales: poisoned(EightBits::scale_bytes(rows, cols, passes)),
            passes,
            shape: (rows, cols),
        }
    }

    pub fn view(&self) -> EightBits<'_> {
        EightBits { quants: self.quants.span(), scales: self.scales.span(), passes: self.passes }
    }

    /// The integers of all rows, then of their second pass, in the order of their elements; and the
    /// 8 bytes of each group's scale and sums.
    pub fn bytes(&self, gpu: &Gpu) -> (Vec<i8>, Vec<u8>) {
        let (mut quants, mut scales) =
            (vec![0i8; self.quants.bytes()], vec![0u8; self.scales.bytes()]);
        gpu.download(self.quants.span(), &mut quants).expect("a download");
        gpu.download(self.scales.span(), &mut scales).expect("a download");
        let ((rows, cols), stride) = (self.shape, EightBits::stride(self.shape.0));
        let chunks = cols.div_ceil(128);
        let in_pair = |e: usize| {
            let (group, e) = (e / 32 % 2, e % 32);
            e % 16 / 4 * 16 + group * 8 + e / 16 * 4 + e % 4
        };
        let (mut integers, mut of_groups) = (Vec::new(), Vec::new());
        for (pass, row) in (0..self.passes).flat_map(|pass| (0..rows).map(move |row| (pass, row))) {
            let chunk = |e: usize| (pass * chunks + e / 128) * stride + row;
            integers.extend(
                (0..cols).map(|e| quants[chunk(e) * 128 + e % 128 / 64 * 64 + in_pair(e % 64)]),
            );
            for group in 0..cols / 32 {
                let at = (chunk(32 * group) * 4 + group % 4) * 8;
                of_groups.extend_from_slice(&scales[at..at + 8]);
            }
        }
        (integers, of_groups)
    }
}

/// What the specification makes of values in 8 bits: `values − residual` of each row.
pub fn rounded(values: &[f32], cols: usize) -> Vec<f32> {
    let mut buffer = ActivationBuffer::new(scalar().activation_form(), 1, cols);
    let mut all = Vec::with_capacity(values.len());
    for row in values.chunks_exact(cols) {
        // SAFETY: one thread.
        let target = unsafe { buffer.writer(1, cols) };
        scalar().quantize_activations(row, target, 0, 0..cols);
        let mut residual = vec![0.0; cols];
        scalar().activation_residual(row, (target, 0), 0..cols, &mut residual);
        all.extend(row.iter().zip(&residual).map(|(value, residual)| value - residual));
    }
    all
}

/// The largest |a − b|, and the largest |b|.
pub fn distance(a: &[f32], b: &[f32]) -> (f32, f32) {
    assert_eq!(a.len(), b.len(), "lengths");
    let off = a.iter().zip(b).map(|(a, b)| if a == b { 0.0 } else { (a - b).abs() });
    // `f32::max` forgets NaN, which must not pass.
    let max = |all: &mut dyn Iterator<Item = f32>| {
        all.fold(0.0f32, |max, x| if x.is_nan() || x > max { x } else { max })
    };
    (max(&mut off.into_iter()), max(&mut b.iter().map(|b| b.abs())))
}

/// What a test of this program says in a process of its own, in which a variable is set. It ends
/// well there.
pub fn said_by_child(test: &str, variable: &str) -> String {
    let output = Command::new(std::env::current_exe().expect("this test's program"))
        .args([test, "--exact", "--nocapture"])
        .env(variable, "1")
        .output()
        .expect("the child runs");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}
