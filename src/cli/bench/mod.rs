//! `tandem bench`: tokens per second of a model or of a shape without a file, as shares of what the
//! machine can do. It owns tests, repetitions and their report; it must not know how a step is
//! computed. It drives a stage made as `tandem serve` makes it, and the command line calls it.

mod arguments;
mod device;
mod print;
mod record;
mod rig;
mod roofs;
mod work;

pub use arguments::BenchArguments;
pub use rig::made_up;

use super::loading::LoadMeter;
use super::output::Output;
use anyhow::{Context, Result};
use arguments::Test;
use device::DeviceWeights;
use print::Printer;
use record::{OpSplit, Record, Setting};
use rig::{Rig, RigSize};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use tandem::actors::{known_rates, on_gpus, parts_of, stage_options};
use tandem::config::Config;
use tandem::executor::{
    CpuPool, ExecutorError, GpuWeights, StageOptions, StagePart, VramPlan, WeightSource, Weights,
    WeightsRequest,
};
use tandem::formats::Checkpoint;
use tandem::hardware::HardwareProfile;
use tandem::model::{FileType, ModelSpec};
use tandem::placement::{Device, Job, Placement};
use tandem::request::RequestError;
use tandem::units::ByteSize;
use work::Costs;

/// Random weights are the same in every run.
const SEED: u64 = 1;
/// Tokens of the widest step unless said otherwise, as llama-bench's.
const STEP_TOKENS: usize = 512;
/// Generated tokens of a warm-up, and of the run that times ops.
const WARMUP_TOKENS: usize = 8;
const OP_TIMES_TOKENS: usize = 32;

/// Why a benchmark is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BenchError {
    /// All sizes are 0.
    #[error("nothing to measure: every prompt size and generation length is 0")]
    NoTest,
    /// A step of all streams does not fit.
    #[error(
        "{streams} streams need steps of {streams} tokens, at most {step_tokens_max} are allowed; \
         use a larger --ubatch-size"
    )]
    TooWide {
        /// Streams asked for.
        streams: usize,
        /// Tokens of the widest step.
        step_tokens_max: usize,
    },
}

/// The model under test.
struct Subject {
    source: WeightSource,
    spec: Arc<ModelSpec>,
    file: String,
    /// Such as `llama 8B Q4_0`.
    title: String,
}

/// Runs all tests and prints their results.
///
/// # Errors
/// A bad file, a model and contexts that do not fit into memory, options that make no sense.
///
/// `folder` is where what was measured of this machine is kept: with that, tests are predicted.
pub fn run(
    arguments: &BenchArguments,
    config: &Config,
    folder: Option<&Path>,
    output: Output,
) -> Result<()> {
    // Workers pin the thread that calls them, which the process's own should not be.
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("tandem-bench".into());
        let job = || Bench::prepare(arguments, config, (folder, output))?.run();
        let thread = thread.spawn_scoped(scope, job).context("a thread")?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// The configuration with a width of steps that is the same for every model and machine.
fn with_width(config: &Config) -> Config {
    let mut config = config.clone();
    if config.scheduler.step_tokens_max == 0 {
        config.scheduler.step_tokens_max = STEP_TOKENS;
    }
    config
}

/// A benchmark whose size is known and fits.
struct Bench<'a> {
    arguments: &'a BenchArguments,
    config: Config,
    output: Output,
    subject: Subject,
    hardware: HardwareProfile,
    tests: Vec<Test>,
    thread_counts: Vec<usize>,
    size: RigSize,
    placement: Placement,
}

impl<'a> Bench<'a> {
    fn prepare(
        arguments: &'a BenchArguments,
        config: &Config,
        (folder, output): (Option<&Path>, Output),
    ) -> Result<Self> {
        let tests = arguments.tests();
        let streams = tests.iter().map(|test| test.streams).max().ok_or(BenchError::NoTest)?;
        let config = &with_width(config);
        let step_tokens_max = config.scheduler.step_tokens_max;
        if streams > step_tokens_max {
            return Err(BenchError::TooWide { streams, step_tokens_max }.into());
        }
        let subject = Subject::find(arguments)?;
        let length = tests.iter().map(Test::length).max().unwrap_or(1);
        let block_tokens = config.kv.block_tokens;
        let stream_blocks = length.div_ceil(block_tokens);
        let vocab = subject.spec.vocab_size;
        let kv_dtype = config.kv.dtype;
        let mut size =
            RigSize { block_tokens, kv_dtype, stream_blocks, streams, step_tokens_max, vocab };
        let mut hardware = HardwareProfile::detect_for(&config.gpu.choice()?);
        hardware.measured = known_rates(&hardware, config, folder)?;
        let placement = size.place(&subject.spec, &hardware, config)?;
        let mut thread_counts = arguments.thread_counts();
        // As in the configuration, 0 is as many as are best.
        let best = placement.workers.threads;
        if thread_counts.is_empty() {
            thread_counts.push(best);
        }
        thread_counts.iter_mut().filter(|count| **count == 0).for_each(|count| *count = best);
        let config = config.clone();
        let bench = Self {
            arguments,
            config,
            output,
            subject,
            hardware,
            tests,
            thread_counts,
            size,
            placement,
        };
        bench.check_context()?;
        Ok(bench)
    }

    /// Says where contexts are longer than the model was trained for.
    fn check_context(&self) -> Result<()> {
        let trained = self.subject.spec.context_tokens_max;
        if self.tests.iter().any(|test| test.length() > trained) {
            self.output
                .notice(&format!("the model was trained for {trained} tokens of context"))?;
        }
        Ok(())
    }
    fn options(&self, threads: usize) -> Result<StageOptions> {
        let mut config = self.config.clone();
        config.cpu.threads = threads;
        Ok(stage_options(&config, &self.hardware.topology, self.size.kv())?)
    }

    fn run(&self) -> Result<()> {
        // Before loading, while the memory for it is free.
        let roofs = self.roofs()?;
        let most = self.thread_counts.iter().copied().max().unwrap_or(1);
        let started = Instant::now();
        let weights = self.load(&self.options(most)?)?;
        let load = started.elapsed();
        let (size, seconds) = (ByteSize(weights.bytes() as u64), load.as_secs_f64());
        self.output.notice(&format!("weights ready in {seconds:.2} s, {size} of memory"))?;
        let format = self.arguments.format(self.output.json);
        let mut printer = Printer::new(format, self.output, &self.subject.title, &self.tests);
        for (threads, roofs) in self.thread_counts.iter().zip(roofs) {
            let options = self.options(*threads)?;
            let setting = Setting { roofs, ..self.setting(&weights, &options, load) };
            // Threads start unpinned from here, so that each number of them gets its own cores.
            let work = || self.tests_on(&weights, &options, &setting, &mut printer);
            std::thread::scope(|scope| {
                let done = scope.spawn(work).join();
                done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })?;
        }
        printer.finish()
    }

    /// Weights outlive the stages of all numbers of threads.
    fn load(&self, options: &StageOptions) -> Result<DeviceWeights> {
        let (spec, source) = (Arc::clone(&self.subject.spec), self.subject.source.clone());
        let part = StagePart::whole(spec.layers.len());
        let parts = on_gpus(&parts_of(&spec, &self.placement));
        let (isa, huge_pages) = (options.isa, options.huge_pages());
        let request = WeightsRequest { source, spec, part, isa, huge_pages };
        let mut meter = LoadMeter::start(self.output);
        let load = || {
            let mut pool = CpuPool::new(&options.pool).map_err(ExecutorError::Threads)?;
            let mut show = |progress: tandem::executor::LoadProgress| {
                meter.show(progress.done_bytes as u64, progress.total_bytes as u64);
            };
            if parts.is_empty() {
                let weights = Weights::load(&request, &mut pool, &mut show)?;
                return Ok(DeviceWeights::Cpu(Arc::new(weights)));
            }
            let plans: Vec<_> = self.placement.stages.iter().map(VramPlan::of).collect();
            let on = (&parts[..], &plans[..]);
            let weights = GpuWeights::load_planned(on, &request, Some(&mut pool), &mut show)?;
            let gpu = &self.config.gpu;
            let step_timeout = Duration::from_millis(gpu.step_timeout_ms);
            weights.iter().for_each(|part| part.limit_waits(step_timeout));
            Ok(DeviceWeights::Gpus(weights, gpu.copies()))
        };
        let loaded = std::thread::scope(|scope| {
            scope.spawn(load).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        loaded.map_err(|error| match error {
            ExecutorError::Format(error) => RequestError::from(error).into(),
            other => other.into(),
        })
    }

    fn setting(&self, weights: &DeviceWeights, options: &StageOptions, load: Duration) -> Setting {
        let spec = &self.subject.spec;
        let threads = options.pool.threads;
        let gpus = self.placement.stages.iter().filter_map(|stage| {
            let mut gpus = self.hardware.gpus.devices.iter();
            gpus.find(|gpu| Device::Gpu(gpu.ordinal) == stage.device).map(|gpu| gpu.name.as_str())
        });
        let gpus: Vec<_> = gpus.collect();
        Setting {
            cpu: HardwareProfile::cpu_name().unwrap_or_default(),
            gpu: gpus.join(", "),
            backend: weights.backend(),
            op_clock: weights.op_clock(),
            gpu_layers: if gpus.is_empty() { 0 } else { spec.layers.len() },
            file: self.subject.file.clone(),
            model: self.subject.title.clone(),
            weight_bytes: spec.weight_bytes(),
            parameters: spec.parameters(),
            step_tokens_max: options.step_tokens_max,
            threads,
            pinned: options.pool.cores.len().min(threads),
            isa: weights.isa(),
            block_tokens: self.size.block_tokens,
            kv_dtype: self.size.kv_dtype,
            spill: self.placement.spill.clone(),
            device_weight_bytes: self.placement.stages.iter().map(|s| s.weight_bytes).sum(),
            load,
            roofs: None,
        }
    }

    /// How long a test should take by what was measured of this machine, on so many workers.
    fn predicted(&self, test: &Test, threads: usize) -> Option<Duration> {
        let Test { prompt, generated, depth, streams } = *test;
        let mut placement = self.placement.clone();
        placement.workers.threads = threads;
        let job = Job { streams, prompt, generated, depth };
        let seconds = job.seconds(&self.subject.spec, &placement, &self.hardware);
        seconds.map(Duration::from_secs_f64)
    }

    fn tests_on(
        &self,
        weights: &DeviceWeights,
        options: &StageOptions,
        setting: &Setting,
        printer: &mut Printer,
    ) -> Result<()> {
        let mut rig = Rig::new(weights.stage(options)?, self.size);
        let costs = Costs::new(&self.subject.spec, weights.bytes_per_token(), self.size.kv_dtype);
        for test in &self.tests {
            if !self.arguments.no_warmup {
                rig.once(&shortened(test, WARMUP_TOKENS))?;
            }
            let repetitions = 0..self.arguments.repetitions;
            let samples = repetitions.map(|_| rig.once(test)).collect::<Result<_>>()?;
            // Ops of one GPU wait for another's.
            let ops = match self.arguments.no_ops || self.placement.stages.len() > 1 {
                true => OpSplit::default(),
                false => rig.once_by_op(&shortened(test, OP_TIMES_TOKENS))?,
            };
            let pinned = setting.pinned.saturating_sub(rig.pin_failures());
            printer.print(Record {
                setting: Setting { pinned, ..setting.clone() },
                test: *test,
                ended: SystemTime::now(),
                samples,
                work: costs.of(test, self.size.step_tokens_max),
                predicted: self.predicted(test, options.pool.threads),
                ops,
            })?;
        }
        Ok(())
    }
}

fn shortened(test: &Test, generated_max: usize) -> Test {
    Test { generated: test.generated.min(generated_max), ..*test }
}

impl Subject {
    fn find(arguments: &BenchArguments) -> Result<Self> {
        if let Some(synthetic) = arguments.synthetic {
            let spec = synthetic.spec();
            return Ok(Self {
                source: WeightSource::Random { seed: SEED },
                file: String::new(),
                title: title(&spec, &synthetic.types().title()),
                spec: Arc::new(spec),
            });
        }
        let path = arguments.path().context("no model file")?;
        let checkpoint = Arc::new(Checkpoint::open(path).map_err(RequestError::from)?);
        let spec = ModelSpec::from_checkpoint(&checkpoint).map_err(RequestError::from)?;
        let stored = checkpoint.metadata().u32_opt("general.file_type").ok().flatten();
        let types = match stored.and_then(FileType::from_gguf_id) {
            Some(file_type) => file_type.title().to_owned(),
            None => most_used_type(&spec),
        };
        Ok(Self {
            source: checkpoint.into(),
            file: path.display().to_string(),
            title: title(&spec, &types),
            spec: Arc::new(spec),
        })
    }
}

/// Such as `llama 8B Q4_0`, `llama 1.2B Q4_0`, `gemma3 268M Q8_0`.
fn title(spec: &ModelSpec, types: &str) -> String {
    let parameters = spec.parameters() as f64;
    let size = match parameters {
        ..1e9 => format!("{:.0}M", parameters / 1e6),
        ..1e10 => format!("{:.1}B", parameters / 1e9).replace(".0B", "B"),
        _ => format!("{:.0}B", parameters / 1e9),
    };
    format!("{} {size} {types}", spec.architecture)
}

/// The element type of most weight bytes.
fn most_used_type(spec: &ModelSpec) -> String {
    let mut bytes: Vec<(&str, u64)> = Vec::new();
    spec.for_each_tensor(&mut |tensor| {
        let name = tensor.dtype.name();
        match bytes.iter_mut().find(|(known, _)| *known == name) {
            Some((_, sum)) => *sum += tensor.bytes(),
            None => bytes.push((name, tensor.bytes())),
        }
    });
    bytes.into_iter().max_by_key(|(_, sum)| *sum).map_or(String::new(), |(name, _)| name.to_owned())
}
