//! The only place where activations cross from one stage to the next: a ring of slots between
//! stage *k* and stage *k + 1*. A slot's memory is allocated once and changes hands; nothing is
//! copied twice, nothing is allocated per step. Between stages on GPUs (`gpu.rs`) a slot is memory
//! of the GPU that reads.

mod gpu;

pub(super) use gpu::GpuHandoff;

use crate::units::StepId;
use crossbeam_channel::{Receiver, Sender, bounded};

/// The residual stream of one step on its way.
#[derive(Debug)]
pub struct Slot {
    /// Whose step.
    pub step: StepId,
    /// Rows in use.
    pub tokens: usize,
    /// `[step_tokens_max, embedding_dim]` f32, row-major; the first `tokens` rows are in use.
    pub residual: Vec<f32>,
}

/// The stage at the other end has gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the neighbouring stage has gone")]
pub struct HandoffClosed;

/// The end of the stage that fills slots.
#[derive(Debug)]
pub struct HandoffSender {
    empty: Receiver<Slot>,
    full: Sender<Slot>,
}

/// The end of the stage that reads slots.
#[derive(Debug)]
pub struct HandoffReceiver {
    full: Receiver<Slot>,
    empty: Sender<Slot>,
}

/// A hand-off with `slots` slots of `[step_tokens_max, embedding_dim]`: with one slot the stages
/// take turns, with more the first may run ahead.
pub fn handoff(
    slots: usize,
    step_tokens_max: usize,
    embedding_dim: usize,
) -> (HandoffSender, HandoffReceiver) {
    let slots = slots.max(1);
    let (give_empty, take_empty) = bounded(slots);
    let (give_full, take_full) = bounded(slots);
    for _ in 0..slots {
        let residual = vec![0.0; step_tokens_max * embedding_dim];
        let slot = Slot { step: StepId::default(), tokens: 0, residual };
        give_empty.send(slot).expect("the ring has room for its own slots");
    }
    (
        HandoffSender { empty: take_empty, full: give_full },
        HandoffReceiver { full: take_full, empty: give_empty },
    )
}

impl HandoffSender {
    /// Waits for a free slot.
    ///
    /// # Errors
    /// [`HandoffClosed`] when the next stage has gone.
    pub fn free_slot(&self) -> Result<Slot, HandoffClosed> {
        self.empty.recv().map_err(|_| HandoffClosed)
    }

    /// Hands a filled slot over.
    ///
    /// # Errors
    /// [`HandoffClosed`] when the next stage has gone.
    pub fn send(&self, slot: Slot) -> Result<(), HandoffClosed> {
        self.full.send(slot).map_err(|_| HandoffClosed)
    }
}

impl HandoffReceiver {
    /// Waits for the next filled slot.
    ///
    /// # Errors
    /// [`HandoffClosed`] when the stage before has gone.
    pub fn receive(&self) -> Result<Slot, HandoffClosed> {
        self.full.recv().map_err(|_| HandoffClosed)
    }

    /// Gives a slot back for reuse.
    pub fn release(&self, slot: Slot) {
        // A sender that has gone needs no slot.
        let _ = self.empty.send(slot);
    }
}
