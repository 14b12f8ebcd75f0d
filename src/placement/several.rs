//! How the layers of a model are cut over several GPUs.
//!
//! A KV block has a part on each, so the GPU that holds the fewest parts decides how many there
//! are. Where all weights fit, the cut is the one that leaves most to that GPU, then to the one
//! after it, and so on: GPUs of one size get layers of as many bytes of weights and KV, smaller
//! ones fewer. In the order of the GPUs, for each number of layers:
//! ```text
//! blocks(gpu, a..b) = (usable − weights(a..b) − activations(a..b))
//!                     / bytes of a block in a..b, and of what grows with it
//! best(gpu, b)      = max over a < b of sorted(best(gpu − 1, a), blocks(gpu, a..b))
//! ```
//! `spill_cuts.rs` cuts by what has to be spilled in the same way.

use super::gpu_buffers::{BufferDims, Growth};
use super::{Room, gpu};
use crate::config::Config;
use crate::hardware::{Gpu, HardwareProfile};
use crate::model::ModelSpec;
use std::ops::Range;

/// The best that the first GPUs can do with the first layers.
#[derive(Clone)]
struct Best<V> {
    value: V,
    /// Where the layers of each begin.
    starts: Vec<usize>,
}

/// What layers take of a GPU.
pub(super) struct Sizes {
    /// Bytes of weights of all layers before one; the output is the last one's.
    weights: Vec<u64>,
    /// Bytes of a KV block in all layers before one.
    block: Vec<u64>,
    /// Bytes of activations, by whether the first layer, and the last one, is among them.
    activations: [[u64; 2]; 2],
    /// What of them grows with the KV store.
    pub growth: Growth,
}

/// What some GPUs have for a model that is cut over them, at least one layer each, in their order;
/// `notes` say where that is less than was allowed.
///
/// # Panics
/// Without GPUs, or with more of them than layers.
pub(super) fn rooms(
    spec: &ModelSpec,
    (hardware, gpus): (&HardwareProfile, &[&Gpu]),
    config: &Config,
    notes: &mut Vec<String>,
) -> Vec<Room> {
    let n_layers = spec.layers.len();
    let sizes = Sizes::of(spec, gpus, config);
    let usable = gpus.iter().map(|gpu| gpu::usable_bytes(spec, gpu, config)).collect::<Vec<_>>();
    let layers =
        cut_by_blocks(n_layers, gpus.len(), |gpu, layers| Some(sizes.blocks(usable[gpu], layers)));
    let layers = layers.expect("no more GPUs than layers");
    let rooms = gpus.iter().zip(layers);
    rooms.map(|(gpu, layers)| gpu::room(spec, (hardware, gpu), layers, config, notes)).collect()
}

/// The layers of each GPU, at least one, for the cut that leaves most KV blocks to the GPU with the
/// fewest, then to the one after it, and so on; none where no cut is possible. `blocks` says how
/// many a GPU has room for beside some layers, if it may have these.
pub(super) fn cut_by_blocks(
    n_layers: usize,
    n_gpus: usize,
    blocks: impl Fn(usize, Range<usize>) -> Option<i64>,
) -> Option<Vec<Range<usize>>> {
    // Ascending.
    cut(n_layers, n_gpus, Vec::new(), |before: &Vec<i64>, gpu, layers| {
        let mut all = before.clone();
        all.push(blocks(gpu, layers)?);
        all.sort_unstable();
        Some(all)
    })
}

/// The layers of each GPU, at least one, for the cut with the greatest value; none where no cut is
/// possible. `with` adds some layers on a GPU to the value of those before, of which a greater one
/// never leads to a lesser.
pub(super) fn cut<V: Ord + Clone>(
    n_layers: usize,
    n_gpus: usize,
    nothing: V,
    with: impl Fn(&V, usize, Range<usize>) -> Option<V>,
) -> Option<Vec<Range<usize>>> {
    // By the number of layers that the GPUs so far have.
    let mut bests = vec![None; n_layers + 1];
    bests[0] = Some(Best { value: nothing, starts: Vec::new() });
    for gpu in 0..n_gpus {
        let left = n_gpus - 1 - gpu;
        let best = |end: usize| {
            // Each of the others gets a layer, and the last one all that are left.
            if n_layers - end < left || (left == 0 && end < n_layers) {
                return None;
            }
            let cuts = (0..end).filter_map(|start| {
                let before: &Best<V> = bests[start].as_ref()?;
                Some((with(&before.value, gpu, start..end)?, before, start))
            });
            let (value, before, start) = cuts.max_by(|a, b| a.0.cmp(&b.0))?;
            let starts = before.starts.iter().copied().chain([start]).collect();
            Some(Best { value, starts })
        };
        bests = (0..=n_layers).map(best).collect();
    }
    let starts = bests.pop()??.starts;
    let ends = starts.iter().skip(1).copied().chain([n_layers]);
    Some(starts.iter().zip(ends).map(|(start, end)| *start..end).collect())
}

impl Sizes {
    /// Of layers on any of some GPUs.
    pub fn of(spec: &ModelSpec, gpus: &[&Gpu], config: &Config) -> Self {
        let n_layers = spec.layers.len();
        let sums = |bytes: &dyn Fn(usize) -> u64| {
            let mut sums = vec![0; n_layers + 1];
            (0..n_layers).for_each(|layer| sums[layer + 1] = sums[layer] + bytes(layer));
            sums
        };
        let block_tokens = config.kv.block_tokens as u64;
        let activations = |start: usize, end| {
            let dims = BufferDims::of(spec, &(start..end));
            let of = |gpu: &&Gpu| dims.fixed_bytes(gpu::size(config, gpu::narrow_max(gpu)));
            gpus.iter().map(of).max().unwrap_or(0)
        };
        let before_last = n_layers.saturating_sub(1);
        Self {
            weights: sums(&|layer| gpu::weight_bytes(spec, &(layer..layer + 1))),
            block: sums(&|layer| {
                spec.layers[layer].kv_bytes_per_token(config.kv.dtype) * block_tokens
            }),
            activations: [1, 0]
                .map(|start| [before_last, n_layers].map(|end| activations(start, end))),
            growth: BufferDims::of(spec, &(0..n_layers)).growth(config.kv.block_tokens),
        }
    }

    /// Bytes of all but KV that some layers take.
    pub fn fixed(&self, layers: &Range<usize>) -> u64 {
        let Range { start, end } = *layers;
        let is_last = end + 1 == self.weights.len();
        let activations = self.activations[usize::from(start == 0)][usize::from(is_last)];
        self.weights[end] - self.weights[start] + activations
    }

    /// Bytes of a KV block in some layers.
    pub fn block(&self, layers: &Range<usize>) -> u64 {
        self.block[layers.end] - self.block[layers.start]
    }

    fn blocks(&self, usable: u64, layers: Range<usize>) -> i64 {
        self.blocks_beside(usable, self.fixed(&layers), &layers)
    }

    /// KV blocks of some layers that fit beside `fixed` bytes; less than 0 where not even these do.
    pub fn blocks_beside(&self, usable: u64, fixed: u64, layers: &Range<usize>) -> i64 {
        self.growth.blocks(usable, fixed, self.block(layers))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every way to cut, by trying them all.
    fn best_of_all(sizes: &Sizes, usable: &[u64], from: usize) -> Option<Vec<i64>> {
        let n_layers = sizes.weights.len() - 1;
        let (first, others) = usable.split_first()?;
        if others.is_empty() {
            return (from < n_layers).then(|| vec![sizes.blocks(*first, from..n_layers)]);
        }
        let cuts = (from + 1..n_layers).filter_map(|end| {
            let mut blocks = best_of_all(sizes, others, end)?;
            blocks.push(sizes.blocks(*first, from..end));
            blocks.sort_unstable();
            Some(blocks)
        });
        cuts.max()
    }

    #[test]
    fn no_other_cut_leaves_more() {
        let mut state = 1_u64;
        let mut random = |most: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) % most
        };
        for _ in 0..500 {
            let mut sums = |n: u64, most: u64| {
                let mut sum = 0;
                let next = (0..n).map(|_| {
                    sum += 1 + random(most);
                    sum
                });
                std::iter::once(0).chain(next).collect::<Vec<_>>()
            };
            let n_layers = 7;
            let (weights, block) = (sums(n_layers, 100), sums(n_layers, 5));
            let activations = [[random(40), random(60)], [random(50), random(70)]];
            let growth = Growth::default();
            let sizes = Sizes { weights, block, activations, growth };
            for n_gpus in 1..=4 {
                let usable: Vec<_> = (0..n_gpus).map(|_| 100 + random(900)).collect();
                let of = |gpu: usize, layers| sizes.blocks(usable[gpu], layers);
                let parts =
                    cut_by_blocks(n_layers as usize, n_gpus, |gpu, layers| Some(of(gpu, layers)));
                let parts = parts.unwrap();
                let blocks = parts.iter().enumerate().map(|(gpu, layers)| of(gpu, layers.clone()));
                let mut blocks: Vec<_> = blocks.collect();
                blocks.sort_unstable();
                assert_eq!(Some(blocks), best_of_all(&sizes, &usable, 0), "{parts:?}");
            }
        }
        assert!(cut_by_blocks(2, 3, |_, _| Some(1)).is_none());
        assert!(cut_by_blocks(3, 2, |_, layers| (layers.len() > 1).then_some(1)).is_none());
    }
}
