//! `tandem perplexity`: how well a model predicts a text, by llama.cpp's method: chunks of equal
//! length, each on its own, the second half of each scored.

use super::connection;
use super::failure::{Exit, USAGE};
use super::output::{Output, ProgressUnit};
use anyhow::{Context, Result, bail};
use serde_json::json;
use std::path::PathBuf;
use std::time::Duration;
use tandem::actors::Engine;
use tandem::config::Config;
use tandem::request::{AddSpecial, Event, Input, ParseSpecial, Request};
use tandem::units::TokenId;

/// What to measure.
#[derive(Clone, Debug)]
pub struct PerplexityOptions {
    /// The text.
    pub file: PathBuf,
    /// Tokens of one chunk.
    pub chunk_tokens: usize,
    /// Only so many chunks.
    pub chunks_max: Option<usize>,
}

/// Prints the running and the final perplexity, `exp(-mean log-probability)`, with the standard
/// error of the mean carried over to first order.
///
/// # Errors
/// The text can't be read or is shorter than one chunk, or the engine fails.
pub async fn run(config: Config, options: PerplexityOptions, output: Output) -> Result<()> {
    let wrong = |message: String| Err(Exit { code: USAGE, message }.into());
    if options.chunk_tokens < 4 {
        return wrong(format!("--chunk is {}; allowed: at least 4", options.chunk_tokens));
    }
    if options.chunks_max == Some(0) {
        return wrong("--chunks is 0; allowed: at least 1".to_owned());
    }
    // Before the model, whose load may take long.
    let text = std::fs::read_to_string(&options.file)
        .with_context(|| options.file.display().to_string())?;
    let engine = connection::load(config, output).await?;
    measure(&engine, text, options, output).await?;
    engine.shutdown(Duration::ZERO).await;
    Ok(())
}

async fn measure(
    engine: &Engine,
    text: String,
    options: PerplexityOptions,
    output: Output,
) -> Result<()> {
    let tokens = engine.tokenize(text, AddSpecial::ModelDefault, ParseSpecial::No).await?;
    // What the model puts before an empty text is its BOS.
    let nothing = engine.tokenize("", AddSpecial::ModelDefault, ParseSpecial::No).await?;
    let bos = nothing.first().copied();
    let chunks: Vec<&[TokenId]> = tokens.chunks_exact(options.chunk_tokens).collect();
    let count = chunks.len().min(options.chunks_max.unwrap_or(usize::MAX));
    if count == 0 {
        bail!("the text has {} tokens, one chunk needs {}", tokens.len(), options.chunk_tokens);
    }
    let bar = output.progress("chunks", ProgressUnit::Tokens);
    bar.set_length((count * options.chunk_tokens) as u64);
    let mut scored = Vec::new();
    for chunk in &chunks[..count] {
        let mut chunk = chunk.to_vec();
        if let Some(bos) = bos {
            chunk[0] = bos;
        }
        scored.extend(second_half(engine, chunk).await?);
        bar.inc(options.chunk_tokens as u64);
    }
    bar.finish_and_clear();
    let (perplexity, error) = summarise(&scored);
    if output.json {
        output.object(&json!({
            "perplexity": perplexity, "error": error, "chunks": count,
            "chunk_tokens": options.chunk_tokens, "scored_tokens": scored.len(),
        }))?;
    } else {
        output.line(&format!("perplexity {perplexity:.4} ± {error:.4} ({count} chunks)"))?;
    }
    Ok(())
}

/// Natural-log probabilities of the tokens after the chunk's middle.
async fn second_half(engine: &Engine, chunk: Vec<TokenId>) -> Result<Vec<f64>> {
    let middle = chunk.len() / 2;
    let mut request = Request::new(Input::Tokens(chunk)).max_tokens(0);
    request.prompt_logprobs = Some(0);
    let mut events = engine.generate(request);
    let mut scored = Vec::new();
    while let Some(event) = events.next().await {
        match event {
            // The first entry scores the token at position 1.
            Event::PromptLogprobs(tokens) => {
                scored.extend(tokens.iter().map(|token| f64::from(token.token.logprob)));
            }
            Event::Failed(error) => return Err(error.into()),
            _ => {}
        }
    }
    Ok(scored.split_off(middle))
}

/// Perplexity and its standard error.
fn summarise(logprobs: &[f64]) -> (f64, f64) {
    let count = logprobs.len() as f64;
    let mean = logprobs.iter().sum::<f64>() / count;
    let variance = logprobs.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / count;
    let perplexity = (-mean).exp();
    (perplexity, perplexity * (variance / (count - 1.0).max(1.0)).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_probabilities_give_their_inverse_and_no_error() {
        let (perplexity, error) = summarise(&[-(8f64.ln()); 10]);
        assert!((perplexity - 8.0).abs() < 1e-9);
        assert!(error.abs() < 1e-9);
    }
}
