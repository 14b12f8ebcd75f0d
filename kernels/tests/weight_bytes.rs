//! Bits per weight on a GPU against those of files: within 2 %, but for exceptions that are named
//! here and in `docs/architecture.md`. What is counted is what an upload allocates.

use tandem_cpu_kernels::DType;
use tandem_kernels::DeviceMatrix;

const ROWS: usize = 4096;
const COLS: usize = 14_336;
/// Planes of a matrix start, and it ends, at multiples of 256 bytes.
const ROUNDED: usize = 3 * 256;

/// Bits of a weight in a file, where a type stands for several of them: by whose layout.
fn in_files(dtype: DType) -> Vec<(&'static str, f64)> {
    let scaled = |group: f64, scale: f64, zero: f64| 4.0 + (scale + zero) / group;
    match dtype {
        // f16 scales and 4-bit zero points.
        DType::INT4_128 => vec![("AWQ, GPTQ", scaled(128.0, 16.0, 4.0))],
        DType::INT4_64 => vec![("AWQ, GPTQ", scaled(64.0, 16.0, 4.0))],
        DType::INT4_32 => vec![("AWQ, GPTQ", scaled(32.0, 16.0, 4.0))],
        // Scales of whole rows, and of blocks of 128 columns in 128 rows.
        DType::E4M3_128 => vec![("a row", 8.0), ("a block", 8.0 + 32.0 / (128.0 * 128.0))],
        // Blocks that are no multiple of 128 columns.
        DType::E4M3_32 => vec![("a block", 8.0 + 32.0 / (32.0 * 32.0))],
        _ => vec![("GGUF", 8.0 * dtype.block_bytes() as f64 / dtype.block_elements() as f64)],
    }
}

/// What a type may take of what its files have.
fn allowed(dtype: DType) -> f64 {
    match dtype {
        // A byte for the zero point and one of nothing, for half a byte.
        DType::INT4_128 => 1.023,
        // Each 128 weights of a row have an f32 scale, though more share it in the file.
        DType::E4M3_128 => 1.032,
        // Each 32.
        DType::E4M3_32 => 1.125,
        _ => 1.02,
    }
}

#[test]
fn bits_per_weight_are_those_of_the_file_or_of_a_named_exception() {
    for dtype in DType::ALL {
        let bits = 8.0 * DeviceMatrix::bytes_of(dtype, ROWS, COLS) as f64 / (ROWS * COLS) as f64;
        for (whose, file) in in_files(dtype) {
            let ratio = bits / file;
            assert!(ratio <= allowed(dtype), "{dtype}: {bits} bits, {file} in {whose}: {ratio}");
            // What is an exception is one.
            let is_named = allowed(dtype) > 1.02;
            assert!(!is_named || ratio > 1.02, "{dtype} against {whose} is no exception: {ratio}");
            assert!(ratio > 0.98, "{dtype}: {bits} bits, {file} in {whose}");
        }
    }
}

#[test]
fn whole_chunks_take_the_bytes_of_their_blocks_and_others_are_filled_up() {
    for dtype in DType::ALL {
        for (rows, cols) in [(1, 256), (37, 768), (300, 2304), (49_152, 576), (50, 384), (45, 320)]
        {
            let Some(row_bytes) = dtype.row_bytes(cols) else { continue };
            let (file, bytes) = (rows * row_bytes, DeviceMatrix::bytes_of(dtype, rows, cols));
            let is_plain = matches!(dtype, DType::F32 | DType::F16 | DType::BF16);
            // A type's own blocks, INT4_128's with a byte of nothing each.
            let empty = if dtype == DType::INT4_128 { rows * cols.div_ceil(128) } else { 0 };
            let filled = if is_plain { cols } else { cols.next_multiple_of(128) };
            let least = (file as f64 * filled as f64 / cols as f64) as usize;
            assert!(
                (least..=least + empty + ROUNDED).contains(&bytes),
                "{dtype} [{rows}, {cols}]: {bytes} bytes of {file}, filled up {least}"
            );
        }
    }
}
