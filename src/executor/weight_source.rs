//! Where a stage's weights come from: a checkpoint, or nowhere. Random weights are written by all
//! workers where the kernels read them, so memory holds them once.

use super::ExecutorError;
use super::cpu_pool::CpuPool;
use super::weight_fill::{PartGroups, fill_parts};
use crate::formats::Checkpoint;
use crate::model::TensorRef;
use crate::tensor::DType;
use half::f16;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;
use std::sync::Arc;
use tandem_cpu_kernels::repack::ROWS;
use tandem_cpu_kernels::{Layout, repack_row_group};

/// Where weights come from.
#[derive(Clone, Debug)]
pub enum WeightSource {
    /// A file.
    Checkpoint(Arc<Checkpoint>),
    /// Random numbers, the same for the same seed whatever the threads: matrices with a spread of
    /// `1 / sqrt(cols)`, norms near 1, biases near 0, so that activations stay in range.
    Random {
        /// Decides all of them.
        seed: u64,
    },
}

impl From<Arc<Checkpoint>> for WeightSource {
    fn from(checkpoint: Arc<Checkpoint>) -> Self {
        Self::Checkpoint(checkpoint)
    }
}

impl WeightSource {
    /// Refuses files that are not as they were when they were opened: to be called before and after
    /// weights are read.
    ///
    /// # Errors
    /// The first file that was written to or cut shorter.
    pub(super) fn check_unchanged(&self) -> Result<(), ExecutorError> {
        let Self::Checkpoint(checkpoint) = self else { return Ok(()) };
        Ok(checkpoint.check_unchanged()?)
    }

    /// Has the system read these tensors, and nothing else, ahead of those who want them.
    pub(super) fn will_read<'t>(
        &self,
        tensors: impl Iterator<Item = &'t TensorRef>,
    ) -> Result<(), ExecutorError> {
        let Self::Checkpoint(checkpoint) = self else { return Ok(()) };
        for tensor in tensors {
            for (file, bytes) in checkpoint.pieces(&tensor.name)? {
                checkpoint.file(file).will_read(bytes);
            }
        }
        Ok(())
    }

    /// A vector in f32.
    pub(super) fn vector(&self, vector: &TensorRef) -> Result<Vec<f32>, ExecutorError> {
        let checkpoint = match self {
            Self::Checkpoint(checkpoint) => checkpoint,
            Self::Random { seed } => return Ok(random_vector(*seed, vector)),
        };
        let TensorRef { rows, cols, .. } = *vector;
        let dtype = checkpoint.dtype(&vector.name)?;
        let row_bytes = dtype.row_bytes(cols).ok_or_else(|| ExecutorError::Misshapen {
            tensor: vector.name.clone(),
            dtype,
            cols,
        })?;
        let mut bytes = vec![0; rows * row_bytes];
        checkpoint.read_rows(&vector.name, 0..rows, &mut bytes)?;
        let mut values = vec![0.0; rows * cols];
        tandem_cpu_kernels::dequantize_row(dtype, &bytes, &mut values);
        Ok(values)
    }
}

/// Uniform, with a standard deviation of 0.06 around 1 for norms and 0 for biases.
fn random_vector(seed: u64, vector: &TensorRef) -> Vec<f32> {
    let mean = if vector.name.ends_with(".bias") { 0.0 } else { 1.0 };
    let mut random = SplitMix64::of(seed, &vector.name, 0);
    let unit = |bits: u64| (bits >> 40) as f32 / (1_u64 << 24) as f32;
    (0..vector.cols).map(|_| mean + 0.2 * (unit(random.next()) - 0.5)).collect()
}

/// Fills the parts of a matrix with random weights, in parallel by groups of rows.
pub(super) fn fill_random(
    pool: &mut CpuPool,
    seed: u64,
    tensor: &TensorRef,
    targets: (&[PartGroups], Vec<&mut [u8]>),
) -> Result<(), ExecutorError> {
    let TensorRef { dtype, cols, .. } = *tensor;
    let fill = |part: &PartGroups, groups: Range<usize>, target: &mut [u8]| {
        let start = part.offset(groups.start);
        let mut group_rows = vec![0; ROWS * part.row_bytes];
        for group in groups {
            let (rows, bytes) = (part.rows_of(group), part.bytes(&(group..group + 1)));
            let target = &mut target[bytes.start - start..bytes.end - start];
            let source = &mut group_rows[..rows.len() * part.row_bytes];
            let mut random = SplitMix64::of(seed, &tensor.name, (rows.start / ROWS) as u64);
            fill_blocks(dtype, cols, &mut random, source);
            match part.layout {
                Layout::RowMajor => target.copy_from_slice(source),
                Layout::Rows16 => repack_row_group(dtype, cols, source, target),
            }
        }
        Ok(())
    };
    fill_parts(pool, targets, usize::MAX, &fill, &mut |_| {})
}

/// How the f16 factors of a block decide its values.
struct Factors {
    /// Offset of the factor that multiplies the quants.
    scale_at: usize,
    /// Offset of the minimum, and what it is, in units of the scale, where the mean is 0.
    min: Option<(usize, f32)>,
    /// Standard deviation of the values when all other bits are random and the scale is 1.
    spread: f32,
}

const fn factors(scale_at: usize, min: Option<(usize, f32)>, spread: f32) -> Factors {
    Factors { scale_at, min, spread }
}

/// By the formulas of `DType`. With uniform quants q, scales s and mins t, for the K types that is
/// `var = E[s²]·E[q²] − E[s]²·E[q]² (+ min²·var t)`.
const fn factors_of(dtype: DType) -> Option<Factors> {
    Some(match dtype {
        DType::F32 | DType::F16 | DType::BF16 => return None,
        DType::Q4_0 => factors(0, None, 4.64),
        DType::Q4_1 => factors(0, Some((2, -7.5)), 4.61),
        DType::Q5_0 => factors(0, None, 9.25),
        DType::Q5_1 => factors(0, Some((2, -15.5)), 9.23),
        DType::Q8_0 => factors(0, None, 73.9),
        DType::Q2_K => factors(80, Some((82, 1.5)), 13.9),
        DType::Q3_K => factors(108, None, 43.3),
        DType::Q4_K => factors(0, Some((2, 7.5)), 258.0),
        DType::Q5_K => factors(0, Some((2, 15.5)), 527.0),
        DType::Q6_K => factors(208, None, 1366.0),
        DType::IQ4_NL => factors(0, None, 67.4),
        DType::IQ4_XS => factors(0, None, 1246.0),
        DType::INT4_128 | DType::INT4_64 | DType::INT4_32 => factors(0, None, 4.64),
        DType::E4M3_128 | DType::E4M3_32 => return None,
    })
}

/// Random rows in file order: every bit is random except what scales them.
fn fill_blocks(dtype: DType, cols: usize, random: &mut SplitMix64, rows: &mut [u8]) {
    let (words, rest) = rows.as_chunks_mut::<8>();
    words.iter_mut().for_each(|word| *word = random.next().to_le_bytes());
    rest.copy_from_slice(&random.next().to_le_bytes()[..rest.len()]);
    let spread = 1.0 / (cols as f32).sqrt();
    let Some(factors) = factors_of(dtype) else { return scale_floats(dtype, spread, rows) };
    let scale_bits = f16::from_f32(spread / factors.spread).to_bits();
    // A few low bits of the scale stay random; its minimum belongs to it exactly, for the mean of
    // thousands of products counts `sqrt(cols)` times as much as their spread.
    let scales: [u16; 8] = std::array::from_fn(|low| scale_bits ^ low as u16);
    let min = |ratio: f32| {
        scales.map(|bits| f16::from_f32(ratio * f16::from_bits(bits).to_f32()).to_bits())
    };
    let mins = factors.min.map(|(at, ratio)| (at, min(ratio)));
    for block in rows.chunks_exact_mut(dtype.block_bytes()) {
        let low = block[factors.scale_at];
        let mut scale = scales[usize::from(low & 7)];
        match mins {
            Some((at, mins)) => {
                block[at..][..2].copy_from_slice(&mins[usize::from(low & 7)].to_le_bytes());
            }
            // Quants without a minimum reach further down than up: the sign evens that out.
            None => scale |= u16::from(low & 8) << 12,
        }
        block[factors.scale_at..][..2].copy_from_slice(&scale.to_le_bytes());
        match dtype {
            // Quants around 8, as those of Q4_0.
            DType::INT4_128 | DType::INT4_64 => block[2] = 8,
            DType::INT4_32 => {
                block[2..4].copy_from_slice(&(scale ^ 0x8000).to_le_bytes());
                block[4] = 0x88;
            }
            _ => {}
        }
    }
}

/// The root mean square of an e4m3 whose bits are random, divided by 256 as its type has it:
/// `sqrt(Σ_e 4^(e − 7)·E[(1 + m/8)²] / 16) / 256`.
const E4M3_SPREAD: f32 = 0.423;

/// Keeps random elements, but for the two that are no numbers, and gives each block its scale.
fn scale_e4m3(dtype: DType, spread: f32, rows: &mut [u8]) {
    for block in rows.chunks_exact_mut(dtype.block_bytes()) {
        let (scale, elements) = block.split_at_mut(size_of::<f32>());
        scale.copy_from_slice(&(spread / E4M3_SPREAD).to_le_bytes());
        elements.iter_mut().filter(|code| **code & 0x7f == 0x7f).for_each(|code| *code ^= 1);
    }
}

/// Keeps sign and mantissa of random floats and gives them all the exponent `e` whose values, `2^e`
/// to `2^(e+1)`, have a root mean square (`sqrt(7/3)·2^e`) nearest to `spread`.
fn scale_floats(dtype: DType, spread: f32, rows: &mut [u8]) {
    if dtype.block_elements() > 1 {
        return scale_e4m3(dtype, spread, rows);
    }
    let exponent = (spread / (7.0_f32 / 3.0).sqrt()).log2().round() as i32;
    let half = |bias: i32, mantissa_bits: u32| {
        let field = (exponent + bias).max(1) as u16;
        (0x8000 | ((1_u16 << mantissa_bits) - 1), field << mantissa_bits)
    };
    let (kept, set) = match dtype {
        DType::F32 => {
            let set = ((exponent + 127) as u32) << 23;
            for word in rows.as_chunks_mut::<4>().0 {
                *word = (u32::from_le_bytes(*word) & 0x807f_ffff | set).to_le_bytes();
            }
            return;
        }
        DType::F16 => half(15, 10),
        _ => half(127, 7),
    };
    for word in rows.as_chunks_mut::<2>().0 {
        *word = (u16::from_le_bytes(*word) & kept | set).to_le_bytes();
    }
}

/// SplitMix64 (Steele, Lea and Flood 2014).
struct SplitMix64(u64);

impl SplitMix64 {
    /// The sequence of one group of rows of a tensor.
    fn of(seed: u64, tensor: &str, group: u64) -> Self {
        let mut hasher = DefaultHasher::new();
        (seed, tensor, group).hash(&mut hasher);
        Self(hasher.finish())
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::PoolOptions;
    use crate::executor::weight_fill::tests::in_one_part;
    use tandem_cpu_kernels::{MatrixView, dequantize_packed_row};

    fn matrix(dtype: DType, layout: Layout, threads: usize) -> Vec<u8> {
        let tensor = TensorRef { name: "blk.0.ffn_up.weight".into(), dtype, rows: 40, cols: 1024 };
        let mut pool = CpuPool::new(&PoolOptions {
            threads,
            cores: Vec::new(),
            nodes: Default::default(),
            spin_us: 0,
        })
        .unwrap();
        let (groups, mut bytes) = in_one_part((dtype, layout), (40, 1024));
        fill_random(&mut pool, 7, &tensor, (&groups, vec![&mut bytes])).unwrap();
        bytes
    }

    #[test]
    fn weights_of_every_type_have_the_spread_of_a_trained_matrix() {
        for dtype in DType::ALL {
            let bytes = matrix(dtype, Layout::RowMajor, 1);
            let view = MatrixView::new(dtype, Layout::RowMajor, 40, 1024, &bytes).unwrap();
            let mut values = vec![0.0; 40 * 1024];
            for (row, values) in values.chunks_exact_mut(1024).enumerate() {
                dequantize_packed_row(&view, row, values);
            }
            let count = values.len() as f64;
            let mean = values.iter().map(|value| f64::from(*value)).sum::<f64>() / count;
            let squares = values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>();
            let (wanted, got) = (1.0 / 32.0, (squares / count).sqrt());
            let allowed = if dtype.is_quantized() { 1.1 } else { std::f64::consts::SQRT_2 };
            assert!(got < wanted * allowed && got > wanted / allowed, "{dtype}: {got}");
            assert!(mean.abs() < wanted / 30.0, "{dtype}: mean {mean}");
        }
    }

    #[test]
    fn weights_are_the_same_in_every_layout_and_on_any_number_of_threads() {
        for dtype in DType::ALL.into_iter().filter(|dtype| dtype.is_quantized()) {
            let (plain, packed) = (Layout::RowMajor, Layout::Rows16);
            let (plain_bytes, bytes) = (matrix(dtype, plain, 1), matrix(dtype, packed, 3));
            let plain = MatrixView::new(dtype, plain, 40, 1024, &plain_bytes).unwrap();
            let packed = MatrixView::new(dtype, packed, 40, 1024, &bytes).unwrap();
            for row in 0..40 {
                let mut rows = [[0.0; 1024]; 2];
                dequantize_packed_row(&plain, row, &mut rows[0]);
                dequantize_packed_row(&packed, row, &mut rows[1]);
                assert_eq!(rows[0], rows[1], "{dtype} row {row}");
            }
        }
    }
}
