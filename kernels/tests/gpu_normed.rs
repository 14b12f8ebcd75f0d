//! Products that normalise on the way against norms and products one by one: the same bits, in the
//! products and in the residual stream.

#![allow(clippy::print_stdout, reason = "tests say what they skip")]

mod gpu;

use gpu::specification::file_bytes;
use gpu::{EightBitMemory, Random, cases, from_gpu, gpu, on_gpu};
use tandem_cpu_kernels::DType;
use tandem_kernels::{
    Added, Columns, DeviceMatrix, DeviceMemory, Gate, Gated, Gpu, NormBefore, NormRows, Product,
    RowNorm, Staging,
};

/// Rows of the matrices: more tiles than a GPU has multiprocessors, and few.
const ROWS: [usize; 2] = [4608, 48];
const EPS: f32 = 1e-5;

/// A residual stream of one token, what is added to it and the weight of its norm.
struct World<'a> {
    gpu: &'a Gpu,
    cols: usize,
    residual: Vec<f32>,
    added: Option<DeviceMemory>,
    weight: DeviceMemory,
}

/// What came out, as bits: products, and the residual stream.
#[derive(Debug, PartialEq)]
struct Outcome {
    products: Vec<Vec<u32>>,
    residual: Vec<u32>,
}

impl World<'_> {
    fn bits(&self, memory: &DeviceMemory, count: usize) -> Vec<u32> {
        from_gpu(self.gpu, memory, count).iter().map(|value| value.to_bits()).collect()
    }

    /// Runs `work` with a norm before it; it says whether the residual stream has moved.
    fn with_norm(
        &self,
        work: impl FnOnce(&NormBefore<'_>, &Columns<'_>) -> (bool, Vec<Vec<u32>>),
    ) -> (Outcome, bool) {
        let (gpu, cols) = (self.gpu, self.cols);
        let (residual, sum) = (on_gpu(gpu, &self.residual), on_gpu(gpu, &vec![f32::NAN; cols]));
        let normed = EightBitMemory::new(gpu, 1, cols, false);
        let added = self.added.as_ref();
        let pass = NormRows {
            residual: residual.span(),
            added: added.map(|values| Added { values: values.span(), norm: None }),
            norm: RowNorm { weight: self.weight.span(), eps: EPS },
            gather: None,
            values: None,
            eight_bits: Some(normed.view()),
            halves: None,
            rows: 1,
            cols,
        };
        let eight_bits = Some(normed.view());
        let x = Columns { columns: 1, cols, values: None, eight_bits, halves: None };
        let (moved, products) = work(&NormBefore { pass, sum: sum.span() }, &x);
        let at = if moved { &sum } else { &residual };
        (Outcome { products, residual: self.bits(at, cols) }, moved)
    }

    /// Both matrices at once.
    fn products(&self, matrices: &[DeviceMatrix], on_the_way: bool) -> (Outcome, bool) {
        self.with_norm(|norm, x| {
            let outs: Vec<_> =
                matrices.iter().map(|m| on_gpu(self.gpu, &vec![f32::NAN; m.rows()])).collect();
            let products = matrices.iter().zip(&outs).map(|(matrix, out)| Product {
                matrix,
                bias: None,
                out: out.span(),
                stride: matrix.rows(),
            });
            let products: Vec<_> = products.collect();
            let moved = if on_the_way {
                self.gpu.multiply_after(norm, &products, x).expect("products after a norm")
            } else {
                self.gpu.norm_rows(&norm.pass, 1).expect("a norm");
                self.gpu.multiply(&products, x).expect("products");
                false
            };
            let bits = |(m, out): (&DeviceMatrix, _)| self.bits(out, m.rows());
            (moved, matrices.iter().zip(&outs).map(bits).collect())
        })
    }

    /// The first matrix as gate and as what is gated.
    fn gated(&self, matrix: &DeviceMatrix, on_the_way: bool) -> (Outcome, bool) {
        let rows = matrix.rows();
        let counters = self.gpu.alloc(Gated::counter_bytes(rows)).expect("room");
        self.with_norm(|norm, x| {
            let outs = [0, 1].map(|_| on_gpu(self.gpu, &vec![f32::NAN; rows]));
            let product = |i: usize| {
                let out: &DeviceMemory = &outs[i];
                Product { matrix, bias: None, out: out.span(), stride: rows }
            };
            let rounded = EightBitMemory::new(self.gpu, 1, rows, false);
            let gated = Gated {
                gate: product(0),
                up: product(1),
                activation: Gate::Silu,
                out: Some(outs[0].span()),
                eight_bits: Some(rounded.view()),
                halves: None,
                counters: counters.span(),
            };
            let moved = if on_the_way {
                self.gpu.multiply_gated(Some(norm), &gated, x).expect("a gate after a norm")
            } else {
                self.gpu.norm_rows(&norm.pass, 1).expect("a norm");
                self.gpu.multiply_gated(None, &gated, x).expect("a gate")
            };
            (moved, vec![self.bits(&outs[0], rows)])
        })
    }
}

#[test]
fn norms_on_the_way_have_the_bits_of_norms() {
    let Some(gpu) = gpu() else { return };
    let staging = Staging::new(&gpu).expect("staging memory");
    let mut random = Random(11);
    for dtype in [DType::Q4_0, DType::Q6_K, DType::Q4_K, DType::Q8_0, DType::INT4_64] {
        // One, two and four fours of a thread of the norm; odd numbers of chunks.
        for cols in cases([640, 256, 2048, 3584, 4096, 5120, 8192, 12288], 8) {
            if dtype.row_bytes(cols).is_none() {
                continue;
            }
            let matrices = ROWS.map(|rows| {
                let file = file_bytes(dtype, rows, cols, &mut random);
                DeviceMatrix::upload(&gpu, &staging, dtype, (rows, cols), &file).expect("an upload")
            });
            for has_added in [true, false] {
                let world = World {
                    gpu: &gpu,
                    cols,
                    residual: random.floats(cols),
                    added: has_added.then(|| on_gpu(&gpu, &random.floats(cols))),
                    weight: on_gpu(&gpu, &random.floats(cols)),
                };
                let name = format!("{dtype}, {cols} elements, added: {has_added}");
                let ((once, moved), (apart, _)) =
                    (world.products(&matrices, true), world.products(&matrices, false));
                assert!(once == apart, "{name}");
                assert!(!moved || has_added, "{name}: nothing is added, and it has moved");
                let ((once, _), (apart, _)) =
                    (world.gated(&matrices[0], true), world.gated(&matrices[0], false));
                assert!(once == apart, "{name}, gated");
            }
        }
    }
}
