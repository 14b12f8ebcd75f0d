//! Rotation, the KV store and attention on the GPU against a naive softmax in f64.

#![allow(clippy::print_stdout, reason = "tests say what they skip")]

mod gpu;

use gpu::kept::{KeptHead, Plane};
use gpu::world::{Shape, World, shapes};
use gpu::{EightBitMemory, Random, distance, from_gpu, gpu, on_gpu};
use half::f16;
use tandem_kernels::{
    Attend, Gpu, HeadCounts, KvSpans, RotateHeads, RoundRows, Span, TokenTables, half_bytes,
};

#[test]
fn attention_matches_a_naive_f64_softmax() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random(9);
    for shape in shapes() {
        let world = World::new(shape, &[1, 33, 70, 129], &mut random);
        let (off, largest) = distance(&world.on_gpu(&gpu, 0), &world.naive(0));
        assert!(off <= 1e-5 * largest.max(1.0), "{shape:?}: {off} of {largest} off");
    }
}

#[test]
fn long_contexts_are_split_and_merged() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random(10);
    for shape in shapes() {
        let world = World::new(shape, &[1400], &mut random);
        for first in [1390, 1399] {
            let got = world.on_gpu(&gpu, first);
            let (off, largest) = distance(&got, &world.naive(first));
            assert!(off <= 1e-5 * largest.max(1.0), "{shape:?} from {first}: {off} off");
        }
    }
}

#[test]
fn a_token_has_the_same_bits_alone_and_in_any_batch() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random(11);
    for shape in shapes() {
        let world = World::new(shape, &[40, 700], &mut random);
        let width = shape.heads.n_heads * shape.heads.head_dim;
        let (all, last) = (world.on_gpu(&gpu, 0), world.on_gpu(&gpu, 739));
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&all[739 * width..]), bits(&last), "{shape:?}");
    }
}

/// Weights of at most 1 are rounded to f16 there, beside queries, keys and values: what a sum is
/// off by then, at most, of its largest term.
const HALF: f32 = 1.0 / 2048.0;

#[test]
fn attention_of_runs_matches_a_naive_f64_softmax() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random(12);
    for shape in shapes() {
        let world = World::new(shape, &[3, 40, 1, 700, 129], &mut random);
        assert!(gpu.has_flash(shape.heads), "{shape:?}");
        // The last 10 tokens of the second sequence, the fourth from an odd one on, the last whole.
        let runs = [[33, 10], [44 + 37, 663], [744, 129]];
        let wanted = world.naive_of(0, |x| f16::from_f64(x).to_f64());
        let width = shape.heads.n_heads * shape.heads.head_dim;
        for blocks in blocks_of(&gpu) {
            let got = world.runs_on_gpu(&gpu, &runs, blocks);
            for (token, (got, wanted)) in got.chunks(width).zip(wanted.chunks(width)).enumerate() {
                let is_asked =
                    runs.iter().any(|[first, n]| (*first..first + n).contains(&(token as u32)));
                let what = format!("{shape:?}, {blocks} blocks, token {token}");
                if !is_asked {
                    assert!(got.iter().all(|x| x.is_nan()), "{what} was written");
                    continue;
                }
                let (off, largest) = distance(got, wanted);
                assert!(off <= HALF * largest.max(1.0), "{what}: {off} off");
            }
        }
    }
}

/// Blocks that may divide the positions of a tile of tokens.
fn blocks_of(gpu: &Gpu) -> impl Iterator<Item = usize> {
    [1, 2, gpu.run_blocks_max()].into_iter().filter(|n| *n <= gpu.run_blocks_max())
}

#[test]
fn a_token_has_the_same_bits_in_any_run() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random(13);
    for shape in shapes() {
        let world = World::new(shape, &[700, 30], &mut random);
        let width = shape.heads.n_heads * shape.heads.head_dim;
        let bits = |values: Vec<f32>, token: usize| -> Vec<u32> {
            values[token * width..][..width].iter().map(|v| v.to_bits()).collect()
        };
        for blocks in blocks_of(&gpu) {
            let all = bits(world.runs_on_gpu(&gpu, &[[0, 700], [700, 30]], blocks), 650);
            for first in [650, 649, 601, 333] {
                let run = bits(world.runs_on_gpu(&gpu, &[[first, 660 - first]], blocks), 650);
                assert_eq!(all, run, "{shape:?}, {blocks} blocks, from {first}");
            }
        }
    }
}

#[test]
fn a_value_that_is_no_number_reaches_those_who_see_it() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random(17);
    for shape in shapes() {
        let mut world = World::new(shape, &[300], &mut random);
        let runs = [[20, 280]];
        let blocks = gpu.run_blocks_max();
        let all = |world: &World| [1, blocks].map(|n| world.runs_on_gpu(&gpu, &runs, n)).concat();
        let wanted = all(&world);
        let (no_number, window) = (150, shape.window.unwrap_or(usize::MAX));
        for kv_head in 0..shape.heads.n_kv_heads {
            let at = world.value_at(no_number, kv_head);
            world.heads[at][3] = f32::NAN;
        }
        let got = all(&world);
        let (width, dim) = (shape.heads.n_heads * shape.heads.head_dim, shape.heads.head_dim);
        let tokens = got.chunks(width).zip(wanted.chunks(width)).enumerate();
        for (token, (got, wanted)) in tokens.map(|(row, both)| (row % 300, both)) {
            if token >= no_number && token - no_number < window {
                assert!(got.iter().skip(3).step_by(dim).all(|x| x.is_nan()), "{shape:?}, {token}");
            } else {
                assert_eq!(bits(got), bits(wanted), "{shape:?}, {token}");
            }
        }
    }
}

#[test]
fn keys_and_values_are_stored_as_the_specification_has_them() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random(18);
    for shape in shapes() {
        let mut world = World::new(shape, &[50, 1, 20], &mut random);
        let width = world.width();
        for (token, heads) in world.heads.chunks_exact_mut(width).enumerate() {
            // Small and large numbers, up to what no type holds; and single odd ones.
            let factor = 10f32.powi(token as i32 / 2 - 12);
            heads.iter_mut().for_each(|x| *x *= factor);
            let odd = [0.0, f32::INFINITY, f32::NAN, 1e38, 1e-40][token % 5];
            heads.iter_mut().step_by(29 + token).for_each(|x| *x = odd);
        }
        let planes = world.prepared(&gpu, |rotate, _, places| {
            gpu.rotate_heads(rotate, shape.heads, places).expect("a rotation");
            stored(&gpu, places.1)
        });
        for (plane, bytes) in [Plane::Keys, Plane::Values].into_iter().zip(&planes) {
            for (token, position) in world.positions.iter().enumerate() {
                let position = *position as usize;
                let table = world.tables[token] as usize;
                let block = world.blocks[table + position / shape.block_tokens] as usize;
                for kv_head in 0..shape.heads.n_kv_heads {
                    let place = (block, kv_head, position % shape.block_tokens);
                    let got = KeptHead::on_gpu((plane, bytes), shape, place);
                    let wanted = world.kept(token, kv_head, plane);
                    assert_eq!(got, wanted, "{shape:?}, {plane:?}, token {token}");
                }
            }
        }
    }
}

#[test]
fn chosen_tokens_attend_as_they_do_among_all() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random(14);
    for shape in shapes() {
        let world = World::new(shape, &[5, 300, 20], &mut random);
        let width = shape.heads.n_heads * shape.heads.head_dim;
        let chosen = [2, 304, 17, 324];
        let (all, some) = (world.on_gpu(&gpu, 0), world.chosen_on_gpu(&gpu, &chosen));
        for (token, (all, some)) in all.chunks(width).zip(some.chunks(width)).enumerate() {
            if chosen.contains(&(token as u32)) {
                assert_eq!(all, some, "{shape:?}, token {token}");
            } else {
                assert!(some.iter().all(|x| x.is_nan()), "{shape:?}: token {token} was written");
            }
        }
    }
}

/// All bits of some f32.
fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Of `n` tokens from `first` on, which have `each` numbers.
fn part(span: Span<'_>, (first, n): (usize, usize), each: usize) -> Span<'_> {
    span.part(4 * first * each, 4 * n * each)
}

/// Some tokens' attention with their rotation on the way, after all others were rotated and stored:
/// their results, and all keys and values.
fn rotated_on_the_way(gpu: &Gpu, world: &World, chosen: &[u32]) -> (Vec<f32>, [Vec<u8>; 2]) {
    let heads = world.shape.heads;
    world.prepared(gpu, |rotate, attend, (tokens, store)| {
        let mut first = 0;
        for last in chosen.iter().map(|token| *token as usize) {
            let range = (first, last - first);
            if last > first {
                let table = TokenTables {
                    tokens: last - first,
                    positions: part(tokens.positions, range, 1),
                    tables: part(tokens.tables, range, 1),
                    ..*tokens
                };
                let pass = RotateHeads {
                    heads: part(rotate.heads, range, world.width()),
                    angles: part(rotate.angles, range, heads.head_dim),
                    ..*rotate
                };
                gpu.rotate_heads(&pass, heads, (&table, store)).expect("a rotation");
            }
            first = last + 1;
        }
        let count = tokens.tokens * heads.n_heads * heads.head_dim;
        let (out, list) = (on_gpu(gpu, &vec![f32::NAN; count]), on_gpu(gpu, chosen));
        let partials = Attend::partial_bytes(heads, chosen.len(), attend.positions_max);
        let partials = gpu.alloc(partials).expect("room");
        let pass = Attend {
            chosen: Some((list.span(), chosen.len())),
            out: out.span(),
            partials: partials.span(),
            ..*attend
        };
        gpu.attend(&pass, heads, (tokens, store), Some(rotate)).expect("an attention");
        (from_gpu(gpu, &out, count), stored(gpu, store))
    })
}

fn stored(gpu: &Gpu, store: &KvSpans<'_>) -> [Vec<u8>; 2] {
    [store.keys, store.values].map(|span| {
        let mut bytes = vec![0u8; span.bytes()];
        gpu.download(span, &mut bytes).expect("a download");
        bytes
    })
}

#[test]
fn rotating_on_the_way_changes_no_bit() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random(15);
    for shape in shapes() {
        let world = World::new(shape, &[33, 1, 257, 700, 256], &mut random);
        let chosen = [32, 33, 290, 990, 1246];
        let wanted = world.chosen_on_gpu(&gpu, &chosen);
        let (got, store) = rotated_on_the_way(&gpu, &world, &chosen);
        assert_eq!(bits(&got), bits(&wanted), "{shape:?}");
        let wanted = world.prepared(&gpu, |rotate, _, places| {
            gpu.rotate_heads(rotate, shape.heads, places).expect("a rotation");
            stored(&gpu, places.1)
        });
        assert!(store == wanted, "{shape:?}: the store");
    }
}

#[test]
fn what_attends_is_rounded_as_rows_are() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random(16);
    let heads = HeadCounts { n_heads: 8, n_kv_heads: 2, head_dim: 128 };
    let usual = Shape { heads, ..shapes()[0] };
    let whole = shapes().into_iter().filter(|shape| shape.heads.are_whole_chunks());
    for shape in whole.chain([usual]) {
        let world = World::new(shape, &[20, 600], &mut random);
        let (heads, rows) = (shape.heads, 620);
        let cols = heads.n_heads * heads.head_dim;
        world.prepared(&gpu, |rotate, attend, places| {
            gpu.rotate_heads(rotate, heads, places).expect("a rotation");
            let out = on_gpu(&gpu, &vec![f32::NAN; rows * cols]);
            let partials = Attend::partial_bytes(heads, rows, attend.positions_max);
            let partials = gpu.alloc(partials).expect("room");
            let forms = [0, 1].map(|_| {
                let halves = on_gpu(&gpu, &vec![0xffu8; half_bytes(rows, cols)]);
                (EightBitMemory::new(&gpu, rows, cols, true), halves)
            });
            let pass = Attend {
                out: out.span(),
                partials: partials.span(),
                eight_bits: Some(forms[0].0.view()),
                halves: Some(forms[0].1.span()),
                ..*attend
            };
            gpu.attend(&pass, heads, places, None).expect("an attention");
            let pass = RoundRows {
                values: out.span(),
                up: None,
                out: None,
                eight_bits: Some(forms[1].0.view()),
                halves: Some(forms[1].1.span()),
                rows,
                cols,
            };
            gpu.round_rows(&pass).expect("rounding");
            assert!(forms[0].0.bytes(&gpu) == forms[1].0.bytes(&gpu), "{shape:?}: 8 bits");
            let halves = forms.each_ref().map(|(_, halves)| {
                let mut bytes = vec![0u8; half_bytes(rows, cols)];
                gpu.download(halves.span(), &mut bytes).expect("a download");
                bytes
            });
            assert!(halves[0] == halves[1], "{shape:?}: f16");
        });
    }
}
