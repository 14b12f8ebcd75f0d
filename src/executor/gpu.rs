//! The GPU interpreter: a stage whose weights, KV blocks and activations lie in a GPU's memory. One
//! match arm per op, as `cpu.rs`; each arm starts a kernel or two on one stream and waits for
//! nothing. The host prepares what a step needs beside the plan (embedding rows, angles,
//! positions), and chooses tokens from the few bytes of each row that come back (`sampling.rs`).
//!
//! Activations of narrow steps are rounded to 8 bits before quantised products, as on the CPU: the
//! two agree up to the order of sums. A token's bits depend on the class of its step's width, as
//! `docs/architecture.md` has them, and on nothing else in it.

mod attend;
mod buffers;
mod experts;
mod graphs;
mod inputs;
mod kv;
mod load;
mod norms;
mod op_marks;
mod ops;
mod order_thread;
mod pipeline;
mod pipeline_kv;
mod sampling;
mod spill;
mod spill_measure;
mod spill_schedule;
mod spill_sender;
mod spill_stream;
mod spill_thread;
mod spill_weights;
mod supported;
mod vram;
mod weights;

pub use buffers::buffer_dims;
pub use pipeline::GpuPipeline;
pub use vram::VramPlan;
pub use weights::GpuWeights;

use super::ExecutorError;
use super::batch::{Batch, PlanLimits};
use super::kv_tiers::KvBlocks;
use super::program::{Linear, Norm, Op, Pending};
use super::sample::RowSamplers;
use super::stage::StageOptions;
use super::stage_memory::StageMemory;
use crate::hardware::HardwareProfile;
use crate::memory::Commitment;
use crate::placement::LOGITS_TILE_ROWS;
use crate::request::RequestError;
use crate::step::{StepOutput, StepPlan};
use buffers::GpuBuffers;
use graphs::Graphs;
use kv::GpuKv;
use op_marks::OpMarks;
use spill::GpuSpill;
use spill_thread::SpillThread;
use std::cell::Cell;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;
use tandem_kernels::{Gpu, GpuError, Span};

/// Threads that share the rows of logits which leave the GPU.
const SAMPLERS: usize = 4;

/// A GPU gives a token of a model with quantised weights the same bits in all steps up to one of
/// these widths and beyond the one before it.
pub const WIDTH_BORDERS: [usize; 3] = [8, 32, 128];

/// The same of a model with F32, F16, BF16 or FP8 weights, where a single token goes another way.
pub const FLOAT_WIDTH_BORDERS: [usize; 4] = {
    let [narrow, medium, wide] = WIDTH_BORDERS;
    [1, narrow, medium, wide]
};

/// How the program ends.
#[derive(Clone, Copy)]
struct LastOps {
    pending: Pending,
    norm: Norm,
    output: Linear,
    softcap: Option<f32>,
}

/// A model on one GPU, ready to run steps; or, in a [`GpuPipeline`], a part of one.
pub struct GpuStage {
    limits: PlanLimits,
    batch: Batch,
    kv: Arc<GpuKv>,
    buffers: GpuBuffers,
    samplers: RowSamplers,
    /// Most blocks that can divide the positions of many tokens of a sequence, where there is a
    /// kernel for these.
    run_blocks: Option<usize>,
    /// Whether the residual stream of the step that is launched is at its second place.
    has_moved: Cell<bool>,
    /// Whether that of a single token ends there: the same in each step.
    ends_moved: Cell<bool>,
    /// None where the residual stream goes on to another stage.
    last: Option<LastOps>,
    graphs: Graphs,
    _reserved: Commitment,
    op_marks: Option<OpMarks>,
    failure: Option<String>,
    spill: Option<GpuSpill>,
    weights: Arc<GpuWeights>,
}

impl GpuStage {
    /// A stage with an empty KV store on weights that are there already. Workers are started where
    /// weights are spilled to the CPU, and for these alone.
    ///
    /// # Errors
    /// The GPU's memory does not hold it, or the CPU's side can't be made; or the weights are those
    /// of a part of a model.
    pub fn start(weights: Arc<GpuWeights>, options: &StageOptions) -> Result<Self, ExecutorError> {
        let is_joined = |op: &Op| matches!(op, Op::Receive | Op::Send { .. });
        if weights.program().ops.iter().any(is_joined) {
            let what = "a part of a model without the others".into();
            return Err(ExecutorError::Unsupported { what });
        }
        let weights = [weights];
        let spill = SpillThread::start(&weights, options)?.map(|thread| (thread, 0));
        let [weights] = weights;
        Self::of_part(weights, options, spill)
    }

    /// A stage of a model, joined to the CPU's side in one of its lanes where it has spilled
    /// weights.
    fn of_part(
        weights: Arc<GpuWeights>,
        options: &StageOptions,
        spill: Option<(Arc<SpillThread>, usize)>,
    ) -> Result<Self, ExecutorError> {
        // Before any memory of the stage: the driver would load a kernel where it is first started,
        // in the middle of a step, and may have no memory for it then.
        weights.gpu().load_kernels()?;
        let (program, tokens) = (weights.program(), options.step_tokens_max);
        let store = (options.kv.device_blocks, options.kv.block_tokens);
        let limits = PlanLimits {
            tokens_max: tokens,
            vocab_size: weights.vocab_size(),
            block_tokens: options.kv.block_tokens,
            blocks: options.kv.device_blocks,
            query_tile: tokens.max(1),
        };
        // First of all: what was promised for a stage is taken by its parts.
        let reserved = weights.vram().begin_stage()?;
        let stage = Self {
            limits,
            batch: Batch::new(tokens, options.kv.device_blocks, Vec::new()),
            run_blocks: attend::run_blocks(weights.gpu(), program),
            has_moved: Cell::new(false),
            ends_moved: Cell::new(false),
            last: last_ops(&program.ops),
            graphs: Graphs::new(weights.vram().recorded_bytes_max()),
            _reserved: reserved,
            op_marks: None,
            kv: Arc::new(GpuKv::new(&weights, options.kv, options.huge_pages())?),
            buffers: GpuBuffers::new(&weights, tokens, store)?,
            samplers: RowSamplers::new(
                SAMPLERS,
                program.dims.vocab,
                if program.dims.vocab > 0 { tokens } else { 0 },
            ),
            failure: None,
            spill: spill.map(|lane| GpuSpill::start(&weights, options, lane)).transpose()?,
            weights,
        };
        stage.weights.vram().log();
        Ok(stage)
    }

    /// The weights, for another stage.
    pub fn weights(&self) -> &Arc<GpuWeights> {
        &self.weights
    }

    /// The KV blocks, for the thread that copies them to and from other tiers. They live until both
    /// have let them go.
    pub fn kv(&self) -> Arc<dyn KvBlocks> {
        Arc::clone(&self.kv) as _
    }

    /// Bytes held on the GPU.
    pub fn memory(&self) -> StageMemory {
        StageMemory {
            weight_bytes: self.weights.bytes(),
            kv_bytes: self.kv.bytes(),
            activation_bytes: self.buffers.bytes(),
            ring_bytes: self.spill.as_ref().map_or(0, GpuSpill::bytes),
            graph_bytes: self.graphs.bytes() as usize,
        }
    }

    /// Runs one step: copies between its blocks, then all tokens, then the wanted logits. Where the
    /// GPU has no memory for what a step brings along, the step is refused
    /// ([`StepOutput::refusal`]) and the stage goes on.
    ///
    /// # Errors
    /// A plan that does not add up (nothing was done), or a failure of the GPU: after that every
    /// further step fails, and the stage is to be replaced.
    pub fn run(&mut self, plan: &StepPlan, output: &mut StepOutput) -> Result<(), ExecutorError> {
        let started = Instant::now();
        if let Some(failure) = &self.failure {
            return Err(ExecutorError::GpuStageFailed { reason: failure.clone() });
        }
        output.clear();
        output.step = plan.step;
        self.check(plan)?;
        match self.compute_marked(plan, started) {
            Ok(()) => self.samplers.gather(output),
            Err(error) => output.refusal = Some(refused(error, &mut self.failure)?),
        }
        output.duration_us = started.elapsed().as_micros() as u64;
        Ok(())
    }

    /// Reads a plan.
    ///
    /// # Errors
    /// It does not add up: then nothing has been done.
    fn check(&mut self, plan: &StepPlan) -> Result<(), ExecutorError> {
        self.batch.prepare(plan, self.limits)?;
        self.kv.check(&plan.copies)
    }

    /// Where the residual stream of `tokens` tokens comes from another stage, `[tokens,
    /// embedding_dim]` f32, and the GPU.
    pub(super) fn incoming(&self, tokens: usize) -> (&Gpu, Span<'_>) {
        let residual = &self.buffers.residual;
        (self.weights.gpu(), residual.values().part(0, tokens * residual.cols * size_of::<f32>()))
    }

    /// Where that of the step that was launched lies when it goes on to another stage.
    pub(super) fn outgoing(&self, tokens: usize) -> (&Gpu, Span<'_>) {
        let bytes = tokens * self.buffers.residual.cols * size_of::<f32>();
        (self.weights.gpu(), self.residual()[0].part(0, bytes))
    }

    fn compute_marked(&mut self, plan: &StepPlan, started: Instant) -> Result<(), ExecutorError> {
        self.mark_start()?;
        self.compute(plan)?;
        if plan.logits.is_empty() {
            // Nobody has waited for it.
            self.kv.keep_order()?;
        }
        if plan.tokens.is_empty() { Ok(()) } else { self.count_ops(started.elapsed()) }
    }
}

/// What a step that failed is refused with.
///
/// # Errors
/// It failed for another reason than too little memory, of the GPU or of the host: the stage has
/// failed with it.
fn refused(
    error: ExecutorError,
    failure: &mut Option<String>,
) -> Result<RequestError, ExecutorError> {
    let suggest = "try again when fewer or shorter requests run";
    let lacks = |device: String, need: usize, free: u64| RequestError::InsufficientMemory {
        device,
        need: need as u64,
        free,
        suggest: suggest.into(),
    };
    match error {
        // Memory is asked for before anything of the step is started there. What the driver lacks
        // by itself may have come to light in the middle of it.
        ExecutorError::Gpu(GpuError::OutOfMemory {
            ordinal,
            need_bytes: Some(need),
            free_bytes,
            ..
        }) => Ok(lacks(format!("GPU {ordinal}"), need, free_bytes.unwrap_or(0) as u64)),
        ExecutorError::Gpu(GpuError::HostOutOfMemory { need_bytes, .. }) => {
            let (_, free) = HardwareProfile::read_memory(Path::new("/"));
            Ok(lacks("host memory".into(), need_bytes, free))
        }
        ExecutorError::Vram(error) => Ok(error.refusal(suggest)),
        error => {
            *failure = Some(error.to_string());
            Err(error)
        }
    }
}

fn last_ops(ops: &[Op]) -> Option<LastOps> {
    let selected = ops.iter().find_map(|op| match op {
        Op::Select { pending, norm } => Some((*pending, *norm)),
        _ => None,
    });
    let logits = ops.iter().find_map(|op| match op {
        Op::Logits { output, softcap } => Some((*output, *softcap)),
        _ => None,
    });
    let ((pending, norm), (output, softcap)) = selected.zip(logits)?;
    Some(LastOps { pending, norm, output, softcap })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Ledger;

    fn refusal_of_the_ledger(need_bytes: usize) -> ExecutorError {
        Ledger::new(2, 5).reserve("activations", need_bytes as u64).unwrap_err().into()
    }

    #[test]
    fn too_little_memory_refuses_a_step_and_leaves_the_stage_alone() {
        let need_bytes = 1 << 30;
        let full = |need_bytes| GpuError::OutOfMemory {
            ordinal: 2,
            what: "allocating memory",
            need_bytes,
            free_bytes: Some(5),
        };
        let mut failure = None;
        for (error, device) in [
            (full(Some(need_bytes)).into(), "GPU 2"),
            (GpuError::HostOutOfMemory { ordinal: 2, need_bytes }.into(), "host memory"),
            (refusal_of_the_ledger(need_bytes), "GPU 2 (activations)"),
        ] {
            let refusal = refused(error, &mut failure).expect("a refusal of the step");
            let RequestError::InsufficientMemory { device: of, need, .. } = refusal else {
                panic!("{refusal:?}");
            };
            assert_eq!((of.as_str(), need), (device, need_bytes as u64));
            assert_eq!(failure, None, "the stage goes on");
        }
        let hung = GpuError::Hung { ordinal: 2, wait_max_ms: 7 };
        for error in [full(None), hung] {
            let mut failure = None;
            assert!(refused(error.into(), &mut failure).is_err() && failure.is_some());
        }
    }
}
