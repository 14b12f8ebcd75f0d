//! How fast weights arrive and are taken apart.

use super::gpu::gpu;
use super::{Pages, layouts};
use std::thread;
use std::time::Instant;
use tandem_cpu_kernels::{DType, Layout, packed_bytes};
use tandem_kernels::{DeviceMatrix, Gpu};

/// Seconds in which pieces, sent by a thread of their own, are taken apart, and their bytes.
fn streamed(gpu: &Gpu, (dtype, host): (DType, &[u8])) -> (f64, usize) {
    let (layout, cols, at_once) = (layouts(dtype)[0], 4096, 16 << 20);
    let row_bytes = dtype.row_bytes(cols).expect("whole blocks");
    let rows = at_once / row_bytes / 16 * 16;
    let ring = gpu.weight_ring(8, rows * row_bytes).expect("memory");
    let matrix = DeviceMatrix::changing(gpu, dtype, (4 * rows, cols)).expect("memory");
    let (base, mut best) = (gpu.alloc(16).expect("memory"), f64::INFINITY);
    let pieces = host.chunks_exact(rows * row_bytes);
    for step_base in [0, 1024, 2048] {
        gpu.upload(&[step_base], base.span()).expect("an upload");
        gpu.synchronize().expect("an upload");
        let started = Instant::now();
        thread::scope(|scope| {
            let (ring, pieces) = (&ring, pieces.clone());
            // SAFETY: the ring is waited for below.
            scope.spawn(move || unsafe { ring.send(gpu, step_base, pieces, || false) });
            for index in 0..host.len() / (rows * row_bytes) {
                let rows = index % 4 * rows..(index % 4 + 1) * rows;
                ring.take(gpu, (&matrix, layout, rows), (base.span(), index)).expect("launches");
            }
            gpu.synchronize().expect("a step");
        });
        ring.synchronize(gpu).expect("copies");
        best = best.min(started.elapsed().as_secs_f64());
    }
    (best, pieces.len() * rows * row_bytes)
}

#[test]
fn streaming_is_measured() {
    let Some(gpu) = gpu() else { return };
    // A kernel that is loaded while another waits for weights would keep these from being sent.
    gpu.load_kernels().expect("kernels");
    let shape = (14336, 4096);
    let marks = [gpu.mark().expect("a mark"), gpu.mark().expect("a mark")];
    for dtype in DType::ALL {
        let layout = layouts(dtype)[0];
        let bytes = packed_bytes(dtype, layout, shape.0, shape.1).expect("a size");
        let packed = gpu.alloc(bytes).expect("memory");
        let matrix = DeviceMatrix::changing(&gpu, dtype, shape).expect("memory");
        for times in [1, 10] {
            gpu.mark_again(&marks[0]).expect("a mark");
            for _ in 0..times {
                match layout {
                    Layout::Rows16 => matrix.pack_rows16(&gpu, packed.span(), 0..shape.0),
                    Layout::RowMajor => matrix.pack(&gpu, packed.span(), 0..shape.0),
                }
                .expect("a launch");
            }
            gpu.mark_again(&marks[1]).expect("a mark");
            let us = marks[0].us_until(&marks[1]).expect("a time") / f64::from(times);
            let gbs = bytes as f64 / us / 1e3;
            println!("pack {dtype}, {times} times: {us:.1} us, {gbs:.0} GB/s read");
        }
    }
    let (slots, bytes) = (4, 64 << 20);
    let host = Pages::new(slots * bytes);
    let started = Instant::now();
    // SAFETY: the memory lives as long.
    let _registered = unsafe { gpu.register(host.bytes()) }.expect("memory");
    println!("registering {} bytes: {:?}", slots * bytes, started.elapsed());
    let ring = gpu.weight_ring(slots, bytes).expect("memory");
    for base in [0, 1024, 2048] {
        let started = Instant::now();
        // SAFETY: the ring is waited for below.
        unsafe { ring.send(&gpu, base, host.bytes().chunks(bytes), || false).expect("copies") };
        ring.synchronize(&gpu).expect("copies");
        let gbs = (slots * bytes) as f64 / started.elapsed().as_secs_f64() / 1e9;
        println!("send: {gbs:.1} GB/s");
    }
    for dtype in [DType::Q4_0, DType::E4M3_128, DType::E4M3_32, DType::BF16, DType::F32] {
        let (seconds, bytes) = streamed(&gpu, (dtype, host.bytes()));
        println!("sent and taken, {dtype}: {:.1} GB/s", bytes as f64 / seconds / 1e9);
    }
}
