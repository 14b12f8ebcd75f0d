//! Loads the weights of a model to one GPU or several, and what is spilled into host memory.

use super::spill_weights::SpilledWeights;
use super::vram::VramPlan;
use super::weights::GpuWeights;
use crate::executor::ExecutorError;
use crate::executor::cpu_pool::CpuPool;
use crate::executor::program::{Program, StagePart};
use crate::executor::weights::{LoadProgress, WeightsRequest};
use std::sync::Arc;
use tandem_kernels::{Gpu, GpuError, driver};

impl GpuWeights {
    /// Opens a GPU and loads a model's weights there, and spilled ones into host memory. `pool`
    /// makes rows that no file has as they are, and random ones, and interleaves spilled ones: it
    /// is needed for those alone.
    ///
    /// # Errors
    /// No such GPU, too little of its memory, a model that the kernels can't run, or a bad tensor.
    ///
    /// # Panics
    /// When such weights are wanted and there is no pool.
    pub fn load(
        ordinal: usize,
        request: &WeightsRequest,
        pool: Option<&mut CpuPool>,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, ExecutorError> {
        let parts = [(ordinal, request.part.clone())];
        let mut loaded = load_all((&parts, &[]), request, pool, progress)?;
        Ok(loaded.pop().expect("the only part"))
    }

    /// Loads the parts of a model, each with the ordinal of its GPU; of `request` all counts but
    /// its own part. What ends one of the GPUs ends all, since they wait for each other. What they
    /// have spilled lies together.
    ///
    /// # Errors
    /// As of [`GpuWeights::load`].
    ///
    /// # Panics
    /// As of it.
    pub fn load_parts(
        parts: &[(usize, StagePart)],
        request: &WeightsRequest,
        pool: Option<&mut CpuPool>,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Vec<Arc<Self>>, ExecutorError> {
        Self::load_planned((parts, &[]), request, pool, progress)
    }

    /// The same within what is planned for each part, of which there are as many, or none. Before
    /// anything is loaded to a GPU, all that its stage is to take is reserved there.
    ///
    /// # Errors
    /// As of [`GpuWeights::load`]; or a GPU has less left than was planned
    /// ([`ExecutorError::Vram`]).
    ///
    /// # Panics
    /// As of it.
    pub fn load_planned(
        parts: (&[(usize, StagePart)], &[VramPlan]),
        request: &WeightsRequest,
        pool: Option<&mut CpuPool>,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Vec<Arc<Self>>, ExecutorError> {
        let loaded = load_all(parts, request, pool, progress)?;
        Ok(loaded.into_iter().map(Arc::new).collect())
    }
}

fn load_all(
    (parts, plans): (&[(usize, StagePart)], &[VramPlan]),
    request: &WeightsRequest,
    mut pool: Option<&mut CpuPool>,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Vec<GpuWeights>, ExecutorError> {
    request.source.check_unchanged()?;
    let spilled = StagePart::spilled_of(parts.iter().map(|(_, part)| part));
    let resident = parts.iter().map(|(_, part)| resident_bytes(request, part));
    let resident = resident.collect::<Result<Vec<_>, _>>()?;
    let of_host = spilled.as_ref().map(|part| resident_bytes(request, part)).transpose()?;
    let total_bytes = resident.iter().sum::<usize>() + of_host.unwrap_or(0);
    let (mut loaded, mut before) = (Vec::<GpuWeights>::new(), 0);
    for ((ordinal, part), bytes) in parts.iter().zip(resident) {
        let request = WeightsRequest { part: part.clone(), ..request.clone() };
        let mut report = |done_bytes| {
            progress(LoadProgress { done_bytes: before + done_bytes, total_bytes });
        };
        let pool = pool.as_deref_mut();
        let request = (&request, plans.get(loaded.len()).copied());
        loaded.push(match loaded.first() {
            None => {
                let driver = driver().map_err(GpuError::from)?;
                let open = || Gpu::open(&driver, *ordinal);
                GpuWeights::load_resident(request, pool, &mut report, open)?
            }
            Some(first) => {
                let open = || first.gpu().open_beside(*ordinal);
                GpuWeights::load_resident(request, pool, &mut report, open)?
            }
        });
        before += bytes;
    }
    if spilled.is_some() {
        let pool = pool.expect("workers for spilled weights");
        let mut report = |of_host: LoadProgress| {
            progress(LoadProgress { done_bytes: before + of_host.done_bytes, total_bytes });
        };
        let programs = loaded.iter().map(GpuWeights::program);
        let stages: Vec<_> = parts.iter().map(|(_, part)| part).zip(programs).collect();
        let gpu = loaded[0].gpu();
        let of_stages = SpilledWeights::load(gpu, request, &stages, (pool, &mut report))?;
        loaded.iter_mut().zip(of_stages).for_each(|(weights, spilled)| weights.spilled = spilled);
    }
    request.source.check_unchanged()?;
    Ok(loaded)
}

/// Bytes of the matrices that the stage of a part has itself.
fn resident_bytes(request: &WeightsRequest, part: &StagePart) -> Result<usize, ExecutorError> {
    let program = Program::lower(&request.spec, part)?;
    let resident = program.matrices.iter().filter(|entry| entry.spilled.is_none());
    Ok(resident.map(|entry| entry.tensor.bytes()).sum::<u64>() as usize)
}
