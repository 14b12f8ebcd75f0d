//! Which worker computes which part of a step's attention: shares of equal cost of the items (query
//! tile, KV head), cut inside an item where whole items would leave workers idle; if none is,
//! shares are where workers begin. Pure arithmetic on the plan, done once per step.
//!
//! An item is cut between segments of positions, which the kernels compute on their own and merge
//! in ascending order whoever computed them: cuts move work, and no bit of a result.

use super::batch::QueryTile;
use super::program::{HeadShape, Op, Program};
use std::ops::Range;
use tandem_cpu_kernels::attention::SEGMENT_TOKENS;

/// Bytes of f16 keys and values whose reading takes about as long as what a divided item costs:
/// one more barrier, and merging.
const DIVISION_BYTES: usize = 64 << 10;
/// Part of an even share that has to be gained, lest prompts pay for a percent.
const GAIN_DIVISOR: usize = 16;
/// Positions whose attention costs as much as starting an item.
const ITEM_POSITIONS: usize = 32;
/// Room for unmerged segments, in f32 (16 MiB): beyond it items stay whole.
const PARTIALS_MAX: usize = 4 << 20;

/// What the cost of an attention depends on: layers that have it in common share their cuts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct AttentionShape {
    pub heads: HeadShape,
    pub window: Option<usize>,
}

impl AttentionShape {
    /// The different ones of a program.
    pub fn of(program: &Program) -> Vec<AttentionShape> {
        let mut shapes = Vec::new();
        for op in &program.ops {
            if let Op::Attend { shape: heads, window, .. } = op {
                let shape = AttentionShape { heads: *heads, window: *window };
                if !shapes.contains(&shape) {
                    shapes.push(shape);
                }
            }
        }
        shapes
    }

    /// Positions that the queries of a tile see.
    fn visible(&self, tile: &QueryTile) -> Range<usize> {
        let first = tile.position_start + 1;
        let start = self.window.map_or(0, |window| first.saturating_sub(window));
        start..tile.position_start + tile.tokens.len()
    }

    /// Segments of the kernels that hold them.
    pub fn segments(&self, tile: &QueryTile) -> Range<usize> {
        let visible = self.visible(tile);
        visible.start / SEGMENT_TOKENS..visible.end.div_ceil(SEGMENT_TOKENS)
    }

    /// Cost of one KV head of a tile, in query-key pairs.
    fn cost(&self, tile: &QueryTile) -> usize {
        tile.tokens.len() * (self.visible(tile).len() + ITEM_POSITIONS)
    }

    /// f32 elements of one segment of an item: sums, maximum and weight per query row.
    fn partial_len(&self, tile: &QueryTile) -> usize {
        let group = self.heads.n_heads / self.heads.n_kv_heads;
        tile.tokens.len() * group * (self.heads.head_dim + 2)
    }

    /// f32 elements that hold the segments of every item that a step of one token at the end of
    /// `positions` could divide.
    fn partials_wanted(&self, positions: usize, workers: usize) -> usize {
        let tile = QueryTile { sequence: 0, tokens: 0..1, position_start: positions };
        let items = self.heads.n_kv_heads.min(workers - 1);
        items * self.partial_len(&tile) * self.segments(&tile).len()
    }
}

/// A border between two workers: segment `segment` of the item's own, before which the left one
/// stops. Segment 0 is the item's start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Cut {
    item: usize,
    segment: usize,
}

/// An item that several workers compute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DividedItem {
    /// `tile · n_kv_heads + kv_head`
    pub item: usize,
    /// Where its segments lie in the partials, one after the other.
    pub partials: Range<usize>,
}

/// What a worker does with an item.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece<'a> {
    /// `tile · n_kv_heads + kv_head`
    pub item: usize,
    /// The worker's segments, counted from the item's first, and the item that they belong to;
    /// `None` for all of it.
    pub part: Option<(Range<usize>, &'a DividedItem)>,
}

/// The shares of attentions of one shape.
#[derive(Debug)]
pub(super) struct AttentionSplit {
    pub shape: AttentionShape,
    workers: usize,
    /// f32 elements that partials may take.
    partials_max: usize,
    /// Per tile: cost of one of its heads and one of all before.
    cost_end: Vec<usize>,
    /// `[workers + 1]`, ascending.
    cuts: Vec<Cut>,
    /// Ascending.
    divided: Vec<DividedItem>,
}

impl AttentionSplit {
    /// For steps of up to `tokens_max` tokens and stores of so many positions.
    pub fn new(
        shape: AttentionShape,
        workers: usize,
        tokens_max: usize,
        positions_max: usize,
    ) -> Self {
        let partials_max = shape.partials_wanted(positions_max, workers).min(PARTIALS_MAX);
        Self {
            shape,
            workers,
            partials_max,
            cost_end: Vec::with_capacity(tokens_max),
            cuts: Vec::with_capacity(workers + 1),
            divided: Vec::with_capacity(workers),
        }
    }

    /// f32 elements of the partials that may be asked for.
    pub fn partials_max(&self) -> usize {
        self.partials_max
    }

    /// Items that several workers compute, ascending.
    pub fn divided(&self) -> &[DividedItem] {
        &self.divided
    }

    /// Deals out the tiles of a step.
    pub fn deal(&mut self, tiles: &[QueryTile]) {
        self.divided.clear();
        self.cost_end.clear();
        let mut cost = 0;
        for tile in tiles {
            cost += self.shape.cost(tile);
            self.cost_end.push(cost);
        }
        self.cuts.clear();
        for index in 0..=self.workers {
            let cut = self.whole_item(self.target(index));
            self.cuts.push(Cut { item: cut, segment: 0 });
        }
        if self.is_worth_dividing() {
            self.divide(tiles);
        }
    }

    /// Where a worker's share begins if none is divided, in items from the last one on.
    pub fn first_from_last(&self, worker: usize) -> usize {
        self.cost_end.len() * self.heads() - self.cuts[self.workers - worker].item
    }

    /// What worker `worker` does, in order.
    pub fn pieces(&self, worker: usize) -> impl Iterator<Item = Piece<'_>> {
        let (from, to) = (self.cuts[worker], self.cuts[worker + 1]);
        let end = to.item + usize::from(to.segment > 0);
        (from.item..end).map(move |item| {
            let divided = self.divided.binary_search_by_key(&item, |divided| divided.item);
            let part = divided.ok().map(|found| {
                let start = if item == from.item { from.segment } else { 0 };
                let end = if item == to.item { to.segment } else { usize::MAX };
                (start..end, &self.divided[found])
            });
            Piece { item, part }
        })
    }

    fn heads(&self) -> usize {
        self.shape.heads.n_kv_heads
    }

    fn total(&self) -> usize {
        self.cost_end.last().map_or(0, |cost| cost * self.heads())
    }

    /// Cost of everything before an even cut.
    fn target(&self, index: usize) -> usize {
        self.total() * index / self.workers
    }

    /// Cost of everything before an item.
    fn cost_before(&self, item: usize) -> usize {
        let (tile, head) = (item / self.heads(), item % self.heads());
        let Some(end) = self.cost_end.get(tile) else { return self.total() };
        let before = if tile == 0 { 0 } else { self.cost_end[tile - 1] };
        before * self.heads() + head * (end - before)
    }

    /// The item that holds `target`; one past the last when it is the total.
    fn item_at(&self, target: usize) -> usize {
        let tile = self.cost_end.partition_point(|end| end * self.heads() <= target);
        let first = tile * self.heads();
        match self.cost_before(first + 1) - self.cost_before(first) {
            0 => first,
            cost => first + (target - self.cost_before(first)) / cost,
        }
    }

    /// The start of an item that is nearest to `target`.
    fn whole_item(&self, target: usize) -> usize {
        let item = self.item_at(target);
        let (start, end) = (self.cost_before(item), self.cost_before(item + 1));
        if end > start && target - start > end - target { item + 1 } else { item }
    }

    /// Whether even shares would be done so much sooner that dividing items pays.
    fn is_worth_dividing(&self) -> bool {
        let load = |cuts: &[Cut]| self.cost_before(cuts[1].item) - self.cost_before(cuts[0].item);
        let longest = self.cuts.windows(2).map(load).max().unwrap_or(0);
        let even = self.total() / self.workers;
        let gain = longest - even.min(longest);
        let bytes = gain * self.shape.heads.head_dim * 2 * size_of::<u16>();
        bytes > DIVISION_BYTES && gain > even / GAIN_DIVISOR
    }

    /// Moves cuts into items, to the border of segments nearest to an even share, while there is
    /// room for the partials.
    fn divide(&mut self, tiles: &[QueryTile]) {
        let mut room = self.partials_max;
        for index in 1..self.workers {
            let target = self.target(index);
            let item = self.item_at(target);
            let tile = &tiles[item / self.heads()];
            let (visible, segments) = (self.shape.visible(tile), self.shape.segments(tile));
            let pairs = target - self.cost_before(item);
            let position = visible.start + (pairs / tile.tokens.len()).min(visible.len());
            let nearest = (position + SEGMENT_TOKENS / 2) / SEGMENT_TOKENS;
            let segment = nearest.clamp(segments.start, segments.end) - segments.start;
            let cut = match segment {
                0 => Cut { item, segment: 0 },
                all if all == segments.len() => Cut { item: item + 1, segment: 0 },
                segment => Cut { item, segment },
            };
            let len = segments.len() * self.shape.partial_len(tile);
            let known = self.divided.last().is_some_and(|last| last.item == item);
            if cut.segment > 0 && !known && len <= room {
                let start = self.partials_max - room;
                self.divided.push(DividedItem { item, partials: start..start + len });
                room -= len;
            }
            let fits = self.divided.last().is_some_and(|last| last.item == cut.item);
            if cut.segment == 0 || fits {
                self.cuts[index] = cut;
            }
            // A cut that found no room stays at a whole item, which may lie before the last one.
            let last = self.cuts[index - 1];
            if (self.cuts[index].item, self.cuts[index].segment) < (last.item, last.segment) {
                self.cuts[index] = last;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tiles of so many tokens that end at so many positions.
    fn tiles(ends: &[(usize, usize)]) -> Vec<QueryTile> {
        let tile = |(sequence, (tokens, end)): (usize, &(usize, usize))| QueryTile {
            sequence,
            tokens: sequence..sequence + tokens,
            position_start: end - tokens,
        };
        ends.iter().enumerate().map(tile).collect()
    }

    fn split(n_kv_heads: usize, workers: usize, window: Option<usize>) -> AttentionSplit {
        let heads = HeadShape { n_heads: 4 * n_kv_heads, n_kv_heads, head_dim: 128 };
        AttentionSplit::new(AttentionShape { heads, window }, workers, 64, 1 << 16)
    }

    /// Checks that every segment of every item is computed once; returns the positions of each
    /// worker.
    fn check(split: &AttentionSplit, tiles: &[QueryTile], name: &str) -> Vec<usize> {
        let mut seen: Vec<Vec<u32>> = Vec::new();
        for tile in tiles {
            let segments = split.shape.segments(tile).len();
            seen.extend((0..split.heads()).map(|_| vec![0; segments]));
        }
        let mut loads = Vec::new();
        for worker in 0..split.workers {
            let mut segments = 0;
            for piece in split.pieces(worker) {
                let all = &mut seen[piece.item];
                let own = piece
                    .part
                    .map_or(0..all.len(), |(part, _)| part.start..part.end.min(all.len()));
                segments += own.len();
                all[own].iter_mut().for_each(|times| *times += 1);
            }
            loads.push(segments);
        }
        assert!(seen.iter().flatten().all(|times| *times == 1), "{name}: {seen:?}");
        for pair in split.divided().windows(2) {
            assert!(pair[0].item < pair[1].item, "{name}");
            assert!(pair[0].partials.end <= pair[1].partials.start, "{name}");
        }
        for divided in split.divided() {
            let tile = &tiles[divided.item / split.heads()];
            let len = split.shape.segments(tile).len() * split.shape.partial_len(tile);
            assert_eq!(divided.partials.len(), len, "{name}");
            assert!(divided.partials.end <= split.partials_max(), "{name}");
        }
        let firsts: Vec<_> = (0..=split.workers).map(|w| split.first_from_last(w)).collect();
        assert_eq!((firsts[0], firsts[split.workers]), (0, seen.len()), "{name}");
        assert!(firsts.is_sorted(), "{name}: {firsts:?}");
        loads
    }

    #[test]
    fn every_segment_is_computed_once() {
        let steps: [&[(usize, usize)]; 6] = [
            &[],
            &[(1, 1)],
            &[(1, 20_000)],
            &[(1, 41), (16, 9_000), (16, 9_016), (3, 700), (1, 100)],
            &[(16, 16), (16, 32), (16, 48), (16, 64)],
            &[(1, 60_000), (1, 3), (1, 5_000)],
        ];
        for (number, step) in steps.iter().enumerate() {
            let tiles = tiles(step);
            for (heads, workers) in [(1, 1), (3, 2), (8, 3), (2, 16), (1, 7), (5, 4)] {
                for window in [None, Some(512), Some(1000)] {
                    let mut split = split(heads, workers, window);
                    split.deal(&tiles);
                    let name = format!("step {number}, {heads} heads, {workers}, {window:?}");
                    check(&split, &tiles, &name);
                }
            }
        }
    }

    #[test]
    fn three_heads_are_even_work_for_two() {
        let mut split = split(3, 2, None);
        let tiles = tiles(&[(1, 4096)]);
        split.deal(&tiles);
        assert_eq!(check(&split, &tiles, "3 heads"), [24, 24]);
        assert_eq!(split.divided().len(), 1);
    }

    #[test]
    fn two_heads_are_work_for_sixteen() {
        let mut split = split(2, 16, None);
        let tiles = tiles(&[(1, 16_384)]);
        split.deal(&tiles);
        assert_eq!(check(&split, &tiles, "2 heads"), [8; 16]);
    }

    #[test]
    fn one_long_sequence_among_short_ones_is_shared() {
        let mut split = split(2, 4, None);
        let tiles = tiles(&[(1, 300), (1, 40_000), (1, 200), (1, 500)]);
        split.deal(&tiles);
        let loads = check(&split, &tiles, "one long");
        assert!(loads.iter().all(|load| (75..=85).contains(load)), "{loads:?}");
    }

    #[test]
    fn short_contexts_and_even_items_stay_whole() {
        for (step, heads, workers) in
            [(&[(1, 200)][..], 3, 2), (&[(1, 9_000)], 4, 4), (&[(1, 100), (1, 110), (1, 90)], 3, 2)]
        {
            let mut split = split(heads, workers, None);
            split.deal(&tiles(step));
            assert!(split.divided().is_empty(), "{step:?}");
        }
    }

    #[test]
    fn items_without_room_for_partials_stay_whole() {
        let mut split = split(3, 2, None);
        split.partials_max = 100;
        let tiles = tiles(&[(1, 4096)]);
        split.deal(&tiles);
        check(&split, &tiles, "no room");
        assert!(split.divided().is_empty());
    }
}
