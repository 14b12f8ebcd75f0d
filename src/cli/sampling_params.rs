//! Sampling flags as protocol parameters. The protocol's own defaults leave the model's distribution
//! as it is; a person at a terminal wants the flags' defaults, so those are always sent.

use super::arguments::SamplingArguments;
use serde_json::{Map, Value, json};

/// The flags in the protocol's words.
pub fn params(arguments: &SamplingArguments) -> Map<String, Value> {
    let mut params = Map::new();
    let mut put = |name: &str, value: Option<Value>| {
        if let Some(value) = value {
            params.insert(name.to_owned(), value);
        }
    };
    put("max_tokens", arguments.max_tokens.map(|value| json!(value)));
    put("temperature", Some(json!(arguments.temperature)));
    put("top_k", Some(json!(arguments.top_k)));
    put("top_p", Some(json!(arguments.top_p)));
    put("min_p", Some(json!(arguments.min_p)));
    put("repetition_penalty", arguments.repetition_penalty.map(|value| json!(value)));
    put("seed", arguments.seed.map(|value| json!(value)));
    put("stop", (!arguments.stop.is_empty()).then(|| json!(arguments.stop)));
    put("ignore_eos", arguments.ignore_eos.then_some(Value::Bool(true)));
    params
}
