//! Paged attention on one thread: decoding as a share of the read bandwidth that is probed in the
//! same run, prefill in operations per second.
//! `cargo bench -p tandem-cpu-kernels --bench attention`

#![allow(clippy::print_stdout, reason = "a benchmark reports to the terminal")]

use half::f16;
use std::hint::black_box;
use std::time::Instant;
use tandem_cpu_kernels::attention::{
    AttentionCall, AttentionParams, AttentionPart, AttentionScratch, KvLayout, KvStore, TokenRows,
};
use tandem_cpu_kernels::{Isa, Kernels, OutputColumns};

const CONTEXT_TOKENS: usize = 32_768;
const PREFILL_TOKENS: usize = 256;
const PREFILL_CONTEXT: usize = 4096;

/// `(n_kv_heads, group, head_dim, block_tokens)`.
const SHAPES: [(usize, usize, usize, usize); 5] =
    [(8, 4, 128, 32), (8, 1, 128, 32), (2, 6, 128, 32), (3, 3, 64, 32), (8, 2, 256, 32)];

fn best_seconds<T>(times: usize, mut f: impl FnMut() -> T) -> f64 {
    (0..times).fold(f64::MAX, |best, _| {
        let start = Instant::now();
        black_box(f());
        best.min(start.elapsed().as_secs_f64())
    })
}

/// Bytes per second of reading 256 MiB in order.
fn read_roof() -> f64 {
    let data = vec![1u64; 32 << 20];
    let seconds = best_seconds(8, || {
        data.chunks_exact(8).fold([0u64; 8], |mut sums, chunk| {
            sums.iter_mut().zip(chunk).for_each(|(sum, x)| *sum ^= x);
            sums
        })
    });
    (data.len() * 8) as f64 / seconds
}

struct Speeds {
    decode_bytes_per_s: f64,
    prefill_flops: f64,
}

fn measure(kernels: &Kernels, shape: (usize, usize, usize, usize)) -> Speeds {
    let (n_kv_heads, group, head_dim, block_tokens) = shape;
    let layout = KvLayout::new(n_kv_heads, head_dim, block_tokens).expect("a good layout");
    let n_blocks = CONTEXT_TOKENS / block_tokens;
    let fill = |i: usize| f16::from_f32((i * 7919 % 1000) as f32 / 1000.0 - 0.5);
    let mut keys: Vec<f16> = (0..n_blocks * layout.block_elements()).map(fill).collect();
    let mut values = keys.clone();
    // An odd multiplier scatters the blocks over the store.
    let blocks: Vec<u32> = (0..n_blocks).map(|b| (b * 769 % n_blocks) as u32).collect();
    let width = n_kv_heads * group * head_dim;
    let queries: Vec<f32> =
        (0..PREFILL_TOKENS * width).map(|i| (i * 31 % 101) as f32 / 101.0 - 0.5).collect();
    let mut out = vec![0.0f32; PREFILL_TOKENS * width];
    let mut scratch = AttentionScratch::new(head_dim);
    // SAFETY: store and output outlive the calls; one thread uses them.
    let (store, output) = unsafe {
        let (keys, values) = (keys.as_mut_ptr(), values.as_mut_ptr());
        let output = OutputColumns::new(out.as_mut_ptr(), PREFILL_TOKENS, width);
        (KvStore::new(keys, values, n_blocks, layout), output)
    };
    let n_heads = n_kv_heads * group;
    let params = AttentionParams { n_heads, scale: 0.1, window: None, softcap: None };
    let mut seconds = |times: usize, n_tokens: usize, context: usize| {
        let queries = TokenRows::new(&queries, n_tokens, width, width);
        let first_position = context - n_tokens;
        let call = AttentionCall { params, store, blocks: &blocks, first_position, queries };
        best_seconds(times, || {
            for kv_head in 0..n_kv_heads {
                let part = AttentionPart { kv_head, queries: 0..n_tokens };
                kernels.attend(&call, &part, output, &mut scratch);
            }
        })
    };
    let bytes = (CONTEXT_TOKENS * n_kv_heads * head_dim * 4) as f64;
    let pairs = PREFILL_TOKENS as f64 * (PREFILL_CONTEXT as f64 - PREFILL_TOKENS as f64 / 2.0);
    Speeds {
        decode_bytes_per_s: bytes / seconds(10, 1, CONTEXT_TOKENS),
        prefill_flops: pairs * (width * 4) as f64 / seconds(2, PREFILL_TOKENS, PREFILL_CONTEXT),
    }
}

fn main() {
    let roof = read_roof();
    println!("read roof {:.1} GB/s on one thread", roof / 1e9);
    for shape in SHAPES {
        for isa in [Isa::Avx2, Isa::Avx512].into_iter().filter(|isa| isa.is_available()) {
            let kernels = Kernels::for_isa(isa).expect("an available set");
            let speeds = measure(kernels, shape);
            println!(
                "{isa:>7} (kv heads, group, head_dim, block) {shape:?}: decode {:.1} GB/s, \
                 {:.0}% of the roof; prefill {:.0} GFLOP/s",
                speeds.decode_bytes_per_s / 1e9,
                100.0 * speeds.decode_bytes_per_s / roof,
                speeds.prefill_flops / 1e9,
            );
        }
    }
}
