//! The roof loops in plain Rust, with what the compiler makes of them.

use super::RoofTable;
use std::hint::black_box;

const ELEMENTS: usize = 512;

fn multiply(rounds: usize) -> i32 {
    let (weights, x) = ([7_u8; ELEMENTS], [-3_i8; ELEMENTS]);
    (0..rounds).fold(0, |sum: i32, _| {
        let pairs = black_box(&weights).iter().zip(&x);
        let dot: i32 = pairs.map(|(w, x)| i32::from(*w) * i32::from(*x)).sum();
        sum.wrapping_add(dot)
    })
}

fn read(words: &[u64]) -> u64 {
    let (parts, rest) = words.as_chunks::<8>();
    let mut all = [0; 8];
    for part in parts {
        all.iter_mut().zip(part).for_each(|(all, word)| *all ^= word);
    }
    all.iter().chain(rest).fold(0, |all, word| all ^ word)
}

pub(crate) const TABLE: RoofTable =
    RoofTable { numbers: "int8", macs_per_round: ELEMENTS, multiply, read };
