//! How much memory a stage takes, by the rows of a plan.

/// Bytes that a stage holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StageMemory {
    /// Weights, repacked.
    pub weight_bytes: usize,
    /// KV blocks that attention reads.
    pub kv_bytes: usize,
    /// Activations.
    pub activation_bytes: usize,
    /// On a GPU, what spilled weights stream through.
    pub ring_bytes: usize,
    /// On a GPU, recorded steps, at most.
    pub graph_bytes: usize,
}

impl StageMemory {
    /// All of them, but for recorded steps.
    pub fn total(&self) -> usize {
        self.weight_bytes + self.kv_bytes + self.activation_bytes + self.ring_bytes
    }
}
