//! Sequences whose tokens attend on the GPU, and a naive softmax over them in f64.

use super::kept::{KeptHead, Plane, turn};
use super::{Random, cases, from_gpu, on_gpu};
use tandem_cpu_kernels::attention::KvDType;
use tandem_kernels::{Attend, Gpu, HeadCounts, KvSpans, RotateHeads, Runs, Span, TokenTables};

#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub heads: HeadCounts,
    pub block_tokens: usize,
    pub window: Option<usize>,
    pub softcap: Option<f32>,
    pub interleaved: bool,
    pub dtype: KvDType,
}

/// Some sequences' heads, one step per prompt: all tokens of sequence s have positions 0 ...
pub struct World {
    pub shape: Shape,
    /// `[tokens, width]`
    pub heads: Vec<f32>,
    /// `[tokens, 2 · pairs]`
    pub angles: Vec<f32>,
    pub positions: Vec<u32>,
    pub tables: Vec<u32>,
    pub blocks: Vec<u32>,
    pub n_blocks: usize,
}

impl World {
    pub fn new(shape: Shape, lengths: &[usize], random: &mut Random) -> World {
        let HeadCounts { n_heads, n_kv_heads, head_dim } = shape.heads;
        let tokens: usize = lengths.iter().sum();
        let mut world = World {
            shape,
            heads: random.floats(tokens * (n_heads + 2 * n_kv_heads) * head_dim),
            angles: Vec::new(),
            positions: Vec::new(),
            tables: Vec::new(),
            blocks: Vec::new(),
            n_blocks: 0,
        };
        for length in lengths {
            let table = world.blocks.len() as u32;
            for position in 0..*length {
                let angle = |pair: usize| position as f32 * 0.9f32.powi(pair as i32);
                world.angles.extend((0..head_dim / 2).map(|pair| angle(pair).cos()));
                world.angles.extend((0..head_dim / 2).map(|pair| angle(pair).sin()));
                world.positions.push(position as u32);
                world.tables.push(table);
            }
            let count = length.div_ceil(shape.block_tokens);
            world.blocks.extend((0..count).map(|block| (world.n_blocks + block) as u32));
            world.n_blocks += count;
        }
        // Blocks of a sequence lie anywhere.
        let last = world.n_blocks as u32 - 1;
        world.blocks.iter_mut().for_each(|block| *block = last - *block);
        world
    }

    /// Elements `head` of token `token`, rotated as they should be, in f32: rounding must see the
    /// same numbers.
    pub fn rotated(&self, token: usize, head: usize) -> Vec<f32> {
        let HeadCounts { n_heads, n_kv_heads, head_dim } = self.shape.heads;
        let at = (token * (n_heads + 2 * n_kv_heads) + head) * head_dim;
        let mut values = self.heads[at..][..head_dim].to_vec();
        let pairs = head_dim / 2;
        let (cos, sin) = self.angles[token * head_dim..][..head_dim].split_at(pairs);
        for pair in 0..pairs {
            let (a, b) = if self.shape.interleaved {
                (2 * pair, 2 * pair + 1)
            } else {
                (pair, pair + pairs)
            };
            let (x, y, c, s) = (values[a], values[b], cos[pair], sin[pair]);
            (values[a], values[b]) = (x.mul_add(c, -(y * s)), x.mul_add(s, y * c));
        }
        values
    }

    /// The value of KV head `kv_head` of token `token`.
    pub fn value_at(&self, token: usize, kv_head: usize) -> std::ops::Range<usize> {
        let HeadCounts { n_heads, n_kv_heads, head_dim } = self.shape.heads;
        let at = (token * (n_heads + 2 * n_kv_heads) + n_heads + n_kv_heads + kv_head) * head_dim;
        at..at + head_dim
    }

    /// What is to be kept of KV head `kv_head` of token `token`.
    pub fn kept(&self, token: usize, kv_head: usize, plane: Plane) -> KeptHead {
        let dtype = self.shape.dtype;
        match plane {
            Plane::Keys => {
                let key = self.rotated(token, self.shape.heads.n_heads + kv_head);
                KeptHead::of(dtype, &key, plane)
            }
            Plane::Values => KeptHead::of(dtype, &self.heads[self.value_at(token, kv_head)], plane),
        }
    }

    /// Keys or values of all tokens, `[tokens · n_kv_heads]` heads.
    fn store(&self, plane: Plane, rounded: &impl Fn(f64) -> f64) -> Vec<Vec<f64>> {
        let (n_kv_heads, dtype) = (self.shape.heads.n_kv_heads, self.shape.dtype);
        let heads = (0..self.positions.len() * n_kv_heads).map(|at| {
            let kept = self.kept(at / n_kv_heads, at % n_kv_heads, plane).numbers(dtype);
            kept.into_iter().map(rounded).collect()
        });
        heads.collect()
    }

    /// The attention of tokens from `first` on.
    pub fn naive(&self, first: usize) -> Vec<f32> {
        self.naive_of(first, |x| x)
    }

    /// The same with queries, keys and values that `rounded` changes.
    pub fn naive_of(&self, first: usize, rounded: impl Fn(f64) -> f64) -> Vec<f32> {
        let HeadCounts { n_heads, n_kv_heads, head_dim } = self.shape.heads;
        let [keys, values] = [Plane::Keys, Plane::Values].map(|plane| self.store(plane, &rounded));
        let mut out = Vec::new();
        for (token, position) in self.positions.iter().enumerate().skip(first) {
            let position = *position as usize;
            let start = token - position;
            let from = self.shape.window.map_or(0, |w| (position + 1).saturating_sub(w));
            for head in 0..n_heads {
                let kv = head / (n_heads / n_kv_heads);
                let at = |key: usize| (start + key) * n_kv_heads + kv;
                let mut q = self.rotated(token, head);
                if self.shape.dtype == KvDType::Q8_0 {
                    turn(&mut q);
                }
                let q: Vec<f64> = q.into_iter().map(|q| rounded(f64::from(q))).collect();
                let score = |key: usize| {
                    let pairs = q.iter().zip(&keys[at(key)]);
                    let score = 0.3 * pairs.map(|(q, k)| q * k).sum::<f64>();
                    let cap = self.shape.softcap.map(f64::from);
                    cap.map_or(score, |cap| cap * (score / cap).tanh())
                };
                let scores: Vec<f64> = (from..=position).map(score).collect();
                let max = scores.iter().copied().fold(f64::MIN, f64::max);
                let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                let mut sums = vec![0.0; head_dim];
                for (key, score) in (from..=position).zip(&scores) {
                    let weight = (score - max).exp() / total;
                    sums.iter_mut().zip(&values[at(key)]).for_each(|(sum, v)| *sum += weight * v);
                }
                out.extend(sums.iter().map(|x| *x as f32));
            }
        }
        out
    }

    /// On the GPU: all tokens rotated and stored in one step, then the attention of those from
    /// `first` on.
    pub fn on_gpu(&self, gpu: &Gpu, first: usize) -> Vec<f32> {
        self.with_store(gpu, |pass, heads, (tokens, store)| {
            let n = tokens.tokens - first;
            let width = self.width();
            fn part(span: Span<'_>, first: usize, n: usize) -> Span<'_> {
                span.part(4 * first, 4 * n)
            }
            let positions = part(tokens.positions, first, n);
            let tables = part(tokens.tables, first, n);
            let table = TokenTables { tokens: n, positions, tables, ..*tokens };
            let positions_max = self.positions[first..].iter().max().map_or(0, |p| *p as usize + 1);
            let out = on_gpu(gpu, &vec![f32::NAN; n * heads.n_heads * heads.head_dim]);
            let partials = Attend::partial_bytes(heads, n, positions_max);
            let partials = gpu.alloc(partials).expect("room");
            let pass = Attend {
                heads: pass.heads.part(4 * first * width, 4 * n * width),
                out: out.span(),
                partials: partials.span(),
                positions_max,
                ..*pass
            };
            gpu.attend(&pass, heads, (&table, store), None).expect("an attention");
            from_gpu(gpu, &out, n * heads.n_heads * heads.head_dim)
        })
    }

    /// The same for runs of tokens on tensor cores, whose positions some blocks divide; others stay
    /// NaN.
    pub fn runs_on_gpu(&self, gpu: &Gpu, runs: &[[u32; 2]], blocks: usize) -> Vec<f32> {
        self.with_store(gpu, |pass, heads, (tokens, store)| {
            let count = tokens.tokens * heads.n_heads * heads.head_dim;
            let out = on_gpu(gpu, &vec![f32::NAN; count]);
            let lengths = on_gpu(gpu, runs);
            let runs = Runs { lengths: runs, on_gpu: lengths.span(), blocks };
            let pass = Attend { out: out.span(), ..*pass };
            gpu.attend_runs(&pass, heads, (tokens, store), &runs).expect("an attention");
            from_gpu(gpu, &out, count)
        })
    }

    /// The same for some tokens, one by one.
    pub fn chosen_on_gpu(&self, gpu: &Gpu, chosen: &[u32]) -> Vec<f32> {
        self.with_store(gpu, |pass, heads, (tokens, store)| {
            let count = tokens.tokens * heads.n_heads * heads.head_dim;
            let out = on_gpu(gpu, &vec![f32::NAN; count]);
            let positions_max = self.positions.iter().max().map_or(0, |p| *p as usize + 1);
            let partials = Attend::partial_bytes(heads, chosen.len(), positions_max);
            let partials = gpu.alloc(partials).expect("room");
            let list = on_gpu(gpu, chosen);
            let pass = Attend {
                chosen: Some((list.span(), chosen.len())),
                out: out.span(),
                partials: partials.span(),
                positions_max,
                ..*pass
            };
            gpu.attend(&pass, heads, (tokens, store), None).expect("an attention");
            from_gpu(gpu, &out, count)
        })
    }

    /// Elements of a token's heads.
    pub fn width(&self) -> usize {
        let HeadCounts { n_heads, n_kv_heads, head_dim } = self.shape.heads;
        (n_heads + 2 * n_kv_heads) * head_dim
    }

    /// Rotates and stores all tokens in one step; `then` gets an attention without an output.
    fn with_store<T>(
        &self,
        gpu: &Gpu,
        then: impl FnOnce(&Attend<'_>, HeadCounts, (&TokenTables<'_>, &KvSpans<'_>)) -> T,
    ) -> T {
        let heads = self.shape.heads;
        self.prepared(gpu, |rotate, attend, places| {
            gpu.rotate_heads(rotate, heads, places).expect("a rotation");
            then(attend, heads, places)
        })
    }

    /// What a rotation and an attention of all tokens take; nothing is stored yet.
    pub fn prepared<T>(
        &self,
        gpu: &Gpu,
        then: impl FnOnce(&RotateHeads<'_>, &Attend<'_>, (&TokenTables<'_>, &KvSpans<'_>)) -> T,
    ) -> T {
        let Shape { heads, block_tokens, window, softcap, interleaved, dtype } = self.shape;
        let bytes = self.n_blocks * KvSpans::block_bytes(heads, block_tokens, dtype);
        // What nobody wrote must not be read as numbers.
        let nothing = vec![u16::MAX; bytes / 2];
        let (keys, values) = (on_gpu(gpu, &nothing), on_gpu(gpu, &nothing));
        let (keys, values, blocks) = (keys.span(), values.span(), self.n_blocks);
        let store = KvSpans { keys, values, blocks, block_tokens, dtype };
        let (rows, angles) = (on_gpu(gpu, &self.heads), on_gpu(gpu, &self.angles));
        let (positions, tables) = (on_gpu(gpu, &self.positions), on_gpu(gpu, &self.tables));
        let blocks = on_gpu(gpu, &self.blocks);
        let table = TokenTables {
            tokens: self.positions.len(),
            positions: positions.span(),
            tables: tables.span(),
            blocks: blocks.span(),
        };
        let pass = RotateHeads {
            heads: rows.span(),
            angles: angles.span(),
            angle_stride: heads.head_dim,
            pairs: heads.head_dim / 2,
            interleaved,
            query_norm: None,
            key_norm: None,
        };
        let none = rows.span().part(0, 0);
        let attend = Attend {
            heads: rows.span(),
            chosen: None,
            out: none,
            eight_bits: None,
            halves: None,
            partials: none,
            scale: 0.3,
            softcap,
            window,
            positions_max: self.positions.iter().max().map_or(0, |p| *p as usize + 1),
        };
        then(&pass, &attend, (&table, &store))
    }
}

/// Shapes with every type of the store.
pub fn shapes() -> Vec<Shape> {
    cases(KvDType::ALL.into_iter().flat_map(shapes_of), 5).collect()
}

fn shapes_of(dtype: KvDType) -> Vec<Shape> {
    let mut shapes = Vec::new();
    let counts = [(1, 1), (3, 1), (4, 2), (6, 1), (8, 8), (7, 1)];
    let dims = [64, 128, 256, 32, 80, 96];
    for ((index, (n_heads, n_kv_heads)), head_dim) in counts.into_iter().enumerate().zip(dims) {
        shapes.push(Shape {
            heads: HeadCounts { n_heads, n_kv_heads, head_dim },
            block_tokens: [32, 16, 48, 64, 32, 128][index],
            window: [None, Some(7), None, Some(100), None, Some(600)][index],
            softcap: [None, None, Some(2.0), None, None, None][index],
            interleaved: index % 2 == 1,
            dtype,
        });
    }
    shapes
}
