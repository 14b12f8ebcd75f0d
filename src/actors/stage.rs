//! What the executor actor asks of a stage. The engine's own stages are `executor::Stage`; tests
//! bring stages whose tokens are a hash of the tokens so far.

use crate::executor::{
    CpuPool, ExecutorError, GpuStage, GpuStageOptions, GpuWeights, LoadProgress, Stage,
    StageOptions, StagePart, Weights, WeightsRequest,
};
use crate::formats::Checkpoint;
use crate::model::ModelSpec;
use crate::step::{StepOutput, StepPlan};
use std::sync::Arc;

/// Runs steps, one at a time, on one thread.
pub trait StepRunner {
    /// Computes a plan. `output` comes cleared.
    ///
    /// # Errors
    /// Anything after which the stage and its KV are not to be used again.
    fn run(&mut self, plan: &StepPlan, output: &mut StepOutput) -> Result<(), String>;
}

/// Makes stages over the same weights: the first one and, after each failure, the next. Called on
/// the thread that will run them.
pub trait StageFactory: Send + Sync {
    /// A stage with empty KV.
    ///
    /// # Errors
    /// Why there can be none.
    fn start(&self) -> Result<Box<dyn StepRunner>, String>;
}

impl StepRunner for Stage {
    fn run(&mut self, plan: &StepPlan, output: &mut StepOutput) -> Result<(), String> {
        Stage::run(self, plan, output).map_err(|error| error.to_string())
    }
}

/// Stages over weights that are loaded once.
pub(super) struct CpuStages {
    weights: Arc<Weights>,
    options: StageOptions,
}

impl CpuStages {
    /// Loads the weights; `progress` is called on a thread of its own: the pool pins its caller.
    pub(super) fn load(
        checkpoint: Arc<Checkpoint>,
        spec: Arc<ModelSpec>,
        options: StageOptions,
        progress: &mut (dyn FnMut(LoadProgress) + Send),
    ) -> Result<Self, ExecutorError> {
        let part = options.part.clone().unwrap_or_else(|| StagePart::whole(spec.layers.len()));
        let (isa, huge_pages) = (options.isa, options.huge_pages());
        let request = WeightsRequest { source: checkpoint.into(), spec, part, isa, huge_pages };
        let load = || {
            let mut pool = CpuPool::new(&options.pool).map_err(ExecutorError::Threads)?;
            let weights = Weights::load(&request, &mut pool, progress);
            // All workers have worked by now, so each has tried.
            for worker in pool.pin_failures() {
                let cpu = options.pool.cores.get(worker);
                tracing::warn!(worker, cpu, "the system does not let this worker be pinned");
            }
            weights
        };
        let loaded = std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("tandem-load".into());
            let thread = thread.spawn_scoped(scope, load).map_err(ExecutorError::Threads)?;
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        Ok(Self { weights: Arc::new(loaded?), options })
    }
}

impl StageFactory for CpuStages {
    fn start(&self) -> Result<Box<dyn StepRunner>, String> {
        let warm = || {
            let mut stage = Stage::restart(Arc::clone(&self.weights), &self.options)?;
            stage.warm_up(self.options.huge_pages())?;
            Ok(stage)
        };
        match warm() {
            Ok(stage) => Ok(Box::new(stage)),
            Err::<_, ExecutorError>(error) => Err(error.to_string()),
        }
    }
}

impl StepRunner for GpuStage {
    fn run(&mut self, plan: &StepPlan, output: &mut StepOutput) -> Result<(), String> {
        GpuStage::run(self, plan, output).map_err(|error| error.to_string())
    }
}

/// Stages over weights that lie on a GPU.
pub(super) struct GpuStages {
    weights: Arc<GpuWeights>,
    options: GpuStageOptions,
}

impl GpuStages {
    /// Opens the GPU and loads the weights.
    pub(super) fn load(
        ordinal: usize,
        (checkpoint, spec): (Arc<Checkpoint>, Arc<ModelSpec>),
        options: &StageOptions,
        progress: &mut (dyn FnMut(LoadProgress) + Send),
    ) -> Result<Self, ExecutorError> {
        let part = StagePart::whole(spec.layers.len());
        let (isa, huge_pages) = (options.isa, options.huge_pages());
        let request = WeightsRequest { source: checkpoint.into(), spec, part, isa, huge_pages };
        let weights = GpuWeights::load(ordinal, &request, None, progress)?;
        let step_tokens_max = options.step_tokens_max;
        let options = GpuStageOptions { kv: options.kv, step_tokens_max };
        Ok(Self { weights: Arc::new(weights), options })
    }
}

impl StageFactory for GpuStages {
    fn start(&self) -> Result<Box<dyn StepRunner>, String> {
        match GpuStage::start(Arc::clone(&self.weights), &self.options) {
            Ok(stage) => Ok(Box::new(stage)),
            Err(error) => Err(error.to_string()),
        }
    }
}
