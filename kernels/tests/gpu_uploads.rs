//! Numbers that are copied to a GPU were read when the call returns, whatever memory they lie in.

#![allow(clippy::print_stdout, reason = "a test that is skipped says so")]

mod gpu;

use gpu::gpu;
use tandem_kernels::Gpu;

/// Seconds of arithmetic that the copy has to wait for.
const BUSY: f64 = 0.2;
const BYTES: usize = 1 << 20;

/// Keeps the GPU busy, uploads, and overwrites at once what was uploaded. What has arrived.
fn arrived(gpu: &Gpu, bytes: &mut [u8]) -> Vec<u8> {
    let shape = gpu.roof_matrices();
    let sums = gpu.alloc(shape.blocks * shape.rows * 4).expect("memory");
    let per_round = (shape.rows * shape.columns * shape.depth * shape.blocks) as f64;
    let rounds = (BUSY * gpu.macs_per_second().expect("a roof") / per_round) as usize;
    let there = gpu.alloc(bytes.len()).expect("memory");
    bytes.fill(1);
    gpu.multiply_rounds(rounds, sums.span()).expect("a launch");
    gpu.upload(bytes, there.span()).expect("an upload");
    bytes.fill(2);
    let mut back = vec![0; bytes.len()];
    gpu.download(there.span(), &mut back).expect("a download");
    back
}

#[test]
fn what_is_uploaded_may_be_overwritten_at_once() {
    let Some(gpu) = gpu() else { return };
    let ones = vec![1; BYTES];
    let mut pinned = gpu.alloc_pinned(BYTES).expect("pinned memory");
    assert!(arrived(&gpu, &mut pinned) == ones, "pinned");
    let mut pageable = vec![0; BYTES];
    assert!(arrived(&gpu, &mut pageable) == ones, "pageable");
    // SAFETY: the memory outlives what is registered of it.
    let registered = unsafe { gpu.register(&pageable) }.expect("registered memory");
    assert!(arrived(&gpu, &mut pageable) == ones, "registered");
    drop(registered);
}
