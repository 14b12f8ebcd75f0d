//! Rounded activations, and the second 8 bits of 16-bit ones: error bounds, special values, and the
//! bits of the specification from every ISA.

use proptest::prelude::*;
use tandem_cpu_kernels::activations::AMAX_MIN;
use tandem_cpu_kernels::*;

/// A product with `Q8_0` unit vectors reads the 8-bit activations back: row `r` is 1 at `r`.
fn read_back(kernels: &Kernels, x: &[f32]) -> Vec<f32> {
    let cols = x.len();
    let mut identity = vec![0; cols * DType::Q8_0.row_bytes(cols).expect("whole blocks")];
    for (row, bytes) in identity.chunks_exact_mut(cols / 32 * 34).enumerate() {
        let block = &mut bytes[row / 32 * 34..][..34];
        block[..2].copy_from_slice(&0x3c00u16.to_le_bytes());
        block[2 + row % 32] = 1;
    }
    let view = MatrixView::new(DType::Q8_0, Layout::RowMajor, cols, cols, &identity);
    let mut buffer = ActivationBuffer::new(kernels.activation_form(), 1, cols);
    // SAFETY: one thread; filled before it is viewed.
    let target = unsafe { buffer.writer(1, cols) };
    kernels.quantize_activations(&x[..32], target, 0, 0..32);
    kernels.quantize_activations(&x[32..], target, 0, 32..cols);
    let mut out = vec![0.0; cols];
    // SAFETY: the pointer is that of `out`, and only this thread writes.
    let columns = unsafe { OutputColumns::new(out.as_mut_ptr(), 1, cols) };
    kernels.matmul(&view.expect("a valid view"), &target.view(x), 0..cols, columns);
    out
}

/// What the 8-bit form of `x` misses of it.
fn missed(kernels: &Kernels, x: &[f32]) -> Vec<f32> {
    let mut buffer = ActivationBuffer::new(kernels.activation_form(), 1, x.len());
    // SAFETY: one thread.
    let target = unsafe { buffer.writer(1, x.len()) };
    kernels.quantize_activations(x, target, 0, 0..x.len());
    let mut residual = vec![0.0; x.len()];
    kernels.activation_residual(&x[..32], (target, 0), 0..32, &mut residual[..32]);
    kernels.activation_residual(&x[32..], (target, 0), 32..x.len(), &mut residual[32..]);
    residual
}

/// Those whose activations are `form`.
fn kernels_with(form: ActivationForm) -> impl Iterator<Item = &'static Kernels> {
    every_isa().filter(move |kernels| kernels.activation_form() == form)
}

fn every_isa() -> impl Iterator<Item = &'static Kernels> {
    Isa::available().map(|isa| Kernels::for_isa(isa).expect("available"))
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| if v.is_nan() { f32::NAN.to_bits() } else { v.to_bits() }).collect()
}

proptest! {
    #[test]
    fn activations_are_within_half_a_step(
        x in prop::collection::vec(-100.0f32..100.0, 96),
    ) {
        for kernels in kernels_with(ActivationForm::Int8) {
            let back = read_back(kernels, &x);
            for (x, back) in x.chunks_exact(32).zip(back.chunks_exact(32)) {
                let amax = x.iter().fold(0f32, |a, b| a.max(b.abs()));
                for (x, back) in x.iter().zip(back) {
                    prop_assert!((x - back).abs() <= 1.0001 * amax / 254.0, "{x} became {back}");
                }
            }
        }
    }

    /// `q₂` has 254 steps for the half step of `q₁` on either side; what floats round is the
    /// product `scale · q₁` (twice: here and in the residual) and `scale · q₂`.
    #[test]
    fn activations_and_what_they_miss_are_within_half_a_step_of_a_half_step(
        x in prop::collection::vec(-100.0f32..100.0, 96),
        magnitude in -60i32..60,
    ) {
        let x: Vec<f32> = x.iter().map(|x| x * 2f32.powi(magnitude)).collect();
        for kernels in kernels_with(ActivationForm::Int8) {
            let first = read_back(kernels, &x);
            let second = read_back(kernels, &missed(kernels, &x));
            for group in (0..3).map(|group| 32 * group..32 * (group + 1)) {
                let amax = x[group.clone()].iter().fold(0f32, |a, b| a.max(b.abs()));
                let step = 1.0001 / (254.0 * 254.0) + f64::from(f32::EPSILON) * 2.0;
                for i in group {
                    let off = f64::from(x[i]) - f64::from(first[i]) - f64::from(second[i]);
                    prop_assert!(off.abs() <= step * f64::from(amax), "{} is off by {off}", x[i]);
                }
            }
        }
    }

    #[test]
    fn any_floats_give_the_same_bits_on_every_isa(
        words in prop::collection::vec(any::<u32>(), 96),
        ordinary in 0usize..3,
    ) {
        let mut x: Vec<f32> = words.iter().map(|word| f32::from_bits(*word)).collect();
        // Leave some groups finite and of one magnitude, ties included.
        for value in &mut x[..32 * ordinary] {
            *value = (value.to_bits() % 255) as f32 / 2.0 - 63.5;
        }
        for kernels in kernels_with(ActivationForm::Bf16) {
            let wanted = read_back(Kernels::specification(kernels.isa()), &x);
            prop_assert_eq!(bits(&read_back(kernels, &x)), bits(&wanted), "{}", kernels.isa());
        }
        let scalar = Kernels::specification(Isa::Scalar);
        let wanted = read_back(scalar, &x);
        for kernels in kernels_with(ActivationForm::Int8) {
            prop_assert_eq!(bits(&read_back(kernels, &x)), bits(&wanted), "{}", kernels.isa());
            let rest = missed(kernels, &x);
            prop_assert_eq!(bits(&rest), bits(&missed(scalar, &x)), "{}", kernels.isa());
            let wanted = read_back(scalar, &rest);
            prop_assert_eq!(bits(&read_back(kernels, &rest)), bits(&wanted), "{}", kernels.isa());
        }
    }
}

/// An identity of bf16 tiles adds zeros to each element, and leaves it as it was rounded.
#[test]
fn bf16_keeps_eight_bits_of_each_element_however_small_its_neighbours_are() {
    let x: Vec<f32> =
        (0..96).map(|at| 1.37f32.powi(at - 60) * [1.0, -1.0][at as usize % 2]).collect();
    let specification = [Kernels::specification(Isa::Amx)];
    for kernels in specification.into_iter().chain(kernels_with(ActivationForm::Bf16)) {
        for (x, back) in x.iter().zip(read_back(kernels, &x)) {
            assert!((x - back).abs() <= x.abs() / 256.0, "{x} became {back} on {}", kernels.isa());
        }
    }
}

#[test]
fn a_column_with_a_nan_or_infinity_in_bf16_has_no_finite_output() {
    let specification = [Kernels::specification(Isa::Amx)];
    for kernels in specification.into_iter().chain(kernels_with(ActivationForm::Bf16)) {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, -f32::NAN] {
            let mut x = vec![1.0; 64];
            x[40] = bad;
            let back = read_back(kernels, &x);
            assert!(back.iter().all(|value| !value.is_finite()), "{bad} on {}", kernels.isa());
        }
    }
}

#[test]
fn a_group_with_a_nan_or_infinity_poisons_its_outputs() {
    for kernels in kernels_with(ActivationForm::Int8) {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -f32::NAN] {
            let mut x = vec![1.0; 64];
            x[40] = bad;
            let back = read_back(kernels, &x);
            assert!(back.iter().all(|value| value.is_nan()), "{bad} on {}", kernels.isa());
            let rest = missed(kernels, &x);
            assert!(rest[..32].iter().all(|value| value.abs() < 1e-6), "the other group");
            assert!(rest[32..].iter().all(|value| value.is_nan()), "{bad} on {}", kernels.isa());
        }
    }
}

#[test]
fn groups_too_small_to_scale_become_zero_and_the_smallest_scale_works() {
    for kernels in kernels_with(ActivationForm::Int8) {
        let mut x = vec![0.0; 64];
        x[3] = AMAX_MIN / 2.0;
        x[35] = -AMAX_MIN;
        let back = read_back(kernels, &x);
        assert_eq!(back[3], 0.0);
        assert_eq!(back[35], -AMAX_MIN);
        let again = read_back(kernels, &missed(kernels, &x));
        assert!(again.iter().all(|value| *value == 0.0), "nothing is left to represent");
    }
}

#[test]
#[should_panic(expected = "whole groups")]
fn a_range_within_a_group_is_refused() {
    let mut buffer = ActivationBuffer::new(Kernels::best().activation_form(), 1, 64);
    // SAFETY: one thread.
    let target = unsafe { buffer.writer(1, 64) };
    Kernels::best().quantize_activations(&[0.0; 16], target, 0, 0..16);
}
