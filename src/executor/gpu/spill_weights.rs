//! Spilled weights in host memory, in the layout of the CPU's kernels, which the GPU takes apart as
//! they arrive.

use super::spill_schedule::SpillCosts;
use crate::executor::cpu_pool::CpuPool;
use crate::executor::kv_store::KvOptions;
use crate::executor::program::{MatrixId, Op, PartWeights, Program, SpilledUnit, StagePart};
use crate::executor::weights::{LoadProgress, Weights, WeightsRequest};
use crate::executor::{ExecutorError, StageOptions};
use crate::placement::piece_rows;
use crate::tensor::DType;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, OnceLock};
use tandem_cpu_kernels::repack::ROWS;
use tandem_kernels::{Gpu, RegisteredMemory};

/// Rows of a matrix of a spilled unit: what streams at once.
pub(super) struct Piece {
    /// In the program of the GPU.
    pub matrix: MatrixId,
    pub dtype: DType,
    pub rows: Range<usize>,
    /// In the arena of the weights.
    bytes: Range<usize>,
}

/// A spilled unit.
pub(super) struct Unit {
    /// Of which layer it is, of those with spilled weights.
    layer: usize,
    /// Its matrices, in the order of the program; none where they can't stream.
    pub pieces: Vec<Piece>,
}

/// All spilled weights of a model.
pub(super) struct SpilledWeights {
    part: StagePart,
    /// By index of the unit.
    units: Vec<Unit>,
    /// None where weights can't stream.
    registered: Option<RegisteredMemory>,
    /// What they cost, once that is measured.
    costs: OnceLock<SpillCosts>,
    // Last: what is registered has to be there.
    weights: Arc<Weights>,
}

impl SpilledWeights {
    /// Loads what `program`, the GPU's, has spilled, and registers it with the driver. Where that
    /// is refused the CPU computes all of it.
    ///
    /// # Errors
    /// As [`Weights::load`].
    pub fn load(
        gpu: &Gpu,
        (request, program): (&WeightsRequest, &Program),
        pool: &mut CpuPool,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Option<Self>, ExecutorError> {
        let Some(part) = request.part.spilled() else { return Ok(None) };
        let request = WeightsRequest { part: part.clone(), ..request.clone() };
        let weights = Arc::new(Weights::load(&request, pool, progress)?);
        let mut units: Vec<_> =
            units(program).map(|unit| Unit { layer: unit.layer, pieces: Vec::new() }).collect();
        let registered = match add_pieces(&mut units, program, &weights) {
            // SAFETY: the weights outlive what is registered.
            Some(()) => match unsafe { gpu.register(weights.arena()) } {
                Ok(registered) => Some(registered),
                Err(error) => {
                    tracing::warn!(%error, "spilled weights can't stream: the CPU computes them");
                    None
                }
            },
            None => {
                tracing::warn!(
                    "spilled weights of this type are not interleaved: the CPU computes them"
                );
                None
            }
        };
        Ok(Some(Self { part, units, registered, costs: OnceLock::new(), weights }))
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
        match &self.part.weights {
            PartWeights::Only(spilled) => spilled.ring_slots.max(1),
            _ => unreachable!("the part has nothing but what is spilled"),
        }
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
        self.registered.is_some()
    }

    pub fn weights(&self) -> &Arc<Weights> {
        &self.weights
    }

    pub fn bytes(&self, piece: &Piece) -> &[u8] {
        &self.weights.arena()[piece.bytes.clone()]
    }

    /// Bytes of all pieces.
    pub fn stored_bytes(&self) -> usize {
        self.pieces().map(|piece| piece.bytes.len()).sum()
    }

    pub fn largest_piece(&self) -> usize {
        self.pieces().map(|piece| piece.bytes.len()).max().unwrap_or(0)
    }

    /// How the CPU's stage is made, where the GPU's is made so.
    pub fn stage_options(&self, options: &StageOptions) -> StageOptions {
        // It keeps no keys and values.
        let kv = KvOptions { device_blocks: 0, ..options.kv };
        StageOptions { part: Some(self.part.clone()), kv, ..options.clone() }
    }
}

fn units(program: &Program) -> impl Iterator<Item = SpilledUnit> {
    program.ops.iter().filter_map(|op| match op {
        Op::SpillStart { unit, .. } => Some(*unit),
        _ => None,
    })
}

/// Gives each unit its pieces; none where some lie in no arena.
fn add_pieces(units: &mut [Unit], program: &Program, weights: &Weights) -> Option<()> {
    let entries = weights.program().matrices.iter();
    let names: HashMap<_, _> = entries.map(|entry| entry.tensor.name.as_str()).zip(0..).collect();
    for (id, entry) in (0..).map(MatrixId).zip(&program.matrices) {
        let Some(unit) = entry.spilled else { continue };
        let there = MatrixId(names[entry.tensor.name.as_str()]);
        let dtype = weights.dtype(there);
        let pieces = weights.arena_parts(there)?.into_iter().flat_map(pieces_of);
        let piece = |(rows, bytes)| Piece { matrix: id, dtype, rows, bytes };
        units[unit.index].pieces.extend(pieces.map(piece));
    }
    Some(())
}

/// Rows that lie side by side, with their bytes, in pieces that stream at once.
fn pieces_of(
    (part, bytes): (Range<usize>, Range<usize>),
) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
    let group_bytes = bytes.len() / part.len().div_ceil(ROWS).max(1);
    let at_once = piece_rows(part.len(), bytes.len()).max(1);
    part.clone().step_by(at_once).map(move |first| {
        let rows = first..(first + at_once).min(part.end);
        let [start, end] = [rows.start - part.start, rows.end - part.start]
            .map(|row| bytes.start + row.div_ceil(ROWS) * group_bytes);
        (rows, start..end)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::placement::NodeTeams;

    #[test]
    fn pieces_of_all_nodes_are_every_row_once_and_in_order() {
        let group_bytes = 2304 * ROWS;
        for (rows, nodes) in
            [(28_672, &[0][..]), (28_672, &[0, 0, 1]), (1000, &[0, 1]), (20, &[3, 4])]
        {
            let teams = NodeTeams::of_workers(nodes);
            let mut place = 0;
            let (mut next_row, mut next_byte) = (0, 0);
            for team in 0..teams.count() {
                let part = teams.rows(team, rows);
                let bytes = place..place + part.len().div_ceil(ROWS) * group_bytes;
                place = bytes.end;
                for (rows, bytes) in pieces_of((part.clone(), bytes)) {
                    assert_eq!((rows.start, bytes.start), (next_row, next_byte));
                    assert_eq!(bytes.len(), rows.len().div_ceil(ROWS) * group_bytes);
                    assert!(bytes.len() <= 17 << 20 && rows.start.is_multiple_of(ROWS));
                    (next_row, next_byte) = (rows.end, bytes.end);
                }
            }
            assert_eq!((next_row, next_byte), (rows, place));
        }
    }
}
