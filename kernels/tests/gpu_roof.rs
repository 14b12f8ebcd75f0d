//! The kernels that measure roofs against plain loops: a roof counts what was really done.

#![allow(clippy::print_stdout, reason = "tests say what they skip")]

mod gpu;

use gpu::{Random, gpu, on_gpu};
use half::f16;

#[test]
fn every_word_is_read() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random(4);
    // One load, less and more than a tile of 64 KiB, and tiles for all blocks and some again.
    for loads in [1, 511, 4096, 4097, 70_001, 4096 * 700] {
        let words: Vec<u32> = (0..4 * loads).map(|_| random.next() as u32).collect();
        let (memory, found) = (on_gpu(&gpu, &words), gpu.alloc(gpu.found_bytes()).expect("memory"));
        gpu.read_words(memory.span(), found.span()).expect("a launch");
        let mut parts = vec![0u32; gpu.found_bytes() / 4];
        gpu.download(found.span(), &mut parts).expect("a download");
        let xor = |words: &[u32]| words.iter().fold(0, |all, word| all ^ word);
        assert_eq!(xor(&parts), xor(&words), "{loads} loads");
    }
}

/// `roof_element` of roof.cu.
fn element(index: usize) -> f64 {
    let mut index = index as u32;
    index = (index ^ index >> 16).wrapping_mul(0x7feb_352d);
    index = (index ^ index >> 15).wrapping_mul(0x846c_a68b);
    index ^= index >> 16;
    f64::from(f16::from_f32((index >> 8) as f32 / (1 << 23) as f32 - 1.0))
}

#[test]
fn every_multiply_accumulate_is_done() {
    let Some(gpu) = gpu() else { return };
    let shape = gpu.roof_matrices();
    let a = |row: usize, k: usize| element(row * shape.depth + k);
    let b = |column: usize, k: usize| element((shape.rows + column) * shape.depth + k);
    for rounds in [1, 2, 7] {
        let memory = on_gpu(&gpu, &vec![f32::NAN; shape.blocks * shape.rows]);
        gpu.multiply_rounds(rounds, memory.span()).expect("a launch");
        let sums = gpu::from_gpu(&gpu, &memory, shape.blocks * shape.rows);
        for row in 0..shape.rows {
            let products = (0..shape.columns)
                .flat_map(|column| (0..shape.depth).map(move |k| a(row, k) * b(column, k)));
            let (sum, size) =
                products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + f64::abs(p)));
            let (wanted, off_max) = (rounds as f64 * sum, 1e-5 * rounds as f64 * size);
            for block in 0..shape.blocks {
                let got = f64::from(sums[block * shape.rows + row]);
                let off = (got - wanted).abs();
                assert!(off <= off_max, "{rounds} rounds, row {row}: {got}, not {wanted}");
            }
        }
    }
}

#[test]
fn roofs_are_those_of_a_gpu() {
    let Some(gpu) = gpu() else { return };
    let read = gpu.read_bytes_per_second(1 << 30).expect("a read roof");
    let macs = gpu.macs_per_second().expect("a roof of arithmetic");
    println!("{:.0} GB/s, {} {:.1} Top/s", read / 1e9, gpu.mac_numbers(), 2.0 * macs / 1e12);
    assert!(read > 5e10 && macs > 1e12, "{read} bytes, {macs} multiply-accumulates per second");
}
