//! Which weights are spilled: they lie in host memory, though a GPU that does not hold the whole
//! model runs it. Attention itself, KV, norms and logits of all layers stay there.
//!
//! In a step the CPU computes what is spilled of a layer, or its weights stream through a ring of
//! slots into the GPU's memory. As little as possible is spilled: reading a weight from host memory
//! takes some forty times as long. First feed-forward networks are; attention's weights, which take
//! two more crossings a layer, only where no network is left. Layers are spread evenly, so that
//! what streams or is computed for one has the time that the GPU takes for those between.

use super::cpu::HOST;
use super::room::{margin_bytes, spilled_context, with_margin};
use super::spill_units::{Unit, attention_units, crossing_bytes, ffn_unit, slots_wanted};
use super::{Room, Workers};
use crate::config::Config;
use crate::hardware::HardwareProfile;
use crate::model::ModelSpec;
use crate::request::RequestError;
use crate::units::ByteSize;
use serde::Serialize;

/// Slots of the smallest ring, for when nothing else is left to be spilled.
const RING_SLOTS_MIN: usize = 4;
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
    /// Slots of the ring through which they stream to the GPU.
    pub ring_slots: usize,
    /// Bytes of the slots, and of what weights are taken apart into, on the GPU.
    pub ring_bytes: u64,
    /// Bytes of host memory in which rows cross, and of the CPU's activations.
    pub crossing_bytes: u64,
}

/// What a GPU and the host have for a model of which as little as possible is spilled, where
/// spilling helps at all. `whole` is what the GPU has for the whole model.
///
/// Feed-forward networks are spilled until the store holds one context or what was asked for, as
/// far as it does with all of them spilled. Where that is less than a short context, attention's
/// weights are spilled for one as well, and the ring is made smaller at last.
///
/// # Errors
/// `InsufficientMemory` of the host.
pub(super) fn room(
    spec: &ModelSpec,
    (hardware, workers): (&HardwareProfile, &Workers),
    config: &Config,
    whole: &Room,
    notes: &mut Vec<String>,
) -> Result<Option<Room>, RequestError> {
    let ways = Ways::new(spec, (workers, config), whole);
    let layers = spec.layers.len();
    let networks: Vec<Room> = (1..=layers).map(|count| ways.room([count, 0])).collect();
    let Some(first) = networks.first() else { return Ok(None) };
    let [longest, short] = [usize::MAX, CONTEXT_TOKENS_SHORT].map(|tokens| {
        first.for_kv(spec, config).wanted_bytes(config, tokens.min(spilled_context(spec)))
    });
    let least = |rooms: &[Room]| rooms.iter().map(Room::fixed_bytes).min().unwrap_or(u64::MAX);
    let (usable, all_networks) = (whole.usable(), least(&networks));
    let (rooms, wanted) = match all_networks.saturating_add(short) <= usable {
        true => (networks, longest),
        false => ([networks, ways.with_attention()].concat(), short),
    };
    let least = least(&rooms);
    if least >= whole.fixed_bytes() {
        return Ok(None);
    }
    let kv_bytes = wanted.min(usable.saturating_sub(least));
    let fits = |room: &Room| room.fixed_bytes() + kv_bytes <= usable.max(least);
    let Some(mut room) = rooms.into_iter().find(fits) else { return Ok(None) };
    if let Some(spill) = &room.spill {
        let left = host_left(spill, hardware)?;
        room.swap_room = room.swap_room.map(|swap| swap.min(left));
        notes.push(in_words(spill, spec, whole, kv_bytes));
    }
    Ok(Some(room))
}

/// All ways to spill a model.
struct Ways<'a> {
    spec: &'a ModelSpec,
    on: (&'a Workers, &'a Config),
    whole: &'a Room,
    /// By layer: bytes of its network, and of its attention, in host memory.
    host_bytes: [Vec<u64>; 2],
}

impl<'a> Ways<'a> {
    fn new(spec: &'a ModelSpec, on: (&'a Workers, &'a Config), whole: &'a Room) -> Self {
        let networks = spec.layers.iter().map(|layer| ffn_unit(layer).host_bytes());
        let attention = spec
            .layers
            .iter()
            .map(|layer| attention_units(layer).iter().map(Unit::host_bytes).sum());
        Self { spec, on, whole, host_bytes: [networks.collect(), attention.collect()] }
    }

    /// With so many networks, and the attention of so many layers, spilled.
    fn room(&self, counts: [usize; 2]) -> Room {
        let [layers, attention_layers] =
            [0, 1].map(|part| spread(&self.host_bytes[part], counts[part]));
        let mut spill = Spill { layers, attention_layers, ..Spill::default() };
        let units: Vec<Unit<'_>> = spill.units(self.spec).collect();
        spill.weight_bytes = units.iter().map(Unit::host_bytes).sum();
        spill.ring_slots = slots_wanted(self.spec, &spill, &self.on.0.nodes);
        spill.crossing_bytes = crossing_bytes(self.spec, &units, self.on);
        self.with(spill, &units)
    }

    fn with(&self, mut spill: Spill, units: &[Unit<'_>]) -> Room {
        spill.set_ring_bytes(units, &self.on.0.nodes);
        let left: u64 = units.iter().map(Unit::device_bytes).sum();
        let weight_bytes = self.whole.weight_bytes - left;
        Room { weight_bytes, spill: Some(spill), ..self.whole.clone() }
    }

    /// With all networks, and more and more of attention, spilled; then with smaller rings.
    fn with_attention(&self) -> Vec<Room> {
        let layers = self.spec.layers.len();
        let mut rooms: Vec<Room> = (1..=layers).map(|count| self.room([layers, count])).collect();
        let all = rooms.last().and_then(|room| room.spill.clone()).unwrap_or_default();
        let slots = (RING_SLOTS_MIN..all.ring_slots).rev();
        let units: Vec<Unit<'_>> = all.units(self.spec).collect();
        let smaller = |ring_slots| self.with(Spill { ring_slots, ..all.clone() }, &units);
        rooms.extend(slots.map(smaller));
        rooms
    }
}

/// What lies in host memory, and what more memory of the GPU would change.
fn in_words(spill: &Spill, spec: &ModelSpec, whole: &Room, kv_bytes: u64) -> String {
    let need = with_margin(whole.fixed_bytes().saturating_add(kv_bytes));
    let limit = if whole.available < whole.free { " (gpu.vram_limit)" } else { "" };
    let attention = match spill.attention_layers.len() {
        0 => String::new(),
        count => format!(", and attention's weights of {count},"),
    };
    format!(
        "the feed-forward networks of {} of {} layers{attention} are spilled to host memory; {} \
         more of the GPU's memory{limit} would hold them all, less some of them",
        spill.layers.len(),
        spec.layers.len(),
        ByteSize(need.saturating_sub(whole.available))
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

/// `count` of the layers, ascending, each with its equal share of all their `bytes` around it.
fn spread(bytes: &[u64], count: usize) -> Vec<usize> {
    let total: u64 = bytes.iter().sum();
    let (mut layer, mut end) = (0, bytes[0]);
    let mut layers = Vec::with_capacity(count);
    for index in 0..count {
        let middle = total as u128 * (2 * index as u128 + 1) / (2 * count as u128);
        while u128::from(end) <= middle && layer + 1 < bytes.len() {
            layer += 1;
            end += bytes[layer];
        }
        // Of unequal layers a large one may have two middles in it, and a small one none.
        let first = layers.last().map_or(0, |last| last + 1);
        layers.push(layer.clamp(first, bytes.len() - (count - index)));
    }
    layers
}
