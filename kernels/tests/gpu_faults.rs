//! GPUs that fail for good: a wait ends, the failure has its type, and nothing is asked of the GPU
//! any more. A lost context takes the process with it, so it is lost in a child.

#![allow(clippy::print_stdout, reason = "tests say what they skip")]

mod gpu;

use gpu::{gpu, on_gpu, said_by_child};
use std::time::{Duration, Instant};
use tandem_cpu_kernels::DType;
use tandem_kernels::{DeviceMatrix, EmbedRows, GpuError, Staging};

/// Seconds of arithmetic that a hung GPU is played with.
const BUSY: f64 = 3.0;

#[test]
fn a_gpu_that_does_not_finish_is_hung_and_left_alone() {
    let Some(gpu) = gpu() else { return };
    let shape = gpu.roof_matrices();
    let bytes = shape.blocks * shape.rows * 4;
    let (sums, pinned) = (gpu.alloc(bytes).expect("memory"), gpu.alloc_pinned(64).expect("memory"));
    let per_round = (shape.rows * shape.columns * shape.depth * shape.blocks) as f64;
    let rounds = (BUSY * gpu.macs_per_second().expect("a roof") / per_round) as usize;
    gpu.limit_waits(Duration::from_millis(100));
    gpu.multiply_rounds(rounds, sums.span()).expect("a launch");
    let started = Instant::now();
    let hung = GpuError::Hung { ordinal: gpu.ordinal(), wait_max_ms: 100 };
    assert_eq!(gpu.synchronize(), Err(hung.clone()));
    let waited = started.elapsed();
    assert!(waited >= Duration::from_millis(100), "{waited:?}");
    // Nothing from here on waits for the GPU.
    let mut numbers = [0f32; 4];
    assert_eq!(gpu.download(sums.span(), &mut numbers), Err(hung.clone()));
    assert_eq!(gpu.upload(&numbers, sums.span()), Err(hung.clone()));
    assert_eq!(gpu.alloc(16).map(|_| ()), Err(hung));
    drop((sums, pinned));
    drop(gpu);
    let waited = started.elapsed();
    assert!(waited < Duration::from_secs_f64(BUSY / 2.0), "{waited:?}");
}

#[test]
fn waits_are_as_long_as_the_work() {
    let Some(gpu) = gpu() else { return };
    let shape = gpu.roof_matrices();
    let sums = gpu.alloc(shape.blocks * shape.rows * 4).expect("memory");
    gpu.limit_waits(Duration::from_secs(60));
    for rounds in [1, 1000, 100_000, 400_000] {
        gpu.multiply_rounds(rounds, sums.span()).expect("a launch");
        gpu.synchronize().expect("a wait");
        let started = Instant::now();
        let before = gpu.mark().expect("a mark");
        gpu.multiply_rounds(rounds, sums.span()).expect("a launch");
        let after = gpu.mark().expect("a mark");
        gpu.synchronize().expect("a wait");
        let waited_us = started.elapsed().as_secs_f64() * 1e6;
        let worked_us = before.us_until(&after).expect("a time");
        println!("{rounds} rounds: {worked_us:.1} us of work, {waited_us:.1} us waited");
        assert!(waited_us < 1.05 * worked_us + 2000.0, "{waited_us} us for {worked_us} us");
    }
}

const CHILD: &str = "child_reads_a_row_that_is_not_there";
const IN_CHILD: &str = "TANDEM_TEST_LOSES_ITS_GPU";

/// The child of the test below; on its own it does nothing.
#[test]
fn child_reads_a_row_that_is_not_there() {
    if std::env::var_os(IN_CHILD).is_none() {
        return;
    }
    let gpu = gpu().expect("the parent has one");
    let (rows, cols) = (4, 256);
    let staging = Staging::new(&gpu).expect("memory");
    let table = DeviceMatrix::empty(&gpu, DType::F32, (rows, cols)).expect("memory");
    let (wild, out) = (on_gpu(&gpu, &[4_000_000_000u32]), gpu.alloc(cols * 4).expect("memory"));
    let pass = EmbedRows {
        table: &table,
        rows: Some(wild.span()),
        tokens: 1,
        scale: 1.0,
        out: out.span(),
    };
    gpu.embed_rows(&pass).expect("a launch");
    let lost = gpu.synchronize().expect_err("memory that nobody has");
    assert!(matches!(&lost, GpuError::Lost { .. }), "{lost}");
    assert_eq!(gpu.alloc(16).map(|_| ()), Err(lost.clone()));
    drop((staging, table, wild, out));
    drop(gpu);
    println!("answer: {lost}");
}

#[test]
fn a_kernel_that_touches_wild_memory_loses_the_gpu_and_nothing_crashes() {
    if gpu().is_none() {
        return;
    }
    let said = said_by_child(CHILD, IN_CHILD);
    assert!(said.contains("CUDA_ERROR_ILLEGAL_ADDRESS; only a new process"), "{said}");
}
