//! Storing keys and values in 8 bits: plain Rust, the same bits for every instruction set. It is
//! inlined into the outermost function of each, whose vectors the compiler then uses.

use super::rotate::rotate;
use super::store::KV_GROUP;
use super::{KvWrite, scalar};
use half::f16;

/// Largest magnitude of an 8-bit element.
const ELEMENT_MAX: f32 = 127.0;

/// Stores all tokens of a write for one head.
///
/// # Safety
/// The write was checked, and its store holds 8 bits.
#[inline(always)]
pub(super) unsafe fn write_groups(write: &KvWrite<'_>, kv_head: usize) {
    let layout = write.store.layout();
    let (head_dim, block_tokens) = (layout.head_dim(), layout.block_tokens());
    for token in 0..write.keys.n_tokens() {
        let position = write.first_position + token;
        let (block, slot) = (write.blocks[position / block_tokens], position % block_tokens);
        let key = write.store.key_at(block, kv_head, slot);
        let value = write.store.value_at(block, kv_head, slot);
        let scales = write.store.scales_at(block, kv_head, slot);
        let rows = [write.keys.row(token), write.values.row(token)];
        let places = [(key, block_tokens, Turn::Rotated), (value, 1, Turn::AsIs)];
        for ((row, (to, stride, turn)), scales) in rows.into_iter().zip(places).zip(scales) {
            let row = &row[kv_head * head_dim..][..head_dim];
            for (index, group) in row.chunks(KV_GROUP).enumerate() {
                let (scale, elements) = quantize(group, turn);
                // SAFETY: groups and elements lie inside the head.
                unsafe {
                    *scales.add(index * block_tokens) = scale;
                    for (i, element) in elements[..group.len()].iter().enumerate() {
                        *to.cast::<i8>().add((index * KV_GROUP + i) * stride) = *element;
                    }
                }
            }
        }
    }
}

/// What is done to a whole group before it is rounded.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Turn {
    AsIs,
    Rotated,
}

/// f16 bits of the scale and the elements of a group: multiples of the scale as it is stored.
#[inline(always)]
fn quantize(group: &[f32], turn: Turn) -> (u16, [i8; KV_GROUP]) {
    let limit = f16::MAX.to_f32() * ELEMENT_MAX;
    let mut values = [0.0f32; KV_GROUP];
    for (value, x) in values.iter_mut().zip(group) {
        *value = if x.is_nan() { f32::NAN } else { x.clamp(-limit, limit) };
    }
    if turn == Turn::Rotated && group.len() == KV_GROUP {
        rotate(&mut values);
    }
    // Times 0, everything that is finite adds nothing, and a NaN makes the scale NaN.
    let nan: f32 = values.iter().map(|value| value * 0.0).sum();
    let largest = values.iter().fold(0.0f32, |max, value| max.max(value.abs()));
    let scale = scalar::to_f16_bits(largest / ELEMENT_MAX + nan);
    let stored = f16::from_bits(scale).to_f32();
    let inverse = if stored == 0.0 { 0.0 } else { 1.0 / stored };
    let mut elements = [0; KV_GROUP];
    for (element, value) in elements.iter_mut().zip(values) {
        let steps = (value * inverse).clamp(-ELEMENT_MAX, ELEMENT_MAX);
        *element = steps.round_ties_even() as i8;
    }
    (scale, elements)
}
