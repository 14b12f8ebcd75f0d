//! Spilled weights in host memory, in the layout of the CPU's kernels, which the GPUs take apart as
//! they arrive. Those of all stages of a model lie together, since one stage of the CPU computes
//! them.

use super::spill_schedule::SpillCosts;
use crate::executor::cpu_pool::CpuPool;
use crate::executor::kv_store::KvOptions;
use crate::executor::program::{
    MatrixId, Op, PartWeights, Program, SpilledLayers, SpilledUnit, StagePart,
};
use crate::executor::weights::{LoadProgress, Weights, WeightsRequest};
use crate::executor::{ExecutorError, StageOptions};
use crate::placement::piece_rows;
use crate::tensor::DType;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, OnceLock};
use tandem_cpu_kernels::Layout;
use tandem_cpu_kernels::repack::ROWS;
use tandem_kernels::{Gpu, RegisteredMemory};

/// Rows of a matrix of a spilled unit: what streams at once.
pub(super) struct Piece {
    /// In the program of the GPU.
    pub matrix: MatrixId,
    pub dtype: DType,
    pub layout: Layout,
    pub rows: Range<usize>,
    /// In the arena of the weights.
    bytes: Range<usize>,
}

/// A spilled unit.
pub(super) struct Unit {
    /// Of which layer it is, of those with spilled weights.
    layer: usize,
    /// Its matrices, in the order of the program.
    pub pieces: Vec<Piece>,
}

/// All spilled weights of a model.
pub(super) struct SpilledModel {
    part: StagePart,
    /// None where the driver refused.
    registered: Option<RegisteredMemory>,
    // Last: what is registered has to be there.
    weights: Arc<Weights>,
}

/// Those of one of its stages.
pub(super) struct SpilledWeights {
    /// Of the model's units, the first one.
    first: SpilledUnit,
    /// By index of the unit, counted over the stage.
    units: Vec<Unit>,
    ring_slots: usize,
    can_stream: bool,
    /// What they cost, once that is measured.
    costs: OnceLock<SpillCosts>,
    model: Arc<SpilledModel>,
}

impl SpilledWeights {
    /// Loads what the stages of a model have spilled, each with its program, and registers it with
    /// the driver. Where that is refused the CPU computes all of it. Of `request` all counts but
    /// its part; none is returned for a stage that has spilled nothing.
    ///
    /// # Errors
    /// As [`Weights::load`].
    pub fn load(
        gpu: &Gpu,
        request: &WeightsRequest,
        stages: &[(&StagePart, &Program)],
        (pool, progress): (&mut CpuPool, &mut dyn FnMut(LoadProgress)),
    ) -> Result<Vec<Option<Self>>, ExecutorError> {
        let Some(part) = StagePart::spilled_of(stages.iter().map(|(part, _)| *part)) else {
            return Ok(stages.iter().map(|_| None).collect());
        };
        let request = WeightsRequest { part: part.clone(), ..request.clone() };
        let weights = Arc::new(Weights::load(&request, pool, progress)?);
        let units: Vec<_> = stages.iter().map(|(_, program)| units(program, &weights)).collect();
        // SAFETY: the weights outlive what is registered.
        let registered = unsafe { gpu.register(weights.arena()) };
        let registered = registered.inspect_err(|error| {
            tracing::warn!(%error, "spilled weights can't stream: the CPU computes them");
        });
        let registered = registered.ok();
        let model = Arc::new(SpilledModel { part, registered, weights });
        let mut first = SpilledUnit { index: 0, layer: 0 };
        let of_stages = stages.iter().zip(units).map(|((part, _), units)| {
            let PartWeights::Without(SpilledLayers { ring_slots, .. }) = part.weights else {
                return None;
            };
            let (costs, model) = (OnceLock::new(), Arc::clone(&model));
            let can_stream = model.registered.is_some();
            let of_stage = Self { first, units, ring_slots, can_stream, costs, model };
            first.index += of_stage.units.len();
            first.layer += of_stage.layers();
            Some(of_stage).filter(|of_stage| !of_stage.units.is_empty())
        });
        Ok(of_stages.collect())
    }

    /// Of the units of all stages, in the order of a step, the first one of this stage.
    pub fn first(&self) -> SpilledUnit {
        self.first
    }

    pub fn units(&self) -> &[Unit] {
        &self.units
    }

    /// Layers with spilled weights.
    pub fn layers(&self) -> usize {
        self.units.last().map_or(0, |unit| unit.layer + 1)
    }

    /// Slots of the ring through which they stream.
    pub fn ring_slots(&self) -> usize {
        self.ring_slots.max(1)
    }

    /// All pieces, in the order of the program.
    pub fn pieces(&self) -> impl Iterator<Item = &Piece> {
        self.units.iter().flat_map(|unit| &unit.pieces)
    }

    /// The pieces of a step in the order in which they are sent and taken: of the units below `end`
    /// in layers that the CPU does not compute.
    pub fn streamed(&self, is_here: &[bool], end: usize) -> impl Iterator<Item = &Piece> {
        let units = self.units[..end].iter().filter(|unit| !is_here[unit.layer]);
        units.flat_map(|unit| &unit.pieces)
    }

    pub fn costs(&self) -> &OnceLock<SpillCosts> {
        &self.costs
    }

    /// Whether the driver can copy from them by itself.
    pub fn can_stream(&self) -> bool {
        self.can_stream
    }

    /// The CPU computes all of them, as where the driver refuses to register their memory.
    pub fn forgo_streams(&mut self) {
        self.can_stream = false;
    }

    /// Those of all stages.
    pub fn weights(&self) -> &Arc<Weights> {
        &self.model.weights
    }

    pub fn bytes(&self, piece: &Piece) -> &[u8] {
        &self.weights().arena()[piece.bytes.clone()]
    }

    /// Bytes of all pieces.
    pub fn stored_bytes(&self) -> usize {
        self.pieces().map(|piece| piece.bytes.len()).sum()
    }

    pub fn largest_piece(&self) -> usize {
        self.pieces().map(|piece| piece.bytes.len()).max().unwrap_or(0)
    }

    /// How the CPU's stage is made, where those of the GPUs are made so.
    pub fn stage_options(&self, options: &StageOptions) -> StageOptions {
        // It keeps no keys and values.
        let kv = KvOptions { device_blocks: 0, ..options.kv };
        StageOptions { part: Some(self.model.part.clone()), kv, ..options.clone() }
    }
}

/// The spilled units of a program, with their pieces.
fn units(program: &Program, weights: &Weights) -> Vec<Unit> {
    let units = program.ops.iter().filter_map(|op| match op {
        Op::SpillStart { unit, .. } => Some(Unit { layer: unit.layer, pieces: Vec::new() }),
        _ => None,
    });
    let mut units = units.collect::<Vec<_>>();
    let entries = weights.program().matrices.iter();
    let names: HashMap<_, _> = entries.map(|entry| entry.tensor.name.as_str()).zip(0..).collect();
    for (matrix, entry) in (0..).map(MatrixId).zip(&program.matrices) {
        let Some(unit) = entry.spilled else { continue };
        let there = MatrixId(names[entry.tensor.name.as_str()]);
        let dtype = weights.dtype(there);
        let (layout, parts) = weights.arena_parts(there);
        let pieces = parts.flat_map(|part| pieces_of(layout, part));
        let piece = |(rows, bytes)| Piece { matrix, dtype, layout, rows, bytes };
        units[unit.index].pieces.extend(pieces.map(piece));
    }
    units
}

/// Rows that lie side by side, with their bytes, in pieces that stream at once.
fn pieces_of(
    layout: Layout,
    (part, bytes): (Range<usize>, Range<usize>),
) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
    // Interleaved rows lie in whole groups.
    let stored = move |rows: usize| match layout {
        Layout::Rows16 => rows.next_multiple_of(ROWS),
        Layout::RowMajor => rows,
    };
    let row_bytes = bytes.len() / stored(part.len()).max(1);
    let at_once = piece_rows(part.len(), bytes.len()).max(1);
    part.clone().step_by(at_once).map(move |first| {
        let rows = first..(first + at_once).min(part.end);
        let [start, end] = [rows.start - part.start, rows.end - part.start]
            .map(|rows| bytes.start + stored(rows) * row_bytes);
        (rows, start..end)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::placement::NodeTeams;
    use tandem_cpu_kernels::packed_bytes;

    #[test]
    fn pieces_of_all_nodes_are_every_row_once_and_in_order() {
        let sizes = [(28_672, &[0][..]), (28_672, &[0, 0, 1]), (1000, &[0, 1]), (20, &[3, 4])];
        let all = sizes.into_iter().flat_map(|(rows, nodes)| {
            [Layout::Rows16, Layout::RowMajor].map(|layout| (layout, rows, nodes))
        });
        for (layout, rows, nodes) in all {
            let teams = NodeTeams::of_workers(nodes);
            let bytes_of = |rows: usize| packed_bytes(DType::Q4_0, layout, rows, 4096).unwrap();
            let mut place = 0;
            let (mut next_row, mut next_byte) = (0, 0);
            for team in 0..teams.count() {
                let part = teams.rows(team, rows);
                let bytes = place..place + bytes_of(part.len());
                place = bytes.end;
                for (rows, bytes) in pieces_of(layout, (part.clone(), bytes)) {
                    assert_eq!((rows.start, bytes.start), (next_row, next_byte));
                    assert_eq!(bytes.len(), bytes_of(rows.len()));
                    assert!(bytes.len() <= 17 << 20 && rows.start.is_multiple_of(ROWS));
                    (next_row, next_byte) = (rows.end, bytes.end);
                }
            }
            assert_eq!((next_row, next_byte), (rows, place));
        }
    }
}
