//! How the layers of a model are cut over several GPUs.
//!
//! A KV block has a part on each, so the GPU that holds the fewest parts decides how many there
//! are. The cut is the one that leaves most to that GPU, then to the one after it, and so on: GPUs
//! of one size get layers of as many bytes of weights and KV, smaller ones fewer. In the order of
//! the GPUs, for each number of layers:
//! ```text
//! blocks(gpu, a..b) = (usable − weights(a..b) − activations(a..b)) / bytes of a block in a..b
//! best(gpu, b)      = max over a < b of sorted(best(gpu − 1, a), blocks(gpu, a..b))
//! ```

use super::{Room, gpu};
use crate::config::Config;
use crate::hardware::{Gpu, HardwareProfile};
use crate::model::ModelSpec;
use std::ops::Range;

/// The best that the first GPUs can do with the first layers.
#[derive(Clone)]
struct Best {
    /// Ascending: blocks that each holds; fewer than none where not even the weights fit.
    blocks: Vec<i64>,
    /// Where the layers of each begin.
    starts: Vec<usize>,
}

/// What layers take of a GPU.
struct Sizes {
    /// Bytes of weights of all layers before one; the output is the last one's.
    weights: Vec<u64>,
    /// Bytes of a KV block in all layers before one.
    block: Vec<u64>,
    /// Bytes of activations, by whether the first layer, and the last one, is among them.
    activations: [[u64; 2]; 2],
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
    let mut room = |gpu, layers| gpu::room(spec, (hardware, gpu), layers, config, notes);
    if let [gpu] = gpus {
        return vec![room(gpu, 0..n_layers)];
    }
    let usable = gpus.iter().map(|gpu| gpu::usable_bytes(gpu, config)).collect::<Vec<_>>();
    let starts = cut(&Sizes::of(spec, config), &usable);
    let ends = starts.iter().skip(1).copied().chain([n_layers]);
    let layers = starts.iter().zip(ends).map(|(start, end)| *start..end);
    let rooms = gpus.iter().zip(layers).map(|(gpu, layers)| {
        let room = room(gpu, layers);
        let suggest = format!("{}; with several GPUs nothing is spilled", room.suggest);
        Room { suggest, ..room }
    });
    rooms.collect()
}

/// Where the layers of each GPU begin.
fn cut(sizes: &Sizes, usable: &[u64]) -> Vec<usize> {
    let (n_layers, n_gpus) = (sizes.weights.len() - 1, usable.len());
    let first = Best { blocks: Vec::new(), starts: Vec::new() };
    // By the number of layers that the GPUs so far have.
    let mut bests = vec![None; n_layers + 1];
    bests[0] = Some(first);
    for (index, usable) in usable.iter().enumerate() {
        let is_enough_left = |end: &usize| n_layers - end >= n_gpus - 1 - index;
        let with = |end: usize| {
            let cuts = (0..end).filter_map(|start| {
                let before: &Best = bests[start].as_ref()?;
                let mut blocks = before.blocks.clone();
                blocks.push(sizes.blocks(*usable, start..end));
                blocks.sort_unstable();
                Some((blocks, before, start))
            });
            let (blocks, before, start) = cuts.max_by(|a, b| a.0.cmp(&b.0))?;
            let starts = before.starts.iter().copied().chain([start]).collect();
            Some(Best { blocks, starts })
        };
        let next = (0..=n_layers).map(|end| Some(end).filter(is_enough_left).and_then(with));
        bests = next.collect();
    }
    let all = bests.pop().flatten();
    all.expect("no more GPUs than layers").starts
}

impl Sizes {
    fn of(spec: &ModelSpec, config: &Config) -> Self {
        let n_layers = spec.layers.len();
        let sums = |bytes: &dyn Fn(usize) -> u64| {
            let mut sums = vec![0; n_layers + 1];
            (0..n_layers).for_each(|layer| sums[layer + 1] = sums[layer] + bytes(layer));
            sums
        };
        let block_tokens = config.kv.block_tokens as u64;
        let tokens = config.scheduler.step_tokens_max as u64;
        let activations = |start: usize, end| gpu::activation_bytes(spec, &(start..end), tokens);
        let before_last = n_layers.saturating_sub(1);
        Self {
            weights: sums(&|layer| gpu::weight_bytes(spec, &(layer..layer + 1))),
            block: sums(&|layer| {
                spec.layers[layer].kv_bytes_per_token(config.kv.dtype) * block_tokens
            }),
            activations: [1, 0]
                .map(|start| [before_last, n_layers].map(|end| activations(start, end))),
        }
    }

    fn blocks(&self, usable: u64, layers: Range<usize>) -> i64 {
        let Range { start, end } = layers;
        let is_last = end + 1 == self.weights.len();
        let activations = self.activations[usize::from(start == 0)][usize::from(is_last)];
        let fixed = self.weights[end] - self.weights[start] + activations;
        blocks(usable, fixed, self.block[end] - self.block[start])
    }
}

/// KV blocks whose parts of `block` bytes fit beside `fixed` bytes; less than 0 where these do not
/// fit.
pub(super) fn blocks(usable: u64, fixed: u64, block: u64) -> i64 {
    let left = i128::from(usable) - i128::from(fixed);
    left.div_euclid(i128::from(block.max(1))) as i64
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
            let sizes = Sizes { weights, block, activations };
            for n_gpus in 1..=4 {
                let usable: Vec<_> = (0..n_gpus).map(|_| 100 + random(900)).collect();
                let starts = cut(&sizes, &usable);
                let ends = starts.iter().skip(1).copied().chain([n_layers as usize]);
                let parts = starts.iter().zip(ends).zip(&usable);
                let blocks = parts.map(|((start, end), usable)| sizes.blocks(*usable, *start..end));
                let mut blocks: Vec<_> = blocks.collect();
                blocks.sort_unstable();
                assert_eq!(Some(blocks), best_of_all(&sizes, &usable, 0), "{starts:?}");
            }
        }
    }
}
