//! `tandem inspect FILE`: what a model file or folder holds, read from its headers alone.

use super::output::Output;
use anyhow::Result;
use serde_json::{Map, Value as Json, json};
use std::collections::BTreeMap;
use std::path::Path;
use tandem::formats::{Checkpoint, StoredType, TensorInfo, Value};
use tandem::model::ModelSpec;
use tandem::request::RequestError;
use tandem::tensor::KvDType;
use tandem::units::ByteSize;

/// What to list besides the summary.
#[derive(Clone, Copy, Debug)]
pub struct InspectOptions {
    /// Every tensor.
    pub tensors: bool,
    /// Every metadata value.
    pub metadata: bool,
}

/// Prints the summary and the wanted lists.
///
/// # Errors
/// The file is no readable GGUF, or the folder no readable Hugging Face model. One that holds a
/// model Tandem can't run is shown with the reason.
pub fn run(file: &Path, options: InspectOptions, output: Output) -> Result<()> {
    let checkpoint = Checkpoint::open(file).map_err(RequestError::from)?;
    let spec = ModelSpec::from_checkpoint(&checkpoint);
    let summary = summary(&checkpoint, &spec);
    if output.json {
        output.object(&as_json(&checkpoint, options, summary))?;
        return Ok(());
    }
    let rows: Vec<Vec<String>> = summary
        .iter()
        .map(|(name, value)| {
            let shown = match (name.as_str(), value.as_u64()) {
                ("file_bytes", Some(bytes)) => ByteSize(bytes).to_string(),
                _ => value.as_str().map_or_else(|| value.to_string(), str::to_owned),
            };
            vec![name.clone(), shown]
        })
        .collect();
    output.table(&["what", "value"], &rows)?;
    output.line("")?;
    output.table(&["type", "tensors", "bytes"], &by_type(&checkpoint))?;
    if options.metadata {
        output.line("")?;
        let metadata = checkpoint.metadata();
        let rows: Vec<Vec<String>> =
            metadata.iter().map(|(key, value)| vec![key.to_owned(), brief(&value)]).collect();
        output.table(&["key", "value"], &rows)?;
    }
    if options.tensors {
        output.line("")?;
        let rows: Vec<Vec<String>> = checkpoint.tensors().map(|info| tensor_row(&info)).collect();
        output.table(&["tensor", "type", "shape", "bytes"], &rows)?;
    }
    Ok(())
}

fn summary<E: std::fmt::Display>(
    checkpoint: &Checkpoint,
    spec: &Result<ModelSpec, E>,
) -> Map<String, Json> {
    let mut summary = Map::new();
    let mut put = |name: &str, value: Json| summary.insert(name.to_owned(), value);
    let bytes: usize = checkpoint.files().map(|file| file.bytes().len()).sum();
    put("files", json!(checkpoint.files().len()));
    put("file_bytes", json!(bytes));
    match spec {
        Ok(spec) => {
            let attention = &spec.layers[0].attention;
            put("name", json!(spec.name));
            put("architecture", json!(spec.architecture));
            put("layers", json!(spec.layers.len()));
            put("embedding", json!(spec.embedding_dim));
            put("heads", json!(attention.n_heads));
            put("kv_heads", json!(attention.n_kv_heads));
            put("head_dim", json!(attention.head_dim));
            put("feed_forward", json!(spec.layers[0].ffn.hidden_dim()));
            if let Some(experts) = spec.layers[0].ffn.experts() {
                put("experts", json!(experts.n_experts));
                put("experts_used", json!(experts.n_used));
                put("active_parameters", json!(spec.active_parameters()));
            }
            put("parameters", json!(spec.parameters()));
            put("vocabulary", json!(spec.vocab_size));
            put("context_tokens", json!(spec.context_tokens_max));
            put("kv_bytes_per_token", json!(spec.kv_bytes_per_token(KvDType::F16)));
            put("runs_here", json!("yes"));
        }
        Err(error) => {
            put("runs_here", json!(format!("no: {error}")));
        }
    }
    summary
}

fn by_type(checkpoint: &Checkpoint) -> Vec<Vec<String>> {
    let mut types: BTreeMap<String, (usize, u64)> = BTreeMap::new();
    for info in checkpoint.tensors() {
        let note = match info.stored {
            StoredType::Known(_) => String::new(),
            StoredType::Other(_) => " (not computable)".to_owned(),
        };
        let entry = types.entry(format!("{}{note}", info.stored)).or_default();
        entry.0 += 1;
        entry.1 += info.bytes.unwrap_or(0) as u64;
    }
    types
        .into_iter()
        .map(|(name, (count, bytes))| vec![name, count.to_string(), ByteSize(bytes).to_string()])
        .collect()
}

fn tensor_row(info: &TensorInfo<'_>) -> Vec<String> {
    let dims: Vec<String> = info.shape.dims().iter().map(usize::to_string).collect();
    let bytes = info.bytes.map_or("unknown".to_owned(), |bytes| bytes.to_string());
    vec![info.name.to_owned(), info.stored.to_string(), dims.join(" × "), bytes]
}

/// A metadata value on one line; long ones cut, arrays by type and length.
fn brief(value: &Value<'_>) -> String {
    const CHARS_MAX: usize = 72;
    let text = match value {
        Value::Integer(number) => number.to_string(),
        Value::Float(number) => number.to_string(),
        Value::Bool(flag) => flag.to_string(),
        Value::Text(text) => text.escape_debug().to_string(),
        Value::Bytes(bytes) => format!("{} bytes, no UTF-8", bytes.len()),
        Value::Array(array) => format!("{array:?}"),
    };
    match text.char_indices().nth(CHARS_MAX) {
        Some((cut, _)) => format!("{}… ({} characters)", &text[..cut], text.chars().count()),
        None => text,
    }
}

fn as_json(checkpoint: &Checkpoint, options: InspectOptions, summary: Map<String, Json>) -> Json {
    let mut all = summary;
    if options.metadata {
        let metadata = checkpoint.metadata();
        let values: Map<String, Json> = metadata
            .iter()
            .map(|(key, value)| {
                let value = match value {
                    Value::Integer(number) => json!(number),
                    Value::Float(number) => json!(number),
                    Value::Bool(flag) => json!(flag),
                    Value::Text(text) => json!(text),
                    other => json!(brief(&other)),
                };
                (key.to_owned(), value)
            })
            .collect();
        all.insert("metadata".into(), Json::Object(values));
    }
    if options.tensors {
        let tensors: Vec<Json> = checkpoint
            .tensors()
            .map(|info| {
                json!({
                    "name": info.name, "type": info.stored.to_string(),
                    "shape": info.shape.dims(), "bytes": info.bytes,
                    "file": info.file, "offset": info.data_offset,
                })
            })
            .collect();
        all.insert("tensors".into(), Json::Array(tensors));
    }
    Json::Object(all)
}
