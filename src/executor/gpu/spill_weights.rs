//! The weights of spilled networks in host memory, in the layout of the CPU's kernels, which the
//! GPU takes apart as they arrive.

use super::spill_schedule::SpillCosts;
use crate::executor::cpu_pool::CpuPool;
use crate::executor::kv_store::KvOptions;
use crate::executor::program::{MatrixId, Program, StagePart};
use crate::executor::weights::{LoadProgress, Weights, WeightsRequest};
use crate::executor::{ExecutorError, StageOptions};
use crate::tensor::DType;
use std::ops::Range;
use std::sync::{Arc, OnceLock};
use tandem_kernels::{Gpu, RegisteredMemory};

/// A matrix of a spilled network.
pub(super) struct Piece {
    /// In the program of the GPU.
    pub matrix: MatrixId,
    pub dtype: DType,
    /// In the arena of the weights.
    bytes: Range<usize>,
}

/// The weights of all spilled networks of a model.
pub(super) struct SpilledWeights {
    part: StagePart,
    /// By index of the network: its matrices, in the order of the program.
    networks: Vec<Vec<Piece>>,
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
        let networks = networks(program, &weights);
        let registered = match &networks {
            // SAFETY: the weights outlive what is registered.
            Some(_) => match unsafe { gpu.register(weights.arena()) } {
                Ok(registered) => Some(registered),
                Err(error) => {
                    tracing::warn!(%error, "spilled weights can't stream: the CPU computes them");
                    None
                }
            },
            None => {
                tracing::warn!(
                    "spilled weights of this type stay in their file: the CPU computes them"
                );
                None
            }
        };
        let count = program.matrices.iter().filter_map(|entry| entry.spilled).max();
        let networks =
            networks.unwrap_or_else(|| (0..=count.unwrap_or(0)).map(|_| Vec::new()).collect());
        Ok(Some(Self { part, networks, registered, costs: OnceLock::new(), weights }))
    }

    pub fn networks(&self) -> &[Vec<Piece>] {
        &self.networks
    }

    /// The pieces of a step in the order in which they are sent and taken: of the networks below
    /// `end` that the CPU does not compute.
    pub fn streamed(&self, is_here: &[bool], end: usize) -> impl Iterator<Item = &Piece> {
        let networks = self.networks[..end].iter().zip(is_here);
        networks.filter(|(_, is_here)| !**is_here).flat_map(|(network, _)| network)
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
        self.networks.iter().flatten().map(|piece| piece.bytes.len()).sum()
    }

    pub fn largest_piece(&self) -> usize {
        self.networks.iter().flatten().map(|piece| piece.bytes.len()).max().unwrap_or(0)
    }

    /// How the CPU's stage is made, where the GPU's is made so.
    pub fn stage_options(&self, options: &StageOptions) -> StageOptions {
        // It keeps no keys and values.
        let kv = KvOptions { device_blocks: 0, host_blocks: 0, ..options.kv };
        StageOptions { part: Some(self.part.clone()), kv, ..options.clone() }
    }
}

/// The matrices of each spilled network, or none where some lie in no arena.
fn networks(program: &Program, weights: &Weights) -> Option<Vec<Vec<Piece>>> {
    let mut networks = Vec::new();
    for (id, entry) in (0..).map(MatrixId).zip(&program.matrices) {
        let Some(index) = entry.spilled else { continue };
        networks.resize_with(networks.len().max(index + 1), Vec::new);
        let name = &entry.tensor.name;
        let there = weights.program().matrices.iter().position(|entry| entry.tensor.name == *name);
        let there = MatrixId(there.expect("both programs name it") as u32);
        let bytes = weights.arena_place(there)?;
        let dtype = weights.matrix(there).dtype();
        networks[index].push(Piece { matrix: id, dtype, bytes });
    }
    Some(networks)
}
