//! Owns the command line: arguments, settings, output, exit codes. Must not know how the engine or
//! the protocol work inside: it is a client like any other. `main` calls it.

mod answer;
mod arguments;
mod bench;
mod chat;
mod config_show;
mod connection;
mod failure;
mod generate;
mod inspect;
mod loading;
mod output;
mod perplexity;
mod plan;
mod plan_measured;
mod plan_stages;
mod probe;
mod repl;
mod sampling_params;
mod serve;
mod service;
mod settings;
mod tokenize;

use anyhow::{Context, Result};
use arguments::{Arguments, Command, ConfigCommand, EngineArguments, SocketArguments};
use bench::BenchArguments;
use chat::ChatOptions;
use clap::{CommandFactory, Parser};
use connection::Place;
use failure::{CONFIG, Exit, exit_code};
use generate::GenerateOptions;
use output::Output;
use serve::{Listen, Systemd};
use settings::{Layers, Settings};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use tandem::server::{Folder, default_socket};
use tandem::telemetry::{LogFormat, start_logging};

/// Reads the command line and does what it says.
pub fn run() -> ExitCode {
    let arguments = Arguments::parse();
    let no_color = std::env::var("NO_COLOR").ok();
    let output = Output::detect(arguments.global.json, arguments.global.quiet, no_color.as_deref());
    match dispatch(arguments, output) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            output.failure(&error);
            ExitCode::from(exit_code(&error))
        }
    }
}

/// `tandem … | head` is no failure.
fn is_closed_pipe(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<std::io::Error>();
    io.is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

fn dispatch(arguments: Arguments, output: Output) -> Result<()> {
    let command = arguments.command;
    if let Command::Completions { shell } = command {
        let mut grammar = Arguments::command();
        clap_complete::generate(shell, &mut grammar, "tandem", &mut std::io::stdout());
        return Ok(());
    }
    let environment = environment()?;
    let layers = Layers {
        file: arguments.global.config.clone().or_else(|| Layers::user_file(&environment)),
        flags: flags(&arguments.global.settings, &command)?,
        environment,
    };
    let mut settings = layers.load().map_err(|error| {
        anyhow::Error::from(Exit { code: CONFIG, message: format!("{error:#}") })
    })?;
    if settings.config.kv.disk_folder.as_os_str().is_empty() {
        settings.config.kv.disk_folder = std::env::temp_dir();
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .worker_threads(2)
        .thread_name("tandem-edge")
        .build()
        .context("the asynchronous runtime")?;
    let done = runtime.block_on(act(command, settings, output));
    // A terminal read may still block a thread; the process ends without it.
    runtime.shutdown_timeout(Duration::from_millis(100));
    done
}

async fn act(command: Command, settings: Settings, output: Output) -> Result<()> {
    match &command {
        Command::Inspect { file, tensors, metadata } => {
            let options = inspect::InspectOptions { tensors: *tensors, metadata: *metadata };
            inspect::run(file, options, output)
        }
        Command::Plan { file, measured, .. } => {
            if file.is_none() {
                connection::require_model(&settings.config)?;
            }
            let file = file.as_deref().unwrap_or(&settings.config.model.path);
            let options = plan::PlanOptions { file, measured: *measured };
            plan::run(options, &settings.config, cache_folder().as_deref(), output).await
        }
        Command::Probe(arguments) => {
            probe::run(arguments, &settings.config, cache_folder().as_deref(), output)
        }
        Command::Bench(arguments) => {
            bench::run(arguments, &settings.config, cache_folder().as_deref(), output)
        }
        Command::Config { command: ConfigCommand::Show } => config_show::run(&settings, output),
        Command::Serve { .. } => serve_here(settings, output).await,
        Command::Ps { .. } => service::ps(place(settings), output).await,
        Command::Stop { .. } => service::stop(place(settings), output).await,
        Command::Tokenize { text, add_special, parse_special, .. } => {
            let options = tokenize::TokenizeOptions {
                text: text.clone(),
                add_special: *add_special,
                parse_special: *parse_special,
            };
            tokenize::run(options, place(settings), output).await
        }
        Command::Perplexity { file, chunk, chunks, .. } => {
            let options = perplexity::PerplexityOptions {
                file: file.clone(),
                chunk_tokens: *chunk,
                chunks_max: *chunks,
            };
            perplexity::run(settings.config, options, output).await
        }
        Command::Chat { .. } | Command::Generate { .. } => talk(&command, settings, output).await,
        Command::Completions { .. } => Ok(()),
    }
}

async fn talk(command: &Command, settings: Settings, output: Output) -> Result<()> {
    let place = place(settings);
    if let Some(options) = GenerateOptions::from_command(command) {
        return generate::run(options, place, output).await;
    }
    let state = user_folder("XDG_STATE_HOME", ".local/state");
    let history = state.map(|folder| folder.join("history"));
    match ChatOptions::from_command(command, history) {
        Some(options) => chat::run(options, place, output).await,
        None => Ok(()),
    }
}

/// Where what was measured of this machine is kept.
fn cache_folder() -> Option<PathBuf> {
    user_folder("XDG_CACHE_HOME", ".cache")
}

/// Our folder where the user keeps such files: below what the variable says, or below home.
fn user_folder(variable: &str, below_home: &str) -> Option<PathBuf> {
    let named = std::env::var_os(variable).filter(|folder| !folder.is_empty());
    let home = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(below_home));
    named.map(PathBuf::from).or(home).map(|folder| folder.join("tandem"))
}

async fn serve_here(settings: Settings, output: Output) -> Result<()> {
    let log = &settings.config.log;
    let format = match (log.format.as_str(), output.color_errors) {
        ("json", _) => LogFormat::Json,
        (_, true) => LogFormat::ColoredText,
        (_, false) => LogFormat::Text,
    };
    start_logging(&log.level, format)?;
    connection::require_model(&settings.config)?;
    let named = !settings.config.server.socket.as_os_str().is_empty();
    let config = settings.config.clone();
    let listen = Listen {
        socket: place(settings).socket()?.to_owned(),
        folder: if named { Folder::AsFound } else { Folder::Private },
        probe_folder: cache_folder(),
    };
    let watchdog = std::env::var("WATCHDOG_USEC").ok().and_then(|text| text.parse().ok());
    let systemd = Systemd {
        notify_socket: std::env::var_os("NOTIFY_SOCKET"),
        watchdog: watchdog.map(Duration::from_micros),
    };
    serve::run(config, listen, systemd, output).await
}

fn place(settings: Settings) -> Place {
    let config = settings.config;
    let socket = if config.server.socket.as_os_str().is_empty() {
        default_socket(std::env::var_os("XDG_RUNTIME_DIR").as_deref()).ok()
    } else {
        Some(config.server.socket.clone())
    };
    Place { socket, config }
}

/// The variables that can be settings. Others may hold any bytes and are none of our business.
fn environment() -> Result<Vec<(String, String)>> {
    let mut variables = Vec::new();
    for (name, value) in std::env::vars_os() {
        match (name.into_string(), value.into_string()) {
            (Ok(name), Ok(value)) => variables.push((name, value)),
            (Ok(name), Err(_)) if name.starts_with("TANDEM__") => {
                let message = format!("the variable {name} is no UTF-8");
                return Err(Exit { code: CONFIG, message }.into());
            }
            _ => {}
        }
    }
    Ok(variables)
}

/// All flags that stand for settings, as dotted paths and values.
fn flags(sets: &[String], command: &Command) -> Result<Vec<(String, String)>> {
    let mut flags = Vec::new();
    for set in sets {
        let Some((key, value)) = set.split_once('=') else {
            let message = format!("--set {set}: write KEY=VALUE, such as kv.cache_bytes=2GiB");
            return Err(Exit { code: CONFIG, message }.into());
        };
        flags.push((key.trim().to_owned(), value.trim().to_owned()));
    }
    let (engine, socket) = engine_and_socket(command);
    let mut put = |key: &str, value: Option<String>| {
        flags.extend(value.map(|value| (key.to_owned(), value)));
    };
    let path = |path: &PathBuf| path.to_string_lossy().into_owned();
    put("model.path", engine.model.as_ref().map(path));
    put("cpu.threads", engine.threads.map(|threads| threads.to_string()));
    put("model.context_tokens", engine.context.map(|tokens| tokens.to_string()));
    if engine.kv_dtype.windows(2).any(|pair| pair[0] != pair[1]) {
        let message = format!("keys and values have one type, not {}", engine.kv_dtype.join(", "));
        return Err(Exit { code: CONFIG, message }.into());
    }
    put("kv.dtype", engine.kv_dtype.first().cloned());
    put("speculative.method", engine.speculative);
    put("speculative.draft_max", engine.draft_max.map(|tokens| tokens.to_string()));
    put("gpu.vram_limit", engine.gpu.vram_limit.map(|limit| limit.0.to_string()));
    put("server.socket", socket.socket.as_ref().map(path));
    if let Command::Bench(arguments) = command {
        let tokens = arguments.ubatch_size.map(|tokens| tokens.to_string());
        put("scheduler.step_tokens_max", tokens);
    }
    Ok(flags)
}

fn engine_and_socket(command: &Command) -> (EngineArguments, SocketArguments) {
    let none = SocketArguments::default;
    match command {
        Command::Serve { engine, socket }
        | Command::Chat { engine, socket, .. }
        | Command::Generate { engine, socket, .. } => (engine.clone(), socket.clone()),
        Command::Perplexity { engine, .. } | Command::Plan { engine, .. } => {
            (engine.clone(), none())
        }
        Command::Tokenize { model, socket, .. } => {
            let engine = EngineArguments { model: model.clone(), ..EngineArguments::default() };
            (engine, socket.clone())
        }
        Command::Bench(BenchArguments { gpu, .. }) => {
            (EngineArguments { gpu: gpu.clone(), ..EngineArguments::default() }, none())
        }
        Command::Ps { socket } | Command::Stop { socket } => {
            (EngineArguments::default(), socket.clone())
        }
        _ => (EngineArguments::default(), none()),
    }
}
