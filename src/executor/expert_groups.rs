//! Which pairs of token and expert a step computes, by expert: all tokens of an expert become the
//! columns of one matmul, and the work of all experts is shared out to the workers.

use super::buffers::{Memory, QuantizedMemory};
use super::program::ProgramDims;
use std::ops::Range;
use std::sync::Mutex;
use tandem_cpu_kernels::ActivationForm;
use tandem_cpu_kernels::blocks::GROUP;

/// Tokens of an expert that are multiplied at once: their copy, at up to 6 bytes per element,
/// stays in the second-level cache for embeddings of 2048.
pub(super) const TILE_TOKENS: usize = 128;
/// Products that a worker holds at once, 64 KiB: they are still in the second-level cache when the
/// next op on them runs.
const TILE_PRODUCTS: usize = 128 * TILE_TOKENS;
/// Reading a weight costs about as much as multiplying it with so many tokens, so experts with
/// fewer tokens than that cost the same.
const TOKENS_PER_WEIGHT_READ: usize = 8;

/// The pairs `token · n_used + slot` of a step, sorted by expert, then by number.
#[derive(Debug, Default)]
pub(super) struct ExpertGroups {
    /// `[n_experts + 1]`: where the pairs of each expert start, and the end.
    starts: Vec<usize>,
    /// `[n_tokens · n_used]`
    pairs: Vec<u32>,
    /// `[n_experts]`: where the next pair of each expert goes while they are sorted.
    next: Vec<usize>,
}

/// A part of one expert's work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ExpertShare {
    pub expert: usize,
    /// Rows of the grouped order: all of the expert's.
    pub rows: Range<usize>,
    /// Units of the expert's matrix rows.
    pub units: Range<usize>,
}

impl ExpertGroups {
    /// Room for `pairs_max` pairs; nothing grows later.
    pub fn with_capacity(n_experts: usize, pairs_max: usize) -> Self {
        let (starts, next) = (vec![0; n_experts + 1], vec![0; n_experts]);
        Self { starts, pairs: Vec::with_capacity(pairs_max), next }
    }

    fn bytes(&self) -> usize {
        (self.starts.len() + self.next.len()) * size_of::<usize>()
            + self.pairs.capacity() * size_of::<u32>()
    }

    /// Sorts the pairs `0 .. pairs` by expert.
    pub fn sort(&mut self, pairs: usize, expert_of: impl Fn(usize) -> usize) {
        self.starts.fill(0);
        for pair in 0..pairs {
            self.starts[expert_of(pair) + 1] += 1;
        }
        for expert in 0..self.next.len() {
            self.starts[expert + 1] += self.starts[expert];
            self.next[expert] = self.starts[expert];
        }
        self.pairs.resize(pairs, 0);
        for pair in 0..pairs {
            let next = &mut self.next[expert_of(pair)];
            self.pairs[*next] = pair as u32;
            *next += 1;
        }
    }

    /// The pair of a row of the grouped order.
    pub fn pair(&self, row: usize) -> usize {
        self.pairs[row] as usize
    }

    /// Experts that have tokens, ascending, with their rows of the grouped order.
    pub fn active(&self) -> impl Iterator<Item = (usize, Range<usize>)> + '_ {
        let groups = self.starts.windows(2).enumerate();
        groups.map(|(expert, ends)| (expert, ends[0]..ends[1])).filter(|(_, rows)| !rows.is_empty())
    }

    /// Share `index` of `count` of all active experts' work, when the matrix of each has `units`
    /// units of rows. Shares are disjoint, cover everything, and cost about the same.
    pub fn share(
        &self,
        (index, count): (usize, usize),
        units: usize,
    ) -> impl Iterator<Item = ExpertShare> + '_ {
        let cost = |rows: &Range<usize>| rows.len().max(TOKENS_PER_WEIGHT_READ);
        let total = self.active().map(|(_, rows)| cost(&rows) * units).sum::<usize>();
        let (low, high) = (total * index / count, total * (index + 1) / count);
        let mut before = 0;
        let of_expert = move |(expert, rows): (usize, Range<usize>)| {
            let cost = cost(&rows);
            let cut = |target: usize| target.saturating_sub(before).div_ceil(cost).min(units);
            let own = cut(low)..cut(high);
            before += cost * units;
            ExpertShare { expert, rows, units: own }
        };
        self.active().map(of_expert).filter(|share| !share.units.is_empty())
    }
}

/// What a worker needs to compute experts.
pub(super) struct ExpertScratch {
    pub groups: ExpertGroups,
    /// `[TILE_TOKENS, embedding_dim]`, also rounded: tokens of one expert, side by side.
    pub gathered: QuantizedMemory,
    /// `[TILE_PRODUCTS]`: products on their way, of few tokens and many rows or the reverse.
    pub products: Memory,
}

impl ExpertScratch {
    /// One per worker, for steps of up to `tokens_max` tokens; none when layers are dense.
    pub fn of_workers(
        form: ActivationForm,
        dims: ProgramDims,
        tokens_max: usize,
        threads: usize,
    ) -> Vec<Mutex<Self>> {
        let tokens = TILE_TOKENS.min(tokens_max);
        let scratch = |_| {
            Mutex::new(Self {
                groups: ExpertGroups::with_capacity(dims.experts, tokens_max * dims.hidden_rows),
                gathered: QuantizedMemory::new(form, tokens, dims.embedding),
                products: Memory::new(TILE_PRODUCTS),
            })
        };
        (0..if dims.experts > 0 { threads } else { 0 }).map(scratch).collect()
    }

    /// As [`Memory::as_bytes_mut`].
    pub fn as_bytes_mut(&mut self) -> [&mut [u8]; 3] {
        let [values, quants] = self.gathered.as_bytes_mut();
        [values, quants, self.products.as_bytes_mut()]
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.groups.bytes() + self.gathered.bytes() + self.products.bytes()
    }
}

/// Rows of an expert that are multiplied with `tokens` tokens at once, whole 8-bit groups: the
/// fewer tokens, the longer a stretch of weights is read in one go.
pub(super) fn tile_rows(tokens: usize) -> usize {
    TILE_PRODUCTS / tokens.clamp(1, TILE_TOKENS) / GROUP * GROUP
}

/// `range` in tiles of up to `size`.
pub(super) fn tiles(range: Range<usize>, size: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(size).map(move |start| start..end.min(start + size))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn groups(n_experts: usize, experts: &[usize]) -> ExpertGroups {
        let mut groups = ExpertGroups::with_capacity(n_experts, experts.len());
        groups.sort(3.min(experts.len()), |pair| experts[pair]);
        groups.sort(experts.len(), |pair| experts[pair]);
        groups
    }

    #[test]
    fn tiles_fit_their_memory() {
        for tokens in 0..=TILE_TOKENS {
            let rows = tile_rows(tokens);
            assert!(rows >= 128 && rows.is_multiple_of(GROUP) && rows * tokens <= TILE_PRODUCTS);
        }
        assert_eq!(tiles(3..10, 4).collect::<Vec<_>>(), [3..7, 7..10]);
    }

    #[test]
    fn pairs_are_sorted_by_expert_and_then_by_number() {
        let experts = [2, 5, 0, 2, 2, 5, 7, 0];
        let groups = groups(8, &experts);
        let active: Vec<_> = groups.active().collect();
        assert_eq!(active, [(0, 0..2), (2, 2..5), (5, 5..7), (7, 7..8)]);
        let pairs: Vec<_> = (0..8).map(|row| groups.pair(row)).collect();
        assert_eq!(pairs, [2, 7, 0, 3, 4, 1, 5, 6]);
    }

    #[test]
    fn shares_cover_every_unit_of_every_active_expert_once() {
        let many: Vec<usize> = (0..1000).map(|pair| pair * pair % 7).collect();
        for experts in [&[3][..], &[0, 1, 2, 3, 4, 5, 6, 7], &[1; 300], &many, &[]] {
            let groups = groups(8, experts);
            for (count, units) in [(1, 1), (2, 24), (3, 5), (16, 24), (16, 1), (7, 64)] {
                let mut done = [0; 8];
                for index in 0..count {
                    for share in groups.share((index, count), units) {
                        assert_eq!(share.units.start, done[share.expert], "{count} {units}");
                        done[share.expert] = share.units.end;
                    }
                }
                let wanted: Vec<_> =
                    (0..8).map(|e| if experts.contains(&e) { units } else { 0 }).collect();
                assert_eq!(done[..], wanted, "{count} workers, {units} units");
            }
        }
    }

    /// Qwen3-30B-A3B: one token goes through 8 experts of 768 rows, 24 units of 32.
    #[test]
    fn sixteen_workers_get_equal_shares_of_eight_narrow_experts() {
        let groups = groups(128, &[3, 17, 40, 41, 77, 90, 100, 127]);
        for index in 0..16 {
            let units = groups.share((index, 16), 24).map(|share| share.units.len());
            assert_eq!(units.sum::<usize>(), 12);
        }
    }
}
