//! The specification of rounded activations.

use super::{
    AMAX_MIN, ActivationTable, BF16_EXPONENT, BF16_ORDER, GroupScale, HalfStarts, LinesMut,
};
use crate::blocks::GROUP;
use half::bf16;

pub(crate) const TABLE: ActivationTable = ActivationTable::Int8 { quantize, residual };
pub(crate) const BF16: ActivationTable = ActivationTable::Bf16 { round };

fn round(values: &[f32], mut lines: LinesMut<'_>) {
    let factor = 2f32.powi(BF16_EXPONENT);
    for (values, line) in values.as_chunks::<GROUP>().0.iter().zip(lines.iter_mut()) {
        for (place, out) in line.0.iter_mut().enumerate() {
            let value = values[place / 4 * 4 + BF16_ORDER[place % 4]];
            *out = bf16::from_f32(value * factor).to_bits();
        }
    }
}

fn quantize(
    values: &[f32],
    quants: &mut [i8],
    (scales, starts): (&mut [GroupScale], &mut [HalfStarts]),
) {
    let groups = values.as_chunks::<GROUP>().0.iter().zip(quants.as_chunks_mut::<GROUP>().0);
    for ((values, quants), (scale, starts)) in groups.zip(scales.iter_mut().zip(starts)) {
        *scale = quantize_group(values, quants);
        *starts = scale.half_starts();
    }
}

fn residual(values: &[f32], quants: &[i8], scales: &[GroupScale], residual: &mut [f32]) {
    let groups = quants.as_chunks::<GROUP>().0.iter().zip(scales);
    let values = values.as_chunks::<GROUP>().0.iter().zip(residual.as_chunks_mut::<GROUP>().0);
    for ((quants, scale), (values, residual)) in groups.zip(values) {
        for ((quant, value), out) in quants.iter().zip(values).zip(residual) {
            *out = value - scale.scale * f32::from(*quant);
        }
    }
}

/// A group with a number that is not finite, or with none that is large enough.
pub(super) fn group_without_integers(amax: f32, quants: &mut [i8; GROUP]) -> GroupScale {
    quants.fill(0);
    if amax.is_finite() {
        return GroupScale::default();
    }
    GroupScale { scale: f32::NAN, scaled_sum: f32::NAN, ..GroupScale::default() }
}

fn quantize_group(values: &[f32; GROUP], quants: &mut [i8; GROUP]) -> GroupScale {
    // As integers, |x| orders like the numbers themselves, with infinity and NaN on top.
    let largest = values.iter().fold(0, |largest, x| largest.max(x.to_bits() & 0x7fff_ffff));
    let amax = f32::from_bits(largest);
    if !amax.is_finite() || amax < AMAX_MIN {
        return group_without_integers(amax, quants);
    }
    let inverse = 127.0 / amax;
    for (quant, value) in quants.iter_mut().zip(values) {
        let rounded = (value * inverse).round_ties_even();
        // SAFETY: |value| ≤ amax, so the product is within ±127 but for its rounding, which the
        // rounding to an integer takes away; it is finite.
        *quant = unsafe { rounded.to_int_unchecked::<i32>() } as i8;
    }
    let sum = |half: &[i8]| half.iter().map(|&quant| i32::from(quant)).sum::<i32>();
    let (low, high) = quants.split_at(GROUP / 2);
    GroupScale::new(amax / 127.0, [sum(low), sum(high)])
}
