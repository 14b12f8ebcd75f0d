//! A model whose layers lie on several GPUs: a stage on each, which hand the residual stream on
//! (`handoff/gpu.rs`). One thread launches a step's stages one after the other on their streams,
//! each of which waits for the one before by an event, and waits itself at the end alone, where the
//! last stage samples.
//!
//! A step without wanted logits is not waited for. So of a prompt in several steps a stage computes
//! one while the next stage computes the one before: all GPUs are at work then.
//!
//! What the stages have spilled streams to each GPU through its own ring, from a thread of its own:
//! such steps overlap as well, and a stage's next one begins when the weights of the last are sent.
//! The CPU serves all stages. So a step of which it computes anything is waited for: it works on
//! one step at a time, for one stage after the other, as these work on it.

use super::pipeline_kv::PipelineKv;
use super::spill::GpuSpill;
use super::spill_thread::SpillThread;
use super::weights::GpuWeights;
use super::{GpuStage, refused};
use crate::executor::handoff::GpuHandoff;
use crate::executor::{ExecutorError, KvBlocks, StageMemory, StageOptions};
use crate::step::{StepOutput, StepPlan};
use std::sync::Arc;
use std::time::Instant;
use tandem_kernels::{GpuError, PeerCopies};

/// The stages of a model on several GPUs, ready to run steps. They are made, fail and are replaced
/// together.
pub struct GpuPipeline {
    // Dropped first: they use the stages' memory.
    /// Between a stage and the next.
    handoffs: Vec<GpuHandoff>,
    stages: Vec<GpuStage>,
    failure: Option<String>,
}

impl GpuPipeline {
    /// Stages with empty KV stores on weights that are there already ([`GpuWeights::load_parts`]).
    ///
    /// # Errors
    /// A GPU's memory does not hold its stage.
    pub fn start(
        weights: &[Arc<GpuWeights>],
        options: &StageOptions,
        copies: PeerCopies,
    ) -> Result<Self, ExecutorError> {
        let spill = SpillThread::start(weights, options)?;
        let (mut stages, mut lane) = (Vec::new(), 0);
        for part in weights {
            let spill = part.spilled().and(spill.as_ref()).map(|thread| (Arc::clone(thread), lane));
            lane += usize::from(spill.is_some());
            stages.push(GpuStage::of_part(Arc::clone(part), options, spill)?);
        }
        let neighbours = stages.iter().zip(stages.iter().skip(1));
        let handoffs =
            neighbours.map(|pair| GpuHandoff::new(pair, options.step_tokens_max, copies));
        Ok(Self { handoffs: handoffs.collect::<Result<_, _>>()?, stages, failure: None })
    }

    /// The KV blocks of all stages, as [`GpuStage::kv`].
    pub fn kv(&self) -> Arc<dyn KvBlocks> {
        let stages = self.stages.iter().map(|stage| Arc::clone(&stage.kv)).collect();
        Arc::new(PipelineKv::new(stages))
    }

    /// Bytes held on each GPU, in the order of the layers.
    pub fn memory(&self) -> Vec<StageMemory> {
        self.stages.iter().map(GpuStage::memory).collect()
    }

    /// Runs one step, as [`GpuStage::run`].
    ///
    /// # Errors
    /// As of it. A failure of a GPU names that GPU.
    pub fn run(&mut self, plan: &StepPlan, output: &mut StepOutput) -> Result<(), ExecutorError> {
        let started = Instant::now();
        if let Some(failure) = &self.failure {
            return Err(ExecutorError::GpuStageFailed { reason: failure.clone() });
        }
        output.clear();
        output.step = plan.step;
        for stage in &mut self.stages {
            stage.check(plan)?;
        }
        match self.compute(plan) {
            Ok(()) => self.gather(output),
            Err(error) => {
                output.refusal = Some(refused(error, &mut self.failure)?);
                // Stages before the one that refused it work on blocks that are given back.
                self.stages.iter().try_for_each(|stage| stage.kv.keep_order())?;
            }
        }
        output.duration_us = started.elapsed().as_micros() as u64;
        Ok(())
    }

    fn compute(&mut self, plan: &StepPlan) -> Result<(), ExecutorError> {
        // All of them first: a step that is refused has made its copies everywhere.
        for stage in &mut self.stages {
            stage.kv.copy(&plan.copies)?;
        }
        if plan.tokens.is_empty() {
            return Ok(());
        }
        let launched = self.launch(plan);
        let done = self.finish_spilled(launched.is_ok() && plan.logits.is_empty());
        use GpuError::{HostOutOfMemory, OutOfMemory};
        match launched {
            // That step is refused, unless the stages before it have failed.
            Err(
                ExecutorError::Vram(_)
                | ExecutorError::Gpu(OutOfMemory { .. } | HostOutOfMemory { .. }),
            ) if done.is_err() => return done,
            launched => launched?,
        }
        if plan.logits.is_empty() {
            // Nobody waits for it.
            self.stages.iter().try_for_each(|stage| stage.kv.keep_order())?;
        } else {
            // A GPU that failed is why the CPU was not answered.
            self.sample(plan)?;
        }
        done?;
        let readers = self.stages.iter().skip(1);
        self.handoffs.iter().zip(readers).try_for_each(|(handoff, stage)| handoff.used(stage))
    }

    /// Launches a step in all stages.
    fn launch(&mut self, plan: &StepPlan) -> Result<(), ExecutorError> {
        for index in 0..self.stages.len() {
            let (before, others) = self.stages.split_at_mut(index);
            let stage = &mut others[0];
            // These may wait for the step before: the stage ahead is at work meanwhile.
            stage.finish_spilled()?;
            let shape = stage.begin(plan)?;
            if let Some(from) = before.last() {
                self.handoffs[index - 1].carry((from, &*stage), shape.tokens)?;
            }
            stage.start_shape(shape)?;
        }
        Ok(())
    }

    /// Waits for the host's side of a step in all stages, unless it may go on beside the next one:
    /// it does where weights are sent alone, and no other model of this process has to wait.
    fn finish_spilled(&self, may_go_on: bool) -> Result<(), ExecutorError> {
        let spills = || self.stages.iter().filter_map(|stage| stage.spill.as_ref());
        // Else there might be no time without a stage's stream in a prompt of many steps.
        let is_waited_for = |spill: &GpuSpill| spill.is_computing() || spill.is_in_the_way();
        if may_go_on && !spills().any(is_waited_for) {
            return Ok(());
        }
        let mut done = Ok(());
        for spill in spills() {
            // Each has to be waited for, whatever became of those before.
            done = done.and(spill.finish());
        }
        done
    }

    /// Waits for the stages in their order, so that whichever does not come to its end is named,
    /// and samples.
    fn sample(&mut self, plan: &StepPlan) -> Result<(), ExecutorError> {
        let Some((last, others)) = self.stages.split_last_mut() else { return Ok(()) };
        for stage in others {
            stage.weights.gpu().synchronize()?;
            stage.buffers.inputs.arrived();
        }
        last.sample(plan)
    }

    fn gather(&mut self, output: &mut StepOutput) {
        if let Some(last) = self.stages.last_mut() {
            last.samplers.gather(output);
        }
    }
}
