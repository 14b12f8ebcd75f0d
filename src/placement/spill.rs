//! Which weights are spilled: they lie in host memory, though GPUs that do not hold the whole model
//! run it. Attention itself, KV, norms and logits of all layers stay there.
//!
//! In a step the CPU computes what is spilled of a layer, or its weights stream through a ring of
//! slots into the memory of the layer's GPU. As little as possible is spilled: reading a weight
//! from host memory takes some forty times as long. First feed-forward networks are; attention's
//! weights, which take two more crossings a layer, only where no network is left. Layers are spread
//! evenly over those of a GPU, so that what streams or is computed for one has the time that the
//! GPU takes for those between.

use super::cpu::HOST;
use super::gpu;
use super::room::{margin_bytes, spilled_context, wanted_blocks, with_margin};
use super::several::Sizes;
use super::spill_cuts::{Share, Shares, Task};
use super::spill_units::crossing_bytes;
use super::spill_ways::Ways;
use super::{Placement, Room, Workers};
use crate::config::Config;
use crate::hardware::{Gpu, HardwareProfile};
use crate::model::ModelSpec;
use crate::request::RequestError;
use crate::units::ByteSize;
use serde::Serialize;

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

/// Some GPUs, each of which gets layers of a model that they do not hold, and the host.
pub(super) struct Spilling<'a> {
    ways: &'a Ways<'a>,
    config: &'a Config,
    pub hardware: &'a HardwareProfile,
    pub gpus: &'a [&'a Gpu],
    workers: &'a Workers,
    sizes: Sizes,
    /// Bytes that may be used of each GPU.
    usable: Vec<u64>,
}

impl<'a> Spilling<'a> {
    pub fn new(
        ways: &'a Ways<'a>,
        (hardware, gpus, workers): (&'a HardwareProfile, &'a [&'a Gpu], &'a Workers),
        config: &'a Config,
    ) -> Self {
        let usable = gpus.iter().map(|gpu| gpu::usable_bytes(ways.spec, gpu, config)).collect();
        let sizes = Sizes::of(ways.spec, gpus, config);
        Self { ways, config, hardware, gpus, workers, sizes, usable }
    }

    pub fn task(&self) -> Task<'_> {
        Task { ways: self.ways, sizes: &self.sizes, usable: &self.usable }
    }

    /// The shares with the fewest spilled bytes, where spilling helps at all.
    ///
    /// Feed-forward networks are spilled until the store holds one context or what was asked for,
    /// as far as it does with all of them spilled. Where that is less than a short context,
    /// attention's weights are spilled for one as well, and the rings are made smaller at last.
    pub fn shares(&self) -> Option<Shares> {
        let spec = self.ways.spec;
        let [longest, short] = [usize::MAX, CONTEXT_TOKENS_SHORT]
            .map(|tokens| wanted_blocks(spec, self.config, tokens.min(spilled_context(spec))));
        self.task().shares(longest, short)
    }

    /// The placement of some shares; none where nothing is spilled.
    pub fn placed(
        &self,
        shares: &Shares,
        mut notes: Vec<String>,
    ) -> Option<Result<Placement, RequestError>> {
        let rooms = self.rooms(shares, &mut notes).transpose()?;
        let on = |rooms: Vec<Room>| {
            Placement::within(self.ways.spec, self.config, (self.workers, &rooms), notes)
        };
        Some(rooms.and_then(on))
    }

    /// What the GPUs have for some shares; none where nothing is spilled.
    ///
    /// # Errors
    /// `InsufficientMemory` of the host.
    fn rooms(
        &self,
        shares: &Shares,
        notes: &mut Vec<String>,
    ) -> Result<Option<Vec<Room>>, RequestError> {
        let Self { ways, config, hardware, gpus, workers, .. } = *self;
        let spec = ways.spec;
        let mut whole = |(gpu, share): (&&Gpu, &Share)| {
            gpu::room(spec, (hardware, *gpu), share.layers.clone(), config, notes)
        };
        let whole: Vec<Room> = gpus.iter().zip(&shares.each).map(&mut whole).collect();
        let mut rooms: Vec<Room> =
            whole.iter().zip(&shares.each).map(|on| with_way(ways, on)).collect();
        add_crossings(&mut rooms, spec, (workers, config));
        let Some(all) = in_all(rooms.iter().filter_map(|room| room.spill.as_ref())) else {
            return Ok(None);
        };
        let left = host_left(&all, hardware)?;
        for room in &mut rooms {
            room.swap_room = room.swap_room.map(|swap| swap.min(left));
        }
        let need = |room: &Room| {
            let kv_bytes = room.kv_bytes(spec, config, shares.kv_blocks);
            with_margin(room.fixed_bytes().saturating_add(kv_bytes))
        };
        notes.push(in_words(&all, spec, &whole, need));
        Ok(Some(rooms))
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
