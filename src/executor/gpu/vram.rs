//! What a stage takes of its GPU's memory, by the rows that a plan shows. Each is reserved in the
//! GPU's ledger before any of it is allocated, so that a limit holds whatever the driver would
//! give. Beside it are what lives while weights are loaded alone, before the rest of the stage
//! does (32 MiB of staging memory), and what measures a spill at its start (a few MiB).

use crate::executor::ExecutorError;
use crate::memory::{Commitment, Ledger, LedgerError, Reservation};
use crate::placement::{KERNELS_BYTES, StagePlacement};
use std::sync::{Mutex, PoisonError};
use tandem_kernels::Gpu;

/// The rows.
pub(super) const WEIGHTS: &str = "weights";
pub(super) const KV: &str = "KV cache";
pub(super) const ACTIVATIONS: &str = "activations";
pub(super) const RING: &str = "ring";
const GRAPHS: &str = "graphs, kernels";
/// All rows but the first, until a stage is made.
const STAGE: &str = "a stage beside the weights";

/// Part of the margin that a stage may take beyond its plan: 1/8.
const SLACK_DIVISOR: u64 = 8;

/// What a stage may take of a GPU's memory, as it was planned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VramPlan {
    /// Bytes that may be used in all: what the plan has, and a part of the margin for what it does
    /// not count, as planes of KV that begin at multiples of 256 and inputs of steps whose
    /// sequences share blocks.
    pub usable_bytes: u64,
    /// Of them, those that are not weights.
    pub beside_weights_bytes: u64,
    /// Of these, what the driver takes for kernels and recorded steps.
    pub graph_bytes: u64,
}

impl VramPlan {
    /// Of a stage of a placement.
    pub fn of(stage: &StagePlacement) -> Self {
        let ring_bytes = stage.spill.as_ref().map_or(0, |spill| spill.ring_bytes);
        let of_stage = stage.kv_bytes + stage.activation_bytes + ring_bytes;
        Self {
            usable_bytes: stage.memory_available_bytes - stage.margin_bytes
                + stage.margin_bytes / SLACK_DIVISOR,
            beside_weights_bytes: of_stage + stage.graph_bytes,
            graph_bytes: stage.graph_bytes,
        }
    }
}

/// The ledger of a stage's GPU.
pub(super) struct Vram {
    ledger: Ledger,
    /// Of the plan, if there is one.
    graph_bytes: Option<u64>,
    /// What a stage is going to take, before there is one.
    promised: Mutex<Option<Reservation>>,
}

impl Vram {
    /// Reserves room for the weights of a stage on a GPU that is open, and for what a plan says
    /// that the stage takes beside them.
    ///
    /// # Errors
    /// Less may be used, or less is free: nothing has been allocated then.
    pub fn reserve(
        gpu: &Gpu,
        plan: Option<VramPlan>,
        weight_bytes: usize,
    ) -> Result<(Self, Reservation), ExecutorError> {
        let (free, _) = gpu.memory()?;
        Ok(Self::of(gpu.ordinal(), free as u64, plan, weight_bytes)?)
    }

    /// The same of a GPU with so many free bytes.
    fn of(
        ordinal: usize,
        free_bytes: u64,
        plan: Option<VramPlan>,
        weight_bytes: usize,
    ) -> Result<(Self, Reservation), LedgerError> {
        let usable = plan.map_or(u64::MAX, |plan| plan.usable_bytes);
        let ledger = Ledger::new(ordinal, usable.min(free_bytes));
        let weights = ledger.reserve(WEIGHTS, weight_bytes as u64)?;
        let beside = plan.map(|plan| ledger.reserve(STAGE, plan.beside_weights_bytes));
        let promised = Mutex::new(beside.transpose()?);
        Ok((Self { ledger, graph_bytes: plan.map(|plan| plan.graph_bytes), promised }, weights))
    }

    /// A stage is made: its rows take the place of what was promised. Reserves that of recorded
    /// steps, as long as the stage lives.
    ///
    /// # Errors
    /// It does not fit.
    pub fn begin_stage(&self) -> Result<Commitment, LedgerError> {
        let promised = self.promised.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(promised);
        Ok(self.ledger.reserve(GRAPHS, self.graph_bytes.unwrap_or(0))?.commit())
    }

    /// Bytes that recorded steps may take.
    pub fn recorded_bytes_max(&self) -> u64 {
        self.graph_bytes.map_or(u64::MAX, |bytes| bytes.saturating_sub(KERNELS_BYTES))
    }

    /// Reserves a row, or what it grows by.
    ///
    /// # Errors
    /// It does not fit.
    pub fn row(&self, row: &'static str, bytes: usize) -> Result<Reservation, LedgerError> {
        self.ledger.reserve(row, bytes as u64)
    }

    /// Tells the log what is reserved.
    pub fn log(&self) {
        tracing::info!(ledger = ?self.ledger.report(), "memory of a GPU");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAN: VramPlan = VramPlan {
        usable_bytes: 1000,
        beside_weights_bytes: 400,
        graph_bytes: 100 + KERNELS_BYTES,
    };

    fn need_and_free(refused: Result<(), LedgerError>) -> (&'static str, u64, u64) {
        let LedgerError::DoesNotFit { purpose, need_bytes, free_bytes, .. } = refused.unwrap_err();
        (purpose, need_bytes, free_bytes)
    }

    #[test]
    fn all_rows_are_reserved_before_anything_is_loaded() {
        let of = |free, weights| Vram::of(0, free, Some(PLAN), weights).map(drop);
        assert_eq!(of(2000, 600), Ok(()));
        // The limit counts, or what another process has left.
        assert_eq!(need_and_free(of(2000, 601)), (STAGE, 400, 399));
        assert_eq!(need_and_free(of(999, 600)), (STAGE, 400, 399));
        assert_eq!(need_and_free(of(2000, 1001)), (WEIGHTS, 1001, 1000));
        assert!(Vram::of(0, 1000, None, 1000).is_ok());
    }

    #[test]
    fn a_stage_takes_its_rows_from_what_was_promised_and_no_more() {
        let plan = VramPlan { graph_bytes: 100, ..PLAN };
        let (vram, weights) = Vram::of(3, 5000, Some(plan), 600).unwrap();
        let _weights = weights.commit();
        assert_eq!(need_and_free(vram.row(KV, 1).map(drop)), (KV, 1, 0));
        let graphs = vram.begin_stage().unwrap();
        let kv = vram.row(KV, 200).unwrap().commit();
        assert_eq!(need_and_free(vram.row(ACTIVATIONS, 101).map(drop)), (ACTIVATIONS, 101, 100));
        let activations = vram.row(ACTIVATIONS, 100).unwrap().commit();
        drop((graphs, kv, activations));
        // Another one takes its place.
        let _graphs = vram.begin_stage().unwrap();
        assert!(vram.row(KV, 300).is_ok());
    }

    #[test]
    fn recorded_steps_may_take_what_kernels_leave_of_their_row() {
        let (vram, _weights) = Vram::of(
            0,
            u64::MAX,
            Some(VramPlan {
                usable_bytes: u64::MAX,
                beside_weights_bytes: PLAN.graph_bytes,
                ..PLAN
            }),
            0,
        )
        .unwrap();
        assert_eq!(vram.recorded_bytes_max(), 100);
    }
}
