//! How fast weights are interleaved, beside copying of the same bytes by the same workers.
//!
//! `cargo run --release --example load_rate -- [threads] [MiB]`
//!
//! For every quantised type: GB/s of file bytes, best of three. "fresh" writes memory that nobody
//! has touched, with and without huge pages, so that its page faults count; "again" writes memory
//! that is there. The source is memory too: a file in the page cache that is mapped.
#![allow(clippy::print_stdout)]

use std::sync::{Mutex, PoisonError};
use std::time::Instant;
use tandem::executor::{CpuPool, PoolOptions, Worker};
use tandem::memory::{AlignedBytes, DisjointChunks, HugePages};
use tandem_cpu_kernels::repack::ROWS;
use tandem_cpu_kernels::{DType, repack_row_group};

const COLS: usize = 2048;
const PASSES: usize = 3;

/// What a worker does with the source bytes of one group of rows.
type Fill<'a> = dyn Fn(&[u8], &mut [u8]) + Sync + 'a;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, default: usize| {
        arguments.get(at).map_or(default, |text| text.parse().expect("a number"))
    };
    let (threads, bytes) = (number(0, 2), number(1, 256) << 20);
    let options = PoolOptions {
        threads,
        cores: (0..threads).collect(),
        nodes: Default::default(),
        spin_us: 50,
    };
    let mut pool = CpuPool::new(&options).expect("threads");
    let source = random_bytes(bytes);
    println!("{threads} thread(s), {} MiB, GB/s of file bytes", bytes >> 20);
    println!("what      fresh  fresh, small pages   again");
    let copy = |source: &[u8], target: &mut [u8]| target.copy_from_slice(source);
    measure(&mut pool, "copy", (&source, ROWS * COLS / 2), &copy);
    for dtype in DType::ALL.into_iter().filter(|dtype| dtype.is_quantized()) {
        let group_bytes = ROWS * dtype.row_bytes(COLS).expect("whole blocks");
        let repack = |source: &[u8], target: &mut [u8]| {
            repack_row_group(dtype, COLS, source, target);
        };
        measure(&mut pool, &dtype.to_string(), (&source, group_bytes), &repack);
    }
}

fn measure(pool: &mut CpuPool, what: &str, source: (&[u8], usize), fill: &Fill<'_>) {
    let whole = source.0.len() / source.1 * source.1;
    let memory = |huge_pages| AlignedBytes::zeroed(whole, huge_pages).expect("memory");
    let rate = |seconds: f64| whole as f64 / seconds / 1e9;
    let fresh = |pool: &mut CpuPool, huge_pages| {
        (0..PASSES)
            .map(|_| seconds_of(pool, source, &mut memory(huge_pages), fill))
            .fold(f64::INFINITY, f64::min)
    };
    let huge = fresh(pool, HugePages::Advise);
    let small = fresh(pool, HugePages::SystemDefault);
    let mut target = memory(HugePages::Advise);
    let again = (0..=PASSES)
        .map(|_| seconds_of(pool, source, &mut target, fill))
        .fold(f64::INFINITY, f64::min);
    println!("{what:8} {:6.2} {:19.2} {:7.2}", rate(huge), rate(small), rate(again));
}

/// One pass over all groups of rows, each worker over its share, as weights are loaded.
fn seconds_of(
    pool: &mut CpuPool,
    (source, group_bytes): (&[u8], usize),
    target: &mut [u8],
    fill: &Fill<'_>,
) -> f64 {
    let groups = DisjointChunks::new(target, group_bytes);
    let slowest = Mutex::new(0.0_f64);
    pool.run(&|worker: &Worker<'_>| {
        worker.meet();
        let started = Instant::now();
        for index in worker.share(groups.count(), 1) {
            if let Some(target) = groups.claim(index) {
                fill(&source[index * group_bytes..][..target.len()], target);
            }
        }
        let mut slowest = slowest.lock().unwrap_or_else(PoisonError::into_inner);
        *slowest = slowest.max(started.elapsed().as_secs_f64());
    })
    .expect("no worker panics");
    slowest.into_inner().unwrap_or_else(PoisonError::into_inner)
}

fn random_bytes(bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..bytes / 8).flat_map(|_| next().to_le_bytes()).collect()
}
