//! Instruction set × type × layout × number of columns, with odd numbers of rows and blocks.

use super::case::{Random, Weights, bits, multiply, quantized_weights};
use tandem_cpu_kernels::*;

/// One to the widest narrow tile and beyond, around the widths of wide tiles and their blocks.
const COLUMNS: [usize; 29] = [
    1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 24, 31, 32, 33, 48, 66,
    256, 257, 129,
];
/// Less than a group of 16, around one, around two, and more.
const ROWS: [usize; 7] = [33, 7, 15, 100, 17, 1, 64];
/// More than a chunk of the decode-once kernels, which have up to 512 elements or 2,048; less, and
/// no whole one; odd numbers of groups, where a type's blocks are as short.
const ELEMENTS: [usize; 6] = [2304, 96, 768, 1056, 32, 256];

#[test]
fn every_type_has_the_bits_of_the_specification_with_any_number_of_columns() {
    for dtype in DType::ALL {
        let mut random = Random(dtype as u64);
        for (index, columns) in COLUMNS.into_iter().enumerate() {
            let cols = ELEMENTS[index % ELEMENTS.len()].next_multiple_of(dtype.block_elements());
            let rows = ROWS[index % ROWS.len()];
            let weights = quantized_weights(dtype, rows, cols, &mut random);
            let x = random.floats(columns * cols);
            let whole = std::slice::from_ref(&(0..rows)).to_vec();
            let wanted = [Isa::Scalar, Isa::Amx].map(|isa| {
                let kernels = Kernels::specification(isa);
                bits(&multiply(kernels, &weights.view(Layout::RowMajor), &x, &whole))
            });
            for isa in Isa::available() {
                let kernels = Kernels::for_isa(isa).expect("available");
                let wanted = &wanted[usize::from(isa == Isa::Amx)];
                for &layout in weights.layouts() {
                    let got = bits(&multiply(kernels, &weights.view(layout), &x, &whole));
                    assert!(
                        got == *wanted,
                        "{isa} {dtype} {layout:?} [{rows}, {cols}] with {columns} columns"
                    );
                }
            }
        }
    }
}

#[test]
fn rows_cut_at_any_place_have_the_same_bits_with_many_columns() {
    let (rows, cols) = (100, 512);
    for dtype in [DType::Q4_0, DType::Q4_K, DType::Q6_K, DType::Q8_0] {
        let mut random = Random(dtype as u64 + 100);
        let weights = quantized_weights(dtype, rows, cols, &mut random);
        for columns in [1, 5, 8, 16, 17, 40] {
            let x = random.floats(columns * cols);
            let view = weights.view(Layout::Rows16);
            for isa in Isa::available() {
                let kernels = Kernels::for_isa(isa).expect("available");
                let whole = multiply(kernels, &view, &x, std::slice::from_ref(&(0..rows)));
                let cuts = [0..1, 1..16, 16..48, 48..49, 49..79, 79..100];
                let parts = multiply(kernels, &view, &x, &cuts);
                assert!(bits(&whole) == bits(&parts), "{isa} {dtype} with {columns} columns");
            }
        }
    }
}

/// Parts of rows of different heights, chunks of different lengths, two parts of columns: with AMX
/// each chunk is decoded in the place of the one before it. Some weights are beyond what the fast
/// way takes.
#[test]
fn many_rows_and_long_rows_have_the_bits_of_few_columns() {
    let rows = 300;
    for (dtype, cols, columns) in [
        (DType::Q4_0, 2048 + 544, 548),
        (DType::Q4_0, 4096, 40),
        (DType::Q4_K, 2 * 2048 + 256, 40),
        (DType::Q6_K, 2304, 70),
        (DType::Q8_0, 5 * 32, 530),
    ] {
        let mut random = Random(dtype as u64 + 200);
        let mut values = random.floats(rows * cols);
        for block in values.chunks_mut(dtype.block_elements()) {
            if random.next().is_multiple_of(97) {
                block.iter_mut().for_each(|value| *value *= 1e5);
            }
        }
        let mut bytes = vec![0; rows * dtype.row_bytes(cols).expect("whole blocks")];
        quantize_row(dtype, &values, &mut bytes);
        let weights = Weights::new(dtype, rows, cols, bytes);
        let x = random.floats(columns * cols);
        let view = weights.view(Layout::Rows16);
        let whole = std::slice::from_ref(&(0..rows)).to_vec();
        for isa in Isa::available().filter(|isa| *isa >= Isa::detect()) {
            let kernels = Kernels::for_isa(isa).expect("available");
            let together = multiply(kernels, &view, &x, &whole);
            let few = x.chunks(16 * cols).flat_map(|x| multiply(kernels, &view, x, &whole));
            assert!(
                bits(&together) == bits(&few.collect::<Vec<_>>()),
                "{isa} {dtype} [{rows}, {cols}] with {columns} columns"
            );
        }
    }
}
