//! One sequence with random queries, keys and values, its paged store, and naive attention on it.

use half::f16;
use tandem_cpu_kernels::Kernels;
use tandem_cpu_kernels::attention::{
    AttentionCall, AttentionParams, KV_GROUP, KvDType, KvLayout, KvStore, KvWrite, TokenRows,
};

#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub n_kv_heads: usize,
    pub group: usize,
    pub head_dim: usize,
    pub block_tokens: usize,
    pub softcap: Option<f32>,
    pub window: Option<usize>,
    pub dtype: KvDType,
}

impl Default for Shape {
    fn default() -> Shape {
        Shape {
            n_kv_heads: 1,
            group: 1,
            head_dim: 64,
            block_tokens: 32,
            softcap: None,
            window: None,
            dtype: KvDType::F16,
        }
    }
}

impl Shape {
    pub fn n_heads(&self) -> usize {
        self.n_kv_heads * self.group
    }

    pub fn layout(&self) -> KvLayout {
        KvLayout::new(self.n_kv_heads, self.head_dim, self.block_tokens, self.dtype)
            .expect("a good layout")
    }

    pub fn params(&self) -> AttentionParams {
        AttentionParams {
            n_heads: self.n_heads(),
            scale: 1.0 / (self.head_dim as f32).sqrt(),
            window: self.window,
            softcap: self.softcap,
        }
    }
}

pub struct World {
    pub shape: Shape,
    /// `[tokens, n_heads · head_dim]`.
    pub queries: Vec<f32>,
    /// `[tokens, n_kv_heads · head_dim]`.
    pub keys: Vec<f32>,
    pub values: Vec<f32>,
    pub blocks: Vec<u32>,
    stored_keys: Vec<u16>,
    stored_values: Vec<u16>,
}

/// Uniform in −2..2, from a 64-bit linear congruential generator.
fn random(n: usize, state: &mut u64) -> Vec<f32> {
    (0..n)
        .map(|_| {
            *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            ((*state >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 4.0
        })
        .collect()
}

/// Element of a Hadamard matrix: ±1.
fn sign(row: usize, column: usize) -> f32 {
    if (row & column).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 }
}

impl World {
    /// Nothing is written yet. Every second block of the store belongs to the sequence, from the
    /// last to the first.
    pub fn empty(shape: Shape, tokens: usize, seed: u64) -> World {
        let mut state = seed;
        let kv = tokens * shape.n_kv_heads * shape.head_dim;
        let n_blocks = tokens.div_ceil(shape.block_tokens);
        let words = (2 * n_blocks + 1) * shape.layout().block_bytes() / 2;
        World {
            shape,
            queries: random(tokens * shape.n_heads() * shape.head_dim, &mut state),
            keys: random(kv, &mut state),
            values: random(kv, &mut state),
            blocks: (0..n_blocks as u32).rev().map(|block| 2 * block + 1).collect(),
            stored_keys: vec![0; words],
            stored_values: vec![0; words],
        }
    }

    pub fn filled(kernels: &Kernels, shape: Shape, tokens: usize, seed: u64) -> World {
        let mut world = World::empty(shape, tokens, seed);
        world.write(kernels, 0, tokens);
        world
    }

    /// The same tokens in other blocks.
    pub fn with_other_blocks(&self, kernels: &Kernels) -> World {
        let tokens = self.tokens();
        let mut moved = World::empty(self.shape, tokens, 0);
        moved.queries.clone_from(&self.queries);
        moved.keys.clone_from(&self.keys);
        moved.values.clone_from(&self.values);
        moved.blocks = (0..self.blocks.len() as u32).map(|block| 2 * block).collect();
        moved.write(kernels, 0, tokens);
        moved
    }

    /// Fills the store with what must never be read as a number.
    pub fn poison(&mut self) {
        self.stored_keys.fill(f16::NAN.to_bits());
        self.stored_values.fill(f16::NAN.to_bits());
    }

    pub fn scale_keys(&mut self, factor: f32) {
        self.keys.iter_mut().for_each(|key| *key *= factor);
    }

    fn tokens(&self) -> usize {
        self.keys.len() / self.kv_width()
    }

    fn kv_width(&self) -> usize {
        self.shape.n_kv_heads * self.shape.head_dim
    }

    fn store(&self) -> KvStore<'_> {
        let n_blocks = 2 * self.stored_keys.len() / self.shape.layout().block_bytes();
        let (keys, values) = (self.stored_keys.as_ptr(), self.stored_values.as_ptr());
        // SAFETY: the store lives as long as `self`; one thread uses it.
        unsafe {
            KvStore::new(
                keys.cast_mut().cast(),
                values.cast_mut().cast(),
                n_blocks,
                self.shape.layout(),
            )
        }
    }

    pub fn write(&mut self, kernels: &Kernels, first: usize, n_tokens: usize) {
        let width = self.kv_width();
        let (keys, values) = (self.stored_keys.as_mut_ptr(), self.stored_values.as_mut_ptr());
        let n_blocks = 2 * self.stored_keys.len() / self.shape.layout().block_bytes();
        // SAFETY: the store lives as long as `self`; one thread uses it.
        let store =
            unsafe { KvStore::new(keys.cast(), values.cast(), n_blocks, self.shape.layout()) };
        let write = KvWrite {
            store,
            blocks: &self.blocks,
            first_position: first,
            keys: TokenRows::packed(&self.keys[first * width..][..n_tokens * width], width),
            values: TokenRows::packed(&self.values[first * width..][..n_tokens * width], width),
        };
        kernels.write_kv(&write, 0..self.shape.n_kv_heads);
    }

    pub fn call(&self, first: usize, n_queries: usize) -> AttentionCall<'_> {
        let width = self.shape.n_heads() * self.shape.head_dim;
        AttentionCall {
            params: self.shape.params(),
            store: self.store(),
            blocks: &self.blocks,
            first_position: first,
            queries: TokenRows::new(&self.queries[first * width..], n_queries, width, width),
        }
    }

    pub fn stored_bits(&self) -> Vec<u16> {
        self.stored_keys.iter().chain(&self.stored_values).copied().collect()
    }

    /// Checks every stored element: the nearest f16 of its source, or within half a scale.
    pub fn assert_stored_exactly(&self) {
        let shape = self.shape;
        for token in 0..self.tokens() {
            for head in 0..shape.n_kv_heads {
                for d in 0..shape.head_dim {
                    let from = token * self.kv_width() + head * shape.head_dim + d;
                    let (key, value) = (self.keys[from], self.values[from]);
                    let stored = self.stored(token, head, d);
                    for (wanted, (got, tolerance)) in [key, value].into_iter().zip(stored) {
                        let is_half = shape.dtype == KvDType::F16;
                        let wanted = if is_half { f16::from_f32(wanted).to_f32() } else { wanted };
                        let error = (got - wanted).abs();
                        assert!(error <= tolerance, "{token} {head} {d}: {got} {wanted}");
                    }
                }
            }
        }
    }

    /// A key's and a value's element as the store holds them, and how far each may be from its
    /// source: half a step (and what rounding the scale itself costs at the largest).
    fn stored(&self, token: usize, head: usize, d: usize) -> [(f32, f32); 2] {
        let (layout, slot) = (self.shape.layout(), token % self.shape.block_tokens);
        let block = self.blocks[token / self.shape.block_tokens] as usize * layout.block_bytes();
        let offsets = [layout.key_offset(head, slot, d), layout.value_offset(head, slot, d)];
        let scale_at = block + layout.scale_offset(head, slot, d / KV_GROUP);
        let mut stored = [(0.0, 0.0); 2];
        let first = d / KV_GROUP * KV_GROUP;
        let rotated = self.shape.dtype == KvDType::Q8_0 && first + KV_GROUP <= self.shape.head_dim;
        for (index, words) in [&self.stored_keys, &self.stored_values].into_iter().enumerate() {
            let at = block + offsets[index];
            stored[index] = if self.shape.dtype == KvDType::F16 {
                (f16::from_bits(words[at / 2]).to_f32(), 0.0)
            } else {
                let scale = f16::from_bits(words[scale_at / 2]).to_f32();
                let step = 0.5 + 127.0 / 2048.0;
                let element = |at: usize| f32::from(words[at / 2].to_le_bytes()[at % 2] as i8);
                if rotated && index == 0 {
                    let keys = (first..first + KV_GROUP)
                        .map(|dim| element(block + layout.key_offset(head, slot, dim)));
                    let turned: f32 =
                        keys.enumerate().map(|(i, key)| sign(i, d % KV_GROUP) * key).sum();
                    let norm = (KV_GROUP as f32).sqrt();
                    (turned / norm * scale, scale * step * norm)
                } else {
                    (element(at) * scale, scale * step)
                }
            };
        }
        stored
    }

    /// `softmax(scores)·values` in f64 over keys and values as they are stored.
    pub fn naive(&self, first: usize, n_queries: usize) -> Vec<f64> {
        let (mut out, mut stored) = (Vec::new(), [Vec::new(), Vec::new()]);
        for token in 0..first + n_queries {
            for element in 0..self.kv_width() {
                let (head, d) = (element / self.shape.head_dim, element % self.shape.head_dim);
                let both = self.stored(token, head, d);
                stored[0].push(f64::from(both[0].0));
                stored[1].push(f64::from(both[1].0));
            }
        }
        for position in first..first + n_queries {
            for head in 0..self.shape.n_heads() {
                out.extend(self.naive_row(&stored, position, head));
            }
        }
        out
    }

    fn naive_row(&self, stored: &[Vec<f64>; 2], position: usize, head: usize) -> Vec<f64> {
        let (shape, kv_head) = (self.shape, head / self.shape.group);
        let n = shape.head_dim;
        let query = &self.queries[(position * shape.n_heads() + head) * n..][..n];
        let kv =
            |which: usize, j: usize, d: usize| stored[which][j * self.kv_width() + kv_head * n + d];
        let start = shape.window.map_or(0, |window| (position + 1).saturating_sub(window));
        let score = |j: usize| {
            let dot: f64 = (0..n).map(|d| f64::from(query[d]) * kv(0, j, d)).sum();
            let score = dot * f64::from(shape.params().scale);
            shape.softcap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
        };
        let scores: Vec<f64> = (start..=position).map(score).collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
        let total: f64 = weights.iter().sum();
        (0..n)
            .map(|d| {
                let sum: f64 = weights.iter().zip(start..).map(|(w, j)| w * kv(1, j, d)).sum();
                sum / total
            })
            .collect()
    }
}
