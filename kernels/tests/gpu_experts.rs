//! Mixtures of experts on the GPU: routes against plain loops, and the products of experts against
//! the scalar specification of the CPU kernels.

#![allow(clippy::print_stdout, reason = "tests say what they skip")]

mod gpu;

use gpu::specification::{file_bytes, round, wanted};
use gpu::{EightBitMemory, Random, cases, distance, from_gpu, gpu, on_gpu};
use tandem_cpu_kernels::{DType, dequantize_row};
use tandem_kernels::{
    Columns, DeviceMatrix, ExpertProduct, ExpertRoutes, ExpertSums, Gpu, Route, Routed, Staging,
    half_bytes,
};

/// How the tokens of a step spread over experts.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Spread {
    Even,
    /// All go through the same ones, the last of all among them.
    Same,
    /// Many logits are equal.
    Ties,
    /// The experts of most tokens are among a few.
    Few,
}

const SPREADS: [Spread; 4] = [Spread::Even, Spread::Same, Spread::Ties, Spread::Few];

/// Router logits, `[tokens, n_experts]`.
fn logits(spread: Spread, tokens: usize, n_experts: usize, random: &mut Random) -> Vec<f32> {
    let logit = |at: usize, random: f32| {
        let expert = at % n_experts;
        match spread {
            Spread::Even => 3.0 * random,
            Spread::Same => (expert * 7 % n_experts) as f32 / n_experts as f32,
            // No negative zeros: they are equal to the others, but sort before them.
            Spread::Ties => (3.0 * random).round() + 0.0,
            Spread::Few => random + if expert % 5 == 3 { 1.5 } else { 0.0 },
        }
    };
    let floats = random.floats(tokens * n_experts);
    floats.iter().enumerate().map(|(at, random)| logit(at, *random)).collect()
}

/// A token's experts, ascending, and their weights.
fn chosen(logits: &[f32], n_used: usize, scale: f64) -> Vec<(usize, f64)> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    // Stable: of equals the lower index comes first.
    order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
    let mut experts = order[..n_used].to_vec();
    experts.sort_unstable();
    let exp = |expert: &usize| f64::from(logits[*expert] - logits[order[0]]).exp();
    let sum: f64 = experts.iter().map(exp).sum();
    experts.iter().map(|expert| (*expert, scale * exp(expert) / sum)).collect()
}

/// Routes of some tokens on the GPU.
fn routes(gpu: &Gpu, logits: &[f32], (n_experts, n_used): (usize, usize)) -> ExpertRoutes {
    let tokens = logits.len() / n_experts;
    let routes = ExpertRoutes::new(gpu, (n_experts, n_used), tokens).expect("room");
    let memory = on_gpu(gpu, logits);
    let route = Route { logits: memory.span(), weight_scale: 1.5 };
    gpu.route(&route, Routed { routes: &routes, tokens }).expect("routes");
    gpu.synchronize().expect("routes");
    routes
}

/// The weights of all pairs.
fn weights(gpu: &Gpu, routed: Routed<'_>) -> Vec<f32> {
    let n_used = routed.routes.n_used();
    let cols = n_used.next_multiple_of(4);
    let mut ones = vec![0.0f32; routed.pairs() * cols];
    ones.chunks_exact_mut(cols).enumerate().for_each(|(pair, row)| row[pair % n_used] = 1.0);
    let ones = on_gpu(gpu, &ones);
    let out = on_gpu(gpu, &vec![f32::NAN; routed.tokens * cols]);
    let sums = ExpertSums { products: ones.span(), out: out.span(), cols };
    gpu.sum_experts(&sums, routed).expect("sums");
    let all = from_gpu(gpu, &out, routed.tokens * cols);
    all.chunks_exact(cols).flat_map(|row| row[..n_used].to_vec()).collect()
}

/// Each expert's only row gives its number times the first element of a token, and the second.
fn numbering(gpu: &Gpu, n_experts: usize) -> DeviceMatrix {
    let rows = (0..n_experts).flat_map(|e| [e as f32 + 1.0, 1000.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
    let file: Vec<u8> = rows.flat_map(f32::to_le_bytes).collect();
    let staging = Staging::new(gpu).expect("staging memory");
    DeviceMatrix::upload(gpu, &staging, DType::F32, (n_experts, 8), &file).expect("an upload")
}

#[test]
fn tokens_go_through_the_experts_with_the_largest_logits() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random(1);
    for (n_experts, n_used) in [(8, 2), (128, 8), (60, 4), (256, 32), (3, 3), (40, 1), (33, 5)] {
        let matrix = numbering(&gpu, n_experts);
        for (tokens, spread) in
            [1, 5, 8, 31, 32, 33, 100, 256, 700].into_iter().flat_map(|n| SPREADS.map(|s| (n, s)))
        {
            let logits = logits(spread, tokens, n_experts, &mut random);
            let routes = routes(&gpu, &logits, (n_experts, n_used));
            let routed = Routed { routes: &routes, tokens };
            let shape = format!("{tokens} tokens, {n_used} of {n_experts} experts, {spread:?}");
            let chosen: Vec<_> =
                logits.chunks_exact(n_experts).flat_map(|row| chosen(row, n_used, 1.5)).collect();
            let x = (0..tokens).flat_map(|t| [1.0, t as f32, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
            let x = on_gpu(&gpu, &x.collect::<Vec<f32>>());
            let (values, eight_bits, halves) = (Some(x.span()), None, None);
            let x = Columns { columns: tokens, cols: 8, values, eight_bits, halves };
            let out = on_gpu(&gpu, &vec![f32::NAN; routed.pairs()]);
            let product = ExpertProduct { matrix: &matrix, out: out.span() };
            gpu.multiply_experts(&[product], &x, routed).expect("products");
            let number = |(pair, (expert, _)): (usize, &(usize, f64))| {
                *expert as f32 + 1.0 + 1000.0 * (pair / n_used) as f32
            };
            let numbers: Vec<f32> = chosen.iter().enumerate().map(number).collect();
            assert_eq!(from_gpu(&gpu, &out, routed.pairs()), numbers, "{shape}");
            let exact: Vec<f32> = chosen.iter().map(|(_, weight)| *weight as f32).collect();
            let (off, _) = distance(&weights(&gpu, routed), &exact);
            assert!(off <= 1e-6, "{shape}: weights {off} off");
        }
    }
}

#[test]
fn logits_that_are_not_finite_spoil_their_token_and_no_other() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random(2);
    for (tokens, bad) in [(4, f32::NAN), (40, f32::INFINITY), (40, f32::NEG_INFINITY)] {
        let mut logits = logits(Spread::Even, tokens, 60, &mut random);
        let exact: Vec<_> = logits.chunks_exact(60).flat_map(|row| chosen(row, 4, 1.5)).collect();
        logits[60 + 47] = bad;
        let routes = routes(&gpu, &logits, (60, 4));
        for (pair, weight) in weights(&gpu, Routed { routes: &routes, tokens }).iter().enumerate() {
            match pair / 4 {
                1 => assert!(weight.is_nan(), "{weight}"),
                _ => assert!((f64::from(*weight) - exact[pair].1).abs() < 1e-6, "{weight}"),
            }
        }
    }
}

/// Experts that have `rows` rows of `cols` elements.
struct World<'a> {
    gpu: &'a Gpu,
    counts: (usize, usize),
    dtype: DType,
    rows: usize,
    cols: usize,
    file: Vec<u8>,
    matrix: DeviceMatrix,
}

impl<'a> World<'a> {
    fn new(
        gpu: &'a Gpu,
        counts: (usize, usize),
        (dtype, rows, cols): (DType, usize, usize),
        random: &mut Random,
    ) -> Self {
        let staging = Staging::new(gpu).expect("staging memory");
        let shape = (counts.0 * rows, cols);
        let file = file_bytes(dtype, shape.0, cols, random);
        let matrix = DeviceMatrix::upload(gpu, &staging, dtype, shape, &file).expect("an upload");
        Self { gpu, counts, dtype, rows, cols, file, matrix }
    }

    /// `[pairs, rows]` twice, as two matrices at once; `x` has columns of tokens, or of pairs.
    fn got(&self, logits: &[f32], x: &[f32]) -> Vec<f32> {
        let (gpu, (n_experts, n_used)) = (self.gpu, self.counts);
        let (tokens, columns) = (logits.len() / n_experts, x.len() / self.cols);
        let routes = routes(gpu, logits, self.counts);
        let routed = Routed { routes: &routes, tokens };
        let (values, is_narrow) = (on_gpu(gpu, x), tokens <= gpu.narrow_max());
        let eight_bits = EightBitMemory::new(gpu, columns, self.cols, false);
        let half_memory = on_gpu(gpu, &vec![0xffu8; half_bytes(columns, self.cols)]);
        let x = Columns {
            columns,
            cols: self.cols,
            values: Some(values.span()),
            eight_bits: (is_narrow && self.dtype.is_quantized()).then(|| eight_bits.view()),
            halves: (!is_narrow).then(|| half_memory.span()),
        };
        gpu.round_rows(&round(&x)).expect("rounding");
        let count = tokens * n_used * self.rows;
        let out = [0; 2].map(|_| on_gpu(gpu, &vec![f32::NAN; count]));
        let product = |out| ExpertProduct { matrix: &self.matrix, out };
        let products = [product(out[0].span()), product(out[1].span())];
        gpu.multiply_experts(&products, &x, routed).expect("products");
        let [got, again] = out.map(|out| from_gpu(gpu, &out, count));
        let shape = format!("{} [{}, {}] × {tokens}", self.dtype, self.rows, self.cols);
        assert!(bits(&got) == bits(&again), "{shape}: two matrices at once differ");
        got
    }

    /// The same by the specification, and how far off it may be.
    fn wanted(&self, logits: &[f32], x: &[f32]) -> (Vec<f32>, f32) {
        let ((n_experts, n_used), cols) = (self.counts, self.cols);
        let tokens = logits.len() / n_experts;
        let is_exact = tokens > self.gpu.narrow_max() && self.dtype.block_elements() > 1;
        let rows = logits.chunks_exact(n_experts);
        let of_pairs: Vec<usize> =
            rows.flat_map(|row| chosen(row, n_used, 1.0)).map(|(expert, _)| expert).collect();
        let sharing = of_pairs.len() / (x.len() / cols);
        let mut all = vec![f32::NAN; of_pairs.len() * self.rows];
        let expert_bytes = self.file.len() / n_experts;
        for (expert, file) in self.file.chunks_exact(expert_bytes).enumerate() {
            let pairs: Vec<usize> =
                (0..of_pairs.len()).filter(|pair| of_pairs[*pair] == expert).collect();
            let column = |pair: &usize| x[pair / sharing * cols..][..cols].to_vec();
            let x: Vec<f32> = pairs.iter().flat_map(column).collect();
            let products = if is_exact {
                // Weights meet activations as f16: both are off by up to 2^-11 of a value.
                let mut exact = vec![0.0f32; self.rows * cols];
                dequantize_row(self.dtype, file, &mut exact);
                let exact: Vec<u8> = exact.iter().flat_map(|value| value.to_le_bytes()).collect();
                wanted(DType::F32, (self.rows, cols), &exact, &x)
            } else {
                wanted(self.dtype, (self.rows, cols), file, &x)
            };
            for (pair, products) in pairs.iter().zip(products.chunks_exact(self.rows)) {
                all[pair * self.rows..][..self.rows].copy_from_slice(products);
            }
        }
        (all, if is_exact { 1e-3 } else { 4e-6 })
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn every_type_has_the_products_of_the_specification_for_any_spread_of_tokens() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random(3);
    for dtype in DType::ALL.into_iter().filter(|dtype| DeviceMatrix::supports_experts(*dtype, 16)) {
        let shapes = [((3, 2), 144, 512), ((20, 3), 16, 96), ((2, 1), 16, 4352)];
        for (counts, rows, cols) in cases(shapes, 3) {
            if dtype.row_bytes(cols).is_none() {
                continue;
            }
            let world = World::new(&gpu, counts, (dtype, rows, cols), &mut random);
            let steps = [
                (1, Spread::Even),
                (2, Spread::Same),
                (7, Spread::Ties),
                (8, Spread::Few),
                (9, Spread::Same),
                (40, Spread::Ties),
                (70, Spread::Even),
                (129, Spread::Same),
                (270, Spread::Same),
            ];
            for (tokens, spread) in cases(steps, 4) {
                let logits = logits(spread, tokens, counts.0, &mut random);
                for columns in [tokens, tokens * counts.1] {
                    let x = random.floats(columns * cols);
                    let (wanted, bound) = world.wanted(&logits, &x);
                    let (off, largest) = distance(&world.got(&logits, &x), &wanted);
                    let shape = format!("{dtype} {counts:?} [{rows}, {cols}] × {columns}");
                    assert!(off <= bound * largest, "{shape}, {spread:?}: {off} of {largest} off");
                }
            }
        }
    }
}

#[test]
fn experts_with_any_number_of_tokens_have_the_products_of_the_specification() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random(5);
    // One has all tokens, or one has most of them.
    let counts = (4, 1);
    for (dtype, rows, cols) in
        [(DType::Q4_0, 272, 160), (DType::Q6_K, 128, 768), (DType::E4M3_32, 16, 1152)]
    {
        let world = World::new(&gpu, counts, (dtype, rows, cols), &mut random);
        for (tokens, spread) in cases([17, 64, 129, 160, 161, 192, 193, 256, 257, 320, 513, 700], 2)
            .flat_map(|tokens| [(tokens, Spread::Same), (tokens, Spread::Few)])
        {
            let logits = logits(spread, tokens, counts.0, &mut random);
            let x = random.floats(tokens * cols);
            let (wanted, bound) = world.wanted(&logits, &x);
            let (off, largest) = distance(&world.got(&logits, &x), &wanted);
            let shape = format!("{dtype} [{rows}, {cols}] × {tokens}, {spread:?}");
            assert!(off <= bound * largest, "{shape}: {off} of {largest} off");
        }
    }
}

#[test]
fn a_pair_has_the_same_bits_whatever_else_is_in_a_step_of_its_form() {
    let Some(gpu) = gpu() else { return };
    let (mut random, counts) = (Random(4), (16, 4));
    // Few columns of each expert alone, many together; and then more than a tile has.
    let many = gpu.narrow_max() + 1;
    let matrices = [
        (DType::Q4_0, 1536),
        (DType::Q8_0, 4352),
        (DType::Q4_K, 4352),
        (DType::Q6_K, 1536),
        (DType::Q2_K, 1536),
        (DType::BF16, 1536),
        (DType::E4M3_128, 1536),
        (DType::E4M3_32, 4352),
    ];
    let steps = [(8, 1), (8, 3), (12 * many, many), (540, 135), (486, 162)];
    for (dtype, cols) in cases(matrices, 6) {
        let world = World::new(&gpu, counts, (dtype, 48, cols), &mut random);
        for ((tokens, part), spread) in
            cases(steps.into_iter().flat_map(|n| SPREADS.map(|s| (n, s))), 6)
        {
            let logits = logits(spread, tokens, counts.0, &mut random);
            let x = random.floats(tokens * cols);
            let together = world.got(&logits, &x);
            let parts = logits.chunks(part * counts.0).zip(x.chunks(part * cols));
            let alone: Vec<f32> = parts.flat_map(|(logits, x)| world.got(logits, x)).collect();
            let shape = format!("{dtype} [48, {cols}] {spread:?}, {part} of {tokens}");
            assert!(bits(&alone) == bits(&together), "{shape}: other bits");
        }
    }
}
