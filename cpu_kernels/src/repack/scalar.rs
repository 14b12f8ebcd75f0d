//! The specification of the interleaving, and its only form on processors that are no x86-64.

#[cfg(any(test, not(target_arch = "x86_64")))]
use super::{ROWS, Unit};

/// Interleaves one field of 16 blocks. `source` has the field's bytes of each row, `packed` 16
/// times as many.
#[cfg(any(test, not(target_arch = "x86_64")))]
pub(super) fn interleave(unit: Unit, source: &[&[u8]; ROWS], packed: &mut [u8]) {
    match unit {
        Unit::Byte => by_unit::<1>(source, packed, |unit| unit),
        Unit::Half => by_unit::<2>(source, packed, |unit| unit),
        Unit::Word => by_unit::<4>(source, packed, |unit| unit),
        Unit::Bits => by_unit::<4>(source, packed, spread_bits),
    }
}

#[cfg(any(test, not(target_arch = "x86_64")))]
fn by_unit<const N: usize>(
    source: &[&[u8]; ROWS],
    packed: &mut [u8],
    change: impl Fn([u8; N]) -> [u8; N],
) {
    let groups = packed.as_chunks_mut::<N>().0.as_chunks_mut::<ROWS>().0;
    for (index, group) in groups.iter_mut().enumerate() {
        for (packed, source) in group.iter_mut().zip(source) {
            *packed = change(source.as_chunks::<N>().0[index]);
        }
    }
}

/// Bit `4w + b` to bit `w` of byte `b`: the transposition of an 8×4 bit matrix.
#[cfg(any(test, not(target_arch = "x86_64")))]
pub(super) fn spread_bits(unit: [u8; 4]) -> [u8; 4] {
    let mask = u32::from_le_bytes(unit);
    std::array::from_fn(|byte| {
        let every_fourth = mask >> byte & 0x1111_1111;
        let pairs = (every_fourth | every_fourth >> 3) & 0x0303_0303;
        let fours = (pairs | pairs >> 6) & 0x000f_000f;
        (fours | fours >> 12) as u8
    })
}

/// The inverse of [`spread_bits`].
pub(super) fn gather_bits(unit: [u8; 4]) -> [u8; 4] {
    let mut mask = 0;
    for (byte, bits) in unit.into_iter().enumerate() {
        let fours = (u32::from(bits) | u32::from(bits) << 12) & 0x000f_000f;
        let pairs = (fours | fours << 6) & 0x0303_0303;
        mask |= ((pairs | pairs << 3) & 0x1111_1111) << byte;
    }
    mask.to_le_bytes()
}
