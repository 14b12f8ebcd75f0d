//! `tandem tokenize`: a text's tokens, from a model file or the running service.

use super::connection::{Connection, Place};
use super::generate::text_or_stdin;
use super::output::Output;
use anyhow::Result;
use serde_json::json;
use tandem::formats::Checkpoint;
use tandem::request::{AddSpecial, ParseSpecial, RequestError};
use tandem::tokenizer::Tokenizer;

/// What to encode and how.
#[derive(Clone, Debug)]
pub struct TokenizeOptions {
    /// The text; `None` is standard input.
    pub text: Option<String>,
    /// BOS and EOS as the model wants them.
    pub add_special: bool,
    /// Text that spells a special token becomes that token.
    pub parse_special: bool,
}

/// Prints one token a line, its id and its text.
///
/// # Errors
/// The file or its vocabulary is bad; without a file, no service answers.
pub async fn run(options: TokenizeOptions, place: Place, output: Output) -> Result<()> {
    let text = text_or_stdin(options.text.clone(), "text")?;
    let path = &place.config.model.path;
    if path.as_os_str().is_empty() {
        return ask_service(&text, &options, &place, output).await;
    }
    let checkpoint = Checkpoint::open(path).map_err(RequestError::from)?;
    let tokenizer = Tokenizer::from_metadata(checkpoint.metadata()).map_err(RequestError::from)?;
    let add = if options.add_special { AddSpecial::ModelDefault } else { AddSpecial::No };
    let parse = if options.parse_special { ParseSpecial::Yes } else { ParseSpecial::No };
    let tokens = tokenizer.encode(&text, add, parse).map_err(RequestError::from)?;
    if output.json {
        output.object(&json!({ "tokens": tokens }))?;
        return Ok(());
    }
    for token in tokens {
        let bytes = tokenizer.token_bytes(token);
        output.line(&row(&token.0.to_string(), &String::from_utf8_lossy(bytes)))?;
    }
    Ok(())
}

async fn ask_service(
    text: &str,
    options: &TokenizeOptions,
    place: &Place,
    output: Output,
) -> Result<()> {
    let connection = Connection::to_service(place).await?;
    let params = json!({
        "text": text,
        "add_special": options.add_special,
        "parse_special": options.parse_special,
    });
    let result = connection.call("tokenize", params).await?;
    if output.json {
        output.object(&result)?;
        return connection.close().await;
    }
    for token in result["tokens"].as_array().into_iter().flatten() {
        let decoded = connection.call("detokenize", json!({ "tokens": [token] })).await?;
        let id = token.to_string();
        output.line(&row(&id, decoded["text"].as_str().unwrap_or_default()))?;
    }
    connection.close().await
}

/// A token's id and its text, with what cannot be seen escaped.
fn row(id: &str, text: &str) -> String {
    let shown: String = text.chars().map(visible).collect();
    format!("{id:>8}  {shown}")
}

fn visible(character: char) -> String {
    match character {
        '\'' | '"' => character.to_string(),
        other => other.escape_debug().to_string(),
    }
}
