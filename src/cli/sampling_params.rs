//! Sampling flags as protocol parameters: only what was given is sent.

use super::arguments::SamplingArguments;
use serde_json::{Map, Value, json};

/// The flags that were given, in the protocol's words.
pub fn params(arguments: &SamplingArguments) -> Map<String, Value> {
    let mut params = Map::new();
    let mut put = |name: &str, value: Option<Value>| {
        if let Some(value) = value {
            params.insert(name.to_owned(), value);
        }
    };
    put("max_tokens", arguments.max_tokens.map(|value| json!(value)));
    put("temperature", arguments.temperature.map(|value| json!(value)));
    put("top_k", arguments.top_k.map(|value| json!(value)));
    put("top_p", arguments.top_p.map(|value| json!(value)));
    put("min_p", arguments.min_p.map(|value| json!(value)));
    put("repetition_penalty", arguments.repetition_penalty.map(|value| json!(value)));
    put("seed", arguments.seed.map(|value| json!(value)));
    put("stop", (!arguments.stop.is_empty()).then(|| json!(arguments.stop)));
    put("ignore_eos", arguments.ignore_eos.then_some(Value::Bool(true)));
    params
}
