//! One sequence with random queries, keys and values, its paged store, and naive attention on it.

use half::f16;
use tandem_cpu_kernels::Kernels;
use tandem_cpu_kernels::attention::{
    AttentionCall, AttentionParams, KvLayout, KvStore, KvWrite, TokenRows,
};

#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub n_kv_heads: usize,
    pub group: usize,
    pub head_dim: usize,
    pub block_tokens: usize,
    pub softcap: Option<f32>,
    pub window: Option<usize>,
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
        }
    }
}

impl Shape {
    pub fn n_heads(&self) -> usize {
        self.n_kv_heads * self.group
    }

    pub fn layout(&self) -> KvLayout {
        KvLayout::new(self.n_kv_heads, self.head_dim, self.block_tokens).expect("a good layout")
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
    stored_keys: Vec<f16>,
    stored_values: Vec<f16>,
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

impl World {
    /// Nothing is written yet. Every second block of the store belongs to the sequence, from the
    /// last to the first.
    pub fn empty(shape: Shape, tokens: usize, seed: u64) -> World {
        let mut state = seed;
        let kv = tokens * shape.n_kv_heads * shape.head_dim;
        let n_blocks = tokens.div_ceil(shape.block_tokens);
        let elements = (2 * n_blocks + 1) * shape.layout().block_elements();
        World {
            shape,
            queries: random(tokens * shape.n_heads() * shape.head_dim, &mut state),
            keys: random(kv, &mut state),
            values: random(kv, &mut state),
            blocks: (0..n_blocks as u32).rev().map(|block| 2 * block + 1).collect(),
            stored_keys: vec![f16::ZERO; elements],
            stored_values: vec![f16::ZERO; elements],
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
        self.stored_keys.fill(f16::NAN);
        self.stored_values.fill(f16::NAN);
    }

    fn tokens(&self) -> usize {
        self.keys.len() / self.kv_width()
    }

    fn kv_width(&self) -> usize {
        self.shape.n_kv_heads * self.shape.head_dim
    }

    fn store(&self) -> KvStore<'_> {
        let n_blocks = self.stored_keys.len() / self.shape.layout().block_elements();
        let (keys, values) = (self.stored_keys.as_ptr(), self.stored_values.as_ptr());
        // SAFETY: the store lives as long as `self`; one thread uses it.
        unsafe { KvStore::new(keys.cast_mut(), values.cast_mut(), n_blocks, self.shape.layout()) }
    }

    pub fn write(&mut self, kernels: &Kernels, first: usize, n_tokens: usize) {
        let width = self.kv_width();
        let (keys, values) = (self.stored_keys.as_mut_ptr(), self.stored_values.as_mut_ptr());
        let n_blocks = self.stored_keys.len() / self.shape.layout().block_elements();
        // SAFETY: the store lives as long as `self`; one thread uses it.
        let store = unsafe { KvStore::new(keys, values, n_blocks, self.shape.layout()) };
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
        self.stored_keys.iter().chain(&self.stored_values).map(|x| x.to_bits()).collect()
    }

    /// Checks every stored element against the nearest f16 of its source.
    pub fn assert_stored_exactly(&self) {
        let (layout, shape) = (self.shape.layout(), self.shape);
        for token in 0..self.tokens() {
            let block = self.blocks[token / shape.block_tokens] as usize * layout.block_elements();
            let slot = token % shape.block_tokens;
            for head in 0..shape.n_kv_heads {
                for d in 0..shape.head_dim {
                    let from = token * self.kv_width() + head * shape.head_dim + d;
                    let key = self.stored_keys[block + layout.key_offset(head, slot, d)];
                    let value = self.stored_values[block + layout.value_offset(head, slot, d)];
                    assert_eq!(key, f16::from_f32(self.keys[from]), "key {token} {head} {d}");
                    assert_eq!(value, f16::from_f32(self.values[from]), "value {token} {head} {d}");
                }
            }
        }
    }

    /// `softmax(scores)·values` in f64 over keys and values rounded to f16.
    pub fn naive(&self, first: usize, n_queries: usize) -> Vec<f64> {
        let mut out = Vec::new();
        for position in first..first + n_queries {
            for head in 0..self.shape.n_heads() {
                out.extend(self.naive_row(position, head));
            }
        }
        out
    }

    fn naive_row(&self, position: usize, head: usize) -> Vec<f64> {
        let (shape, kv_head) = (self.shape, head / self.shape.group);
        let n = shape.head_dim;
        let query = &self.queries[(position * shape.n_heads() + head) * n..][..n];
        let kv = |data: &[f32], j: usize, d: usize| {
            f16::from_f32(data[j * self.kv_width() + kv_head * n + d]).to_f64()
        };
        let start = shape.window.map_or(0, |window| (position + 1).saturating_sub(window));
        let score = |j: usize| {
            let dot: f64 = (0..n).map(|d| f64::from(query[d]) * kv(&self.keys, j, d)).sum();
            let score = dot * f64::from(shape.params().scale);
            shape.softcap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
        };
        let scores: Vec<f64> = (start..=position).map(score).collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
        let total: f64 = weights.iter().sum();
        (0..n)
            .map(|d| {
                let sum: f64 =
                    weights.iter().zip(start..).map(|(w, j)| w * kv(&self.values, j, d)).sum();
                sum / total
            })
            .collect()
    }
}
