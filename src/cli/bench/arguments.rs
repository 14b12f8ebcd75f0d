//! What is to be measured: the grammar of `tandem bench`, and its lists made into tests.

use crate::cli::arguments::GpuArguments;
use clap::{ArgGroup, Args, ValueEnum};
use std::path::PathBuf;
use std::str::FromStr;
use tandem::model::SyntheticModel;

/// Bounds of what a test may ask for, so that sums and products of them stay small numbers.
const TOKENS_MAX: usize = 1 << 24;
const NUMBERS_MAX: usize = 1000;

/// Options of `tandem bench`; names are llama-bench's where it has the option.
#[derive(Clone, Debug, Args)]
#[command(group(ArgGroup::new("source").required(true).args(["file", "model", "synthetic"])))]
pub struct BenchArguments {
    /// Model: a GGUF file (the first part of a split one), or a Hugging Face folder
    pub file: Option<PathBuf>,
    /// The same, as llama-bench takes it
    #[arg(long, short, value_name = "FILE")]
    pub model: Option<PathBuf>,
    /// A well-known shape with random weights instead of a file, such as llama-8b:q4_0 or
    /// llama-1b:q4_k_m; llama-8b:pure-q4_k has all matrices of one type
    #[arg(long, value_name = "SHAPE:TYPE")]
    pub synthetic: Option<SyntheticModel>,
    /// Prompt sizes in tokens. A LIST is numbers like 64,512 and ranges like 1-5+2 or 1-64*2
    #[arg(long, short = 'p', value_name = "LIST", default_value = "512")]
    pub n_prompt: Vec<Numbers>,
    /// Tokens to generate
    #[arg(long, short = 'n', value_name = "LIST", default_value = "128")]
    pub n_gen: Vec<Numbers>,
    /// A prompt and what follows it in one test; may be repeated
    #[arg(long = "pg", value_name = "PROMPT,GEN")]
    pub prompt_and_gen: Vec<Pair>,
    /// Tokens that are in the context before a test starts
    #[arg(long, short = 'd', value_name = "LIST", default_value = "0")]
    pub n_depth: Vec<Numbers>,
    /// Streams that run side by side, each with a prompt and answer of its own
    #[arg(long, alias = "npl", value_name = "LIST", default_value = "1")]
    pub n_parallel: Vec<Numbers>,
    /// Worker threads; without it what the configuration says
    #[arg(long, short = 't', value_name = "LIST")]
    pub threads: Vec<Numbers>,
    /// Tokens of the widest step (scheduler.step_tokens_max)
    #[arg(long, visible_alias = "ub", value_name = "TOKENS")]
    pub ubatch_size: Option<usize>,
    #[command(flatten)]
    pub gpu: GpuArguments,
    /// How often each test is measured
    #[arg(long, short, value_name = "N", default_value_t = 5,
          value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub repetitions: u32,
    /// Measure from the first pass on
    #[arg(long)]
    pub no_warmup: bool,
    /// Don't measure what memory and arithmetic can do at most
    #[arg(long)]
    pub no_roof: bool,
    /// Don't run the further pass that says how long each op takes
    #[arg(long)]
    pub no_ops: bool,
    /// How to print; --json stands for jsonl
    #[arg(long, short, value_enum, default_value_t = Format::Md)]
    pub output: Format,
}

/// How results are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// A table in Markdown.
    Md,
    /// A header and a line for each test.
    Csv,
    /// One array.
    Json,
    /// An object a line.
    Jsonl,
}

/// Why a text is no list of numbers.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{got:?} is no number, nor a range like 1-5, 1-9+2 or 1-64*2 (up to {TOKENS_MAX})")]
pub struct ListError {
    got: String,
}

/// One value of a list option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Numbers(pub Vec<usize>);

impl FromStr for Numbers {
    type Err = ListError;

    fn from_str(text: &str) -> Result<Self, ListError> {
        let mut numbers = Vec::new();
        for part in text.split(',') {
            let refuse = || ListError { got: part.to_owned() };
            numbers.extend(range(part.trim()).ok_or_else(refuse)?);
            if numbers.len() > NUMBERS_MAX {
                return Err(refuse());
            }
        }
        Ok(Self(numbers))
    }
}

fn number(text: &str) -> Option<usize> {
    text.parse().ok().filter(|number| *number <= TOKENS_MAX)
}

/// `7`, `1-5`, `1-9+2` or `1-64*2`.
fn range(text: &str) -> Option<Vec<usize>> {
    let Some((first, rest)) = text.split_once('-') else { return Some(vec![number(text)?]) };
    let first = number(first)?;
    let (last, next): (usize, Box<dyn Fn(usize) -> usize>) = match rest.split_once(['+', '*']) {
        None => (number(rest)?, Box::new(|number| number + 1)),
        Some((last, step)) => {
            let step = number(step)?;
            let last = number(last)?;
            if rest.contains('+') {
                (last, Box::new(move |number| number + step))
            } else {
                (last, Box::new(move |number| number * step))
            }
        }
    };
    let grows = next(first) > first && first <= last;
    let all = std::iter::successors(Some(first), |number| Some(next(*number)));
    grows.then(|| all.take_while(|number| *number <= last).take(NUMBERS_MAX + 1).collect())
}

/// A prompt's size and how many tokens follow it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair(pub usize, pub usize);

impl FromStr for Pair {
    type Err = ListError;

    fn from_str(text: &str) -> Result<Self, ListError> {
        let pair = text.split_once(',').and_then(|(a, b)| Some(Self(number(a)?, number(b)?)));
        pair.ok_or_else(|| ListError { got: text.to_owned() })
    }
}

/// One thing to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Test {
    /// Tokens of each stream's prompt.
    pub prompt: usize,
    /// Tokens that each stream generates.
    pub generated: usize,
    /// Tokens of each stream that are there before.
    pub depth: usize,
    /// Streams side by side.
    pub streams: usize,
}

impl Test {
    /// llama-bench's name: `pp512`, `tg128`, `pp512+tg128`, `tg128 @ d4096`.
    pub fn label(&self) -> String {
        let mut label = match (self.prompt, self.generated) {
            (prompt, 0) => format!("pp{prompt}"),
            (0, generated) => format!("tg{generated}"),
            (prompt, generated) => format!("pp{prompt}+tg{generated}"),
        };
        if self.depth > 0 {
            label += &format!(" @ d{}", self.depth);
        }
        label
    }

    /// Tokens of one stream at the end.
    pub fn length(&self) -> usize {
        self.depth + self.prompt + self.generated
    }

    /// Tokens of all streams that are computed while the clock runs.
    pub fn tokens(&self) -> usize {
        self.streams * (self.prompt + self.generated)
    }
}

fn flat(lists: &[Numbers]) -> Vec<usize> {
    lists.iter().flat_map(|list| list.0.iter().copied()).collect()
}

impl BenchArguments {
    /// All combinations, streams and depths outermost. Sizes of 0 leave a kind of test out.
    pub fn tests(&self) -> Vec<Test> {
        let mut tests = Vec::new();
        for streams in flat(&self.n_parallel).into_iter().filter(|streams| *streams > 0) {
            for depth in flat(&self.n_depth) {
                let prompts = flat(&self.n_prompt).into_iter().map(|prompt| (prompt, 0));
                let answers = flat(&self.n_gen).into_iter().map(|generated| (0, generated));
                let both = self.prompt_and_gen.iter().map(|pair| (pair.0, pair.1));
                let sizes = prompts.chain(answers).chain(both).filter(|sizes| *sizes != (0, 0));
                tests.extend(sizes.map(|(prompt, generated)| Test {
                    prompt,
                    generated,
                    depth,
                    streams,
                }));
            }
        }
        tests
    }

    /// Numbers of threads; empty for the configured one.
    pub fn thread_counts(&self) -> Vec<usize> {
        flat(&self.threads)
    }

    /// How to print when `--json` was given or not.
    pub fn format(&self, json: bool) -> Format {
        if json { Format::Jsonl } else { self.output }
    }

    /// The model file, unless the weights are random.
    pub fn path(&self) -> Option<&PathBuf> {
        self.file.as_ref().or(self.model.as_ref())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        bench: BenchArguments,
    }

    fn parse(arguments: &[&str]) -> Result<BenchArguments, clap::Error> {
        Line::try_parse_from(["bench"].iter().chain(arguments)).map(|line| line.bench)
    }

    #[test]
    fn lists_are_numbers_and_ranges() {
        let numbers = |text: &str| text.parse::<Numbers>().map(|numbers| numbers.0);
        assert_eq!(numbers("512").unwrap(), [512]);
        assert_eq!(numbers("1,4-6,8-64*2,0-100+50").unwrap(), {
            [1, 4, 5, 6, 8, 16, 32, 64, 0, 50, 100]
        });
        for text in ["", "x", "1,", "5-1", "1-9+0", "1-9*1", "0-9*2", "-3", "99999999", "0-5000"] {
            assert!(numbers(text).is_err(), "{text}: {:?}", numbers(text));
        }
    }

    #[test]
    fn the_default_is_llama_benchs() {
        let tests = parse(&["model.gguf"]).unwrap().tests();
        let labels: Vec<String> = tests.iter().map(Test::label).collect();
        assert_eq!(labels, ["pp512", "tg128"]);
        assert!(tests.iter().all(|test| test.streams == 1));
    }

    #[test]
    fn every_combination_is_a_test_and_zero_leaves_out() {
        let arguments = ["-m", "x", "-p", "0", "-n", "16,32", "--pg", "8,4", "-d", "0", "-d", "64"];
        let arguments = arguments.iter().chain(&["--n-parallel", "1-2"]).copied();
        let tests = parse(&arguments.collect::<Vec<_>>()).unwrap().tests();
        assert_eq!(tests.len(), 2 * 2 * 3);
        assert_eq!(tests[11].label(), "pp8+tg4 @ d64");
        assert_eq!((tests[11].tokens(), tests[11].length()), (2 * 12, 76));
    }

    #[test]
    fn there_is_one_model_and_its_name_is_checked() {
        for arguments in [
            &[][..],
            &["model.gguf", "--synthetic", "tiny:q4_0"],
            &["--synthetic", "tiny"],
            &["--synthetic", "mixtral:q4_0"],
            &["x", "-r", "0"],
            &["x", "-o", "xml"],
            &["x", "--pg", "512"],
        ] {
            assert!(parse(arguments).is_err(), "{arguments:?}");
        }
        assert!(parse(&["--synthetic", "tiny:q4_0"]).unwrap().path().is_none());
    }
}
