//! Weights of spilled units on their way to the GPU, and where they come to.

use super::order_thread::OrderThread;
use super::spill_sender::{SendOrder, SpillSender};
use super::spill_weights::SpilledWeights;
use super::vram::RING;
use super::weights::GpuWeights;
use crate::executor::ExecutorError;
use crate::executor::program::MatrixId;
use crate::memory::Commitment;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use tandem_kernels::{DeviceMatrix, WeightRing};

/// A ring that a thread fills, and what its pieces are taken apart into.
pub(super) struct SpillStream {
    sender: SpillSender,
    /// Units with matrices of one shape share them, since they are computed one after the other.
    scratch: Vec<DeviceMatrix>,
    /// By matrix of the program: which of them.
    places: HashMap<MatrixId, usize>,
    _reserved: Commitment,
}

impl SpillStream {
    /// Makes room, and starts the thread.
    ///
    /// # Errors
    /// Memory or threads refused.
    pub fn start(
        weights: &Arc<GpuWeights>,
        from: &SpilledWeights,
        is_abandoned: Arc<AtomicBool>,
    ) -> Result<Self, ExecutorError> {
        let gpu = weights.gpu();
        let (mut scratch, mut places) = (Vec::new(), HashMap::new());
        for unit in from.units() {
            let mut used = Vec::new();
            for piece in &unit.pieces {
                if places.contains_key(&piece.matrix) {
                    continue;
                }
                let tensor = &weights.program().matrix(piece.matrix).tensor;
                let shape = (piece.dtype, tensor.rows, tensor.cols);
                let fits = |at: &usize| scratch[*at] == shape && !used.contains(at);
                let place = match (0..scratch.len()).find(fits) {
                    Some(place) => place,
                    None => {
                        scratch.push(shape);
                        scratch.len() - 1
                    }
                };
                used.push(place);
                places.insert(piece.matrix, place);
            }
        }
        let bytes = |(dtype, rows, cols): &(_, _, _)| DeviceMatrix::bytes_of(*dtype, *rows, *cols);
        let slots = (from.ring_slots(), from.largest_piece());
        let ring_bytes = WeightRing::bytes_of(slots) + scratch.iter().map(bytes).sum::<usize>();
        let reserved = weights.vram().row(RING, ring_bytes)?;
        let scratch = scratch
            .into_iter()
            .map(|(dtype, rows, cols)| DeviceMatrix::changing(gpu, dtype, (rows, cols)));
        let scratch = scratch.collect::<Result<_, _>>()?;
        let ring = gpu.weight_ring(slots.0, slots.1)?;
        let sender = SpillSender::start(ring, Arc::clone(weights), is_abandoned)?;
        Ok(Self { sender, scratch, places, _reserved: reserved.commit() })
    }

    /// Orders, each for the pieces of a step.
    pub fn orders(&self) -> &OrderThread<SendOrder, ()> {
        self.sender.orders()
    }

    /// Ends a step whose pieces nobody takes any more.
    pub fn abandon(&self) {
        self.sender.abandon();
    }

    pub fn ring(&self) -> &WeightRing {
        self.sender.ring()
    }

    /// Where a matrix is while its unit is computed, if it streams.
    pub fn matrix(&self, id: MatrixId) -> Option<&DeviceMatrix> {
        Some(&self.scratch[*self.places.get(&id)?])
    }

    /// Bytes held on the GPU.
    pub fn bytes(&self) -> usize {
        self.ring().bytes() + self.scratch.iter().map(DeviceMatrix::bytes).sum::<usize>()
    }
}
