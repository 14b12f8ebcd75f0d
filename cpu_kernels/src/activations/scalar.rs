//! The specification of 8-bit activations.

use super::{AMAX_MIN, ActivationTable, GroupScale};
use crate::blocks::GROUP;

pub(crate) const TABLE: ActivationTable = ActivationTable { quantize };

fn quantize(values: &[f32], quants: &mut [i8], scales: &mut [GroupScale]) {
    let groups = values.as_chunks::<GROUP>().0.iter().zip(quants.as_chunks_mut::<GROUP>().0);
    for ((values, quants), scale) in groups.zip(scales) {
        *scale = quantize_group(values, quants);
    }
}

fn quantize_group(values: &[f32; GROUP], quants: &mut [i8; GROUP]) -> GroupScale {
    // As integers, |x| orders like the numbers themselves, with infinity and NaN on top.
    let largest = values.iter().map(|x| x.to_bits() & 0x7fff_ffff).max().unwrap_or(0);
    let amax = f32::from_bits(largest);
    quants.fill(0);
    if !amax.is_finite() {
        return GroupScale { scale: f32::NAN, scaled_sum: f32::NAN, sums: [0; 2] };
    }
    if amax < AMAX_MIN {
        return GroupScale::default();
    }
    let inverse = 127.0 / amax;
    let mut sums = [0; 2];
    for (element, (value, quant)) in values.iter().zip(quants).enumerate() {
        *quant = (value * inverse).round_ties_even() as i8;
        sums[element / 16] += i16::from(*quant);
    }
    let scale = amax / 127.0;
    GroupScale { scale, scaled_sum: scale * f32::from(sums[0] + sums[1]), sums }
}
