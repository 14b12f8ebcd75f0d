//! Paged attention against a naive f64 softmax, and its independence of the batch, bit by bit.

#[path = "attention/world.rs"]
mod world;

use proptest::prelude::*;
use tandem_cpu_kernels::attention::{
    AttentionCall, AttentionPart, AttentionScratch, KvDType, KvLayout, KvLayoutError,
    SEGMENT_TOKENS,
};
use tandem_cpu_kernels::{Isa, Kernels, OutputColumns};
use world::{Shape, World};

fn kernels() -> Vec<&'static Kernels> {
    Isa::available().map(|isa| Kernels::for_isa(isa).expect("an available set")).collect()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|v| v.to_bits()).collect()
}

fn shapes() -> impl Strategy<Value = Shape> {
    let head_dims =
        prop_oneof![Just(64usize), Just(80), Just(96), Just(128), Just(256), 1usize..50, Just(35)];
    let softcap = prop_oneof![Just(None), Just(Some(2.0f32))];
    let window = prop_oneof![Just(None), (1usize..200).prop_map(Some)];
    let blocks = prop_oneof![Just(16usize), Just(32), Just(48), Just(64), Just(128)];
    let dtype = prop_oneof![Just(KvDType::F16), Just(KvDType::Q8_0)];
    (1usize..3, 1usize..8, head_dims, blocks, (softcap, window), dtype).prop_map(
        |(n_kv_heads, group, head_dim, block_tokens, (softcap, window), dtype)| Shape {
            dtype,
            n_kv_heads,
            group,
            head_dim,
            block_tokens,
            softcap,
            window,
        },
    )
}

/// Attention of queries `first ..` of the world, all heads, one call.
fn attend(kernels: &Kernels, world: &World, first: usize, n_queries: usize) -> Vec<f32> {
    let width = world.shape.n_heads() * world.shape.head_dim;
    let mut out = vec![f32::NAN; n_queries * width];
    // SAFETY: `out` lives through the calls and nobody else uses it.
    let view = unsafe { OutputColumns::new(out.as_mut_ptr(), n_queries, width) };
    let mut scratch = AttentionScratch::new(world.shape.head_dim);
    let call = world.call(first, n_queries);
    for kv_head in 0..world.shape.n_kv_heads {
        let part = AttentionPart { kv_head, queries: 0..n_queries };
        kernels.attend(&call, &part, view, &mut scratch);
    }
    out
}

/// The same, runs of `run` segments on their own (last first, to show that order doesn't matter),
/// then merged.
fn attend_by_segments(
    kernels: &Kernels,
    world: &World,
    (first, n): (usize, usize),
    run: usize,
) -> Vec<f32> {
    let width = world.shape.n_heads() * world.shape.head_dim;
    let mut out = vec![f32::NAN; n * width];
    // SAFETY: `out` lives through the calls and nobody else uses it.
    let view = unsafe { OutputColumns::new(out.as_mut_ptr(), n, width) };
    let mut scratch = AttentionScratch::new(world.shape.head_dim);
    let call: AttentionCall<'_> = world.call(first, n);
    for kv_head in 0..world.shape.n_kv_heads {
        let part = AttentionPart { kv_head, queries: 0..n };
        let (segments, len) = (call.segments(&part.queries), call.partial_len(n));
        let mut partials = vec![f32::NAN; segments.len() * len];
        for (index, own) in partials.chunks_mut(run * len).enumerate().rev() {
            let start = segments.start + index * run;
            let own_segments = start..segments.end.min(start + run);
            kernels.attend_segments(&call, &part, own_segments, own, &mut scratch);
        }
        kernels.merge_segments(&call, &part, &partials, view, &mut scratch);
    }
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn attention_matches_a_naive_f64_softmax(
        shape in shapes(), seed in any::<u64>(), tokens in 1usize..300, n in 1usize..40,
    ) {
        let n = n.min(tokens);
        for kernels in kernels() {
            let world = World::filled(kernels, shape, tokens, seed);
            let got = attend(kernels, &world, tokens - n, n);
            let wanted = world.naive(tokens - n, n);
            for (i, (got, wanted)) in got.iter().zip(&wanted).enumerate() {
                let error = (f64::from(*got) - wanted).abs();
                prop_assert!(error < 4e-6, "{} element {i}: {got} {wanted}", kernels.isa());
            }
        }
    }

    #[test]
    fn a_chunk_of_queries_gives_the_bits_of_token_by_token(
        shape in shapes(), seed in any::<u64>(), tokens in 1usize..700, cut in 0usize..700,
    ) {
        let n = tokens.min(48);
        let first = tokens - n;
        for kernels in kernels() {
            let world = World::filled(kernels, shape, tokens, seed);
            let together = attend(kernels, &world, first, n);
            let width = together.len() / n;
            for query in 0..n {
                let alone = attend(kernels, &world, first + query, 1);
                let row = &together[query * width..][..width];
                prop_assert_eq!(bits(&alone), bits(row), "{} query {}", kernels.isa(), query);
            }
            let cut = cut % n;
            let mut halves = attend(kernels, &world, first, cut.max(1));
            halves.truncate(cut * width);
            halves.extend(attend(kernels, &world, first + cut, n - cut));
            prop_assert_eq!(bits(&halves), bits(&together), "{} cut at {}", kernels.isa(), cut);
        }
    }

    #[test]
    fn block_ids_change_no_bit(shape in shapes(), seed in any::<u64>(), tokens in 1usize..200) {
        for kernels in kernels() {
            let world = World::filled(kernels, shape, tokens, seed);
            let moved = world.with_other_blocks(kernels);
            prop_assert_ne!(&world.blocks, &moved.blocks);
            let (first, n) = (tokens / 2, tokens - tokens / 2);
            let same = bits(&attend(kernels, &world, first, n));
            prop_assert_eq!(same, bits(&attend(kernels, &moved, first, n)));
        }
    }

    #[test]
    fn segments_merged_give_the_bits_of_one_call(
        shape in shapes(), seed in any::<u64>(), tokens in 1usize..1400, n in 1usize..90,
        run in 1usize..4,
    ) {
        let n = n.min(tokens);
        for kernels in kernels() {
            let world = World::filled(kernels, shape, tokens, seed);
            let together = attend(kernels, &world, tokens - n, n);
            let apart = attend_by_segments(kernels, &world, (tokens - n, n), run);
            prop_assert_eq!(bits(&together), bits(&apart), "{}", kernels.isa());
        }
    }

    #[test]
    fn tokens_written_one_by_one_or_together_are_the_same(
        shape in shapes(), seed in any::<u64>(), tokens in 1usize..90,
    ) {
        for kernels in kernels() {
            let together = World::filled(kernels, shape, tokens, seed);
            let mut singly = World::empty(shape, tokens, seed);
            for token in 0..tokens {
                singly.write(kernels, token, 1);
            }
            prop_assert_eq!(together.stored_bits(), singly.stored_bits(), "{}", kernels.isa());
            together.assert_stored_exactly();
        }
    }
}

#[test]
fn long_contexts_cross_many_segments() {
    let shape = Shape { group: 3, head_dim: 64, block_tokens: 32, ..Shape::default() };
    let tokens = 3 * SEGMENT_TOKENS + 77;
    for kernels in kernels() {
        let world = World::filled(kernels, shape, tokens, 7);
        let got = attend(kernels, &world, tokens - 2, 2);
        for (got, wanted) in got.iter().zip(world.naive(tokens - 2, 2)) {
            assert!((f64::from(*got) - wanted).abs() < 4e-6, "{}: {got} {wanted}", kernels.isa());
        }
    }
}

#[test]
fn stale_numbers_behind_the_last_token_do_not_leak() {
    let shape = Shape { group: 2, head_dim: 40, ..Shape::default() };
    for kernels in kernels() {
        let clean = World::filled(kernels, shape, 37, 3);
        let mut dirty = World::empty(shape, 37, 3);
        dirty.poison();
        dirty.write(kernels, 0, 37);
        let (clean, dirty) = (attend(kernels, &clean, 30, 7), attend(kernels, &dirty, 30, 7));
        assert_eq!(bits(&clean), bits(&dirty), "{}", kernels.isa());
        assert!(clean.iter().all(|v| v.is_finite()));
    }
}

#[test]
fn blocks_before_the_window_may_be_gone() {
    let window = Some(20);
    let shape = Shape { head_dim: 16, block_tokens: 16, window, ..Shape::default() };
    for kernels in kernels() {
        let mut world = World::filled(kernels, shape, 100, 11);
        let wanted = attend(kernels, &world, 99, 1);
        world.blocks[..5].fill(u32::MAX);
        assert_eq!(bits(&wanted), bits(&attend(kernels, &world, 99, 1)), "{}", kernels.isa());
    }
}

#[test]
fn huge_scores_keep_their_distribution() {
    let shape = Shape { head_dim: 8, ..Shape::default() };
    for kernels in kernels() {
        let mut world = World::empty(shape, 130, 5);
        world.scale_keys(1e4);
        world.write(kernels, 0, 130);
        let got = attend(kernels, &world, 129, 1);
        for (got, wanted) in got.iter().zip(world.naive(129, 1)) {
            assert!((f64::from(*got) - wanted).abs() < 1e-2, "{}: {got} {wanted}", kernels.isa());
        }
    }
}

#[test]
fn layouts_that_no_kernel_can_read_are_refused() {
    assert_eq!(KvLayout::new(1, 64, 20, KvDType::F16), Err(KvLayoutError::BlockTokens { got: 20 }));
    assert_eq!(KvLayout::new(1, 64, 0, KvDType::Q8_0), Err(KvLayoutError::BlockTokens { got: 0 }));
    let empty = KvLayoutError::Empty { n_kv_heads: 2, head_dim: 0 };
    assert_eq!(KvLayout::new(2, 0, 16, KvDType::F16), Err(empty));
    for got in [KvDType::Bf16, KvDType::Fp8E4m3] {
        let refused = KvLayout::new(1, 64, 16, got).unwrap_err();
        assert_eq!(refused, KvLayoutError::DType { got });
        assert!(refused.to_string().starts_with(&format!("kv.dtype is {got}; allowed")));
    }
}
