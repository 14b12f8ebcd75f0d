//! A model whose layers lie on several GPUs: a stage on each, which hand the residual stream on
//! (`handoff/gpu.rs`). One thread launches a step's stages one after the other on their streams,
//! each of which waits for the one before by an event, and waits itself at the end alone, where the
//! last stage samples.
//!
//! A step without wanted logits is not waited for. So of a prompt in several steps a stage computes
//! one while the next stage computes the one before: all GPUs are at work then.

use super::pipeline_kv::PipelineKv;
use super::weights::GpuWeights;
use super::{GpuStage, refused};
use crate::executor::cpu_pool::CpuPool;
use crate::executor::handoff::GpuHandoff;
use crate::executor::program::{Program, StagePart};
use crate::executor::weights::{LoadProgress, WeightsRequest};
use crate::executor::{ExecutorError, KvBlocks, StageMemory, StageOptions};
use crate::step::{StepOutput, StepPlan};
use std::sync::Arc;
use std::time::Instant;
use tandem_kernels::PeerCopies;

/// The stages of a model on several GPUs, ready to run steps. They are made, fail and are replaced
/// together.
pub struct GpuPipeline {
    // Dropped first: they use the stages' memory.
    /// Between a stage and the next.
    handoffs: Vec<GpuHandoff>,
    stages: Vec<GpuStage>,
    failure: Option<String>,
}

impl GpuWeights {
    /// Loads the parts of a model, each with the ordinal of its GPU; of `request` all counts but
    /// its own part. What ends one of the GPUs ends all, since they wait for each other.
    ///
    /// # Errors
    /// As of [`GpuWeights::load`].
    ///
    /// # Panics
    /// As of it.
    pub fn load_parts(
        parts: &[(usize, StagePart)],
        request: &WeightsRequest,
        mut pool: Option<&mut CpuPool>,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Vec<Arc<Self>>, ExecutorError> {
        let totals = parts.iter().map(|(_, part)| {
            let program = Program::lower(&request.spec, part)?;
            Ok(program.matrices.iter().map(|entry| entry.tensor.bytes()).sum::<u64>() as usize)
        });
        let totals = totals.collect::<Result<Vec<_>, ExecutorError>>()?;
        let total_bytes = totals.iter().sum();
        let (mut loaded, mut before) = (Vec::<Arc<Self>>::new(), 0);
        for ((ordinal, part), total) in parts.iter().zip(totals) {
            let request = WeightsRequest { part: part.clone(), ..request.clone() };
            let mut report = |of_part: LoadProgress| {
                progress(LoadProgress { done_bytes: before + of_part.done_bytes, total_bytes });
            };
            let pool = pool.as_deref_mut();
            loaded.push(Arc::new(match loaded.first() {
                None => Self::load(*ordinal, &request, pool, &mut report)?,
                Some(first) => {
                    let open = || first.gpu().open_beside(*ordinal);
                    Self::load_on(&request, pool, &mut report, open)?
                }
            }));
            before += total;
        }
        Ok(loaded)
    }
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
        let stages = weights.iter().map(|part| GpuStage::of_part(Arc::clone(part), options));
        let stages = stages.collect::<Result<Vec<_>, _>>()?;
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
        self.launch(plan)?;
        if plan.logits.is_empty() {
            // Nobody waits for it.
            self.stages.iter().try_for_each(|stage| stage.kv.keep_order())?;
        } else {
            self.sample(plan)?;
        }
        let readers = self.stages.iter().skip(1);
        self.handoffs.iter().zip(readers).try_for_each(|(handoff, stage)| handoff.used(stage))
    }

    /// Launches a step in all stages.
    fn launch(&mut self, plan: &StepPlan) -> Result<(), ExecutorError> {
        for index in 0..self.stages.len() {
            let (before, others) = self.stages.split_at_mut(index);
            let stage = &mut others[0];
            // This may wait for the step before: the stage ahead is at work meanwhile.
            let shape = stage.begin(plan, 0)?;
            if let Some(from) = before.last() {
                self.handoffs[index - 1].carry((from, &*stage), shape.tokens)?;
            }
            stage.run_shape(shape)?;
        }
        Ok(())
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
