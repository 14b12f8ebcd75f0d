//! A stage: a part of a model, its weights, KV store, buffers and workers. It runs one step at a
//! time on the thread that calls it.

use super::ExecutorError;
use super::attention_split::{AttentionShape, AttentionSplit};
use super::batch::{Batch, PlanLimits};
use super::buffers::{Buffers, Memory, Rows};
use super::cpu::Step;
use super::cpu_pool::{CpuPool, PoolOptions, WorkerPanic};
use super::expert_groups::ExpertScratch;
use super::handoff::{HandoffReceiver, HandoffSender, Slot};
use super::kv_store::{KvMemory, KvOptions};
use super::kv_tiers::KvBlocks;
use super::op_times::{OpClocks, OpTime};
use super::own_buffers::{OwnBuffers, OwnRows};
use super::passes::StepPasses;
use super::program::{Op, Program, StagePart};
use super::sample::RowSamplers;
use super::spill::SpillStep;
use super::stage_memory::StageMemory;
use super::warm_up;
use super::weights::{LoadProgress, Weights, WeightsRequest};
use crate::formats::Checkpoint;
use crate::memory::HugePages;
use crate::model::ModelSpec;
use crate::step::{StepOutput, StepPlan};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;
use tandem_cpu_kernels::Isa;
use tandem_cpu_kernels::attention::AttentionScratch;

/// Query rows (token × head of a KV head's group) that the attention kernel computes together.
const QUERY_ROWS: usize = 64;

/// How a stage is to be made.
#[derive(Clone, Debug)]
pub struct StageOptions {
    /// Which part of the model; `None` for all of it.
    pub part: Option<StagePart>,
    /// The workers.
    pub pool: PoolOptions,
    /// Whose kernels; `None` for the widest this CPU has.
    pub isa: Option<Isa>,
    /// Whether weights and KV ask for huge pages.
    pub huge_pages: bool,
    /// KV blocks.
    pub kv: KvOptions,
    /// Tokens of the widest step: the activations' memory is sized by it.
    pub step_tokens_max: usize,
    /// Which barriers are saved.
    pub passes: StepPasses,
    /// Percent of the spilled networks whose weights stream to the GPU in steps that the CPU could
    /// compute them for; `None` for what is measured to be fastest.
    pub spill_streamed: Option<u8>,
}

/// What a step of a part of a model is joined to.
struct Ends<'a> {
    /// `[n_tokens, embedding_dim]` from the stage before.
    inlet: Option<&'a [f32]>,
    /// `[n_tokens, embedding_dim]` for the next stage.
    outlet: Option<Rows<'a>>,
    spill: Option<SpillStep<'a>>,
}

/// A part of a model, ready to run steps.
pub struct Stage {
    weights: Arc<Weights>,
    limits: PlanLimits,
    batch: Batch,
    kv: Arc<KvMemory>,
    buffers: Buffers,
    angles: Memory,
    partials: Memory,
    own: Vec<Mutex<OwnBuffers>>,
    /// Tokens of the longest tile whose heads are rotated by those who attend to it.
    rotated_tokens_max: usize,
    scratch: Vec<Mutex<AttentionScratch>>,
    experts: Vec<Mutex<ExpertScratch>>,
    samplers: RowSamplers,
    inlet: Option<HandoffReceiver>,
    outlet: Option<HandoffSender>,
    failure: Option<WorkerPanic>,
    clocks: Option<OpClocks>,
    barriers: AtomicU64,
    // Last, so that workers are joined before what they work on is freed.
    pool: CpuPool,
}

impl StageOptions {
    /// What is asked of the system for weights and KV.
    pub fn huge_pages(&self) -> HugePages {
        if self.huge_pages { HugePages::Advise } else { HugePages::SystemDefault }
    }
}

impl Stage {
    /// Loads the weights and makes a stage of them. `progress` is called on this thread.
    ///
    /// # Errors
    /// A bad model file, options that this machine can't fulfil, or memory and threads refused.
    pub fn load(
        checkpoint: Arc<Checkpoint>,
        spec: Arc<ModelSpec>,
        options: &StageOptions,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, ExecutorError> {
        let mut pool = CpuPool::new(&options.pool).map_err(ExecutorError::Threads)?;
        let part = options.part.clone().unwrap_or_else(|| StagePart::whole(spec.layers.len()));
        let (isa, huge_pages) = (options.isa, options.huge_pages());
        let request = WeightsRequest { source: checkpoint.into(), spec, part, isa, huge_pages };
        let weights = Arc::new(Weights::load(&request, &mut pool, progress)?);
        Self::with_pool(weights, options, pool)
    }

    /// A stage with new workers, buffers and an empty KV store on weights that are there already:
    /// milliseconds, not seconds. `options.part` and `options.isa` are those of the weights.
    ///
    /// # Errors
    /// Memory or threads refused.
    pub fn restart(weights: Arc<Weights>, options: &StageOptions) -> Result<Self, ExecutorError> {
        let pool = CpuPool::new(&options.pool).map_err(ExecutorError::Threads)?;
        Self::with_pool(weights, options, pool)
    }

    fn with_pool(
        weights: Arc<Weights>,
        options: &StageOptions,
        pool: CpuPool,
    ) -> Result<Self, ExecutorError> {
        let program = weights.program();
        let (tokens, threads) = (options.step_tokens_max, pool.threads());
        let form = weights.kernels().activation_form();
        let limits = PlanLimits {
            tokens_max: tokens,
            vocab_size: weights.vocab_size(),
            block_tokens: options.kv.block_tokens,
            blocks: options.kv.device_blocks,
            query_tile: query_tile(program),
        };
        let positions = options.kv.device_blocks * options.kv.block_tokens;
        let splits = AttentionShape::of(program)
            .into_iter()
            .map(|shape| AttentionSplit::new(shape, threads, tokens, positions))
            .collect();
        let batch = Batch::new(tokens, options.kv.device_blocks, splits);
        let head_dim = program.kv_layers.iter().map(|shape| shape.head_dim).max().unwrap_or(1);
        let scratch = (0..threads).map(|_| Mutex::new(AttentionScratch::new(head_dim))).collect();
        let own = OwnRows::new(&weights, options.passes, (threads, tokens, limits.query_tile));
        let sampled_rows = if program.dims.vocab > 0 { tokens } else { 0 };
        Ok(Self {
            limits,
            partials: Memory::new(batch.partials_max()),
            batch,
            kv: KvMemory::new(&program.kv_layers, options)?.into(),
            buffers: Buffers::new(form, program.dims, tokens),
            angles: Memory::new(tokens * weights.rotations().width()),
            own: OwnBuffers::of_workers(form, program.dims, own, threads),
            rotated_tokens_max: own.rotated_tokens,
            scratch,
            experts: ExpertScratch::of_workers(form, program.dims, tokens, threads),
            samplers: RowSamplers::new(threads, program.dims.vocab, sampled_rows),
            inlet: None,
            outlet: None,
            failure: None,
            clocks: None,
            barriers: AtomicU64::new(0),
            pool,
            weights,
        })
    }

    /// Touches the memory of all activations and, in a stage without neighbours, computes a step
    /// that nobody waits for: the first request then takes no longer than others. For a new stage;
    /// it takes about as long as one token. `huge_pages` says whether the activations ask for them.
    ///
    /// # Errors
    /// See [`Stage::run`].
    pub fn warm_up(&mut self, huge_pages: HugePages) -> Result<(), ExecutorError> {
        let mut memory = self.buffers.as_bytes_mut();
        memory.extend([self.angles.as_bytes_mut(), self.partials.as_bytes_mut()]);
        for scratch in &mut self.experts {
            let scratch = scratch.get_mut().unwrap_or_else(PoisonError::into_inner);
            memory.extend(scratch.as_bytes_mut());
        }
        warm_up::touch(&mut self.pool, memory, huge_pages)?;
        let program = self.weights.program();
        let is_joined =
            |op: &Op| matches!(op, Op::Receive | Op::Send { .. } | Op::SpillStart { .. });
        let is_whole = !program.ops.iter().any(is_joined);
        if is_whole && self.limits.blocks > 0 {
            let plan = warm_up::plan(self.limits.tokens_max, program.dims.vocab > 0);
            self.run(&plan, &mut StepOutput::default())?;
        }
        Ok(())
    }

    /// The weights, for [`Stage::restart`].
    pub fn weights(&self) -> &Arc<Weights> {
        &self.weights
    }

    /// The KV blocks, for the thread that copies them to other tiers and back.
    pub fn kv(&self) -> Arc<dyn KvBlocks> {
        Arc::clone(&self.kv) as _
    }

    /// Workers that run on no core of their own because the system refused it.
    pub fn pin_failures(&self) -> Vec<usize> {
        self.pool.pin_failures()
    }

    /// From now on every op's time is counted, from 0.
    pub fn start_op_times(&mut self) {
        self.clocks = Some(OpClocks::new(self.weights.program(), self.pool.threads()));
    }

    /// Ends the counting; the times since [`Stage::start_op_times`], if it was called.
    pub fn take_op_times(&mut self) -> Option<Vec<OpTime>> {
        self.clocks.take().map(|clocks| clocks.times())
    }

    /// How often the workers have met since the stage was made: the barriers inside steps. Their
    /// start and end are not counted.
    pub fn barriers(&self) -> u64 {
        self.barriers.load(Ordering::Relaxed)
    }

    /// Bytes held.
    pub fn memory(&self) -> StageMemory {
        let scratch = |scratch: &Mutex<ExpertScratch>| {
            scratch.lock().unwrap_or_else(PoisonError::into_inner).bytes()
        };
        let experts = self.experts.iter().map(scratch).sum::<usize>();
        let own = self.own.iter().map(|own| own.lock().unwrap_or_else(PoisonError::into_inner));
        let own = own.map(|own| own.bytes()).sum::<usize>();
        StageMemory {
            weight_bytes: self.weights.bytes(),
            kv_bytes: self.kv.bytes(),
            activation_bytes: self.buffers.bytes()
                + self.angles.bytes()
                + self.partials.bytes()
                + experts
                + own,
            ring_bytes: 0,
            graph_bytes: 0,
        }
    }

    /// Where the residual stream of a stage whose program starts with a hand-off comes from.
    pub fn set_inlet(&mut self, inlet: HandoffReceiver) {
        self.inlet = Some(inlet);
    }

    /// Where the residual stream of a stage whose program ends with a hand-off goes to.
    pub fn set_outlet(&mut self, outlet: HandoffSender) {
        self.outlet = Some(outlet);
    }

    /// Runs one step: copies between its blocks, then all tokens, then the wanted logits. Allocates
    /// nothing once its buffers have grown to the largest step seen, except `top` lists asked for.
    ///
    /// # Errors
    /// A plan that does not add up (nothing was done), a neighbour that has gone, or a worker's
    /// panic: after that every further step fails, and the stage is to be replaced.
    pub fn run(&mut self, plan: &StepPlan, output: &mut StepOutput) -> Result<(), ExecutorError> {
        let started = Instant::now();
        if let Some(panic) = &self.failure {
            return Err(panic.clone().into());
        }
        output.clear();
        output.step = plan.step;
        self.batch.prepare(plan, self.limits)?;
        self.kv.copy(&plan.copies)?;
        if !plan.tokens.is_empty() {
            self.compute(plan)?;
            self.samplers.gather(output);
        }
        output.duration_us = started.elapsed().as_micros() as u64;
        Ok(())
    }

    fn compute(&mut self, plan: &StepPlan) -> Result<(), ExecutorError> {
        let tokens = plan.tokens.len();
        let mut inlet = self.receive(plan)?;
        let mut outlet = self.outlet.as_ref().map(HandoffSender::free_slot).transpose()?;
        let embedding_dim = self.weights.program().dims.embedding;
        let ends = Ends {
            inlet: inlet.as_ref().map(|slot| slot.residual.as_slice()),
            outlet: outlet
                .as_mut()
                .map(|slot| Rows::new(&mut slot.residual, tokens, embedding_dim)),
            spill: None,
        };
        self.execute(plan, ends)?;
        if let (Some(slot), Some(from)) = (inlet.take(), &self.inlet) {
            from.release(slot);
        }
        if let (Some(mut slot), Some(to)) = (outlet, &self.outlet) {
            (slot.step, slot.tokens) = (plan.step, tokens);
            to.send(slot)?;
        }
        Ok(())
    }

    /// Computes the units that a GPU leaves to this stage in a step of as many tokens as the plan
    /// has. Of the plan nothing else counts.
    ///
    /// # Errors
    /// As [`Stage::run`]; also when the GPU does not come.
    pub(super) fn run_spilled(
        &mut self,
        plan: &StepPlan,
        spill: SpillStep<'_>,
    ) -> Result<(), ExecutorError> {
        if let Some(panic) = &self.failure {
            return Err(panic.clone().into());
        }
        self.execute(plan, Ends { inlet: None, outlet: None, spill: Some(spill) })
    }

    /// Has all workers walk the program.
    fn execute(&mut self, plan: &StepPlan, ends: Ends<'_>) -> Result<(), ExecutorError> {
        let tokens = plan.tokens.len();
        let program = self.weights.program();
        let selected = if program.dims.vocab > 0 { plan.logits.len() } else { 0 };
        let rotations = self.weights.rotations();
        let mut buffers = self.buffers.shaped(tokens, selected);
        if let Some(spill) = &ends.spill {
            buffers.projected = spill.rows_out(tokens, buffers.projected.width);
            buffers.heads = spill.rows_out(buffers.heads.rows, buffers.heads.width);
        }
        let step = Step {
            program,
            weights: &self.weights,
            kernels: self.weights.kernels(),
            plan,
            batch: &self.batch,
            buffers,
            rotations,
            angles: self.angles.rows(tokens, rotations.width()),
            kv: self.kv.layers(),
            inlet: ends.inlet,
            outlet: ends.outlet,
            spill: ends.spill,
            partials: self.partials.rows(1, self.batch.partials_max()),
            attention_rotates: self.batch.has_short_sequences_only(self.rotated_tokens_max),
            own: &self.own,
            scratch: &self.scratch,
            experts: &self.experts,
            samplers: &self.samplers,
            clocks: self.clocks.as_ref(),
            barriers: &self.barriers,
        };
        let done = self.pool.run(&|worker| step.execute(worker));
        if let Err(panic) = done {
            self.failure = Some(panic.clone());
            return Err(panic.into());
        }
        Ok(())
    }

    /// The slot of this step, when the program starts with one.
    fn receive(&self, plan: &StepPlan) -> Result<Option<Slot>, ExecutorError> {
        let Some(inlet) = &self.inlet else { return Ok(None) };
        let slot = inlet.receive()?;
        if slot.step == plan.step && slot.tokens == plan.tokens.len() {
            return Ok(Some(slot));
        }
        let (step, tokens) = (plan.step.0, plan.tokens.len());
        let message = format!(
            "step {step} with {tokens} tokens, the slot holds step {} with {}",
            slot.step.0, slot.tokens
        );
        inlet.release(slot);
        Err(ExecutorError::InvalidPlan { field: "step", message })
    }
}

/// Tokens of a query tile: as many as fill the kernel's rows for the smallest group of heads.
fn query_tile(program: &Program) -> usize {
    let group = |op: &Op| match op {
        Op::Attend { shape, .. } => Some(shape.n_heads / shape.n_kv_heads),
        _ => None,
    };
    let largest = program.ops.iter().filter_map(group).max().unwrap_or(1);
    (QUERY_ROWS / largest).max(1)
}
