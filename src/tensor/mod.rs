//! Owns the words for stored tensors: shape, element type, and a borrowed view of the bytes. It
//! must not know where the bytes come from or what a tensor is for. Every layer above reads its
//! weights through these.

use std::fmt;

pub use tandem_cpu_kernels::DType;
pub use tandem_cpu_kernels::attention::KvDType;

/// Extents of a tensor of one to four dimensions, fastest first, as GGUF writes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    extents: [usize; Shape::RANK_MAX],
    rank: usize,
}

impl Shape {
    /// Most dimensions of a tensor.
    pub const RANK_MAX: usize = 4;

    /// A shape of one to four extents, each at least 1, whose product fits `usize`; otherwise
    /// `None`.
    pub fn new(dims: &[usize]) -> Option<Self> {
        if dims.is_empty() || dims.len() > Self::RANK_MAX || dims.contains(&0) {
            return None;
        }
        dims.iter().try_fold(1_usize, |product, dim| product.checked_mul(*dim))?;
        let mut extents = [1; Self::RANK_MAX];
        extents[..dims.len()].copy_from_slice(dims);
        Some(Self { extents, rank: dims.len() })
    }

    /// All extents, fastest first: `dims()[0] == cols()`.
    pub fn dims(&self) -> &[usize] {
        &self.extents[..self.rank]
    }

    /// Elements that lie next to each other: the length of a row.
    pub fn cols(&self) -> usize {
        self.extents[0]
    }

    /// How many rows: the product of all other extents, 1 for a vector.
    pub fn rows(&self) -> usize {
        self.extents[1..].iter().product()
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.extents.iter().product()
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:?}", self.dims())
    }
}

/// A stored tensor, borrowed: row-major, `shape.rows()` rows of `dtype.row_bytes(shape.cols())`
/// bytes.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    /// The tensor's name in its file.
    pub name: &'a str,
    /// How the elements are stored.
    pub dtype: DType,
    /// Extents, fastest first.
    pub shape: Shape,
    /// Exactly `rows * row_bytes` bytes, 8-byte aligned in a GGUF file.
    pub bytes: &'a [u8],
}

impl<'a> TensorView<'a> {
    /// Bytes of one row.
    pub fn row_bytes(&self) -> usize {
        self.bytes.len() / self.shape.rows()
    }

    /// The bytes of rows `start .. end`.
    pub fn rows(&self, rows: std::ops::Range<usize>) -> &'a [u8] {
        let row_bytes = self.row_bytes();
        &self.bytes[rows.start * row_bytes..rows.end * row_bytes]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_and_columns_follow_the_fastest_dimension() {
        let shape = Shape::new(&[576, 49152]).unwrap();
        assert_eq!((shape.cols(), shape.rows(), shape.elements()), (576, 49152, 576 * 49152));
        assert_eq!(
            (Shape::new(&[7]).unwrap().rows(), shape.to_string()),
            (1, "[576, 49152]".into())
        );
    }

    #[test]
    fn empty_and_overflowing_shapes_are_refused() {
        for dims in [&[][..], &[0], &[4, 0], &[1; 5], &[usize::MAX, 2]] {
            assert_eq!(Shape::new(dims), None, "{dims:?}");
        }
    }
}
