//! A long sequence that an engine swaps out and back in while other streams decode: how long its
//! blocks take, against the copy rate of the same run, and what that costs the others' steps.
//! `cargo bench --bench swap_beside_streams -- FILE [gpu] [--rounds N] [--vram-limit SIZE]`
//!
//! The KV store holds the long sequence, which is of priority `batch`, and twelve streams only
//! while these are short. So it goes out as they grow, and comes back when four of them have ended.
//! All times are the engine's own, from its trace: copies as the swap thread performs them, and
//! steps from the end of the one before, which is what a stream sees between two tokens.
#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a benchmark's report")]

#[path = "support/copy_roofs.rs"]
mod copy_roofs;

use copy_roofs::roofs;
use futures_util::future::join_all;
use serde_json::Value;
use std::collections::BTreeMap;
use std::time::Duration;
use tandem::actors::Engine;
use tandem::config::Config;
use tandem::formats::Checkpoint;
use tandem::model::ModelSpec;
use tandem::request::{Event, Input, Priority, Request, SamplingParams};
use tandem::units::{ByteSize, TokenId};

const BLOCK_TOKENS: usize = 32;
/// The sequence that moves, and its blocks.
const LONG_TOKENS: usize = 4000;
const LONG_BLOCKS: usize = LONG_TOKENS.div_ceil(BLOCK_TOKENS);
/// Streams that stay, and that leave when the long sequence is to come back.
const STAYING: usize = 8;
const LEAVING: usize = 4;
const PROMPT_TOKENS: usize = 480;
const STAYING_TOKENS: usize = 448;
const LEAVING_TOKENS: usize = 224;
/// Tokens of a stream's answer that find room beside the long sequence.
const GROWTH_TOKENS: usize = 128;
/// Copies that follow each other so closely are one swap, µs.
const PAUSE_MAX_US: u64 = 50_000;

struct Options {
    file: String,
    on_gpu: bool,
    rounds: usize,
    vram_limit: Option<ByteSize>,
}

impl Options {
    fn read() -> Self {
        let mut words = std::env::args().skip(1).filter(|word| word != "--bench");
        let mut options = Self { file: String::new(), on_gpu: false, rounds: 4, vram_limit: None };
        while let Some(word) = words.next() {
            match word.as_str() {
                "gpu" => options.on_gpu = true,
                "--rounds" => options.rounds = words.next().unwrap().parse().unwrap(),
                "--vram-limit" => options.vram_limit = Some(words.next().unwrap().parse().unwrap()),
                _ => options.file = word,
            }
        }
        assert!(!options.file.is_empty(), "which model file?");
        options
    }

    fn config(&self, block_bytes: u64) -> Config {
        let mut config = Config::default();
        config.model.path = self.file.clone().into();
        config.model.context_tokens = LONG_TOKENS + 2 * STAYING_TOKENS;
        config.gpu.device = if self.on_gpu { "0" } else { "off" }.to_owned();
        config.gpu.vram_limit = self.vram_limit.unwrap_or(config.gpu.vram_limit);
        config.kv.block_tokens = BLOCK_TOKENS;
        // What is copied ahead of need for its prefix would be counted with the swaps.
        config.kv.prefix_cache = false;
        // A token of each stream is a step.
        config.speculative.method = "off".into();
        let stream_blocks = (PROMPT_TOKENS + GROWTH_TOKENS).div_ceil(BLOCK_TOKENS);
        let blocks = LONG_BLOCKS + 2 + (STAYING + LEAVING) * stream_blocks;
        config.kv.cache_bytes = ByteSize(blocks as u64 * block_bytes);
        config.kv.swap_bytes = ByteSize(2 * LONG_BLOCKS as u64 * block_bytes);
        // The streams begin at nearly the same time.
        config.scheduler.prefill_slowdown_max = 16.0;
        config
    }
}

/// Copies of one swap.
#[derive(Clone, Copy, Debug)]
struct Swap {
    is_out: bool,
    start_us: u64,
    end_us: u64,
    blocks: u64,
}

/// What the rounds showed.
#[derive(Default)]
struct Findings {
    swaps: Vec<Swap>,
    /// Milliseconds from one step's end to the next one's, without and beside copies, by the
    /// number of streams.
    steps: BTreeMap<u64, [Vec<f64>; 2]>,
    /// Where the trace has been read to.
    read_to_us: u64,
}

impl Findings {
    /// Takes in what is new in a trace.
    fn read(&mut self, trace: &Value) {
        let events = trace["traceEvents"].as_array().unwrap();
        let number = |event: &Value, field: &str| event[field].as_u64().unwrap();
        let ends = |event: &Value| number(event, "ts") + number(event, "dur");
        let is_new = |event: &&Value| {
            event["ph"] == "X" && event["ts"].as_u64().is_some_and(|ts| ts > self.read_to_us)
        };
        let new: Vec<_> = events.iter().filter(is_new).collect();
        for copies in new.iter().filter(|event| event["cat"] == "copies") {
            let swap = Swap {
                is_out: copies["name"] == "device to host",
                start_us: number(copies, "ts"),
                end_us: ends(copies),
                blocks: number(&copies["args"], "blocks"),
            };
            match self.swaps.last_mut() {
                Some(last)
                    if last.is_out == swap.is_out && swap.start_us < last.end_us + PAUSE_MAX_US =>
                {
                    (last.end_us, last.blocks) = (swap.end_us, last.blocks + swap.blocks);
                }
                _ => self.swaps.push(swap),
            }
        }
        let steps: Vec<_> = new.iter().filter(|event| event["name"] == "run").collect();
        for pair in steps.windows(2) {
            let of = |field| number(&pair[1]["args"], field);
            let decodes = |step: &Value| step["args"]["tokens"] == step["args"]["sequences"];
            if decodes(pair[0]) && decodes(pair[1]) {
                let ms = (ends(pair[1]) - ends(pair[0])) as f64 / 1e3;
                let times = self.steps.entry(of("sequences")).or_default();
                times[usize::from(of("copies") > 0)].push(ms);
            }
        }
        self.read_to_us = new.iter().map(|event| ends(event)).max().unwrap_or(self.read_to_us);
    }

    fn print(mut self, block_bytes: u64, roofs: [f64; 2]) {
        for (name, is_out, roof) in [("out", true, roofs[0]), ("in", false, roofs[1])] {
            let all = self.swaps.iter().filter(|swap| swap.is_out == is_out);
            let whole = all.filter(|swap| swap.blocks >= LONG_BLOCKS as u64);
            let mut times: Vec<(f64, f64, u64)> = whole
                .map(|swap| {
                    let seconds = (swap.end_us - swap.start_us) as f64 / 1e6;
                    let bytes = (swap.blocks * block_bytes) as f64;
                    (seconds * roof / bytes, seconds, swap.blocks)
                })
                .collect();
            times.sort_by(|a, b| a.0.total_cmp(&b.0));
            let Some((over, seconds, blocks)) = times.get(times.len() / 2) else {
                println!("{name}: no swap");
                continue;
            };
            let rate = (blocks * block_bytes) as f64 / seconds / 1e9;
            println!(
                "swapped {name:<3} {} times, the middle one: {blocks} blocks in {:.2} ms, \
                 {rate:.1} GB/s, {over:.2} x bytes / roof; {:.2} to {:.2}",
                times.len(),
                seconds * 1e3,
                times[0].0,
                times[times.len() - 1].0,
            );
        }
        println!(
            "{:<22} {:>6} {:>9} {:>9} {:>9} {:>9} {:>9}",
            "steps, ms", "n", "mean", "median", "95th", "longest", "mean +%"
        );
        for (streams, [alone, beside]) in &mut self.steps {
            if alone.is_empty() || beside.is_empty() {
                continue;
            }
            let quiet = row(&format!("{streams} streams"), alone, None);
            row(&format!("{streams} beside copies"), beside, Some(quiet));
        }
    }
}

/// Prints times and gives their mean.
fn row(name: &str, times: &mut [f64], quiet: Option<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    let mean = times.iter().sum::<f64>() / times.len() as f64;
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
    let more =
        quiet.map_or_else(String::new, |quiet| format!("{:+.1}", 100.0 * (mean / quiet - 1.0)));
    println!(
        "{name:<22} {:>6} {mean:>9.3} {:>9.3} {:>9.3} {:>9.3} {more:>9}",
        times.len(),
        at(0.5),
        at(0.95),
        at(1.0)
    );
    mean
}

/// A request for so many tokens after a prompt that no other number has.
fn request(number: usize, prompt: usize, tokens: usize, vocab: usize) -> Request {
    let prompt = (0..prompt).map(|at| (number * 104_729 + at * 7919) % (vocab / 2));
    let prompt = prompt.map(|token| TokenId(token as u32)).collect();
    let mut request = Request::new(Input::Tokens(prompt)).max_tokens(tokens);
    request.ignore_eos = true;
    request.sampling(SamplingParams::greedy())
}

/// One swap out and back in, and perhaps a second one out.
async fn round(engine: &Engine, number: usize, vocab: usize) {
    let mut long = request(number, LONG_TOKENS, STAYING_TOKENS, vocab);
    long.priority = Priority::Batch;
    let mut long = engine.generate(long);
    // Until it decodes.
    while !matches!(long.next().await, Some(Event::Delta(_)) | None) {}
    let streams = (0..STAYING + LEAVING).map(|stream| {
        let tokens = if stream < STAYING { STAYING_TOKENS } else { LEAVING_TOKENS };
        let number = 1_000 * (number + 1) + stream;
        engine.generate(request(number, PROMPT_TOKENS, tokens, vocab)).collect()
    });
    let reading = tokio::spawn(async move { while long.next().await.is_some() {} });
    for answer in join_all(streams).await {
        answer.unwrap();
    }
    // What is left of the long answer is of no interest.
    reading.abort();
    let _ = reading.await;
    while engine.stats().sequences.running > 0 || engine.stats().blocks.copies_under_way > 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::main]
async fn main() {
    let options = Options::read();
    let (block_bytes, vocab) = {
        let checkpoint = Checkpoint::open(options.file.as_ref()).unwrap();
        let spec = ModelSpec::from_checkpoint(&checkpoint).unwrap();
        let dtype = Config::default().kv.dtype;
        (spec.kv_bytes_per_token(dtype) * BLOCK_TOKENS as u64, spec.vocab_size)
    };
    let roofs = roofs(options.on_gpu);
    let engine = Engine::builder().config(options.config(block_bytes)).build().await.unwrap();
    let plan = engine.plan().unwrap();
    println!(
        "{} on {}: {LONG_TOKENS} tokens are {LONG_BLOCKS} blocks, {:.1} MB; copies of pinned \
         memory: out {:.1} GB/s, in {:.1} GB/s; {} spilled",
        plan.model,
        plan.device(),
        (LONG_BLOCKS as u64 * block_bytes) as f64 / 1e6,
        roofs[0] / 1e9,
        roofs[1] / 1e9,
        ByteSize(plan.spill.as_ref().map_or(0, |spill| spill.weight_bytes)),
    );
    // Everything is there, and warm, after the first.
    round(&engine, 0, vocab).await;
    let mut findings = Findings::default();
    findings.read(&engine.chrome_trace());
    (findings.swaps, findings.steps) = (Vec::new(), BTreeMap::new());
    for number in 1..=options.rounds {
        round(&engine, number, vocab).await;
        findings.read(&engine.chrome_trace());
    }
    let metrics = engine.stats().metrics;
    println!(
        "blocks: {} out, {} in, {} copies failed",
        metrics.blocks_swapped_out, metrics.blocks_swapped_in, metrics.block_copies_failed
    );
    findings.print(block_bytes, roofs);
    engine.shutdown(Duration::ZERO).await;
}
