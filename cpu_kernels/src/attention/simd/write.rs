//! Storing keys and values.

use crate::attention::KvWrite;
use crate::attention::write::write_groups;
use crate::lanes::Lanes;

/// See [`AttentionTable::write_kv`].
///
/// # Safety
/// The write was checked and the CPU has the instructions of `L`.
#[inline(always)]
pub(super) unsafe fn write_kv<L: Lanes>(write: &KvWrite<'_>, kv_head: usize) {
    let layout = write.store.layout();
    if layout.is_eight_bits() {
        // SAFETY: the write was checked.
        return unsafe { write_groups(write, kv_head) };
    }
    let (head_dim, block_tokens) = (layout.head_dim(), layout.block_tokens());
    for token in 0..write.keys.n_tokens() {
        let position = write.first_position + token;
        let (block, slot) = (write.blocks[position / block_tokens], position % block_tokens);
        let key = write.store.key_at(block, kv_head, slot).cast::<u16>();
        let value = write.store.value_at(block, kv_head, slot).cast::<u16>();
        let keys = &write.keys.row(token)[kv_head * head_dim..][..head_dim];
        let values = &write.values.row(token)[kv_head * head_dim..][..head_dim];
        let mut d = 0;
        while d < head_dim {
            let len = (head_dim - d).min(L::WIDTH);
            let mut bits = [0u16; 16];
            // SAFETY: `len` elements from `d` lie inside the head; a vector has at most 16.
            unsafe {
                store_f16::<L>(value.add(d), values.as_ptr().add(d), len);
                store_f16::<L>(bits.as_mut_ptr(), keys.as_ptr().add(d), len);
                for (i, bits) in bits[..len].iter().enumerate() {
                    *key.add((d + i) * block_tokens) = *bits;
                }
            }
            d += L::WIDTH;
        }
    }
}

/// Stores `len` elements as f16, within its finite range; NaN stays NaN.
///
/// # Safety
/// Both pointers are valid for `len ≤ WIDTH` elements.
#[inline(always)]
unsafe fn store_f16<L: Lanes>(to: *mut u16, from: *const f32, len: usize) {
    let max = half::f16::MAX.to_f32();
    // SAFETY: `min` and `max` keep a NaN in their second argument.
    unsafe {
        let x = L::load_head(from, len);
        let x = L::max(L::splat(-max), L::min(L::splat(max), x));
        L::store_f16_head(to, x, len);
    }
}
