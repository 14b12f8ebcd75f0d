//! All ways in which weights of a run of layers can be spilled, and what each saves: more and more
//! feed-forward networks, then more and more of attention, then smaller rings. Layers are spread
//! evenly. The rest of a plan only compares these few numbers, for each run of layers that a GPU
//! may have.

use super::spill_units::{Unit, attention_units, ffn_unit, slots_wanted};
use super::{NodeTeams, Spill};
use crate::model::{LayerSpec, ModelSpec};
use crate::tensor::DType;
use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;
use std::rc::Rc;

/// Slots of the smallest ring, for when nothing else is left to be spilled.
const RING_SLOTS_MIN: usize = 4;

/// A way to spill weights of a run of layers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Way {
    /// Networks, and layers whose attention's weights are spilled.
    counts: [usize; 2],
    ring_slots: usize,
    /// Bytes of the GPU's memory that it saves, and those of the ring that it takes.
    pub saved: u64,
    pub ring_bytes: u64,
    /// Bytes in host memory.
    pub host_bytes: u64,
}

/// A ring, and what its pieces are taken apart into.
#[derive(Clone, Copy)]
struct Ring {
    /// Those that are wanted.
    slots: usize,
    slot_bytes: u64,
    scratch_bytes: u64,
}

impl Way {
    /// The same way with so many slots of its ring.
    fn with_slots(self, ring_slots: usize, Ring { slot_bytes, scratch_bytes, .. }: Ring) -> Self {
        Self { ring_slots, ring_bytes: ring_slots as u64 * slot_bytes + scratch_bytes, ..self }
    }
}

/// The ways of a run of layers.
pub(super) struct RunWays {
    /// By the number of networks that are spilled, from none to all.
    pub networks: Vec<Way>,
    /// With all networks, by the number of layers whose attention's weights are spilled as well,
    /// from none to all; then with smaller and smaller rings.
    pub attention: Vec<Way>,
}

/// Matrices by type, rows, columns and experts: layers of which these are equal are spilled alike.
type Shapes = Vec<(DType, usize, usize, usize)>;

/// The ways of all runs of a model's layers, made as they are asked for.
pub(super) struct Ways<'a> {
    pub spec: &'a ModelSpec,
    /// By which pieces of matrices end.
    nodes: NodeTeams,
    /// By layer: the first one that is spilled alike.
    kinds: Vec<usize>,
    /// By layer: bytes of its network, and of its attention, in host memory and on a GPU.
    host_bytes: [Vec<u64>; 2],
    device_bytes: [Vec<u64>; 2],
    /// By the kinds of layers whose networks, and whose attention's weights, are spilled.
    rings: RefCell<HashMap<[Vec<usize>; 2], Ring>>,
    runs: RefCell<HashMap<Range<usize>, Rc<RunWays>>>,
}

impl<'a> Ways<'a> {
    pub fn new(spec: &'a ModelSpec, nodes: NodeTeams) -> Self {
        let bytes = |of: fn(&Unit<'_>) -> u64| {
            let networks = spec.layers.iter().map(|layer| of(&ffn_unit(layer))).collect();
            let of_attention = |layer| attention_units(layer).iter().map(of).sum();
            [networks, spec.layers.iter().map(of_attention).collect()]
        };
        let mut firsts = HashMap::new();
        let kinds = spec.layers.iter().enumerate();
        let kinds = kinds.map(|(at, layer)| *firsts.entry(shapes(layer)).or_insert(at)).collect();
        Self {
            spec,
            nodes,
            kinds,
            host_bytes: bytes(|unit| unit.host_bytes()),
            device_bytes: bytes(|unit| unit.device_bytes()),
            rings: RefCell::default(),
            runs: RefCell::default(),
        }
    }

    /// The ways of a run of layers, at least one.
    pub fn of(&self, layers: &Range<usize>) -> Rc<RunWays> {
        if let Some(known) = self.runs.borrow().get(layers) {
            return Rc::clone(known);
        }
        let count = layers.len();
        let networks = (0..=count).map(|some| self.way(layers, [some, 0]).0).collect();
        let mut attention: Vec<Way> =
            (0..count).map(|some| self.way(layers, [count, some]).0).collect();
        let (all, ring) = self.way(layers, [count; 2]);
        let smaller = |ring_slots| all.with_slots(ring_slots, ring);
        attention.push(all);
        attention.extend((RING_SLOTS_MIN..all.ring_slots).rev().map(smaller));
        let made = Rc::new(RunWays { networks, attention });
        self.runs.borrow_mut().insert(layers.clone(), Rc::clone(&made));
        made
    }

    /// With so many networks, and the attention of so many layers, spilled, and their ring.
    fn way(&self, layers: &Range<usize>, counts: [usize; 2]) -> (Way, Ring) {
        let of = self.layers(layers, counts);
        let sum = |bytes: &[Vec<u64>; 2]| -> u64 {
            let parts = of.iter().zip(bytes);
            parts.map(|(layers, bytes)| layers.iter().map(|at| bytes[*at]).sum::<u64>()).sum()
        };
        let (saved, host_bytes) = (sum(&self.device_bytes), sum(&self.host_bytes));
        let (way, ring) = (Way { counts, saved, host_bytes, ..Way::default() }, self.ring(&of));
        (way.with_slots(ring.slots, ring), ring)
    }

    /// Layers whose networks, and whose attention's weights, are spilled.
    fn layers(&self, layers: &Range<usize>, counts: [usize; 2]) -> [Vec<usize>; 2] {
        [0, 1].map(|part| {
            let bytes = &self.host_bytes[part][layers.clone()];
            let some = spread(bytes, counts[part]);
            some.into_iter().map(|layer| layers.start + layer).collect()
        })
    }

    /// The ring for some layers: a layer of each kind has the largest piece and the matrices of
    /// all.
    fn ring(&self, layers: &[Vec<usize>; 2]) -> Ring {
        let kinds = layers.each_ref().map(|layers| {
            let mut kinds: Vec<_> = layers.iter().map(|layer| self.kinds[*layer]).collect();
            kinds.sort_unstable();
            kinds.dedup();
            kinds
        });
        if let Some(known) = self.rings.borrow().get(&kinds) {
            return *known;
        }
        let [layers, attention_layers] = kinds.clone();
        let mut spill = Spill { layers, attention_layers, ..Spill::default() };
        let [scratch_bytes, with_slot] = [0, 1].map(|ring_slots| {
            spill.set_ring(self.spec, ring_slots, &self.nodes);
            spill.ring_bytes
        });
        let slots = slots_wanted(self.spec, &spill, &self.nodes);
        let ring = Ring { slots, slot_bytes: with_slot - scratch_bytes, scratch_bytes };
        self.rings.borrow_mut().insert(kinds, ring);
        ring
    }

    /// What a way spills; none where that is nothing. Its crossing is not known yet.
    pub fn spill(&self, layers: &Range<usize>, way: &Way) -> Option<Spill> {
        let Way { counts, ring_slots, ring_bytes, host_bytes: weight_bytes, .. } = *way;
        let [layers, attention_layers] = self.layers(layers, counts);
        let spill = Spill {
            layers,
            attention_layers,
            weight_bytes,
            ring_slots,
            ring_bytes,
            ..Spill::default()
        };
        Some(spill).filter(|_| counts != [0, 0])
    }
}

fn shapes(layer: &LayerSpec) -> Shapes {
    let [heads, output] = attention_units(layer);
    let units = [ffn_unit(layer), heads, output];
    units.iter().flat_map(Unit::shapes).collect()
}

/// `count` of some layers, ascending, each with its equal share of all their `bytes` around it.
fn spread(bytes: &[u64], count: usize) -> Vec<usize> {
    let total: u64 = bytes.iter().sum();
    let (mut layer, mut end) = (0, bytes[0]);
    let mut layers = Vec::with_capacity(count);
    for index in 0..count {
        // Where its share has its middle, times the number of its halves.
        let middle = u128::from(total) * (2 * index as u128 + 1);
        while u128::from(end) * (2 * count as u128) <= middle && layer + 1 < bytes.len() {
            layer += 1;
            end += bytes[layer];
        }
        // Of unequal layers a large one may have two middles in it, and a small one none.
        let first = layers.last().map_or(0, |last| last + 1);
        layers.push(layer.clamp(first, bytes.len() - (count - index)));
    }
    layers
}
