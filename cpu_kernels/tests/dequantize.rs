//! Dequantisation against gguf-py's values, and the quantisers against their error bounds.

use proptest::prelude::*;
use tandem_cpu_kernels::{DType, dequantize_row, quantize_row};

/// Written by `make_dequantize_data.py`.
const DATA: &[u8] = include_bytes!("data/dequantize.bin");

fn u32_at(data: &[u8], offset: usize) -> usize {
    u32::from_le_bytes(data[offset..offset + 4].try_into().expect("4 bytes")) as usize
}

#[test]
fn every_type_dequantizes_to_the_values_of_the_reference_implementation() {
    let mut data = DATA;
    let mut seen = Vec::new();
    while !data.is_empty() {
        let (id, elements, bytes) = (u32_at(data, 0), u32_at(data, 4), u32_at(data, 8));
        let dtype = DType::from_gguf_id(id as u32).expect("a supported type");
        let (raw, rest) = data[12..].split_at(bytes);
        let (wanted, rest) = rest.split_at(4 * elements);
        let mut got = vec![0.0; elements];
        dequantize_row(dtype, raw, &mut got);
        for (index, (got, wanted)) in got.iter().zip(wanted.as_chunks::<4>().0).enumerate() {
            let wanted = f32::from_le_bytes(*wanted);
            assert!(*got == wanted, "{dtype} element {index}: {got} instead of {wanted}");
        }
        seen.push(dtype);
        data = rest;
    }
    for dtype in DType::ALL {
        assert!(seen.contains(&dtype), "{dtype} is missing from the data");
    }
}

/// Largest error as a fraction of the largest value, with f16 and integer scales rounded too.
/// One step is 1/8 of the range for 4-bit types around zero, 1/4 for `Q3_K`, and so on; half a
/// step plus the rounding of 4- to 6-bit scales and of the clamped opposite end.
fn error_bound(dtype: DType) -> f32 {
    match dtype {
        DType::F32 => 0.0,
        DType::F16 => 1.0 / 2048.0,
        DType::BF16 => 1.0 / 256.0,
        DType::Q8_0 => 0.006,
        DType::Q6_K => 0.05,
        DType::Q5_0 | DType::Q5_1 | DType::Q5_K => 0.09,
        DType::Q4_0 | DType::Q4_1 | DType::Q4_K => 0.15,
        // Half a step is 1/15 of the largest value where both signs are as large.
        DType::INT4_128 | DType::INT4_64 | DType::INT4_32 => 0.15,
        // Half of the last of 4 bits.
        DType::E4M3_128 | DType::E4M3_32 => 1.0 / 16.0,
        DType::IQ4_NL | DType::IQ4_XS => 0.16,
        DType::Q3_K => 0.3,
        DType::Q2_K => 0.5,
    }
}

proptest! {
    #[test]
    fn quantizing_keeps_values_within_the_steps_of_the_type(
        values in prop::collection::vec(-4.0f32..4.0, 512),
        magnitude in -6i32..6,
    ) {
        let values: Vec<f32> = values.iter().map(|v| v * 2f32.powi(magnitude)).collect();
        for dtype in DType::ALL {
            let mut bytes = vec![0; dtype.row_bytes(values.len()).unwrap()];
            quantize_row(dtype, &values, &mut bytes);
            let mut back = vec![0.0; values.len()];
            dequantize_row(dtype, &bytes, &mut back);
            let largest = values.iter().fold(0f32, |a, v| a.max(v.abs()));
            for (value, back) in values.iter().zip(&back) {
                let error = (value - back).abs() / largest;
                prop_assert!(error <= error_bound(dtype), "{dtype}: {value} became {back}");
            }
        }
    }

    #[test]
    fn any_bytes_dequantize_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 1024)) {
        for dtype in DType::ALL {
            let mut out = vec![0.0; 256];
            dequantize_row(dtype, &bytes[..dtype.row_bytes(256).unwrap()], &mut out);
        }
    }

    #[test]
    fn any_floats_quantize_without_a_panic(bits in prop::collection::vec(any::<u32>(), 256)) {
        let values: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
        for dtype in DType::ALL {
            let mut bytes = vec![0; dtype.row_bytes(256).unwrap()];
            quantize_row(dtype, &values, &mut bytes);
        }
    }
}

#[test]
fn a_row_of_zeros_stays_zero() {
    for dtype in DType::ALL {
        let mut bytes = vec![0xff; dtype.row_bytes(256).unwrap()];
        quantize_row(dtype, &[0.0; 256], &mut bytes);
        let mut back = [1.0; 256];
        dequantize_row(dtype, &bytes, &mut back);
        assert!(back.iter().all(|value| *value == 0.0), "{dtype}: {back:?}");
    }
}
