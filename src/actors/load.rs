//! Loads a model: file → spec → vocabulary, template and placement → weights.

use super::builder::OnProgress;
use super::root::Source;
use super::shared::Shared;
use super::stage::{CpuStages, GpuStages, StageFactory, StepRunner};
use super::stage_fault::StageFault;
use super::{EngineError, LoadProgress, ModelInfo};
use crate::config::{Config, ConfigError};
use crate::executor::{
    ExecutorError, FLOAT_WIDTH_BORDERS, KvOptions, PoolOptions, SpilledLayers, StageOptions,
    StagePart, StepPasses, TierOptions, VramPlan, WIDTH_BORDERS,
};
use crate::formats::{Checkpoint, FormatError};
use crate::hardware::{
    Fingerprint, HardwareProfile, Measured, Topology, keep_current_thread_on, load_measured,
    probe_file,
};
use crate::kv::TierBlocks;
use crate::model::ModelSpec;
use crate::placement::{Device, Phase, Placement, Prediction, StagePlacement, Workers};
use crate::request::RequestError;
use crate::scheduler::{KvStore, SchedulerOptions, TierRates};
use crate::tokenizer::{ChatTemplate, TemplateConfig, Tokenizer};
use crate::units::TokenId;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use tandem_cpu_kernels::Isa;

/// The stages' maker, until the engine ends and lets the weights go.
pub(super) struct StageSlot(Mutex<Option<Arc<dyn StageFactory>>>);

impl StageSlot {
    pub(super) fn start(&self) -> Result<Box<dyn StepRunner>, StageFault> {
        let factory = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        factory.ok_or("the engine has ended")?.start()
    }

    pub(super) fn release(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// Everything about the model that does not change while the engine lives.
pub(super) struct Loaded {
    pub(super) info: ModelInfo,
    pub(super) placement: Placement,
    pub(super) tokenizer: Arc<Tokenizer>,
    pub(super) template: ChatTemplate,
    pub(super) end_tokens: Vec<TokenId>,
    /// Steps of up to so many tokens give a token the same bits, ascending.
    width_borders: &'static [usize],
    /// What copies between KV tiers and prompts take, as far as known before anything ran.
    pub(super) rates: TierRates,
    pub(super) stages: StageSlot,
}

impl Loaded {
    /// Keeps the calling thread, which serves a GPU, near to it where that is known.
    pub(super) fn keep_near_gpu(&self) {
        if let Err(error) = keep_current_thread_on(&self.placement.workers.gpu_threads) {
            tracing::warn!(%error, "a thread that serves the GPU may run far from it");
        }
    }

    /// Refuses tokens outside the vocabulary.
    pub(super) fn check_tokens(&self, field: &str, tokens: &[TokenId]) -> Result<(), RequestError> {
        let vocab_tokens = self.info.vocab_tokens;
        match tokens.iter().find(|token| token.index() >= vocab_tokens) {
            None => Ok(()),
            Some(token) => Err(RequestError::InvalidParams {
                field: field.into(),
                got: token.to_string(),
                allowed: format!("token ids below {vocab_tokens}"),
            }),
        }
    }
}

/// Loads the model that the configuration names.
pub(super) fn load(shared: &Arc<Shared>, source: Source) -> Result<Loaded, EngineError> {
    let config = &shared.config;
    let checkpoint = Arc::new(Checkpoint::open(&config.model.path).map_err(refuse)?);
    let spec = Arc::new(ModelSpec::from_checkpoint(&checkpoint).map_err(refuse)?);
    let tokenizer = Tokenizer::from_metadata(checkpoint.metadata()).map_err(RequestError::from)?;
    let limits = TemplateConfig {
        fuel: config.template.fuel,
        output_bytes_max: config.template.output_bytes_max.0 as usize,
        ..TemplateConfig::default()
    };
    let template = ChatTemplate::from_metadata(checkpoint.metadata(), &tokenizer, limits)
        .map_err(RequestError::from)?;
    let warnings = [tokenizer.warnings(), template.warnings()].concat();
    let mut hardware = HardwareProfile::detect_for(&config.gpu.choice()?);
    // Asked for first, since it names a bad knob as such.
    hardware.measured = known_rates(&hardware, config, source.probe_folder.as_deref())?;
    let placement = Placement::plan(&spec, &hardware, config)?;
    let config = &placement.settled(config);
    tracing::info!(chosen = %placement.workers, "compute workers");
    let rates = tier_rates(&spec, &placement, &hardware, config);
    for note in &placement.notes {
        tracing::warn!(note, "placement");
    }
    let factory = match source.stages {
        Some(factory) => factory,
        None => {
            let kv = KvOptions {
                block_tokens: config.kv.block_tokens,
                dtype: placement.kv_dtype,
                device_blocks: placement.device_blocks,
            };
            let options = stage_options(config, &hardware.topology, kv)?;
            let (threads, cores) = (placement.workers.threads, placement.workers.cores());
            let nodes = placement.workers.nodes.clone();
            let pool = PoolOptions { threads, cores, nodes, ..options.pool };
            let options = StageOptions { pool, ..options };
            let model = (checkpoint, Arc::clone(&spec));
            let tiers = tier_options(config, &placement)?;
            load_weights(shared, model, (&placement, options, tiers), source.on_progress)
                .map_err(|error| unloaded(error, &placement, config))?
        }
    };
    Ok(Loaded {
        info: model_info(config, &spec, &placement, &warnings),
        width_borders: width_borders(&spec, &placement),
        rates,
        placement,
        template,
        end_tokens: tokenizer.end_tokens().to_vec(),
        tokenizer: Arc::new(tokenizer),
        stages: StageSlot(Mutex::new(Some(factory))),
    })
}

/// Widths up to which steps of a model give a token the same bits; none where they never differ.
fn width_borders(spec: &ModelSpec, placement: &Placement) -> &'static [usize] {
    if *placement.device() == Device::Cpu {
        return &[];
    }
    let mut has_floats = false;
    spec.for_each_tensor(&mut |tensor| {
        has_floats |= tensor.rows > 1 && !tensor.dtype.is_quantized()
    });
    if has_floats { &FLOAT_WIDTH_BORDERS } else { &WIDTH_BORDERS }
}

/// What copies between KV tiers and prompts take on this machine: what was measured and what is
/// predicted from it, else what is typical.
fn tier_rates(
    spec: &ModelSpec,
    placement: &Placement,
    hardware: &HardwareProfile,
    config: &Config,
) -> TierRates {
    let typical = TierRates::default();
    let Some(measured) = &hardware.measured else { return typical };
    let host_bytes = match placement.device() {
        // A copy reads and writes, and one thread makes it.
        Device::Cpu => measured.reads.first().map(|reads| reads.bytes_per_second / 2.0),
        Device::Gpu(index) => {
            let rates = measured.gpus.iter().find(|rates| rates.ordinal == *index);
            rates.map(|rates| rates.pinned.to_gpu.min(rates.pinned.from_gpu))
        }
    };
    let prediction = Prediction::of(spec, placement, hardware, config);
    let prompt = prediction.and_then(|prediction| prediction.prompt.first().copied());
    TierRates {
        host_bytes: host_bytes.unwrap_or(typical.host_bytes),
        disk_bytes: measured.disk.as_ref().map_or(typical.disk_bytes, |d| d.bytes_per_second),
        prompt_tokens: prompt.map_or(typical.prompt_tokens, |prompt| prompt.tokens_per_second),
    }
}

/// The tiers behind the KV store.
fn tier_options(config: &Config, placement: &Placement) -> Result<TierOptions, ConfigError> {
    let folder = match config.kv.disk_folder.as_path() {
        empty if empty.as_os_str().is_empty() => Path::new("/tmp"),
        folder => folder,
    };
    if placement.disk_blocks > 0 && !folder.is_dir() {
        return Err(ConfigError {
            field: "kv.disk_folder".into(),
            got: folder.display().to_string(),
            allowed: "a folder that is there and can be written to".into(),
        });
    }
    Ok(TierOptions {
        host_blocks: placement.host_blocks,
        disk_blocks: placement.disk_blocks,
        disk_folder: folder.to_owned(),
    })
}

fn refuse(error: FormatError) -> EngineError {
    EngineError::Model(error.into())
}

fn load_weights(
    shared: &Shared,
    model: (Arc<Checkpoint>, Arc<ModelSpec>),
    (placement, options, tiers): (&Placement, StageOptions, TierOptions),
    mut on_progress: Option<OnProgress>,
) -> Result<Arc<dyn StageFactory>, ExecutorError> {
    let mut report = |progress: crate::executor::LoadProgress| {
        let progress = LoadProgress {
            done_bytes: progress.done_bytes as u64,
            total_bytes: progress.total_bytes as u64,
        };
        shared.report_load(progress);
        if let Some(hear) = &mut on_progress {
            hear(progress);
        }
    };
    let on_gpus = on_gpus(&parts_of(&model.1, placement));
    let plans: Vec<_> = placement.stages.iter().map(VramPlan::of).collect();
    let options = (options, tiers);
    if on_gpus.is_empty() {
        let stages = CpuStages::load(model, options, &mut report)?;
        return Ok(Arc::new(stages));
    }
    let on = (&on_gpus[..], &plans[..], &shared.config.gpu);
    Ok(Arc::new(GpuStages::load(on, model, options, &mut report)?))
}

/// What the engine ends with when weights could not be loaded.
fn unloaded(error: ExecutorError, placement: &Placement, config: &Config) -> EngineError {
    if let ExecutorError::Format(error) = error {
        return refuse(error);
    }
    let end = StageFault::from(&error).end(0, Phase::Loading, (placement, config));
    end.unwrap_or_else(|| EngineError::Model(RequestError::Internal { message: error.to_string() }))
}

fn model_info(
    config: &Config,
    spec: &ModelSpec,
    placement: &Placement,
    warnings: &[String],
) -> ModelInfo {
    let unused = spec.unused_tensors.iter().map(|name| format!("tensor {name} is not used"));
    ModelInfo {
        name: config.model.name(),
        title: spec.name.clone(),
        architecture: spec.architecture.to_owned(),
        path: config.model.path.clone(),
        vocab_tokens: spec.vocab_size,
        context_tokens: placement.context_tokens,
        context_tokens_max: spec.context_tokens_max,
        layers: spec.layers.len(),
        weight_bytes: spec.weight_bytes(),
        kv_bytes_per_token: spec.kv_bytes_per_token(placement.kv_dtype),
        warnings: warnings.iter().chain(&placement.notes).cloned().chain(unused).collect(),
    }
}

/// What was measured of this machine and kept in a folder, if it was and still holds. Measures
/// nothing.
///
/// # Errors
/// A setting of the workers is wrong.
pub fn known_rates(
    hardware: &HardwareProfile,
    config: &Config,
    folder: Option<&Path>,
) -> Result<Option<Measured>, EngineError> {
    let workers = Workers::choose(&hardware.topology, &config.cpu)?;
    let isa = compute_isa(config, workers.threads)?;
    let fingerprint = Fingerprint::of(hardware, (workers.threads, &workers.cpus), isa);
    Ok(folder.and_then(|folder| load_measured(&probe_file(folder), &fingerprint)))
}

/// Whose kernels so many compute workers run, by the configuration.
///
/// # Errors
/// An instruction set that is not there.
pub fn compute_isa(config: &Config, workers: usize) -> Result<Isa, EngineError> {
    let name = config.cpu.isa.as_str();
    if name == "auto" {
        return Ok(Isa::for_workers(workers));
    }
    let allowed = || {
        let names: Vec<&str> = Isa::available().map(Isa::name).collect();
        format!("auto, {}", names.join(", "))
    };
    let chosen = name.parse::<Isa>().ok().filter(|isa| isa.is_available());
    chosen.ok_or_else(|| {
        let (field, got) = ("cpu.isa".to_owned(), name.to_owned());
        EngineError::Config(ConfigError { field, got, allowed: allowed() })
    })
}

/// How a stage of all layers is made here: threads, pinning, kernels and step width by the
/// configuration that a placement has settled, with the given KV blocks. The engine and benchmarks
/// share it.
///
/// # Errors
/// An instruction set that is not there, or more threads than the machine can run.
pub fn stage_options(
    config: &Config,
    topology: &Topology,
    kv: KvOptions,
) -> Result<StageOptions, EngineError> {
    let workers = Workers::choose(topology, &config.cpu)?;
    let (threads, cores) = (workers.threads, workers.cores());
    Ok(StageOptions {
        part: None,
        pool: PoolOptions { threads, cores, nodes: workers.nodes, spin_us: config.cpu.spin_us },
        isa: Some(compute_isa(config, threads)?),
        huge_pages: config.cpu.huge_pages,
        kv,
        step_tokens_max: config.scheduler.step_tokens_max,
        passes: StepPasses::ByCost,
        spill_streamed: config.gpu.streamed_percent()?,
    })
}

/// What the stages of a placement run of a model, in the order of the layers.
pub fn parts_of(spec: &ModelSpec, placement: &Placement) -> Vec<(Device, StagePart)> {
    let layers = spec.layers.len();
    let cuts: Vec<_> = placement.stages.iter().skip(1).map(|stage| stage.layers.start).collect();
    let parts = StagePart::cut(layers, &cuts).into_iter().zip(&placement.stages);
    let without = |(part, stage): (StagePart, &StagePlacement)| match &stage.spill {
        Some(spill) => part.without(SpilledLayers {
            feed_forward: spill.layers.clone(),
            attention: spill.attention_layers.clone(),
            ring_slots: spill.ring_slots,
        }),
        None => part,
    };
    let devices = placement.stages.iter().map(|stage| stage.device.clone());
    devices.zip(parts.map(without)).collect()
}

/// Those parts that lie on GPUs, with the GPU's index: all, or none.
pub fn on_gpus(parts: &[(Device, StagePart)]) -> Vec<(usize, StagePart)> {
    let of = |(device, part): &(Device, StagePart)| match device {
        Device::Gpu(index) => Some((*index, part.clone())),
        Device::Cpu => None,
    };
    parts.iter().filter_map(of).collect()
}

/// Sequences that may be alive at once, running or waiting.
pub(super) fn sequences_alive_max(config: &Config) -> usize {
    config.scheduler.sequences_max + config.scheduler.queue_max
}

impl Loaded {
    /// Options of a scheduler for this placement, with a fresh key for its prefix cache.
    pub(super) fn scheduler_options(&self, config: &Config) -> Result<SchedulerOptions, String> {
        let mut prefix_key = [0; 16];
        getrandom::fill(&mut prefix_key).map_err(|error| format!("no random key: {error}"))?;
        let kv = KvStore {
            blocks: TierBlocks {
                device: self.placement.device_blocks,
                host: self.placement.host_blocks,
                disk: self.placement.disk_blocks,
            },
            rates: self.rates,
            block_bytes: self.placement.block_bytes(),
            context_tokens: self.placement.context_tokens,
        };
        let settled = self.placement.settled(config);
        let mut options = SchedulerOptions::from_config(&settled, kv, prefix_key);
        if let Some(speculation) = &mut options.speculation {
            speculation.width_borders = self.width_borders;
        }
        // Credits bound the sequences at the edge. Behind it none is refused: after a crash all of
        // them come back at once, before any can run.
        Ok(SchedulerOptions { queue_max: sequences_alive_max(config), ..options })
    }
}
