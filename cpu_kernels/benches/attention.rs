//! Paged attention: decoding as a share of the read bandwidth and prefill as a share of the
//! multiply-add peak, both probed in the same run with the same threads.
//! `cargo bench -p tandem-cpu-kernels --bench attention -- [threads] [isa]`
//!
//! Decoding goes through as many layers as hold 256 MiB, so that keys and values come from memory
//! as they do in a model: by the time a layer is read again, the caches hold others.

#![allow(clippy::print_stdout, reason = "a benchmark reports to the terminal")]

#[path = "attention/roofs.rs"]
mod roofs;
#[path = "attention/store.rs"]
mod store;

use std::hint::black_box;
use std::time::Instant;
use store::Layers;
use tandem_cpu_kernels::attention::{AttentionParams, AttentionScratch, KvDType, KvLayout};
use tandem_cpu_kernels::{Isa, Kernels};

const STORE_BYTES: usize = 256 << 20;
const CONTEXTS: [usize; 4] = [256, 1024, 4096, 32_768];
const PREFILL_TOKENS: usize = 256;
const PREFILL_CONTEXT: usize = 4096;
const BLOCK_TOKENS: usize = 32;

/// `(n_kv_heads, group, head_dim)`.
const SHAPES: [(usize, usize, usize); 5] =
    [(3, 3, 64), (8, 1, 128), (8, 4, 128), (2, 6, 128), (1, 4, 256)];

fn best_seconds<T>(times: usize, mut f: impl FnMut() -> T) -> f64 {
    (0..times).fold(f64::MAX, |best, _| {
        let start = Instant::now();
        black_box(f());
        best.min(start.elapsed().as_secs_f64())
    })
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let threads: usize = arguments.first().map_or(1, |text| text.parse().expect("a number"));
    let isa = arguments.get(1).map_or(Isa::detect(), |name| name.parse().expect("an ISA"));
    let kernels = Kernels::for_isa(isa).expect("an ISA of this CPU");
    let (read, peak) = (roofs::read_bytes_per_s(threads), roofs::fma_flops(threads, isa));
    println!(
        "{isa}, {threads} thread(s): reads {:.1} GB/s, multiply-adds {:.0} GFLOP/s",
        read / 1e9,
        peak / 1e9
    );
    println!("type, kv heads, group, head_dim | decode GB/s (% of roof) at {CONTEXTS:?} | prefill");
    let cases = KvDType::ON_CPU.into_iter().flat_map(|dtype| SHAPES.map(|shape| (dtype, shape)));
    for (dtype, (n_kv_heads, group, head_dim)) in cases {
        let layout = KvLayout::new(n_kv_heads, head_dim, BLOCK_TOKENS, dtype);
        let layout = layout.expect("a good layout");
        print!("{dtype:4} {n_kv_heads:2} {group:2} {head_dim:4} |");
        for context in CONTEXTS {
            let layers = Layers::new(layout, context, STORE_BYTES);
            let speed = layers.bytes() as f64 / decode(kernels, &layers, group, threads);
            print!(" {:5.1} ({:3.0}%)", speed / 1e9, 100.0 * speed / read);
        }
        let flops = prefill(kernels, layout, group, threads);
        println!(" | {:4.0} GFLOP/s ({:2.0}%)", flops / 1e9, 100.0 * flops / peak);
    }
}

fn params(layout: KvLayout, group: usize) -> AttentionParams {
    let n_heads = layout.n_kv_heads() * group;
    AttentionParams { n_heads, scale: 0.1, window: None, softcap: None }
}

/// Seconds of one token's attention in all layers.
fn decode(kernels: &Kernels, layers: &Layers, group: usize, threads: usize) -> f64 {
    let params = params(layers.layout(), group);
    let items = layers.count() * layers.layout().n_kv_heads();
    best_seconds(6, || {
        on_threads(threads, &|thread| {
            let mut scratch = AttentionScratch::new(layers.layout().head_dim());
            let queries = layers.queries(1, params.n_heads);
            let mut out = vec![0.0f32; queries.len()];
            for item in items * thread / threads..items * (thread + 1) / threads {
                layers.attend(kernels, (params, item), &queries, (&mut out, &mut scratch));
            }
            black_box(out);
        });
    })
}

/// Operations per second of a chunk of a prompt, each thread with a store of its own.
fn prefill(kernels: &Kernels, layout: KvLayout, group: usize, threads: usize) -> f64 {
    let params = params(layout, group);
    let layers = Layers::new(layout, PREFILL_CONTEXT, 1);
    let seconds = best_seconds(3, || {
        on_threads(threads, &|_| {
            let mut scratch = AttentionScratch::new(layout.head_dim());
            let queries = layers.queries(PREFILL_TOKENS, params.n_heads);
            let mut out = vec![0.0f32; queries.len()];
            for item in 0..layout.n_kv_heads() {
                layers.attend(kernels, (params, item), &queries, (&mut out, &mut scratch));
            }
            black_box(out);
        });
    });
    let pairs = PREFILL_TOKENS as f64 * (PREFILL_CONTEXT as f64 - PREFILL_TOKENS as f64 / 2.0);
    threads as f64 * pairs * (params.n_heads * layout.head_dim() * 4) as f64 / seconds
}

fn on_threads(threads: usize, work: &(dyn Fn(usize) + Sync)) {
    std::thread::scope(|scope| {
        for thread in 1..threads {
            scope.spawn(move || work(thread));
        }
        work(0);
    });
}
