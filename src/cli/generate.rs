//! `tandem generate`: continues one text.

use super::answer;
use super::arguments::{Command, SamplingArguments};
use super::connection::{Connection, Place};
use super::failure::{Exit, INTERRUPTED, USAGE};
use super::output::Output;
use super::sampling_params;
use anyhow::Result;
use serde_json::json;
use std::io::{IsTerminal, Read};

/// What to continue and how.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// The text; `None` is standard input.
    pub prompt: Option<String>,
    /// Text that spells a special token becomes that token.
    pub parse_special: bool,
    /// Most likely tokens per step.
    pub logprobs: Option<usize>,
    /// Sampling flags.
    pub sampling: SamplingArguments,
}

impl GenerateOptions {
    /// Takes its part of a parsed command.
    pub fn from_command(command: &Command) -> Option<Self> {
        let Command::Generate { prompt, parse_special, logprobs, sampling, .. } = command else {
            return None;
        };
        Some(Self {
            prompt: prompt.clone(),
            parse_special: *parse_special,
            logprobs: *logprobs,
            sampling: sampling.clone(),
        })
    }
}

/// The text given, or all of standard input.
///
/// # Errors
/// Nothing was given and a person sits at standard input, or it is no UTF-8.
pub fn text_or_stdin(given: Option<String>, what: &str) -> Result<String> {
    if let Some(text) = given {
        return Ok(text);
    }
    if std::io::stdin().is_terminal() {
        let message = format!("no {what}: give it as an argument or on standard input");
        return Err(Exit { code: USAGE, message }.into());
    }
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text)?;
    Ok(text)
}

/// Streams the continuation.
///
/// # Errors
/// The service or the engine refused, or was interrupted.
pub async fn run(options: GenerateOptions, place: Place, output: Output) -> Result<()> {
    let prompt = text_or_stdin(options.prompt, "prompt")?;
    let mut params = sampling_params::params(&options.sampling);
    params.insert("prompt".into(), json!(prompt));
    if options.parse_special {
        params.insert("parse_special".into(), json!(true));
    }
    if let Some(top) = options.logprobs {
        params.insert("logprobs".into(), json!(true));
        params.insert("top_logprobs".into(), json!(top));
    }
    let mut connection = Connection::open(place, output).await?;
    let answer = answer::stream(&mut connection, "generate", params.into(), output).await?;
    if !output.json {
        output.notice(&answer::figures(&answer.done))?;
    }
    connection.close().await?;
    if answer.interrupted {
        return Err(Exit { code: INTERRUPTED, message: "interrupted".into() }.into());
    }
    Ok(())
}
