//! How the layers of a model that must be spilled are cut over GPUs, and what each of them spills.
//!
//! At first the cut is the one with which the fewest bytes are spilled, and of equals the one with
//! which the GPU that spills most spills least:
//! ```text
//! bytes(gpu, a..b) = fewest that a way to spill some of a..b has in host memory, of those with
//!                    fixed(a..b) − saved + ring + KV of a..b ≤ usable(gpu)
//! spilled(gpu, b)  = min over a < b of spilled(gpu − 1, a) + bytes(gpu, a..b)
//! ```
//! Which ways and runs of layers there are, and what KV is wanted, does not depend on the GPUs'
//! memory. So more of it never has to spill more.
//!
//! That cut often leaves all that is spilled to one GPU, whose ring then serves for both. But in a
//! prompt of several steps all GPUs are at work at once, each at another step, and the slowest
//! decides. So other cuts are looked at, beside which as many KV blocks have room: from that one,
//! and from the one with which the GPU that spills most spills least, borders are moved one at a
//! time to where the value that the caller gives is least. Of two GPUs these are all cuts.

use super::several::{Sizes, cut, cut_by_blocks};
use super::spill_ways::{RunWays, Way, Ways};
use std::cell::RefCell;
use std::cmp::Reverse;
use std::collections::HashMap;
use std::ops::Range;
use std::rc::Rc;

/// How often all borders are moved at most.
const ROUNDS_MAX: usize = 4;

/// What GPUs are asked for.
#[derive(Clone, Copy)]
pub(super) struct Task<'a> {
    pub ways: &'a Ways<'a>,
    pub sizes: &'a Sizes,
    /// Bytes that may be used of each.
    pub usable: &'a [u64],
}

/// What a GPU gets.
#[derive(Clone)]
pub(super) struct Share {
    pub layers: Range<usize>,
    pub way: Way,
}

/// What each GPU gets.
#[derive(Clone)]
pub(super) struct Shares {
    pub each: Vec<Share>,
    /// KV blocks that all of them have room for then.
    pub kv_blocks: u64,
    /// Among which ways theirs were the cheapest; none where everything is spilled, since no other
    /// way has room.
    choice: Option<Choice>,
}

/// Of the ways of some layers those that are looked at: from the one that spills least to all.
pub(super) type Choice = fn(&RunWays) -> &[Way];

impl Task<'_> {
    /// The shares with the fewest spilled bytes; none where spilling does not help. Networks are
    /// spilled for as many as `longest` KV blocks, attention's weights for as many as `short`.
    pub fn shares(&self, longest: u64, short: u64) -> Option<Shares> {
        let networks: Choice = |ways| &ways.networks;
        let attention: Choice = |ways| &ways.attention;
        if let Some(shares) = self.cheapest(longest, networks) {
            return Some(shares);
        }
        let shares = self.fullest(networks)?;
        if shares.kv_blocks >= short {
            return Some(shares);
        }
        self.cheapest(short, attention).or_else(|| self.fullest(attention))
    }

    /// The shares of least value among those of other cuts, and these themselves; a cut without a
    /// value is none.
    pub fn best<V: Ord + Copy>(
        &self,
        shares: &Shares,
        value: impl Fn(&Shares) -> Option<V>,
    ) -> Shares {
        let Some(choice) = shares.choice else { return shares.clone() };
        let beside = (shares.kv_blocks, choice);
        let with = |cut: &[Range<usize>]| self.with_cut(cut, beside);
        // Most cuts are met several times, and a value takes long.
        let known = RefCell::new(HashMap::new());
        let value = |cut: &[Range<usize>]| {
            let of_cut = known.borrow().get(cut).copied();
            of_cut.unwrap_or_else(|| {
                let of_cut = with(cut).and_then(|shares| value(&shares));
                known.borrow_mut().insert(cut.to_vec(), of_cut);
                of_cut
            })
        };
        let own = shares.each.iter().map(|share| share.layers.clone()).collect();
        let starts = std::iter::once(own).chain(self.most_even(beside));
        // Of equals the first.
        let best = starts.filter_map(|cut| moved(cut, value)).min_by_key(|(_, least)| *least);
        best.and_then(|(cut, _)| with(&cut)).unwrap_or_else(|| shares.clone())
    }

    /// The cheapest way of some layers on a GPU beside so many KV blocks.
    fn way(&self, gpu: usize, layers: &Range<usize>, beside: (u64, Choice)) -> Option<Way> {
        let (kv_blocks, choice) = beside;
        let ways = self.ways_of(layers)?;
        let kv_bytes = u128::from(kv_blocks) * u128::from(self.sizes.block(layers).max(1));
        let (usable, fixed) = (u128::from(self.usable[gpu]), self.sizes.fixed(layers));
        let fits = |way: &&Way| u128::from(fixed - way.saved + way.ring_bytes) + kv_bytes <= usable;
        choice(&ways).iter().filter(fits).min_by_key(|way| way.host_bytes).copied()
    }

    /// The cut with which the GPU that spills most spills least.
    fn most_even(&self, beside: (u64, Choice)) -> Option<Vec<Range<usize>>> {
        cut(self.n_layers(), self.usable.len(), Reverse(0), |before, gpu, layers| {
            let bytes = self.way(gpu, &layers, beside)?.host_bytes;
            Some(Reverse(before.0.max(bytes)))
        })
    }

    /// The cheapest shares of a cut.
    fn with_cut(&self, cut: &[Range<usize>], beside: (u64, Choice)) -> Option<Shares> {
        let share = |(gpu, layers): (usize, &Range<usize>)| {
            Some(Share { way: self.way(gpu, layers, beside)?, layers: layers.clone() })
        };
        let each = cut.iter().enumerate().map(share).collect::<Option<_>>()?;
        Some(Shares { each, kv_blocks: beside.0, choice: Some(beside.1) })
    }

    /// The shares with the fewest spilled bytes beside which so many KV blocks have room.
    fn cheapest(&self, kv_blocks: u64, choice: Choice) -> Option<Shares> {
        let (beside, nothing) = ((kv_blocks, choice), Reverse((0, 0)));
        let cut = cut(self.n_layers(), self.usable.len(), nothing, |before, gpu, layers| {
            let bytes = self.way(gpu, &layers, beside)?.host_bytes;
            let Reverse((all, most)) = *before;
            Some(Reverse((all + bytes, most.max(bytes))))
        })?;
        self.with_cut(&cut, beside)
    }

    /// The shares with everything spilled that leave most KV blocks to the GPU with the fewest.
    fn fullest(&self, choice: Choice) -> Option<Shares> {
        let way = |layers: &Range<usize>| choice(&*self.ways_of(layers)?).last().copied();
        let blocks = |gpu, layers: &Range<usize>| Some(self.blocks(gpu, layers, &way(layers)?));
        let cut =
            cut_by_blocks(self.n_layers(), self.usable.len(), |gpu, layers| blocks(gpu, &layers))?;
        let of_gpus = cut.iter().enumerate().filter_map(|(gpu, layers)| blocks(gpu, layers));
        let kv_blocks = of_gpus.min().unwrap_or(0).max(0) as u64;
        let each = cut.into_iter().map(|layers| Some(Share { way: way(&layers)?, layers }));
        Some(Shares { each: each.collect::<Option<_>>()?, kv_blocks, choice: None })
    }

    fn n_layers(&self) -> usize {
        self.ways.spec.layers.len()
    }

    /// The ways of some layers; none where a ring takes more than all their networks save. A GPU
    /// does not get so few.
    fn ways_of(&self, layers: &Range<usize>) -> Option<Rc<RunWays>> {
        let ways = self.ways.of(layers);
        let all = ways.networks.last()?;
        (all.ring_bytes < all.saved).then_some(ways)
    }

    /// KV blocks that fit beside some layers; less than 0 where not even their weights do.
    fn blocks(&self, gpu: usize, layers: &Range<usize>, way: &Way) -> i64 {
        let fixed = self.sizes.fixed(layers) - way.saved + way.ring_bytes;
        self.sizes.blocks_beside(self.usable[gpu], fixed, layers)
    }
}

/// A cut of least value that is reached from another by moving one border at a time to the best
/// place between its neighbours; none where none of these has a value.
fn moved<V: Ord>(
    mut cut: Vec<Range<usize>>,
    value: impl Fn(&[Range<usize>]) -> Option<V>,
) -> Option<(Vec<Range<usize>>, V)> {
    let mut least = value(&cut);
    for _ in 0..ROUNDS_MAX {
        let mut has_moved = false;
        for border in 1..cut.len() {
            for place in cut[border - 1].start + 1..cut[border].end {
                let mut other = cut.clone();
                (other[border - 1].end, other[border].start) = (place, place);
                let of_other = value(&other);
                if of_other.is_some() && (least.is_none() || of_other < least) {
                    (cut, least, has_moved) = (other, of_other, true);
                }
            }
        }
        if !has_moved {
            break;
        }
    }
    Some((cut, least?))
}

#[cfg(test)]
mod tests {
    use super::super::spill_units::{Unit, slots_wanted};
    use super::*;
    use crate::config::Config;
    use crate::model::{FfnSpec, ModelSpec, SyntheticModel};
    use crate::placement::{NodeTeams, Spill};
    use crate::tensor::DType;

    /// Eight layers of which some have larger networks, or larger attention.
    fn spec() -> ModelSpec {
        let mut spec = "llama-8b:q4_0".parse::<SyntheticModel>().unwrap().spec();
        spec.layers.truncate(8);
        for layer in [0, 3, 4] {
            let FfnSpec::Dense(ffn) = &mut spec.layers[layer].ffn else { panic!("dense") };
            ffn.down.weight.dtype = DType::Q6_K;
        }
        spec.layers[3].attention.value.weight.dtype = DType::Q8_0;
        spec
    }

    /// All cuts of layers from `from` over so many GPUs.
    fn cuts(from: usize, layers: usize, gpus: usize) -> Vec<Vec<Range<usize>>> {
        if gpus == 1 {
            return if from < layers { vec![vec![from..layers]] } else { Vec::new() };
        }
        let first = (from + 1..layers).flat_map(|end| {
            let others = cuts(end, layers, gpus - 1);
            others.into_iter().map(move |others| std::iter::once(from..end).chain(others).collect())
        });
        first.collect()
    }

    /// Numbers below one that is asked for.
    fn random() -> impl FnMut(u64) -> u64 {
        let mut state = 3_u64;
        move |most| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) % most
        }
    }

    /// What a way spills, from the layers alone.
    fn plainly(spec: &ModelSpec, spill: &Spill) -> (u64, Spill) {
        let mut plain = spill.clone();
        let units: Vec<Unit<'_>> = spill.units(spec).collect();
        plain.weight_bytes = units.iter().map(Unit::host_bytes).sum();
        let saved = units.iter().map(Unit::device_bytes).sum();
        let nodes = NodeTeams::default();
        plain.set_ring(spec, slots_wanted(spec, spill, &nodes), &nodes);
        (saved, plain)
    }

    #[test]
    fn ways_are_what_their_layers_make_them() {
        let (spec, nodes) = (spec(), NodeTeams::default());
        let ways = Ways::new(&spec, nodes.clone());
        for layers in cuts(0, 8, 3).concat() {
            let of = ways.of(&layers);
            assert_eq!(of.networks.len(), layers.len() + 1);
            for way in of.networks.iter().chain(&of.attention[..=layers.len()]) {
                let Some(spill) = ways.spill(&layers, way) else {
                    assert_eq!((way.saved, way.ring_bytes, way.host_bytes), (0, 0, 0));
                    continue;
                };
                assert_eq!((way.saved, spill.clone()), plainly(&spec, &spill), "{layers:?}");
            }
            let smaller = &of.attention[layers.len()..];
            assert!(smaller.windows(2).all(|pair| pair[1].ring_bytes < pair[0].ring_bytes));
        }
    }

    #[test]
    fn no_other_cut_spills_less() {
        let (spec, config, nodes) = (spec(), Config::default(), NodeTeams::default());
        let (ways, sizes) = (Ways::new(&spec, nodes.clone()), Sizes::of(&spec, &[], &config));
        let mut random = random();
        let choices: [Choice; 2] = [|ways| &ways.networks, |ways| &ways.attention];
        let mut found = [0; 2];
        for round in 0..400 {
            let gpus = 1 + round % 3;
            let usable: Vec<_> = (0..gpus).map(|_| (300 + random(1500)) << 20).collect();
            let task = Task { ways: &ways, sizes: &sizes, usable: &usable };
            let kv_blocks = random(600);
            for (at, choice) in choices.into_iter().enumerate() {
                let least = |(gpu, layers): (usize, &Range<usize>)| {
                    let of = task.ways_of(layers)?;
                    let ways = choice(&of).iter();
                    let fit = ways.filter(|way| {
                        let fixed = sizes.fixed(layers) - way.saved + way.ring_bytes;
                        fixed + sizes.growth.bytes(kv_blocks, sizes.block(layers)) <= usable[gpu]
                    });
                    fit.map(|way| way.host_bytes).min()
                };
                let of_cut = |cut: &Vec<Range<usize>>| -> Option<[u64; 2]> {
                    let bytes = cut.iter().enumerate().map(least).collect::<Option<Vec<_>>>()?;
                    Some([bytes.iter().sum(), bytes.into_iter().max()?])
                };
                let wanted = cuts(0, 8, gpus).iter().filter_map(of_cut).min();
                let shares = task.cheapest(kv_blocks, choice);
                let got = shares.map(|shares| {
                    let bytes = shares.each.iter().map(|share| share.way.host_bytes);
                    [bytes.clone().sum(), bytes.max().unwrap()]
                });
                assert_eq!(got, wanted, "{kv_blocks} blocks on {usable:?}");
                found[at] += usize::from(wanted.is_some_and(|[all, _]| all > 0));
            }
        }
        assert!(found.iter().all(|found| *found > 20), "{found:?}");
    }

    #[test]
    fn borders_are_moved_to_where_the_value_is_least() {
        let mut random = random();
        for round in 0..200 {
            let gpus = 2 + round % 3;
            let all = cuts(0, 8, gpus);
            // Some cuts have no value.
            let values: Vec<_> = all.iter().map(|_| Some(random(50)).filter(|v| *v > 5)).collect();
            let value = |cut: &[Range<usize>]| {
                values[all.iter().position(|other| other == cut).expect("a cut of all layers")]
            };
            let start = random(all.len() as u64) as usize;
            let found = moved(all[start].clone(), value);
            if gpus == 2 {
                let least = found.as_ref().map(|(_, least)| *least);
                assert_eq!(least, values.iter().flatten().min().copied());
            }
            let Some((cut, least)) = found else {
                assert_eq!(values[start], None);
                continue;
            };
            assert_eq!(value(&cut), Some(least));
            assert!(values[start].is_none_or(|of_start| least <= of_start));
        }
    }

    #[test]
    fn another_cut_is_taken_for_its_value_alone_and_has_as_much_room() {
        let (spec, config, nodes) = (spec(), Config::default(), NodeTeams::default());
        let (ways, sizes) = (Ways::new(&spec, nodes.clone()), Sizes::of(&spec, &[], &config));
        let usable = [1000 << 20; 2];
        let task = Task { ways: &ways, sizes: &sizes, usable: &usable };
        let shares = task.shares(64, 64).expect("room for it");
        let spilled = |shares: &Shares| shares.each.iter().map(|share| share.way.host_bytes).sum();
        let all = |shares: &Shares| -> u64 { spilled(shares) };
        let same = task.best(&shares, |other| Some(all(other)));
        assert_eq!(all(&same), all(&shares));
        // As if the first GPU was slow.
        let best = task.best(&shares, |other| Some(other.each[0].layers.len()));
        let first = |shares: &Shares| shares.each[0].layers.len();
        let beside = (shares.kv_blocks, shares.choice.expect("a way to cut them"));
        let fitting = cuts(0, 8, 2).into_iter().filter_map(|cut| task.with_cut(&cut, beside));
        assert_eq!(Some(first(&best)), fitting.map(|shares| first(&shares)).min());
        assert!(first(&best) < first(&shares));
        assert!(all(&best) >= all(&shares));
        assert_eq!(best.kv_blocks, shares.kv_blocks);
        for (gpu, share) in best.each.iter().enumerate() {
            assert!(task.blocks(gpu, &share.layers, &share.way) >= best.kv_blocks as i64);
        }
        let none = task.best(&shares, |_| None::<u64>);
        assert_eq!(all(&none), all(&shares));
    }
}
