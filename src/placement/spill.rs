//! Which weights are spilled: they lie in host memory, though GPUs that do not hold the whole model
//! run it. Attention itself, KV, norms and logits of all layers stay there.
//!
//! In a step the CPU computes what is spilled of a layer, or its weights stream through a ring of
//! slots into the memory of the layer's GPU. As little as possible is spilled: reading a weight
//! from host memory takes some forty times as long. First feed-forward networks are; attention's
//! weights, which take two more crossings a layer, only where no network is left. Layers are spread
//! evenly over those of a GPU, so that what streams or is computed for one has the time that the
//! GPU takes for those between.
//!
//! Of all cuts of the layers over several GPUs the one is taken with which the fewest bytes are
//! spilled, and of equals the one with which the GPU that spills most spills least:
//! ```text
//! bytes(gpu, a..b) = fewest that a way to spill some of a..b has in host memory, of those with
//!                    fixed(a..b) − saved + ring + KV of a..b ≤ usable(gpu)
//! spilled(gpu, b)  = min over a < b of spilled(gpu − 1, a) + bytes(gpu, a..b)
//! ```
//! Which ways and runs of layers there are, and what KV is wanted, does not depend on the GPUs'
//! memory. So more of it never spills more.

use super::cpu::HOST;
use super::gpu;
use super::room::{margin_bytes, spilled_context, wanted_blocks, with_margin};
use super::several::{Sizes, blocks, cut, cut_by_blocks};
use super::spill_units::crossing_bytes;
use super::spill_ways::{RunWays, Way, Ways};
use super::{Room, Workers};
use crate::config::Config;
use crate::hardware::{Gpu, HardwareProfile};
use crate::model::ModelSpec;
use crate::request::RequestError;
use crate::units::ByteSize;
use serde::Serialize;
use std::cmp::Reverse;
use std::ops::Range;
use std::rc::Rc;

/// Tokens of a context for which attention's weights are spilled, unless another one is asked for.
const CONTEXT_TOKENS_SHORT: usize = 2048;
/// Tokens of the widest step whose rows cross to the CPU and back: beyond them weights stream.
pub const CROSSING_TOKENS_MAX: usize = 256;

/// Weights that lie in host memory though a GPU runs the model.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Spill {
    /// Layers whose feed-forward networks do, ascending.
    pub layers: Vec<usize>,
    /// Layers whose attention's weights do, ascending.
    pub attention_layers: Vec<usize>,
    /// Bytes of these weights in host memory, in the CPU kernels' layout.
    pub weight_bytes: u64,
    /// Slots of the ring through which they stream to the GPU; of several GPUs, of all rings.
    pub ring_slots: usize,
    /// Bytes of the slots, and of what weights are taken apart into, on the GPU.
    pub ring_bytes: u64,
    /// Bytes of host memory in which rows cross, and of the CPU's activations, which are those of
    /// the first GPU that spills.
    pub crossing_bytes: u64,
}

/// What GPUs are asked for.
#[derive(Clone, Copy)]
struct Task<'a> {
    ways: &'a Ways<'a>,
    sizes: &'a Sizes,
    /// Bytes that may be used of each.
    usable: &'a [u64],
}

/// What a GPU gets.
struct Share {
    layers: Range<usize>,
    way: Way,
}

/// What some GPUs, each of which gets layers, and the host have for a model of which as little as
/// possible is spilled, where spilling helps at all.
///
/// Feed-forward networks are spilled until the store holds one context or what was asked for, as
/// far as it does with all of them spilled. Where that is less than a short context, attention's
/// weights are spilled for one as well, and the rings are made smaller at last.
///
/// # Errors
/// `InsufficientMemory` of the host.
pub(super) fn rooms(
    ways: &Ways<'_>,
    (hardware, gpus, workers): (&HardwareProfile, &[&Gpu], &Workers),
    config: &Config,
    notes: &mut Vec<String>,
) -> Result<Option<Vec<Room>>, RequestError> {
    let (spec, sizes) = (ways.spec, Sizes::of(ways.spec, config));
    let usable: Vec<_> = gpus.iter().map(|gpu| gpu::usable_bytes(gpu, config)).collect();
    let task = Task { ways, sizes: &sizes, usable: &usable };
    let [longest, short] = [usize::MAX, CONTEXT_TOKENS_SHORT]
        .map(|tokens| wanted_blocks(spec, config, tokens.min(spilled_context(spec))));
    let Some((shares, kv_blocks)) = task.shares(longest, short) else { return Ok(None) };
    let mut whole = |(gpu, share): (&&Gpu, &Share)| {
        gpu::room(spec, (hardware, *gpu), share.layers.clone(), config, notes)
    };
    let whole: Vec<Room> = gpus.iter().zip(&shares).map(&mut whole).collect();
    let mut rooms: Vec<Room> = whole.iter().zip(&shares).map(|on| with_way(ways, on)).collect();
    add_crossings(&mut rooms, spec, (workers, config));
    let Some(all) = in_all(rooms.iter().filter_map(|room| room.spill.as_ref())) else {
        return Ok(None);
    };
    let left = host_left(&all, hardware)?;
    for room in &mut rooms {
        room.swap_room = room.swap_room.map(|swap| swap.min(left));
    }
    let need = |room: &Room| {
        let kv_bytes = kv_blocks.saturating_mul(room.block_bytes(spec, config));
        with_margin(room.fixed_bytes().saturating_add(kv_bytes))
    };
    notes.push(in_words(&all, spec, &whole, need));
    Ok(Some(rooms))
}

/// Of the ways of some layers those that are looked at: from the one that spills least to all.
type Choice = fn(&RunWays) -> &[Way];

impl Task<'_> {
    /// What each GPU gets, and the KV blocks that all of them have room for then; none where
    /// spilling does not help.
    fn shares(&self, longest: u64, short: u64) -> Option<(Vec<Share>, u64)> {
        let networks: Choice = |ways| &ways.networks;
        let attention: Choice = |ways| &ways.attention;
        if let Some(shares) = self.cheapest(longest, networks) {
            return Some((shares, longest));
        }
        let (shares, most) = self.fullest(networks)?;
        if most >= short {
            return Some((shares, most));
        }
        match self.cheapest(short, attention) {
            Some(shares) => Some((shares, short)),
            None => self.fullest(attention),
        }
    }

    /// The shares with the fewest spilled bytes beside which so many KV blocks have room.
    fn cheapest(&self, kv_blocks: u64, choice: Choice) -> Option<Vec<Share>> {
        let way = |gpu: usize, layers: &Range<usize>| {
            let ways = self.ways_of(layers)?;
            let fits = |way: &&Way| self.blocks(gpu, layers, way) >= kv_blocks as i64;
            choice(&ways).iter().filter(fits).min_by_key(|way| way.host_bytes).copied()
        };
        let nothing = Reverse((0, 0));
        let cut = cut(self.n_layers(), self.usable.len(), nothing, |before, gpu, layers| {
            let (Reverse((all, most)), bytes) = (*before, way(gpu, &layers)?.host_bytes);
            Some(Reverse((all + bytes, most.max(bytes))))
        })?;
        let shares = cut.into_iter().enumerate().map(|(gpu, layers)| {
            let way = way(gpu, &layers)?;
            Some(Share { layers, way })
        });
        shares.collect()
    }

    /// The shares with everything spilled that leave most KV blocks to the GPU with the fewest, and
    /// how many that are.
    fn fullest(&self, choice: Choice) -> Option<(Vec<Share>, u64)> {
        let way = |layers: &Range<usize>| choice(&*self.ways_of(layers)?).last().copied();
        let blocks = |gpu, layers: &Range<usize>| Some(self.blocks(gpu, layers, &way(layers)?));
        let cut =
            cut_by_blocks(self.n_layers(), self.usable.len(), |gpu, layers| blocks(gpu, &layers))?;
        let of_gpus = cut.iter().enumerate().filter_map(|(gpu, layers)| blocks(gpu, layers));
        let fewest = of_gpus.min().unwrap_or(0).max(0) as u64;
        let shares = cut.into_iter().map(|layers| Some(Share { way: way(&layers)?, layers }));
        Some((shares.collect::<Option<_>>()?, fewest))
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
        blocks(self.usable[gpu], fixed, self.sizes.block(layers))
    }
}

/// What a GPU has for the layers of its share.
fn with_way(ways: &Ways<'_>, (whole, share): (&Room, &Share)) -> Room {
    let weight_bytes = whole.weight_bytes - share.way.saved;
    Room { weight_bytes, spill: ways.spill(&share.layers, &share.way), ..whole.clone() }
}

/// Tells each GPU that spills what crosses, and the first of them what the CPU makes of it.
fn add_crossings(rooms: &mut [Room], spec: &ModelSpec, on: (&Workers, &Config)) {
    let Some(all) = in_all(rooms.iter().filter_map(|room| room.spill.as_ref())) else { return };
    let [rows, mut made] = crossing_bytes(spec, &all.units(spec).collect::<Vec<_>>(), on);
    for spill in rooms.iter_mut().filter_map(|room| room.spill.as_mut()) {
        spill.crossing_bytes = rows + std::mem::take(&mut made);
    }
}

/// What some GPUs, in the order of the layers, spill together, if they spill anything.
pub(super) fn in_all<'a>(spills: impl Iterator<Item = &'a Spill>) -> Option<Spill> {
    spills.cloned().reduce(|mut all, spill| {
        all.layers.extend(spill.layers);
        all.attention_layers.extend(spill.attention_layers);
        all.weight_bytes += spill.weight_bytes;
        all.ring_slots += spill.ring_slots;
        all.ring_bytes += spill.ring_bytes;
        all.crossing_bytes += spill.crossing_bytes;
        all
    })
}

/// What lies in host memory, and what more memory of the GPUs would change.
fn in_words(
    spill: &Spill,
    spec: &ModelSpec,
    whole: &[Room],
    need: impl Fn(&Room) -> u64,
) -> String {
    let lacking: u64 = whole.iter().map(|room| need(room).saturating_sub(room.available)).sum();
    let is_limited = whole.iter().any(|room| room.available < room.free);
    let limit = if is_limited { " (gpu.vram_limit)" } else { "" };
    let whose = if whole.len() > 1 { "GPUs'" } else { "GPU's" };
    let attention = match spill.attention_layers.len() {
        0 => String::new(),
        count => format!(", and attention's weights of {count},"),
    };
    format!(
        "the feed-forward networks of {} of {} layers{attention} are spilled to host memory; {} \
         more of the {whose} memory{limit} would hold them all, less some of them",
        spill.layers.len(),
        spec.layers.len(),
        ByteSize(lacking)
    )
}

/// Bytes of host memory that are left for other things.
fn host_left(spill: &Spill, hardware: &HardwareProfile) -> Result<u64, RequestError> {
    let available = hardware.memory_available_bytes;
    let free = available - margin_bytes(available);
    let need = spill.weight_bytes + spill.crossing_bytes;
    free.checked_sub(need).ok_or_else(|| RequestError::InsufficientMemory {
        device: HOST.into(),
        need,
        free,
        suggest: "the GPU's memory does not hold the whole model, and the host's not what would \
                  be spilled: use a smaller or more quantised model, or a shorter context"
            .into(),
    })
}

#[cfg(test)]
mod tests {
    use super::super::spill_units::{Unit, slots_wanted};
    use super::*;
    use crate::model::{FfnSpec, SyntheticModel};
    use crate::placement::NodeTeams;
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
        let ways = Ways::new(&spec, &nodes);
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
        let (ways, sizes) = (Ways::new(&spec, &nodes), Sizes::of(&spec, &config));
        let mut state = 3_u64;
        let mut random = |most: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) % most
        };
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
                        fixed + kv_blocks * sizes.block(layers) <= usable[gpu]
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
                    let bytes = shares.iter().map(|share| share.way.host_bytes);
                    [bytes.clone().sum(), bytes.max().unwrap()]
                });
                assert_eq!(got, wanted, "{kv_blocks} blocks on {usable:?}");
                found[at] += usize::from(wanted.is_some_and(|[all, _]| all > 0));
            }
        }
        assert!(found.iter().all(|found| *found > 20), "{found:?}");
    }
}
