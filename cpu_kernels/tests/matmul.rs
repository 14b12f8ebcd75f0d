//! Every matmul kernel against the scalar specification of its arithmetic, bit for bit.

use proptest::prelude::*;
use tandem_cpu_kernels::*;

#[path = "matmul/case.rs"]
mod case;
#[path = "matmul/table.rs"]
mod table;

use case::{Random, Weights, bits, multiply, quantized_weights, round_all};

fn every_dtype() -> impl Strategy<Value = DType> {
    prop::sample::select(DType::ALL.to_vec())
}

/// Columns of a matrix that suit the type: float rows may have any length.
fn cols_of(dtype: DType, blocks: usize, odd: usize) -> usize {
    match dtype.block_elements() {
        1 => 32 * blocks + odd,
        elements => blocks * elements,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn every_isa_and_layout_gives_the_bits_of_the_scalar_specification(
        dtype in every_dtype(),
        rows in 1usize..50,
        blocks in 1usize..7,
        odd in 0usize..32,
        columns in 1usize..20,
        seed in any::<u64>(),
    ) {
        let mut random = Random(seed);
        let cols = cols_of(dtype, blocks, odd);
        let weights = quantized_weights(dtype, rows, cols, &mut random);
        let x = random.floats(columns * cols);
        let whole = 0..rows;
        let wanted = [Isa::Scalar, Isa::Amx].map(|isa| {
            let whole = std::slice::from_ref(&whole);
            multiply(Kernels::specification(isa), &weights.view(Layout::RowMajor), &x, whole)
        });
        for isa in Isa::available() {
            let kernels = Kernels::for_isa(isa).expect("available");
            let wanted = &wanted[usize::from(isa == Isa::Amx)];
            for &layout in weights.layouts() {
                let whole = std::slice::from_ref(&whole);
                let got = multiply(kernels, &weights.view(layout), &x, whole);
                prop_assert_eq!(bits(&got), bits(wanted), "{} {:?} {}", isa, layout, dtype);
            }
        }
    }

    #[test]
    fn a_column_has_the_same_bits_alone_and_in_any_batch(
        dtype in every_dtype(),
        rows in 1usize..40,
        columns in 2usize..20,
        seed in any::<u64>(),
    ) {
        let mut random = Random(seed);
        let cols = cols_of(dtype, 5, 7);
        let weights = quantized_weights(dtype, rows, cols, &mut random);
        let x = random.floats(columns * cols);
        let whole = std::slice::from_ref(&(0..rows)).to_vec();
        for isa in Isa::available() {
            let kernels = Kernels::for_isa(isa).expect("available");
            for &layout in weights.layouts() {
                let view = weights.view(layout);
                let together = multiply(kernels, &view, &x, &whole);
                for (x, together) in x.chunks_exact(cols).zip(together.chunks_exact(rows)) {
                    let alone = multiply(kernels, &view, x, &whole);
                    prop_assert_eq!(bits(&alone), bits(together), "{} {:?}", isa, layout);
                }
            }
        }
    }

    #[test]
    fn rows_split_anywhere_give_the_same_bits_and_no_other_row_is_written(
        dtype in every_dtype(),
        rows in 3usize..70,
        columns in 1usize..10,
        cuts in prop::collection::vec(0.0f64..1.0, 2),
        seed in any::<u64>(),
    ) {
        let mut random = Random(seed);
        // Long enough that row-major weights take several chunks.
        let cols = cols_of(dtype, 2304 / dtype.block_elements().max(32), 3);
        let weights = quantized_weights(dtype, rows, cols, &mut random);
        let x = random.floats(columns * cols);
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| (cut * rows as f64) as usize).collect();
        cuts.sort_unstable();
        for isa in Isa::available() {
            let kernels = Kernels::for_isa(isa).expect("available");
            for &layout in weights.layouts() {
                let view = weights.view(layout);
                let whole = multiply(kernels, &view, &x, std::slice::from_ref(&(0..rows)));
                let parts = [0..cuts[0], cuts[0]..cuts[1], cuts[1]..rows];
                prop_assert_eq!(bits(&multiply(kernels, &view, &x, &parts)), bits(&whole));
                let outer = multiply(kernels, &view, &x, &[0..cuts[0], cuts[1]..rows]);
                for (outer, whole) in outer.chunks_exact(rows).zip(whole.chunks_exact(rows)) {
                    for row in 0..rows {
                        let skipped = (cuts[0]..cuts[1]).contains(&row);
                        let right = if skipped { f32::NAN } else { whole[row] };
                        prop_assert_eq!(bits(&[outer[row]]), bits(&[right]));
                    }
                }
            }
        }
    }

    #[test]
    fn any_bytes_as_weights_give_the_same_bits_everywhere_without_a_panic(
        dtype in every_dtype(),
        columns in prop::sample::select(vec![1usize, 3, 40]),
        seed in any::<u64>(),
    ) {
        let (rows, cols) = (17, 512);
        let mut random = Random(seed);
        let bytes = random.bytes(rows * dtype.row_bytes(cols).expect("whole blocks"));
        let weights = Weights::new(dtype, rows, cols, bytes);
        let x = random.floats(columns * cols);
        let whole = std::slice::from_ref(&(0..rows)).to_vec();
        for isa in Isa::available() {
            let kernels = Kernels::for_isa(isa).expect("available");
            let specification = Kernels::specification(isa);
            let wanted = multiply(specification, &weights.view(Layout::RowMajor), &x, &whole);
            for &layout in weights.layouts() {
                let got = multiply(kernels, &weights.view(layout), &x, &whole);
                prop_assert_eq!(bits(&got), bits(&wanted), "{} {:?} {}", isa, layout, dtype);
            }
        }
    }

    #[test]
    fn the_result_is_the_exact_product_up_to_the_rounding_of_activations(
        dtype in every_dtype(),
        columns in 1usize..4,
        seed in any::<u64>(),
    ) {
        let (rows, cols) = (16, 768);
        let mut random = Random(seed);
        let weights = quantized_weights(dtype, rows, cols, &mut random);
        let x = random.floats(columns * cols);
        for isa in [Isa::Scalar, Isa::Amx] {
            let kernels = Kernels::specification(isa);
            let whole = 0..rows;
            let view = weights.view(Layout::RowMajor);
            let got = multiply(kernels, &view, &x, std::slice::from_ref(&whole));
            for column in 0..columns {
                for row in 0..rows {
                    let x = &x[column * cols..][..cols];
                    let (exact, bound) = exact_product(&weights, row, x, kernels.activation_form());
                    let error = (f64::from(got[column * rows + row]) - exact).abs();
                    prop_assert!(error <= bound, "{isa} {dtype}: error {error}, bound {bound}");
                }
            }
        }
    }

    #[test]
    fn a_packed_row_dequantizes_like_the_row_in_file_order(
        dtype in every_dtype(),
        rows in 1usize..40,
        seed in any::<u64>(),
    ) {
        let cols = cols_of(dtype, 2, 5);
        let mut random = Random(seed);
        let bytes = random.bytes(rows * dtype.row_bytes(cols).expect("whole blocks"));
        let weights = Weights::new(dtype, rows, cols, bytes);
        let row_bytes = weights.row_major.len() / rows;
        for row in 0..rows {
            let mut wanted = vec![0.0; cols];
            dequantize_row(dtype, &weights.row_major[row * row_bytes..][..row_bytes], &mut wanted);
            for &layout in weights.layouts() {
                let mut got = vec![0.0; cols];
                dequantize_packed_row(&weights.view(layout), row, &mut got);
                prop_assert_eq!(bits(&got), bits(&wanted), "{} {:?} row {}", dtype, layout, row);
            }
        }
    }
}

/// The product in f64 of dequantised weights and unrounded activations, and how far a result may
/// be from it: half an activation step (amax/254 per group of 32) times |w| for quantised types,
/// and for the arithmetic n·2⁻²⁴ of the sum of magnitudes, n being additions and products in a
/// chain (each group adds at most 3; 32 partial sums of float types are shorter).
///
/// With bf16 a product is off by 2⁻⁸ of itself for the activation, and the weight by 2⁻⁸ and 2⁻¹¹
/// of itself and by 2⁻¹¹ of each of `scale·(q − middle)` and its offset, neither of which is more
/// than twice the largest weight of its group. The chain of a group has 16 pairs and 2 additions.
fn exact_product(weights: &Weights, row: usize, x: &[f32], form: ActivationForm) -> (f64, f64) {
    let mut w = vec![0.0; weights.cols];
    dequantize_packed_row(&weights.view(Layout::RowMajor), row, &mut w);
    let (mut exact, mut magnitude, mut rounding) = (0.0, 0.0, 0.0);
    for (w, x) in w.chunks(32).zip(x.chunks(32)) {
        let amax = x.iter().fold(0f32, |a, b| a.max(b.abs()));
        let wmax = w.iter().fold(0f32, |a, b| a.max(b.abs()));
        for (w, x) in w.iter().zip(x) {
            let product = f64::from(*w) * f64::from(*x);
            exact += product;
            // The terms of types with offsets are larger than the weight they add up to.
            magnitude += product.abs() + f64::from(amax);
            rounding += match form {
                ActivationForm::Int8 => f64::from(w.abs()) * f64::from(amax) / 254.0,
                ActivationForm::Bf16 => {
                    product.abs() * 2.02 / 256.0 + f64::from(wmax * x.abs()) * 4.0 / 2048.0
                }
            };
        }
    }
    let of_group = if form == ActivationForm::Bf16 { 18.0 } else { 3.0 };
    let chain = of_group * weights.cols as f64 / 32.0 + 8.0;
    let arithmetic = chain * magnitude * 2f64.powi(-24);
    (exact, arithmetic + if weights.dtype.is_quantized() { 1.001 * rounding } else { 0.0 })
}

#[test]
fn a_part_of_a_fused_output_is_written_at_its_offset() {
    let mut random = Random(1);
    let weights = quantized_weights(DType::Q4_K, 20, 256, &mut random);
    let x = random.floats(2 * 256);
    let view = weights.view(Layout::Rows16);
    let kernels = Kernels::best();
    let alone = multiply(kernels, &view, &x, std::slice::from_ref(&(0..20)));
    let mut buffer = ActivationBuffer::new(kernels.activation_form(), 2, 256);
    // SAFETY: one thread; filled before it is viewed.
    let target = unsafe { buffer.writer(2, 256) };
    kernels.quantize_activations(&x[..256], target, 0, 0..256);
    kernels.quantize_activations(&x[256..], target, 1, 0..256);
    let mut fused = [0.0; 2 * 50];
    // SAFETY: the pointer is that of `fused`, and only this thread writes.
    let out = unsafe { OutputColumns::new(fused.as_mut_ptr(), 2, 50) };
    kernels.matmul(&view, &target.view(&x), 0..20, out.skip_rows(30));
    assert_eq!(fused[30..50], alone[..20]);
    assert_eq!(fused[80..100], alone[20..]);
    assert!(fused[..30].iter().chain(&fused[50..80]).all(|value| *value == 0.0));
}

#[test]
fn rows_cut_from_a_matrix_have_the_bits_that_they_have_in_it() {
    let mut random = Random(5);
    let (rows, columns, cols) = (70, 40, 256);
    let weights = quantized_weights(DType::Q4_K, rows, cols, &mut random);
    let x = random.floats(columns * cols);
    for isa in Isa::available() {
        let kernels = Kernels::for_isa(isa).expect("available");
        for &layout in weights.layouts() {
            let view = weights.view(layout);
            let all = multiply(kernels, &view, &x, std::slice::from_ref(&(0..rows)));
            for part in [0..70, 16..16, 32..64, 48..70] {
                let cut = view.cut(part.clone());
                assert_eq!(cut.rows(), part.len());
                let own = multiply(kernels, &cut, &x, std::slice::from_ref(&(0..part.len())));
                for column in 0..columns {
                    let wanted = &all[column * rows..][part.clone()];
                    let got = &own[column * part.len()..][..part.len()];
                    assert_eq!(bits(got), bits(wanted), "{isa} {layout:?} {part:?}");
                }
            }
        }
    }
}

#[test]
fn a_wide_prefill_has_the_bits_of_single_columns() {
    let mut random = Random(2);
    let (rows, cols, columns) = (33, 256, 515);
    let x = random.floats(columns * cols);
    for dtype in [DType::Q4_0, DType::Q4_K, DType::Q6_K, DType::Q8_0, DType::BF16] {
        let weights = quantized_weights(dtype, rows, cols, &mut random);
        let view = weights.view(*weights.layouts().last().expect("a layout"));
        let whole = std::slice::from_ref(&(0..rows)).to_vec();
        for isa in Isa::available().filter(|isa| *isa >= Isa::detect()) {
            let kernels = Kernels::for_isa(isa).expect("available");
            let together = multiply(kernels, &view, &x, &whole);
            for (x, together) in x.chunks_exact(cols).zip(together.chunks_exact(rows)) {
                let alone = multiply(kernels, &view, x, &whole);
                assert_eq!(bits(&alone), bits(together), "{isa} {dtype}");
            }
        }
    }
}

#[test]
fn a_part_of_the_columns_has_the_bits_that_they_have_among_all() {
    let mut random = Random(4);
    let (rows, cols, columns) = (50, 512, 600);
    let x = random.floats(columns * cols);
    let weights = quantized_weights(DType::Q4_0, rows, cols, &mut random);
    for isa in Isa::available().filter(|isa| *isa > Isa::Scalar) {
        let kernels = Kernels::for_isa(isa).expect("available");
        let mut buffer = ActivationBuffer::new(kernels.activation_form(), columns, cols);
        // SAFETY: one thread, and all is filled before the view is made.
        let target = unsafe { buffer.writer(columns, cols) };
        round_all(kernels, target, &x);
        for &layout in weights.layouts() {
            let view = weights.view(layout);
            let all = multiply(kernels, &view, &x, std::slice::from_ref(&(0..rows)));
            for part in [0..1, 5..6, 15..17, 3..20, 9..41, 592..600, 7..65, 3..596, 16..595] {
                let mut out = vec![f32::NAN; part.len() * rows];
                // SAFETY: the pointer is that of `out`, and only this thread writes.
                let output = unsafe { OutputColumns::new(out.as_mut_ptr(), part.len(), rows) };
                let activations = target.view(&x).slice(part.clone());
                kernels.matmul(&view, &activations, 0..rows, output);
                let among_all = &all[part.start * rows..part.end * rows];
                assert_eq!(bits(&out), bits(among_all), "{isa} {layout:?} {part:?}");
            }
        }
    }
}

#[test]
fn threads_with_their_own_rows_give_the_bits_of_one_thread() {
    let mut random = Random(3);
    let (rows, cols, columns) = (96, 512, 6);
    let x = random.floats(columns * cols);
    let weights = quantized_weights(DType::Q4_K, rows, cols, &mut random);
    let view = weights.view(Layout::Rows16);
    let kernels = Kernels::best();
    let alone = multiply(kernels, &view, &x, std::slice::from_ref(&(0..rows)));
    let mut buffer = ActivationBuffer::new(kernels.activation_form(), columns, cols);
    // SAFETY: each thread fills its own half of every column, and all end before the view.
    let target = unsafe { buffer.writer(columns, cols) };
    std::thread::scope(|scope| {
        for half in 0..2 {
            let (x, range) = (&x, half * cols / 2..(half + 1) * cols / 2);
            scope.spawn(move || {
                for (column, x) in x.chunks_exact(cols).enumerate() {
                    kernels.quantize_activations(&x[range.clone()], target, column, range.clone());
                }
            });
        }
    });
    let activations = target.view(&x);
    let mut out = vec![f32::NAN; columns * rows];
    // SAFETY: the pointer is that of `out`; threads get disjoint rows.
    let output = unsafe { OutputColumns::new(out.as_mut_ptr(), columns, rows) };
    std::thread::scope(|scope| {
        for rows in [0..17, 17..64, 64..96] {
            scope.spawn(move || kernels.matmul(&view, &activations, rows, output));
        }
    });
    assert_eq!(bits(&out), bits(&alone));
}

#[test]
#[should_panic(expected = "needs rounded input")]
fn quantized_weights_refuse_activations_without_a_rounded_form() {
    let view = MatrixView::new(DType::Q4_0, Layout::RowMajor, 1, 32, &[0; 18]).expect("valid");
    let mut out = [0.0];
    // SAFETY: the pointer is that of `out`, and only this thread writes.
    let output = unsafe { OutputColumns::new(out.as_mut_ptr(), 1, 1) };
    Kernels::best().matmul(&view, &Activations::float(&[0.0; 32], 1, 32), 0..1, output);
}

#[test]
fn a_view_of_the_wrong_size_is_refused_with_the_facts() {
    let error = MatrixView::new(DType::Q4_0, Layout::Rows16, 17, 64, &[0; 100]).unwrap_err();
    let MatrixError::WrongBytes { wanted, got, .. } = error else { panic!("{error}") };
    assert_eq!((wanted, got), (32 * 36, 100));
    let error = MatrixView::new(DType::Q6_K, Layout::RowMajor, 1, 200, &[]).unwrap_err();
    assert!(matches!(error, MatrixError::PartialBlock { cols: 200, .. }), "{error}");
    let error = MatrixView::new(DType::F16, Layout::Rows16, 1, 32, &[0; 64]).unwrap_err();
    assert!(matches!(error, MatrixError::NoLayout { .. }), "{error}");
}
