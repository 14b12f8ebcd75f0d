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
        let text = String::from_utf8_lossy(bytes);
        output.line(&format!("{:>8}  {}", token.0, text.escape_debug()))?;
    }
    Ok(())
}

async fn ask_service(
    text: &str,
    options: &TokenizeOptions,
    place: &Place,
    output: Output,
) -> Result<()> {
    let mut connection = Connection::to_service(place).await?;
    let params = json!({
        "text": text,
        "add_special": options.add_special,
        "parse_special": options.parse_special,
    });
    let result = connection.call("tokenize", params).await?;
    connection.close().await?;
    if output.json {
        output.object(&result)?;
        return Ok(());
    }
    for token in result["tokens"].as_array().into_iter().flatten() {
        output.line(&format!("{token:>8}"))?;
    }
    Ok(())
}
