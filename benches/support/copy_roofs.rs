//! What copies between host and GPU reach at most, for benches of KV blocks.

use std::time::Instant;
use tandem_kernels::{CopyWay, Gpu, driver};

/// Bytes that are copied at once.
const LANE_BYTES: usize = 256 << 20;
/// Copies in memory; the fastest counts.
const PASSES: usize = 9;

/// Bytes per second out of the device and back: of the bus where there is one, else of a copy in
/// memory.
pub fn roofs(on_gpu: bool) -> [f64; 2] {
    if on_gpu {
        let gpu = Gpu::open(&driver().unwrap(), 0).unwrap();
        let mut lanes = gpu.copy_lanes(LANE_BYTES).unwrap();
        return [CopyWay::FromGpu, CopyWay::ToGpu].map(|way| {
            lanes.pinned(way, 1).unwrap();
            lanes.pinned(way, 8).unwrap()
        });
    }
    let (from, mut to) = (vec![1_u8; LANE_BYTES], vec![2_u8; LANE_BYTES]);
    let copies = (0..PASSES).map(|_| {
        let started = Instant::now();
        std::hint::black_box(&mut to).copy_from_slice(std::hint::black_box(&from));
        LANE_BYTES as f64 / started.elapsed().as_secs_f64()
    });
    [copies.fold(0.0, f64::max); 2]
}
