//! The command line's grammar, as clap reads it. No logic.

use super::bench::BenchArguments;
use super::probe::ProbeArguments;
use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;
use tandem::units::ByteSize;

/// Runs large language models across a GPU's memory and the host's memory at once.
#[derive(Debug, Parser)]
#[command(name = "tandem", version, max_term_width = 100)]
pub struct Arguments {
    /// Options of every command.
    #[command(flatten)]
    pub global: GlobalArguments,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Clone, Debug, Args)]
pub struct GlobalArguments {
    /// Configuration file; without it $XDG_CONFIG_HOME/tandem/config.toml, if there is one
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// One setting, such as kv.cache_bytes=2GiB (see `tandem config show`); may be repeated
    #[arg(long = "set", global = true, value_name = "KEY=VALUE")]
    pub settings: Vec<String>,
    /// Print JSON, one object a line
    #[arg(long, global = true)]
    pub json: bool,
    /// No progress bars and no notices
    #[arg(long, short, global = true)]
    pub quiet: bool,
}

/// What engine to build, for commands that build one.
#[derive(Clone, Debug, Default, Args)]
pub struct EngineArguments {
    /// Model: a GGUF file (the first part of a split one), or a Hugging Face folder
    #[arg(long, short, value_name = "FILE")]
    pub model: Option<PathBuf>,
    /// CPU worker threads
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// Longest sequence, in tokens
    #[arg(long, value_name = "TOKENS")]
    pub context: Option<usize>,
    /// Keep keys and values as f16, q8_0 or, on a GPU, bf16 or fp8_e4m3 (both alike)
    #[arg(long, value_name = "TYPE", visible_aliases = ["cache-type-k", "cache-type-v"])]
    pub kv_dtype: Vec<String>,
    /// Where tokens that are tried ahead come from: ngram (prompt lookup), off
    #[arg(long, value_name = "METHOD")]
    pub speculative: Option<String>,
    /// Most tokens that are tried ahead in one step
    #[arg(long, value_name = "N")]
    pub draft_max: Option<usize>,
    #[command(flatten)]
    pub gpu: GpuArguments,
}

/// What a GPU may be used for, for commands that place a model.
#[derive(Clone, Debug, Default, Args)]
pub struct GpuArguments {
    /// Use at most so much of each GPU's memory, such as 24GiB (gpu.vram_limit)
    #[arg(long, value_name = "BYTES")]
    pub vram_limit: Option<ByteSize>,
}

/// Where the service listens.
#[derive(Clone, Debug, Default, Args)]
pub struct SocketArguments {
    /// Socket path; without it $XDG_RUNTIME_DIR/tandem/tandem.sock
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
}

/// How tokens are chosen; the defaults are llama.cpp's.
#[derive(Clone, Debug, Args)]
pub struct SamplingArguments {
    /// At most so many new tokens
    #[arg(long, short = 'n', value_name = "N")]
    pub max_tokens: Option<usize>,
    /// 0 is greedy
    #[arg(long, short, value_name = "T", default_value_t = 0.8, allow_negative_numbers = true)]
    pub temperature: f64,
    /// Keep the K most likely tokens; 0 keeps all
    #[arg(long, value_name = "K", default_value_t = 40)]
    pub top_k: usize,
    /// Nucleus sampling: keep the most likely tokens whose mass reaches P
    #[arg(long, value_name = "P", default_value_t = 0.95)]
    pub top_p: f64,
    /// Keep tokens at least P times as likely as the best
    #[arg(long, value_name = "P", default_value_t = 0.05)]
    pub min_p: f64,
    /// Divides the logits of tokens seen; 1 is off
    #[arg(long, value_name = "X")]
    pub repetition_penalty: Option<f64>,
    /// The same seed gives the same answer
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// End before this text; may be repeated
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// The model's end tokens do not end the answer
    #[arg(long)]
    pub ignore_eos: bool,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start the service
    Serve {
        #[command(flatten)]
        engine: EngineArguments,
        #[command(flatten)]
        socket: SocketArguments,
    },
    /// Talk to the model; asks the running service, or loads the model itself
    Chat {
        /// Ask this one thing and end
        #[arg(long, short, value_name = "TEXT")]
        prompt: Option<String>,
        /// System message
        #[arg(long, value_name = "TEXT")]
        system: Option<String>,
        #[command(flatten)]
        sampling: SamplingArguments,
        #[command(flatten)]
        engine: EngineArguments,
        #[command(flatten)]
        socket: SocketArguments,
    },
    /// Continue a text; asks the running service, or loads the model itself
    Generate {
        /// The text; without it standard input
        prompt: Option<String>,
        /// Text that spells a special token becomes that token
        #[arg(long)]
        parse_special: bool,
        /// Report the K most likely tokens per step (with --json)
        #[arg(long, value_name = "K")]
        logprobs: Option<usize>,
        #[command(flatten)]
        sampling: SamplingArguments,
        #[command(flatten)]
        engine: EngineArguments,
        #[command(flatten)]
        socket: SocketArguments,
    },
    /// Show what a model file holds
    Inspect {
        /// Model file
        file: PathBuf,
        /// List every tensor
        #[arg(long)]
        tensors: bool,
        /// List every metadata value
        #[arg(long)]
        metadata: bool,
    },
    /// Show what would lie where, how many bytes, and which context fits
    Plan {
        /// Model: a GGUF file or a Hugging Face folder; or give it as --model
        #[arg(conflicts_with = "model")]
        file: Option<PathBuf>,
        /// Load the model, run what is predicted, and show both
        #[arg(long)]
        measured: bool,
        #[command(flatten)]
        engine: EngineArguments,
    },
    /// Show what this machine is and what its memory, processors and GPUs reach; measured once
    Probe(ProbeArguments),
    /// Turn text into tokens; asks the running service if no model is named
    Tokenize {
        /// The text; without it standard input
        text: Option<String>,
        /// Put the model's BOS and EOS around it
        #[arg(long)]
        add_special: bool,
        /// Text that spells a special token becomes that token
        #[arg(long)]
        parse_special: bool,
        /// Model file
        #[arg(long, short, value_name = "FILE")]
        model: Option<PathBuf>,
        #[command(flatten)]
        socket: SocketArguments,
    },
    /// Measure perplexity on a text: chunks of the context, the second half of each scored
    Perplexity {
        /// Text file
        file: PathBuf,
        /// Tokens of one chunk
        #[arg(long, default_value_t = 512, value_name = "TOKENS")]
        chunk: usize,
        /// Only the first chunks
        #[arg(long, value_name = "N")]
        chunks: Option<usize>,
        #[command(flatten)]
        engine: EngineArguments,
    },
    /// Measure tokens per second, with llama-bench's options, names and formats
    Bench(BenchArguments),
    /// Show the running service: model, requests, memory; all figures with --json
    Ps {
        #[command(flatten)]
        socket: SocketArguments,
    },
    /// Stop the running service; running streams get their end
    Stop {
        #[command(flatten)]
        socket: SocketArguments,
    },
    /// Settings
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
    /// Print a shell's completion script
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

/// What to do with settings.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Each value with its origin: default, file, environment, flag
    Show,
}
