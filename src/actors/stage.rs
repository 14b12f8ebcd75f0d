//! What the executor actor asks of a stage. The engine's own stages are `executor::Stage`; tests
//! bring stages whose tokens are a hash of the tokens so far.

use crate::step::{StepOutput, StepPlan};

/// Runs steps, one at a time, on one thread.
pub trait StepRunner: Send {
    /// Computes a plan. `output` comes cleared.
    ///
    /// # Errors
    /// Anything after which the stage and its KV are not to be used again.
    fn run(&mut self, plan: &StepPlan, output: &mut StepOutput) -> Result<(), String>;
}

/// Makes stages over the same weights: the first one and, after each failure, the next.
pub trait StageFactory: Send + Sync {
    /// A stage with empty KV.
    ///
    /// # Errors
    /// Why there can be none.
    fn start(&self) -> Result<Box<dyn StepRunner>, String>;
}
