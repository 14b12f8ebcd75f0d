//! Weights and stages on either device, as a benchmark drives them.

use anyhow::Result;
use std::sync::Arc;
use tandem::executor::{
    ExecutorError, GpuPipeline, GpuStage, GpuWeights, OpTime, Stage, StageOptions, Weights,
};
use tandem::step::{StepOutput, StepPlan};
use tandem_kernels::PeerCopies;

/// Loaded weights.
#[derive(Clone)]
pub enum DeviceWeights {
    Cpu(Arc<Weights>),
    /// By GPU, in the order of the layers; and what crosses between them.
    Gpus(Vec<Arc<GpuWeights>>, PeerCopies),
}

/// A stage on them.
pub enum DeviceStage {
    Cpu(Box<Stage>),
    Gpu(Box<GpuStage>),
    Gpus(Box<GpuPipeline>),
}

impl DeviceWeights {
    /// A stage with an empty KV store.
    ///
    /// # Errors
    /// Memory or threads refused.
    pub fn stage(&self, options: &StageOptions) -> Result<DeviceStage> {
        Ok(match self {
            Self::Cpu(weights) => {
                DeviceStage::Cpu(Box::new(Stage::restart(Arc::clone(weights), options)?))
            }
            Self::Gpus(parts, copies) => match &parts[..] {
                [weights] => {
                    DeviceStage::Gpu(Box::new(GpuStage::start(Arc::clone(weights), options)?))
                }
                parts => DeviceStage::Gpus(Box::new(GpuPipeline::start(parts, options, *copies)?)),
            },
        })
    }

    /// Bytes of memory held.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Cpu(weights) => weights.bytes(),
            Self::Gpus(parts, _) => {
                parts.iter().map(|weights| weights.bytes() + weights.spilled_bytes()).sum()
            }
        }
    }

    /// Bytes that a step of one token reads.
    pub fn bytes_per_token(&self) -> usize {
        match self {
            Self::Cpu(weights) => weights.bytes_per_token(),
            Self::Gpus(parts, _) => parts.iter().map(|weights| weights.bytes_per_token()).sum(),
        }
    }

    /// llama-bench's word for what computes.
    pub fn backend(&self) -> &'static str {
        match self {
            Self::Cpu(_) => "CPU",
            Self::Gpus(..) => "CUDA",
        }
    }

    /// How the time of ops is measured: in words for a reader of the figures.
    pub fn op_clock(&self) -> &'static str {
        match self {
            Self::Cpu(_) => "clocks of the workers",
            Self::Gpus(parts, _) if parts.len() > 1 => "none: ops of several GPUs are not timed",
            Self::Gpus(..) => "marks between ops that are launched one by one",
        }
    }

    /// The instruction set of a CPU's kernels; empty on a GPU.
    pub fn isa(&self) -> &'static str {
        match self {
            Self::Cpu(weights) => weights.kernels().isa().name(),
            Self::Gpus(..) => "",
        }
    }
}

impl DeviceStage {
    /// Runs one step.
    ///
    /// # Errors
    /// See the stages.
    pub fn run(&mut self, plan: &StepPlan, output: &mut StepOutput) -> Result<(), ExecutorError> {
        match self {
            Self::Cpu(stage) => stage.run(plan, output),
            Self::Gpu(stage) => stage.run(plan, output),
            Self::Gpus(stages) => stages.run(plan, output),
        }
    }

    /// Workers that the system did not let be pinned.
    pub fn pin_failures(&self) -> usize {
        match self {
            Self::Cpu(stage) => stage.pin_failures().len(),
            Self::Gpu(_) | Self::Gpus(_) => 0,
        }
    }

    /// Begins to count the time of each op; of several GPUs none is.
    ///
    /// # Errors
    /// What a GPU's driver refuses.
    pub fn start_op_times(&mut self) -> Result<(), ExecutorError> {
        match self {
            Self::Cpu(stage) => stage.start_op_times(),
            Self::Gpu(stage) => stage.start_op_times()?,
            Self::Gpus(_) => {}
        }
        Ok(())
    }

    /// Ends the counting.
    pub fn take_op_times(&mut self) -> Vec<OpTime> {
        let times = match self {
            Self::Cpu(stage) => stage.take_op_times(),
            Self::Gpu(stage) => stage.take_op_times(),
            Self::Gpus(_) => None,
        };
        times.unwrap_or_default()
    }
}
