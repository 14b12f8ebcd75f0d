//! What a store keeps of a key or a value: by the specification, and where it lies on a GPU.

use super::scalar;
use super::world::Shape;
use half::{bf16, f16};
use tandem_cpu_kernels::attention::{KV_GROUP, KvDType, KvLayout, KvStore, KvWrite, TokenRows};

/// Which of the two planes of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plane {
    Keys,
    Values,
}

/// One position's key, or value, of one head: the bits of its elements and of its scales. All NaN
/// of a float type have the same bits here.
#[derive(Debug, PartialEq, Eq)]
pub struct KeptHead {
    pub elements: Vec<u16>,
    pub scales: Vec<u16>,
}

impl KeptHead {
    /// What is to be kept of a head: on the CPU, where it has the type.
    pub fn of(dtype: KvDType, head: &[f32], plane: Plane) -> KeptHead {
        let elements = match dtype {
            KvDType::F16 | KvDType::Q8_0 => return Self::on_cpu(dtype, head, plane),
            KvDType::Bf16 => head.iter().map(|x| {
                let max = bf16::MAX.to_f32();
                bf16::from_f32(if x.is_nan() { *x } else { x.clamp(-max, max) }).to_bits()
            }),
            KvDType::Fp8E4m3 => return Self::e4m3(head),
        };
        Self { elements: elements.collect(), scales: Vec::new() }.with_one_nan(dtype)
    }

    fn e4m3(head: &[f32]) -> KeptHead {
        // Ascending, so that a magnitude's nearest one is beside where it would stand.
        let all: Vec<f64> = (0..127).map(e4m3_number).collect();
        let nearest = |size: f64| {
            let above = all.partition_point(|value| *value < size).min(126);
            let below = above.saturating_sub(1);
            let (up, down) = (all[above] - size, size - all[below]);
            let is_below = down < up || (down == up && below % 2 == 0);
            if is_below { below } else { above }
        };
        let bits = |x: &f32| match x.is_nan() {
            true => 0x7f,
            false => nearest(f64::from(x.abs())) as u16 | (u16::from(x.is_sign_negative()) << 7),
        };
        KeptHead { elements: head.iter().map(bits).collect(), scales: Vec::new() }
    }

    /// What the scalar kernels store.
    fn on_cpu(dtype: KvDType, head: &[f32], plane: Plane) -> KeptHead {
        let layout = KvLayout::new(1, head.len(), 16, dtype).expect("a layout");
        let mut planes = [0, 1].map(|_| vec![0u16; layout.block_bytes() / 2]);
        let [keys, values] = planes.each_mut().map(|plane| plane.as_mut_ptr().cast());
        // SAFETY: both have one block, and one thread uses them.
        let store = unsafe { KvStore::new(keys, values, 1, layout) };
        let rows = TokenRows::packed(head, head.len());
        let write = KvWrite { store, blocks: &[0], first_position: 0, keys: rows, values: rows };
        scalar().write_kv(&write, 0..1);
        let words = &planes[plane as usize];
        let element = |d: usize| {
            let at = match plane {
                Plane::Keys => layout.key_offset(0, 0, d),
                Plane::Values => layout.value_offset(0, 0, d),
            };
            let word = words[at / 2];
            if dtype == KvDType::F16 { word } else { u16::from(word.to_le_bytes()[at % 2]) }
        };
        let groups = if dtype == KvDType::Q8_0 { head.len().div_ceil(KV_GROUP) } else { 0 };
        let scales = (0..groups).map(|group| words[layout.scale_offset(0, 0, group) / 2]);
        Self { elements: (0..head.len()).map(element).collect(), scales: scales.collect() }
            .with_one_nan(dtype)
    }

    /// What lies in a plane of a GPU's store.
    pub fn on_gpu(plane: (Plane, &[u8]), shape: Shape, place: (usize, usize, usize)) -> KeptHead {
        let (Shape { heads, block_tokens, dtype, .. }, (block, kv_head, slot)) = (shape, place);
        let dim = heads.head_dim;
        let size = if matches!(dtype, KvDType::F16 | KvDType::Bf16) { 2 } else { 1 };
        let start = (block * heads.n_kv_heads + kv_head) * dtype.head_bytes(dim) * block_tokens;
        let bytes = |at: usize, size: usize| {
            let bytes = plane.1[start + at..][..size].iter().rev();
            bytes.fold(0u16, |all, byte| (all << 8) | u16::from(*byte))
        };
        let element = |d: usize| {
            let index = match plane.0 {
                Plane::Keys => (d / 8 * block_tokens + slot) * 8 + d % 8,
                Plane::Values => slot * dim + d,
            };
            bytes(index * size, size)
        };
        let groups = if dtype == KvDType::Q8_0 { dim.div_ceil(KV_GROUP) } else { 0 };
        let scale = |group: usize| bytes(dim * block_tokens + 2 * (group * block_tokens + slot), 2);
        Self { elements: (0..dim).map(element).collect(), scales: (0..groups).map(scale).collect() }
            .with_one_nan(dtype)
    }

    fn with_one_nan(mut self, dtype: KvDType) -> KeptHead {
        for bits in &mut self.elements {
            match dtype {
                KvDType::F16 if f16::from_bits(*bits).is_nan() => *bits = f16::NAN.to_bits(),
                KvDType::Bf16 if bf16::from_bits(*bits).is_nan() => *bits = bf16::NAN.to_bits(),
                KvDType::Fp8E4m3 if *bits & 0x7f == 0x7f => *bits = 0x7f,
                _ => {}
            }
        }
        self
    }

    /// The numbers that attention reads; keys of q8_0 as they are rotated.
    pub fn numbers(&self, dtype: KvDType) -> Vec<f64> {
        let number = |(d, bits): (usize, &u16)| match dtype {
            KvDType::F16 => f16::from_bits(*bits).to_f64(),
            KvDType::Bf16 => bf16::from_bits(*bits).to_f64(),
            KvDType::Fp8E4m3 => {
                let sign = if bits & 0x80 == 0 { 1.0 } else { -1.0 };
                sign * e4m3_number(bits & 0x7f)
            }
            KvDType::Q8_0 => {
                f64::from(*bits as u8 as i8) * f16::from_bits(self.scales[d / KV_GROUP]).to_f64()
            }
        };
        self.elements.iter().enumerate().map(number).collect()
    }
}

/// A number of e4m3 without its sign.
fn e4m3_number(bits: u16) -> f64 {
    let (exponent, fraction) = (i32::from(bits >> 3), f64::from(bits & 7) / 8.0);
    match (bits, exponent) {
        (0x7f, _) => f64::NAN,
        (_, 0) => fraction * 2f64.powi(-6),
        _ => (1.0 + fraction) * 2f64.powi(exponent - 7),
    }
}

/// Whole groups times a Hadamard matrix over √32, as keys of q8_0 and the queries that meet them.
pub fn turn(head: &mut [f32]) {
    for group in head.as_chunks_mut::<KV_GROUP>().0 {
        let mut half = 1;
        while half < KV_GROUP {
            for low in (0..KV_GROUP).filter(|index| index & half == 0) {
                let (a, b) = (group[low], group[low + half]);
                (group[low], group[low + half]) = (a + b, a - b);
            }
            half *= 2;
        }
        group.iter_mut().for_each(|x| *x *= 0.176_776_69);
    }
}
