//! What the executor actor asks of a stage. The engine's own stages are `executor::Stage`; tests
//! bring stages whose tokens are a hash of the tokens so far.

use super::stage_fault::StageFault;
use crate::config::GpuConfig;
use crate::executor::{
    CpuPool, ExecutorError, GpuPipeline, GpuStage, GpuWeights, KvBlocks, KvTiers, LoadProgress,
    OpTime, Stage, StageOptions, StagePart, TierOptions, VramPlan, Weights, WeightsRequest,
};
use crate::formats::Checkpoint;
use crate::model::ModelSpec;
use crate::step::{BlockCopy, CopyResult, StepOutput, StepPlan};
use std::sync::Arc;
use std::time::Duration;
use tandem_kernels::PeerCopies;

/// Runs steps, one at a time, on one thread.
pub trait StepRunner {
    /// Computes a plan. `output` comes cleared.
    ///
    /// # Errors
    /// Anything after which the stage and its KV are not to be used again.
    fn run(&mut self, plan: &StepPlan, output: &mut StepOutput) -> Result<(), StageFault>;

    /// What makes the tiers behind its KV blocks.
    fn tiers(&self) -> Arc<dyn TierSource>;

    /// From now on every op's time is counted, from 0, where the stage can do that.
    ///
    /// # Errors
    /// As of a step.
    fn start_op_times(&mut self) -> Result<(), StageFault> {
        Ok(())
    }

    /// Ends the counting; the times since it was started.
    fn take_op_times(&mut self) -> Vec<OpTime> {
        Vec::new()
    }
}

/// Makes the tiers behind a stage's KV blocks: when the stage starts, and again when the thread
/// that copied between them has died.
pub trait TierSource: Send + Sync {
    /// Empty lower tiers.
    ///
    /// # Errors
    /// Memory or a file refused.
    fn tiers(&self) -> Result<Box<dyn BlockMover>, StageFault>;
}

/// Copies KV blocks between tiers while the stage runs steps. A block that a copy works on is in no
/// step's tables, or is only read there.
pub trait BlockMover: Send {
    /// Performs copies in order and adds one result for each. One that fails leaves its source as
    /// it was.
    fn perform(&mut self, orders: &[BlockCopy], results: &mut Vec<CopyResult>);

    /// Whether copies to the disk tier fail from now on.
    fn disk_stopped(&self) -> bool;

    /// Makes a little more of the lower tiers ready for use, while there is nothing to copy.
    /// Whether there may be more to do.
    fn prepare_ahead(&mut self) -> bool;
}

/// Makes stages over the same weights: the first one and, after each failure, the next. Called on
/// the thread that will run them.
pub trait StageFactory: Send + Sync {
    /// A stage with empty KV.
    ///
    /// # Errors
    /// Why there can be none.
    fn start(&self) -> Result<Box<dyn StepRunner>, StageFault>;
}

/// Steps of the stages of `executor`.
trait Steps {
    fn run(&mut self, plan: &StepPlan, output: &mut StepOutput) -> Result<(), ExecutorError>;
    fn start_op_times(&mut self) -> Result<(), ExecutorError>;
    fn take_op_times(&mut self) -> Vec<OpTime>;
}

impl Steps for Stage {
    fn run(&mut self, plan: &StepPlan, output: &mut StepOutput) -> Result<(), ExecutorError> {
        self.run(plan, output)
    }

    fn start_op_times(&mut self) -> Result<(), ExecutorError> {
        self.start_op_times();
        Ok(())
    }

    fn take_op_times(&mut self) -> Vec<OpTime> {
        self.take_op_times().unwrap_or_default()
    }
}

impl Steps for GpuStage {
    fn run(&mut self, plan: &StepPlan, output: &mut StepOutput) -> Result<(), ExecutorError> {
        self.run(plan, output)
    }

    fn start_op_times(&mut self) -> Result<(), ExecutorError> {
        self.start_op_times()
    }

    fn take_op_times(&mut self) -> Vec<OpTime> {
        self.take_op_times().unwrap_or_default()
    }
}

impl Steps for GpuPipeline {
    fn run(&mut self, plan: &StepPlan, output: &mut StepOutput) -> Result<(), ExecutorError> {
        self.run(plan, output)
    }

    /// Ops of one GPU wait for another's: no times of theirs would add up to a step.
    fn start_op_times(&mut self) -> Result<(), ExecutorError> {
        Ok(())
    }

    fn take_op_times(&mut self) -> Vec<OpTime> {
        Vec::new()
    }
}

/// A stage with the tiers behind its KV blocks.
struct Tiered<S> {
    stage: S,
    source: Arc<KvSource>,
}

/// The tiers behind a store, and where they are kept.
struct KvSource {
    kv: Arc<dyn KvBlocks>,
    options: TierOptions,
}

impl<S: Steps + 'static> Tiered<S> {
    fn boxed(kv: Arc<dyn KvBlocks>, options: &TierOptions, stage: S) -> Box<dyn StepRunner> {
        let source = Arc::new(KvSource { kv, options: options.clone() });
        Box::new(Self { stage, source })
    }
}

impl<S: Steps> StepRunner for Tiered<S> {
    fn run(&mut self, plan: &StepPlan, output: &mut StepOutput) -> Result<(), StageFault> {
        self.stage.run(plan, output).map_err(|error| StageFault::of_step(&error))
    }

    fn tiers(&self) -> Arc<dyn TierSource> {
        Arc::clone(&self.source) as _
    }

    fn start_op_times(&mut self) -> Result<(), StageFault> {
        self.stage.start_op_times().map_err(|error| StageFault::of_step(&error))
    }

    fn take_op_times(&mut self) -> Vec<OpTime> {
        self.stage.take_op_times()
    }
}

impl TierSource for KvSource {
    fn tiers(&self) -> Result<Box<dyn BlockMover>, StageFault> {
        let made = |options: &TierOptions| KvTiers::new(Arc::clone(&self.kv), options);
        match made(&self.options) {
            Ok(tiers) => Ok(Box::new(tiers)),
            Err(error @ ExecutorError::DiskTier { .. }) => {
                // As of a disk that fails later: nothing goes there, all else goes on.
                tracing::error!(%error, "no KV blocks go to disk");
                let tiers = made(&TierOptions { disk_blocks: 0, ..self.options.clone() });
                Ok(Box::new(WithoutDisk(tiers.map_err(|error| StageFault::from(&error))?)))
            }
            Err(error) => Err((&error).into()),
        }
    }
}

/// Tiers whose disk can't be had.
struct WithoutDisk(KvTiers);

impl BlockMover for WithoutDisk {
    fn perform(&mut self, orders: &[BlockCopy], results: &mut Vec<CopyResult>) {
        self.0.perform(orders, results);
    }

    fn disk_stopped(&self) -> bool {
        true
    }

    fn prepare_ahead(&mut self) -> bool {
        self.0.prepare_ahead()
    }
}

impl BlockMover for KvTiers {
    fn perform(&mut self, orders: &[BlockCopy], results: &mut Vec<CopyResult>) {
        KvTiers::perform(self, orders, results);
    }

    fn disk_stopped(&self) -> bool {
        KvTiers::disk_stopped(self)
    }

    fn prepare_ahead(&mut self) -> bool {
        KvTiers::prepare_ahead(self)
    }
}

/// Stages over weights that are loaded once.
pub(super) struct CpuStages {
    weights: Arc<Weights>,
    options: StageOptions,
    tiers: TierOptions,
}

impl CpuStages {
    /// Loads the weights; `progress` is called on a thread of its own: the pool pins its caller.
    pub(super) fn load(
        (checkpoint, spec): (Arc<Checkpoint>, Arc<ModelSpec>),
        (options, tiers): (StageOptions, TierOptions),
        progress: &mut (dyn FnMut(LoadProgress) + Send),
    ) -> Result<Self, ExecutorError> {
        let part = options.part.clone().unwrap_or_else(|| StagePart::whole(spec.layers.len()));
        let request = request(checkpoint, spec, part, &options);
        let load = |pool: &mut CpuPool| Weights::load(&request, pool, progress);
        Ok(Self { weights: Arc::new(with_pool(&options, load)?), options, tiers })
    }
}

fn request(
    checkpoint: Arc<Checkpoint>,
    spec: Arc<ModelSpec>,
    part: StagePart,
    options: &StageOptions,
) -> WeightsRequest {
    let (isa, huge_pages) = (options.isa, options.huge_pages());
    WeightsRequest { source: checkpoint.into(), spec, part, isa, huge_pages }
}

/// Loads with the workers that the options ask for, on a thread of its own: a pool pins its caller.
fn with_pool<T: Send>(
    options: &StageOptions,
    load: impl FnOnce(&mut CpuPool) -> Result<T, ExecutorError> + Send,
) -> Result<T, ExecutorError> {
    let body = || {
        let mut pool = CpuPool::new(&options.pool).map_err(ExecutorError::Threads)?;
        let loaded = load(&mut pool);
        // All workers have worked by now, so each has tried.
        for worker in pool.pin_failures() {
            let cpu = options.pool.cores.get(worker);
            tracing::warn!(worker, cpu, "the system does not let this worker be pinned");
        }
        loaded
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("tandem-load".into());
        let thread = thread.spawn_scoped(scope, body).map_err(ExecutorError::Threads)?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

impl StageFactory for CpuStages {
    fn start(&self) -> Result<Box<dyn StepRunner>, StageFault> {
        let warm = || {
            let mut stage = Stage::restart(Arc::clone(&self.weights), &self.options)?;
            stage.warm_up(self.options.huge_pages())?;
            Ok(stage)
        };
        match warm() {
            Ok(stage) => Ok(Tiered::boxed(stage.kv(), &self.tiers, stage)),
            Err::<_, ExecutorError>(error) => Err((&error).into()),
        }
    }
}

/// Stages over weights that lie on GPUs.
pub(super) struct GpuStages {
    /// In the order of the layers.
    weights: Vec<Arc<GpuWeights>>,
    options: StageOptions,
    tiers: TierOptions,
    copies: PeerCopies,
}

impl GpuStages {
    /// Opens the GPUs, reserves what is planned there and loads the weights, those of spilled
    /// networks into host memory. No step may wait longer for a GPU than `gpu.step_timeout_ms`.
    pub(super) fn load(
        (parts, plans, config): (&[(usize, StagePart)], &[VramPlan], &GpuConfig),
        (checkpoint, spec): (Arc<Checkpoint>, Arc<ModelSpec>),
        (options, tiers): (StageOptions, TierOptions),
        progress: &mut (dyn FnMut(LoadProgress) + Send),
    ) -> Result<Self, ExecutorError> {
        let whole = StagePart::whole(spec.layers.len());
        let request = request(checkpoint, spec, whole, &options);
        let weights = with_pool(&options, |pool| {
            GpuWeights::load_planned((parts, plans), &request, Some(pool), progress)
        })?;
        let step_timeout = Duration::from_millis(config.step_timeout_ms);
        weights.iter().for_each(|part| part.limit_waits(step_timeout));
        Ok(Self { weights, options, tiers, copies: config.copies() })
    }
}

impl StageFactory for GpuStages {
    fn start(&self) -> Result<Box<dyn StepRunner>, StageFault> {
        let started = match &self.weights[..] {
            [whole] => GpuStage::start(Arc::clone(whole), &self.options)
                .map(|stage| Tiered::boxed(stage.kv(), &self.tiers, stage)),
            parts => GpuPipeline::start(parts, &self.options, self.copies)
                .map(|stages| Tiered::boxed(stages.kv(), &self.tiers, stages)),
        };
        started.map_err(|error| StageFault::from(&error))
    }
}
