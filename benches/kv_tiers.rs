//! A sequence's KV blocks out to other tiers and back, against the copy rate of the same run, and
//! what that costs the steps of other streams.
//! `cargo bench --bench kv_tiers -- [SHAPE:TYPE] [cpu|gpu]`; without a word for it, the GPU if
//! there is one. Weights are random.
#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a benchmark's report")]

#[path = "support/copy_roofs.rs"]
mod copy_roofs;
#[path = "../tests/support/stage.rs"]
mod stage;
#[path = "../tests/support/tiers.rs"]
mod tiers;

use copy_roofs::roofs;
use stage::{BLOCK_TOKENS, options, plan_tokens};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tandem::executor::{
    CpuPool, GpuStage, GpuWeights, KvBlocks, KvTiers, Stage, StageOptions, StagePart, TierOptions,
    WeightSource, Weights, WeightsRequest,
};
use tandem::model::{ModelSpec, SyntheticModel};
use tandem::request::SamplingParams;
use tandem::step::{LogitsTask, StepOutput, StepPlan, Tier};
use tandem::units::TokenId;
use tandem_kernels::driver;
use tiers::moved;

/// The sequence that moves.
const SEQUENCE_TOKENS: usize = 4000;
const SEQUENCE_BLOCKS: usize = SEQUENCE_TOKENS.div_ceil(BLOCK_TOKENS);
/// Streams that decode, and their context.
const STREAMS: usize = 8;
const CONTEXT_TOKENS: usize = 512;
const STREAM_BLOCKS: usize = CONTEXT_TOKENS / BLOCK_TOKENS;
/// Blocks of the host's tier: room for the sequence in memory that is registered from the start, if
/// a block has up to 4 MiB, and in such as is not.
const HOST_BLOCKS: usize = 3 * SEQUENCE_BLOCKS;
const LATE_BLOCK: u32 = 2 * SEQUENCE_BLOCKS as u32;
/// Of which the middle one counts.
const PASSES: usize = 9;
/// Steps of a measurement, and how often it alternates with the other: less where steps are slow.
const STEPS: usize = 60;
const ROUNDS_MAX: usize = 5;
const MEASUREMENT_SECONDS: f64 = 1.0;

enum AnyStage {
    Cpu(Box<Stage>),
    Gpu(Box<GpuStage>),
}

impl AnyStage {
    fn start(spec: ModelSpec, options: &StageOptions, on_gpu: bool) -> Self {
        let request = WeightsRequest {
            source: WeightSource::Random { seed: 1 },
            part: StagePart::whole(spec.layers.len()),
            spec: Arc::new(spec),
            isa: None,
            huge_pages: options.huge_pages(),
        };
        let mut pool = CpuPool::new(&options.pool).unwrap();
        if on_gpu {
            let weights = GpuWeights::load(0, &request, Some(&mut pool), &mut |_| {}).unwrap();
            weights.limit_waits(Duration::from_secs(5));
            return Self::Gpu(Box::new(GpuStage::start(Arc::new(weights), options).unwrap()));
        }
        let weights = Weights::load(&request, &mut pool, &mut |_| {}).unwrap();
        drop(pool);
        Self::Cpu(Box::new(Stage::restart(Arc::new(weights), options).unwrap()))
    }

    fn kv(&self) -> Arc<dyn KvBlocks> {
        match self {
            Self::Cpu(stage) => stage.kv(),
            Self::Gpu(stage) => stage.kv(),
        }
    }

    fn run(&mut self, plan: &StepPlan) {
        let mut output = StepOutput::default();
        match self {
            Self::Cpu(stage) => stage.run(plan, &mut output).unwrap(),
            Self::Gpu(stage) => stage.run(plan, &mut output).unwrap(),
        }
        assert!(output.failures.is_empty(), "{:?}", output.failures);
    }

    /// Seconds of each of [`STEPS`] steps in which every stream gets a token.
    fn steps(&mut self) -> Vec<f64> {
        let params = Arc::new(SamplingParams::greedy());
        let tokens: Vec<_> =
            (0..CONTEXT_TOKENS as u32).map(|at| TokenId(at * 7919 % 20_000)).collect();
        let seconds = (0..STEPS).map(|step| {
            let mut plan = StepPlan::default();
            let position = CONTEXT_TOKENS - STEPS + step;
            for stream in 0..STREAMS {
                let blocks = (stream as u64, (stream * STREAM_BLOCKS) as u32);
                plan_tokens(&mut plan, blocks, &tokens, position..position + 1, |_| {
                    let params = Arc::clone(&params);
                    Some(LogitsTask::Sample { params, history: 0..0, prompt_tokens: 0 })
                });
            }
            let started = Instant::now();
            self.run(&plan);
            started.elapsed().as_secs_f64()
        });
        seconds.collect()
    }
}

/// The sequence moves to blocks from `start` on and back, `at_once` blocks an order list. Seconds
/// out and back.
fn out_and_in(tiers: &mut KvTiers, (away, start): (Tier, u32), at_once: usize) -> [f64; 2] {
    let first = (STREAMS * STREAM_BLOCKS) as u32;
    let blocks: Vec<u32> = (0..SEQUENCE_BLOCKS as u32).collect();
    let mut pass = |is_out: bool| {
        let started = Instant::now();
        for blocks in blocks.chunks(at_once) {
            let moves: Vec<_> = blocks
                .iter()
                .map(|block| ((Tier::Device, first + block), (away, start + block)))
                .map(|(here, there)| if is_out { (here, there) } else { (there, here) })
                .collect();
            moved(tiers, &moves);
        }
        started.elapsed().as_secs_f64()
    };
    [pass(true), pass(false)]
}

fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}

fn main() {
    let words: Vec<String> =
        std::env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    let shape =
        words.iter().find(|word| word.contains(':')).map_or("llama-8b:q4_0", String::as_str);
    let wants = |word: &str| words.iter().any(|other| other == word);
    let on_gpu = !wants("cpu") && (wants("gpu") || driver().is_ok());
    let spec = shape.parse::<SyntheticModel>().unwrap().spec();
    let roofs = roofs(on_gpu);
    let threads = std::thread::available_parallelism().unwrap().get();
    let mut options = options(threads, STREAMS * CONTEXT_TOKENS + SEQUENCE_BLOCKS * BLOCK_TOKENS);
    (options.huge_pages, options.step_tokens_max) = (true, 64);
    let mut stage = AnyStage::start(spec, &options, on_gpu);
    let sizes = TierOptions {
        host_blocks: HOST_BLOCKS,
        disk_blocks: SEQUENCE_BLOCKS,
        disk_folder: std::env::temp_dir(),
    };
    let mut tiers = KvTiers::new(stage.kv(), &sizes).unwrap();
    let bytes = (SEQUENCE_BLOCKS * stage.kv().block_bytes()) as f64;
    println!(
        "{shape} on {}: {SEQUENCE_TOKENS} tokens are {SEQUENCE_BLOCKS} blocks, {:.1} MB; copies of \
         pinned memory: out {:.1} GB/s, in {:.1} GB/s",
        if on_gpu { "a GPU" } else { "the CPU" },
        bytes / 1e6,
        roofs[0] / 1e9,
        roofs[1] / 1e9,
    );
    println!("{:<32} {:>9} {:>9} {:>9} {:>9}", "way", "out GB/s", "x roof", "in GB/s", "x roof");
    let print = |name: &str, [out, back]: [f64; 2]| {
        let over = |seconds: f64, roof: f64| seconds * roof / bytes;
        let (out_over, in_over) = (over(out, roofs[0]), over(back, roofs[1]));
        let (out, back) = (bytes / out / 1e9, bytes / back / 1e9);
        println!("{name:<32} {out:>9.1} {out_over:>9.2} {back:>9.1} {in_over:>9.2}");
    };
    print("host, first use", out_and_in(&mut tiers, (Tier::Host, LATE_BLOCK), SEQUENCE_BLOCKS));
    for at_once in [1, 4, 16, SEQUENCE_BLOCKS] {
        let passes: Vec<_> =
            (0..PASSES).map(|_| out_and_in(&mut tiers, (Tier::Host, 0), at_once)).collect();
        let of = |way: usize| median(passes.iter().map(|pass| pass[way]).collect());
        print(&format!("host, {at_once} blocks at once"), [of(0), of(1)]);
    }
    print("disk, first use", out_and_in(&mut tiers, (Tier::Disk, 0), SEQUENCE_BLOCKS));
    print("disk", out_and_in(&mut tiers, (Tier::Disk, 0), SEQUENCE_BLOCKS));
    println!("{:?}", tiers.bytes());
    println!("times of a row are medians; x roof: time as a multiple of bytes / roof");
    drop(tiers);
    beside(&mut stage, &sizes);
}

/// Steps of the streams alone, and while the sequence goes out and in all the time.
fn beside(stage: &mut AnyStage, sizes: &TierOptions) {
    let seconds: f64 = stage.steps().iter().sum();
    let rounds = ((MEASUREMENT_SECONDS / seconds) as usize).clamp(1, ROUNDS_MAX);
    println!(
        "{:<32} {:>9} {:>9} {:>9} {:>9} {:>9}",
        "ms of a step of 8 streams", "mean", "median", "95th", "longest", "moves/s"
    );
    // Whole sequences, parts of one, and to memory that has to be registered first.
    for (start, at_once) in [(0, SEQUENCE_BLOCKS), (0, 4), (0, 1), (LATE_BLOCK, SEQUENCE_BLOCKS)] {
        let (mut alone, mut beside, mut moves, mut seconds) = (vec![], vec![], 0, 0.0);
        for _ in 0..rounds {
            let mut tiers = KvTiers::new(stage.kv(), sizes).unwrap();
            alone.extend(stage.steps());
            let (is_over, done) = (AtomicBool::new(false), AtomicUsize::new(0));
            let started = Instant::now();
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    while !is_over.load(Ordering::Relaxed) {
                        out_and_in(&mut tiers, (Tier::Host, start), at_once);
                        done.fetch_add(1, Ordering::Relaxed);
                    }
                });
                beside.extend(stage.steps());
                is_over.store(true, Ordering::Relaxed);
            });
            seconds += started.elapsed().as_secs_f64();
            moves += done.into_inner();
        }
        let late = if start == 0 { "" } else { ", first use" };
        row("alone", alone, 0.0);
        row(&format!("beside, {at_once} blocks at once{late}"), beside, moves as f64 / seconds);
    }
}

fn row(name: &str, mut seconds: Vec<f64>, rate: f64) {
    seconds.sort_by(f64::total_cmp);
    let mean = seconds.iter().sum::<f64>() / seconds.len() as f64;
    let at = |share: f64| seconds[((seconds.len() - 1) as f64 * share) as usize] * 1e3;
    let (mean, median, most, longest) = (mean * 1e3, at(0.5), at(0.95), at(1.0));
    println!("{name:<32} {mean:>9.3} {median:>9.3} {most:>9.3} {longest:>9.3} {rate:>9.1}");
}
