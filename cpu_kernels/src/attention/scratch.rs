//! The buffers that attention works in: one per worker, allocated once.

/// Query rows (token × head of the group) that are processed together: their scores and sums must
/// stay in the second-level cache beside a chunk of keys and values.
pub(crate) const TILE_ROWS: usize = 64;
/// Positions whose scores are computed before the running maximum moves. Chunks start at absolute
/// multiples, so the order of additions depends on positions alone.
pub(crate) const CHUNK: usize = 64;

/// One cache line of f32.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// A zeroed f32 buffer on a cache-line boundary.
struct AlignedRows(Vec<Line>);

impl AlignedRows {
    fn new(len: usize) -> AlignedRows {
        AlignedRows(vec![Line([0.0; 16]); len.div_ceil(16)])
    }

    fn as_mut_ptr(&mut self) -> *mut f32 {
        self.0.as_mut_ptr().cast()
    }
}

/// Working memory of one thread's attention calls, for heads up to a given size.
pub struct AttentionScratch {
    head_dim_max: usize,
    stride: usize,
    scores: AlignedRows,
    rotated: AlignedRows,
    sums: AlignedRows,
    merged: AlignedRows,
    states: AlignedRows,
}

impl AttentionScratch {
    /// Scratch for heads of up to `head_dim_max` elements.
    pub fn new(head_dim_max: usize) -> AttentionScratch {
        let stride = head_dim_max.next_multiple_of(16);
        AttentionScratch {
            head_dim_max,
            stride,
            scores: AlignedRows::new(TILE_ROWS * CHUNK),
            rotated: AlignedRows::new(TILE_ROWS * stride),
            sums: AlignedRows::new(TILE_ROWS * stride),
            merged: AlignedRows::new(TILE_ROWS * stride),
            states: AlignedRows::new(TILE_ROWS * 5),
        }
    }

    /// Elements of the largest head that fits.
    pub fn head_dim_max(&self) -> usize {
        self.head_dim_max
    }

    /// Raw pointers to all parts.
    pub(crate) fn tile_state(&mut self) -> TileState {
        let states = self.states.as_mut_ptr();
        // SAFETY: `states` holds five arrays of `TILE_ROWS`.
        let part = |index: usize| unsafe { states.add(index * TILE_ROWS) };
        TileState {
            scores: self.scores.as_mut_ptr(),
            stride: self.stride,
            rotated: self.rotated.as_mut_ptr(),
            sums: self.sums.as_mut_ptr(),
            merged: self.merged.as_mut_ptr(),
            max: part(0),
            weight: part(1),
            correction: part(2),
            merged_max: part(3),
            merged_weight: part(4),
        }
    }
}

/// Pointers into an [`AttentionScratch`], valid while it is borrowed. `R` is [`TILE_ROWS`].
#[derive(Clone, Copy)]
pub(crate) struct TileState {
    /// `[R, CHUNK]` scores, then weights `e^(score − max)`.
    pub scores: *mut f32,
    /// Elements from row to row of `rotated`, `sums` and `merged`: a multiple of 16.
    pub stride: usize,
    /// `[R, stride]` queries, rotated for a store of 8 bits.
    pub rotated: *mut f32,
    /// `[R, stride]` weighted sums of values of the segment.
    pub sums: *mut f32,
    /// `[R, stride]` the same over all segments so far.
    pub merged: *mut f32,
    /// `[R]` largest score of the segment so far.
    pub max: *mut f32,
    /// `[R]` sum of weights of the segment so far.
    pub weight: *mut f32,
    /// `[R]` factor that moves older sums to the new maximum.
    pub correction: *mut f32,
    /// `[R]` largest score over all segments so far.
    pub merged_max: *mut f32,
    /// `[R]` sum of weights over all segments so far.
    pub merged_weight: *mut f32,
}

impl TileState {
    /// Starts a segment for `rows` rows.
    ///
    /// # Safety
    /// The scratch is borrowed and `rows ≤ TILE_ROWS`.
    pub unsafe fn clear_segment(&self, rows: usize) {
        // SAFETY: all rows are inside the scratch.
        unsafe {
            std::slice::from_raw_parts_mut(self.sums, rows * self.stride).fill(0.0);
            std::slice::from_raw_parts_mut(self.max, TILE_ROWS).fill(f32::NEG_INFINITY);
            std::slice::from_raw_parts_mut(self.weight, TILE_ROWS).fill(0.0);
        }
    }

    /// Starts a tile of `rows` rows.
    ///
    /// # Safety
    /// As [`TileState::clear_segment`].
    pub unsafe fn clear_merged(&self, rows: usize) {
        // SAFETY: all rows are inside the scratch.
        unsafe {
            std::slice::from_raw_parts_mut(self.merged, rows * self.stride).fill(0.0);
            std::slice::from_raw_parts_mut(self.merged_max, TILE_ROWS).fill(f32::NEG_INFINITY);
            std::slice::from_raw_parts_mut(self.merged_weight, TILE_ROWS).fill(0.0);
        }
    }
}
