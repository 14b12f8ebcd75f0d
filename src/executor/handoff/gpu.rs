//! From a stage on a GPU to the next, which lies on another GPU or has a stream of its own on the
//! same. The slot is the memory of the residual stream of the stage that reads: a step's rows are
//! copied there once, behind the kernels that made them and before those that read them, and no
//! thread waits. A stage whose steps nobody waits for may run one step ahead of the next stage.

use crate::executor::{ExecutorError, GpuStage};
use tandem_kernels::{PeerCopies, PeerLane};

/// The hand-off between two stages of a pipeline.
pub(in crate::executor) struct GpuHandoff {
    lane: PeerLane,
}

impl GpuHandoff {
    /// A hand-off of steps of up to `tokens_max` tokens.
    ///
    /// # Errors
    /// No host memory, where rows go through it, or what the driver refuses.
    pub fn new(
        (from, to): (&GpuStage, &GpuStage),
        tokens_max: usize,
        copies: PeerCopies,
    ) -> Result<Self, ExecutorError> {
        let (from, _) = from.incoming(0);
        let (to, slot) = to.incoming(tokens_max);
        let lane = from.lane_to(to, slot.bytes(), copies)?;
        if lane.is_by_host() {
            let (from, to) = (from.ordinal(), to.ordinal());
            tracing::info!(from, to, "activations cross between these GPUs through host memory");
        }
        Ok(Self { lane })
    }

    /// Starts the copy of a step that was launched in `from`, before it is launched in `to`. Both
    /// are those of [`GpuHandoff::new`].
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn carry(
        &mut self,
        (from, to): (&GpuStage, &GpuStage),
        tokens: usize,
    ) -> Result<(), ExecutorError> {
        // SAFETY: each residual stream is used on its stage's stream alone, where it is freed as
        // well, and the lane orders the two.
        unsafe { self.lane.send(from.outgoing(tokens), to.incoming(tokens))? };
        Ok(())
    }

    /// All that reads the slot in a step has been launched.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn used(&self, to: &GpuStage) -> Result<(), ExecutorError> {
        let (to, _) = to.incoming(0);
        Ok(self.lane.used(to)?)
    }
}
