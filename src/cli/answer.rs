//! Streams one answer to the person or program in front: text as it comes, JSON lines on request,
//! a bar while the prompt is worked on, Ctrl-C to stop it. Used by `chat` and `generate`.

use super::connection::Connection;
use super::failure::{Exit, INTERRUPTED};
use super::output::{Output, ProgressUnit};
use anyhow::{Context, Result};
use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};

/// What is left of an answer when its stream has ended.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    /// All its text.
    pub text: String,
    /// The terminal `done` event.
    pub done: Value,
    /// Whether Ctrl-C ended it.
    pub interrupted: bool,
}

/// Sends a request and prints its events until the terminal one.
///
/// # Errors
/// The service refused or lost the request ([`super::failure::ServiceError`]), or standard output
/// is closed.
pub async fn stream(
    connection: &mut Connection,
    method: &str,
    params: Value,
    output: Output,
) -> Result<Answer> {
    let mut answer = Answer::default();
    let mut bar = None;
    // One for the whole answer: a new one per event would miss a Ctrl-C between two of them.
    let mut interrupts = signal(SignalKind::interrupt()).context("the signal handler")?;
    let mut events = connection.stream(method, params).await?;
    loop {
        let event = tokio::select! {
            event = events.next() => event,
            _ = interrupts.recv() => {
                if answer.interrupted {
                    let message = "interrupted twice".to_owned();
                    return Err(Exit { code: INTERRUPTED, message }.into());
                }
                answer.interrupted = true;
                events.cancel().await?;
                continue;
            }
        };
        if event.is_err() && !answer.text.is_empty() && !output.json {
            // The reason gets a line of its own.
            output.line("")?;
        }
        let event = event?;
        if output.json {
            output.object(&event)?;
        }
        match event["type"].as_str().unwrap_or_default() {
            "progress" => {
                let bar =
                    bar.get_or_insert_with(|| output.progress("prompt", ProgressUnit::Tokens));
                bar.set_length(event["total"].as_u64().unwrap_or(0));
                bar.set_position(event["done"].as_u64().unwrap_or(0));
            }
            "delta" => {
                if let Some(bar) = bar.take() {
                    bar.finish_and_clear();
                }
                let text = event["text"].as_str().unwrap_or_default();
                answer.text.push_str(text);
                if !output.json {
                    output.piece(text)?;
                }
            }
            "done" => {
                answer.done = event;
                break;
            }
            _ => {}
        }
    }
    if !output.json {
        output.line("")?;
        for warning in answer.done["warnings"].as_array().into_iter().flatten() {
            output.notice(&format!("warning: {}", warning.as_str().unwrap_or_default()))?;
        }
    }
    Ok(answer)
}

/// One line of figures about a finished answer.
pub fn figures(done: &Value) -> String {
    let usage = &done["usage"];
    let timings = &done["timings"];
    let number = |value: &Value| value.as_f64().unwrap_or(0.0);
    let completion = number(&usage["completion_tokens"]);
    let prompt = number(&usage["prompt_tokens"]) - number(&usage["cached_tokens"]);
    let rate = |tokens: f64, ms: &Value| match number(ms) {
        ms if ms > 0.0 && tokens > 0.0 => format!("{:.1} tokens/s", tokens * 1e3 / ms),
        _ => "no rate".to_owned(),
    };
    let drafted = match (&usage["draft_tokens_accepted"], number(&usage["draft_tokens"])) {
        (accepted, drafted) if drafted > 0.0 => format!(" ({accepted} of {drafted} drafted)"),
        _ => String::new(),
    };
    format!(
        "prompt {} tokens ({} cached), {}; answer {} tokens{drafted}, {}; {:.0} ms in all; \
         ended by {}",
        usage["prompt_tokens"],
        usage["cached_tokens"],
        rate(prompt, &timings["prefill_ms"]),
        usage["completion_tokens"],
        rate((completion - 1.0).max(0.0), &timings["decode_ms"]),
        number(&timings["total_ms"]),
        done["finish_reason"].as_str().unwrap_or("?"),
    )
}
