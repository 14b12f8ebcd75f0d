//! How much of a product a worker takes at once: the executor deals out rows so, and a prediction
//! knows for how long the last piece keeps all others waiting.

/// Rows of a matrix that the interleaved layout keeps together.
const ROWS: usize = 16;
/// The same for more tokens than a narrow tile has, where the kernel takes two such groups at a
/// time.
const PAIRED_ROWS: usize = 32;
const NARROW_TOKENS: usize = 4;
/// Tokens that cost the arithmetic about as long as memory takes for the weights.
const FREE_TOKENS: usize = 8;
/// Weights that are worth a claim of their own: some microseconds of a thread's bandwidth.
const CLAIM_BYTES: usize = 32 << 10;
/// Rows of a claim at least where kernels on tiles have many tokens: workers differ in speed by as
/// much as four times where two of them share a core's tiles, and 128 rows at the end of a loop
/// kept all others waiting.
const TILED_ROWS: usize = 64;

/// Rows of a matrix that are dealt out together in a step of so many tokens.
pub fn dealt_rows(tokens: usize) -> usize {
    if tokens > NARROW_TOKENS { PAIRED_ROWS } else { ROWS }
}

/// How many units of `unit_bytes` bytes of weights are worth a claim; 0 where one is worth more.
pub fn claimed_units(unit_bytes: usize, tokens: usize) -> usize {
    CLAIM_BYTES / (unit_bytes * tokens.div_ceil(FREE_TOKENS)).max(1)
}

/// The units of a claim at least where kernels decode weights once for all of so many tokens.
pub fn tiled_units(tokens: usize) -> usize {
    TILED_ROWS / dealt_rows(tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims_are_of_some_bytes_and_shrink_with_the_arithmetic() {
        // Rows of 4096 weights in 4.5 bits.
        let row_bytes = 4096 * 18 / 32;
        let bytes = |tokens| claimed_units(dealt_rows(tokens) * row_bytes, tokens);
        assert_eq!([1, 4, 5, 8, 9, 64].map(bytes), [0; 6]);
        let small = |tokens| claimed_units(dealt_rows(tokens) * 36, tokens) * dealt_rows(tokens);
        let rows = [1, 4, 8, 16, 64].map(small);
        assert!(rows.is_sorted_by(|a, b| a >= b) && rows[0] * 36 <= CLAIM_BYTES, "{rows:?}");
        assert!(rows.iter().all(|rows| rows % ROWS == 0));
        assert_eq!(tiled_units(33) * dealt_rows(33), TILED_ROWS);
    }
}
