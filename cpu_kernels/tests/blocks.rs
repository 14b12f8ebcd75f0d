//! Element types: ids, names and sizes.

use tandem_cpu_kernels::DType;

#[test]
fn ids_and_names_lead_back_to_their_type() {
    for dtype in DType::ALL {
        assert_eq!(DType::from_gguf_id(dtype.gguf_id()), Some(dtype));
        assert_eq!(dtype.to_string().parse(), Ok(dtype));
        assert_eq!(dtype.to_string().to_lowercase().parse(), Ok(dtype));
    }
    let error = "Q7_X".parse::<DType>().unwrap_err();
    assert_eq!(error.to_string(), "unknown element type \"Q7_X\"");
}

#[test]
fn ids_without_kernels_are_none() {
    // Q8_1, IQ2_XXS, I32, and ids that ggml has withdrawn or not given out.
    for id in [4, 5, 9, 16, 26, 31, 1000, u32::MAX] {
        assert_eq!(DType::from_gguf_id(id), None, "id {id}");
    }
}

#[test]
fn rows_are_whole_blocks_and_sizes_do_not_overflow() {
    assert_eq!(DType::Q4_0.row_bytes(4096), Some(2304));
    assert_eq!(DType::Q6_K.row_bytes(512), Some(420));
    assert_eq!(DType::BF16.row_bytes(7), Some(14));
    assert_eq!(DType::Q4_K.row_bytes(0), Some(0));
    assert_eq!(DType::Q4_0.row_bytes(33), None);
    assert_eq!(DType::Q4_K.row_bytes(128), None);
    assert_eq!(DType::F32.row_bytes(usize::MAX), None);
    assert_eq!(DType::Q8_0.row_bytes(usize::MAX - 31), None);
}
