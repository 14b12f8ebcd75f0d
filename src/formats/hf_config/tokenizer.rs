//! The files about text: `tokenizer.json` as a whole, what `tokenizer_config.json` and
//! `generation_config.json` say of special tokens, and the chat template.

use super::{CONFIG_BYTES_MAX, Fields, read_text};
use crate::formats::FormatError;
use crate::formats::metadata_writer::MetadataWriter;
use serde_json::Value;
use std::path::Path;

/// Gemma's, with 262,144 tokens and half a million merges, has 33 MB.
const TOKENIZER_BYTES_MAX: usize = 256 << 20;
/// Templates have some ten kilobytes.
const TEMPLATE_BYTES_MAX: usize = 4 << 20;
const ENDS_MAX: usize = 256;

/// Writes what the files have; a folder without `tokenizer.json` has no vocabulary.
pub(super) fn write(
    folder: &Path,
    config: &Fields,
    writer: &mut MetadataWriter,
) -> Result<(), FormatError> {
    let read = |name: &str| {
        let path = folder.join(name);
        path.exists().then(|| Fields::open(&path, CONFIG_BYTES_MAX)).transpose()
    };
    let (settings, generation) = (read("tokenizer_config.json")?, read("generation_config.json")?);
    write_ends(writer, [generation.as_ref(), Some(config)])?;
    let field = "bos_token_id";
    if let Some(id) = config.count_opt(field, 0..=u32::MAX)? {
        writer.u32("tokenizer.ggml.bos_token_id", id, (config, field));
    }
    if let Some(settings) = &settings {
        write_settings(settings, writer)?;
    }
    write_template(folder, (settings.as_ref(), config), writer)?;
    writer.text("tokenizer.ggml.model", "huggingface", (config, "model_type"));
    let path = folder.join("tokenizer.json");
    if path.exists() {
        let text = read_text(&path, TOKENIZER_BYTES_MAX)?;
        writer.text("tokenizer.huggingface.json", &text, (config, "model_type"));
    }
    Ok(())
}

/// `eos_token_id`, one or a list, of the first file that has it.
fn write_ends(
    writer: &mut MetadataWriter,
    places: [Option<&Fields>; 2],
) -> Result<(), FormatError> {
    let field = "eos_token_id";
    for fields in places.into_iter().flatten() {
        let ids = match fields.get(field) {
            None => continue,
            Some(Value::Array(list)) if list.len() <= ENDS_MAX => list.iter().collect(),
            Some(one) => vec![one],
        };
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids: Option<Vec<u32>> = ids.into_iter().map(id).collect();
        let wanted = || {
            let message = format!("wanted: a token's id, or a list of at most {ENDS_MAX}");
            fields.refuse(field, message)
        };
        let ids = ids.ok_or_else(wanted)?;
        writer.u32s("tokenizer.huggingface.eos_token_ids", &ids, (fields, field));
        return Ok(());
    }
    Ok(())
}

fn write_settings(settings: &Fields, writer: &mut MetadataWriter) -> Result<(), FormatError> {
    for field in ["add_bos_token", "add_eos_token"] {
        if let Some(adds) = settings.bool_opt(field)? {
            writer.bool(&format!("tokenizer.ggml.{field}"), adds, (settings, field));
        }
    }
    for field in ["bos_token", "eos_token", "unk_token", "pad_token"] {
        // A text, or an object about a token whose text is its content.
        let text = match settings.get(field) {
            Some(Value::Object(token)) => token.get("content").and_then(Value::as_str),
            _ => settings.text_opt(field)?,
        };
        if let Some(text) = text {
            writer.text(&format!("tokenizer.huggingface.{field}"), text, (settings, field));
        }
    }
    Ok(())
}

/// `chat_template.jinja`, or what the settings have: a text, or a list of named ones.
fn write_template(
    folder: &Path,
    (settings, config): (Option<&Fields>, &Fields),
    writer: &mut MetadataWriter,
) -> Result<(), FormatError> {
    let (key, field) = ("tokenizer.chat_template", "chat_template");
    let path = folder.join("chat_template.jinja");
    if path.exists() {
        let text = read_text(&path, TEMPLATE_BYTES_MAX)?;
        writer.text(key, &text, (config, "model_type"));
        return Ok(());
    }
    let Some(settings) = settings else { return Ok(()) };
    let text = match settings.get(field) {
        None => return Ok(()),
        Some(Value::Array(list)) => {
            let named = |wanted: &str| {
                let found = list.iter().find(|one| one["name"].as_str() == Some(wanted));
                found.and_then(|one| one["template"].as_str())
            };
            let message = "a list without a template named \"default\"";
            named("default").ok_or_else(|| settings.refuse(field, message))?
        }
        Some(_) => settings.text(field)?,
    };
    writer.text(key, text, (settings, field));
    Ok(())
}
