//! The vector operations that the interleaved kernel is written in, implemented per ISA.
//!
//! A lane is a row of weights. Integer vectors have 32-bit lanes, often used as 4 bytes: four
//! consecutive elements of that row.

/// Vector operations of one instruction set.
///
/// All methods are inlined into an outermost function that carries `#[target_feature]`.
///
/// # Safety
/// The CPU must have the instruction set; pointers must be readable for the lanes named.
pub(super) trait Lanes: Copy {
    /// Rows per vector: 8 or 16.
    const LANES: usize;
    /// Columns per tile: 4, or 8 where there are registers for 8 sums and 8 accumulators.
    const TILE: usize;
    /// Columns beyond which decoding weights into a buffer pays (`wide.rs`); half as many where the
    /// halves of a group have scales, which are costly to decode.
    const WIDE_FROM: usize;
    /// What [`Lanes::dot_signed`] adds to each weight; its caller takes it away with the sums.
    const SIGNED_EXCESS: i16;

    /// 32-bit integer lanes.
    type Int: Copy;
    /// f32 lanes.
    type Float: Copy;
    /// Signed bytes, prepared for [`Lanes::dot_signed`].
    type Signed: Copy;

    /// Asks for the cache line at `at`, which need not exist.
    unsafe fn prefetch(at: *const u8) -> ();
    /// The same, into the second-level cache only.
    unsafe fn prefetch_second(at: *const u8) -> ();
    /// 4 bytes per lane.
    unsafe fn load_words(from: *const u8) -> Self::Int;
    /// One byte per lane, zero-extended.
    unsafe fn load_bytes(from: *const u8) -> Self::Int;
    /// One byte per lane, sign-extended.
    unsafe fn load_signed_bytes(from: *const u8) -> Self::Int;
    /// Two bytes per lane, zero-extended.
    unsafe fn load_halves(from: *const u8) -> Self::Int;
    /// An f16 per lane.
    unsafe fn load_f16(from: *const u8) -> Self::Float;
    /// An f32 per lane.
    unsafe fn load_f32(from: *const f32) -> Self::Float;
    /// Writes an f32 per lane.
    unsafe fn store_f32(to: *mut f32, value: Self::Float);
    /// The same integer in every lane.
    unsafe fn splat(value: i32) -> Self::Int;
    /// The same float in every lane.
    unsafe fn splat_f32(value: f32) -> Self::Float;
    /// `a & b`
    unsafe fn and(a: Self::Int, b: Self::Int) -> Self::Int;
    /// `a | b`
    unsafe fn or(a: Self::Int, b: Self::Int) -> Self::Int;
    /// `a − b`
    unsafe fn sub(a: Self::Int, b: Self::Int) -> Self::Int;
    /// `a << count` in each 32-bit lane.
    unsafe fn shl(a: Self::Int, count: usize) -> Self::Int;
    /// `a >> count` in each 32-bit lane, zeros shifted in.
    unsafe fn shr(a: Self::Int, count: usize) -> Self::Int;
    /// Each 32-bit lane rotated left by `count` below 32.
    unsafe fn rotate(a: Self::Int, count: usize) -> Self::Int;
    /// `a >> count` in each 32-bit lane, copies of the sign shifted in.
    unsafe fn shift_signed(a: Self::Int, count: usize) -> Self::Int;
    /// Replaces each byte (0..16) by the table's.
    unsafe fn lookup(table: &[i8; 16], index: Self::Int) -> Self::Int;
    /// Integer to f32.
    unsafe fn to_f32(a: Self::Int) -> Self::Float;
    /// `a · b`
    unsafe fn mul(a: Self::Float, b: Self::Float) -> Self::Float;
    /// `a · b + c`, rounded once.
    unsafe fn fma(a: Self::Float, b: Self::Float, c: Self::Float) -> Self::Float;
    /// `−a`
    unsafe fn neg(a: Self::Float) -> Self::Float;
    /// `a.low · b.low + a.high · b.high` on the i16 halves of each lane.
    unsafe fn pair_dot(a: Self::Int, b: Self::Int) -> Self::Int;
    /// `sum + Σ w·x` over 4 bytes per lane: `w` unsigned and at most 127, `x` in −127..=127.
    unsafe fn dot_unsigned(sum: Self::Int, w: Self::Int, x: Self::Int) -> Self::Int;
    /// Prepares signed bytes, once for all columns of a tile.
    unsafe fn signed(w: Self::Int) -> Self::Signed;
    /// `sum + Σ (w + SIGNED_EXCESS)·x` over 4 bytes per lane, `x` in −127..=127.
    unsafe fn dot_signed(sum: Self::Int, w: Self::Signed, x: Self::Int) -> Self::Int;
}

/// Writes methods of a [`Lanes`] implementation: inlined, with one unsafe block as the body.
macro_rules! lane_ops {
    ($(fn $name:ident($($arg:ident: $type:ty),*) -> $result:ty { $($body:tt)* })*) => {$(
        #[inline(always)]
        unsafe fn $name($($arg: $type),*) -> $result {
            // SAFETY: the trait's contract: the CPU has the instructions, pointers are readable.
            unsafe { $($body)* }
        }
    )*};
}
pub(super) use lane_ops;
