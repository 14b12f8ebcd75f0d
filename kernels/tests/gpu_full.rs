//! GPUs without free memory: kernels that were loaded start all the same, what can't be had is told
//! as such, and to other processes as well.

#![allow(clippy::print_stdout, reason = "tests say what they skip and measure")]

mod gpu;

use gpu::{from_gpu, gpu, on_gpu, said_by_child};
use std::time::Instant;
use tandem_cpu_kernels::DType;
use tandem_kernels::{DeviceMatrix, DeviceMemory, EmbedRows, Gpu, GpuError, driver};

const COLS: usize = 256;
/// Bytes that are not worth taking.
const BYTES_MIN: usize = 4096;
/// Loads of all kernels, each of which takes some 16 MiB, that fill what is left.
const KERNELS_MAX: usize = 16;

/// All memory of a GPU that was free.
struct Taken {
    memory: Vec<DeviceMemory>,
    /// What memory in pieces can't fill, kernels can.
    kernels: Vec<Gpu>,
}

impl Taken {
    /// Gives it back.
    fn release(self, gpu: &Gpu) {
        drop(self);
        gpu.give_back_freed().expect("freed memory");
    }
}

/// Takes all memory of a GPU that is free.
fn fill(gpu: &Gpu) -> Taken {
    let (mut taken, mut kernels) = (Vec::new(), Vec::new());
    let mut bytes = gpu.memory().expect("figures").0;
    while bytes >= BYTES_MIN {
        match gpu.alloc(bytes) {
            Ok(memory) => taken.push(memory),
            Err(GpuError::OutOfMemory { need_bytes, .. }) => {
                assert_eq!(need_bytes, Some(bytes));
                bytes /= 2;
            }
            Err(error) => panic!("{error}"),
        }
    }
    gpu.synchronize().expect("cleared memory");
    let is_full = |error: GpuError| {
        assert!(matches!(error, GpuError::OutOfMemory { need_bytes: None, .. }), "{error}");
    };
    for _ in 0..KERNELS_MAX {
        match gpu.open_beside(gpu.ordinal()) {
            Ok(other) => {
                let loaded = other.load_kernels();
                kernels.push(other);
                if loaded.map_err(is_full).is_err() {
                    break;
                }
            }
            Err(error) => {
                is_full(error);
                break;
            }
        }
    }
    Taken { memory: taken, kernels }
}

/// A few kernels, with all that they need.
struct Work {
    table: DeviceMatrix,
    rows: DeviceMemory,
    out: DeviceMemory,
    sums: DeviceMemory,
}

impl Work {
    fn new(gpu: &Gpu) -> Self {
        let shape = gpu.roof_matrices();
        let empty = DeviceMatrix::empty(gpu, DType::F32, (4, COLS)).expect("memory");
        Self {
            table: empty,
            rows: on_gpu(gpu, &[3u32]),
            out: on_gpu(gpu, &[1f32; COLS]),
            sums: gpu.alloc(shape.blocks * shape.rows * size_of::<f32>()).expect("memory"),
        }
    }

    /// Starts them and waits.
    fn run(&self, gpu: &Gpu) -> Result<(), GpuError> {
        gpu.multiply_rounds(1, self.sums.span())?;
        gpu.embed_rows(&EmbedRows {
            table: &self.table,
            rows: Some(self.rows.span()),
            tokens: 1,
            scale: 1.0,
            out: self.out.span(),
        })?;
        gpu.synchronize()
    }
}

#[test]
fn kernels_that_are_loaded_start_on_a_full_gpu() {
    let Some(gpu) = gpu() else { return };
    let free = || gpu.memory().expect("figures").0;
    for turn in ["first", "second"] {
        let (before, started) = (free(), Instant::now());
        gpu.load_kernels().expect("kernels");
        let (ms, bytes) = (started.elapsed().as_secs_f64() * 1e3, before.saturating_sub(free()));
        println!("{turn} load of all kernels: {ms:.1} ms, {bytes} bytes");
    }
    let work = Work::new(&gpu);
    let taken = fill(&gpu);
    println!("{} bytes are left beside {} loads", free(), taken.kernels.len());
    work.run(&gpu).expect("kernels that are there");
    taken.release(&gpu);
    assert_eq!(from_gpu(&gpu, &work.out, COLS), [0.0; COLS], "a row of zeros was looked up");
}

#[test]
fn a_kernel_that_a_full_gpu_cannot_load_is_lacking_memory_and_nothing_worse() {
    let Some(gpu) = gpu() else { return };
    let work = Work::new(&gpu);
    let taken = fill(&gpu);
    let free_bytes = gpu.memory().expect("figures").0;
    let ran = work.run(&gpu);
    println!("{free_bytes} bytes are left for kernels that were not loaded: {ran:?}");
    if let Err(error) = ran {
        let is_full = matches!(error, GpuError::OutOfMemory { need_bytes: None, .. });
        assert!(is_full, "{error}");
    }
    taken.release(&gpu);
}

#[test]
fn what_was_freed_is_there_for_kernels_and_for_others() {
    let Some(gpu) = gpu() else { return };
    let device = || driver().expect("it is open").device(0).expect("free memory");
    let before = device().memory_free_bytes;
    // Nobody has waited for what is freed here when the kernels are loaded.
    drop(fill(&gpu));
    gpu.load_kernels().expect("kernels");
    fill(&gpu).release(&gpu);
    let lost = before.saturating_sub(device().memory_free_bytes);
    assert!(lost < 1 << 30, "{lost} of {before} bytes were not given back");
}

const CHILD: &str = "child_finds_a_full_gpu";
const IN_CHILD: &str = "TANDEM_TEST_FINDS_A_FULL_GPU";

/// The child of the test below; on its own it does nothing.
#[test]
fn child_finds_a_full_gpu() {
    if std::env::var_os(IN_CHILD).is_none() {
        return;
    }
    let driver = driver().expect("the parent has one");
    let told = driver.device(0);
    println!("told: {told:?}");
    let opened = Gpu::open(&driver, 0).map(|_| ());
    println!("opened: {opened:?}");
    let held = told.map_or_else(|error| error.holders, |facts| facts.holders);
    assert!(held.iter().all(|holder| holder.pid != std::process::id()), "no context of ours");
    assert!(matches!(opened, Err(GpuError::OutOfMemory { .. })), "{opened:?}");
}

#[test]
fn another_process_is_told_that_a_gpu_is_full() {
    let Some(gpu) = gpu() else { return };
    let before = driver().expect("it is open").device(0).expect("free memory");
    let taken = fill(&gpu);
    println!("process {}, which was told: {before:?}", std::process::id());
    println!("{} pieces; {}", taken.memory.len(), said_by_child(CHILD, IN_CHILD));
    taken.release(&gpu);
}
