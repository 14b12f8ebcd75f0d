//! Reads one line into a command: the envelope's rules, before any method's.

use super::json::{JsonLimits, brief, brief_text, parse};
use super::{ErrorObject, PROTOCOL_MAJOR};
use crate::request::ErrorKind;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::fmt;

/// Longest `id` that is a string.
pub const ID_BYTES_MAX: usize = 128;
/// Largest `id` that is a number: every JSON reader holds it exactly.
pub const ID_NUMBER_MAX: i64 = (1 << 53) - 1;
const ID_ALLOWED: &str = "a string of 1 to 128 bytes or an integer of at most 53 bits";

/// What a client calls one of its requests. Echoed exactly as it came.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(untagged)]
pub enum RequestId {
    /// An integer, -(2^53 - 1) to 2^53 - 1.
    Number(
        #[schemars(range(min = -9_007_199_254_740_991_i64, max = 9_007_199_254_740_991_i64))] i64,
    ),
    /// A string of 1 to 128 bytes.
    Text(#[schemars(length(min = 1, max = 128))] String),
}

impl RequestId {
    fn read(value: &Value) -> Option<Self> {
        match value {
            Value::Number(number) => {
                let number = number.as_i64()?;
                (-ID_NUMBER_MAX..=ID_NUMBER_MAX).contains(&number).then_some(Self::Number(number))
            }
            Value::String(text) if (1..=ID_BYTES_MAX).contains(&text.len()) => {
                Some(Self::Text(text.clone()))
            }
            _ => None,
        }
    }

    /// The id as a JSON value.
    pub fn to_json(&self) -> Value {
        match self {
            Self::Number(number) => Value::from(*number),
            Self::Text(text) => Value::from(text.as_str()),
        }
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => number.fmt(formatter),
            Self::Text(text) => formatter.write_str(&brief_text(text)),
        }
    }
}

/// One request of a client, its envelope checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Command {
    /// What the client calls it.
    pub id: RequestId,
    /// The method's name as it came.
    pub method: String,
    /// The parameters as they came.
    pub params: Map<String, Value>,
    /// Fields of the envelope that were ignored.
    pub warnings: Vec<String>,
}

/// What a line is.
#[derive(Clone, Debug, PartialEq)]
pub enum Inbound {
    /// A request.
    Command(Command),
    /// The client's own hello, of a version that is spoken here; it gets no answer.
    Hello,
}

/// A line that is no request, with its id where it has a good one.
#[derive(Clone, Debug, PartialEq)]
pub struct Refused {
    /// The request's id; `None` is sent as `null`.
    pub id: Option<RequestId>,
    /// Why.
    pub error: ErrorObject,
    /// What becomes of the connection.
    pub then: AfterRefusal,
}

/// What becomes of a connection after a refused line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AfterRefusal {
    /// It goes on with the next line.
    GoOn,
    /// Client and server do not speak the same protocol: it closes.
    Close,
}

impl From<ErrorObject> for Refused {
    fn from(error: ErrorObject) -> Self {
        Self { id: None, error, then: AfterRefusal::GoOn }
    }
}

/// Reads one line.
///
/// # Errors
/// `parse_error`, `invalid_request`, `invalid_params` (params that are no object) or
/// `unsupported_version`.
pub fn read_line(line: &[u8], limits: JsonLimits) -> Result<Inbound, Refused> {
    let value = parse(line, limits).map_err(ErrorObject::parse_error)?;
    let Value::Object(mut object) = value else {
        let allowed = "one JSON object per line; there are no batches";
        return Err(ErrorObject::invalid_request("the line", &brief(&value), allowed).into());
    };
    if let (Some(hello), None) = (object.get("hello"), object.get("method")) {
        return read_hello(hello);
    }
    let id = match object.remove("id") {
        None => Err(ErrorObject::invalid_request("id", "missing", ID_ALLOWED)),
        Some(id) => RequestId::read(&id)
            .ok_or_else(|| ErrorObject::invalid_request("id", &brief(&id), ID_ALLOWED)),
    }?;
    read_command(id.clone(), object)
        .map(Inbound::Command)
        .map_err(|error| Refused { id: Some(id), ..error.into() })
}

fn read_command(id: RequestId, mut object: Map<String, Value>) -> Result<Command, ErrorObject> {
    match object.remove("jsonrpc") {
        None => {}
        Some(Value::String(version)) if version == "2.0" => {}
        Some(Value::String(version)) => {
            return Err(unsupported("jsonrpc", &brief_text(&version), "\"2.0\", or none"));
        }
        Some(other) => {
            let got = brief(&other);
            return Err(ErrorObject::invalid_request("jsonrpc", &got, "\"2.0\", or none"));
        }
    }
    let method = match object.remove("method") {
        Some(Value::String(method)) => method,
        other => {
            let got = other.map_or("missing".to_owned(), |value| brief(&value));
            return Err(ErrorObject::invalid_request("method", &got, "a method's name"));
        }
    };
    let params = match object.remove("params") {
        None | Some(Value::Null) => Map::new(),
        Some(Value::Object(params)) => params,
        Some(other) => {
            return Err(ErrorObject::invalid_value("params", &other, "an object"));
        }
    };
    let warnings = object.keys().map(|key| ignored(key)).collect();
    Ok(Command { id, method, params, warnings })
}

/// The warning for a field that the protocol does not know.
pub(super) fn ignored(field: &str) -> String {
    format!("{} is unknown here and was ignored", brief_text(field))
}

fn unsupported(field: &str, got: &str, allowed: &str) -> ErrorObject {
    let message = format!("{field} is {got}; spoken here: {allowed}");
    ErrorObject::new(ErrorKind::UnsupportedVersion, message)
        .with("field", field)
        .with("got", got)
        .with("allowed", allowed)
}

/// A client may say which protocol it speaks: `{"hello":{"protocol":{"major":1,"minor":0}}}`.
fn read_hello(hello: &Value) -> Result<Inbound, Refused> {
    let major = hello.pointer("/protocol/major");
    if major.and_then(Value::as_u64) == Some(u64::from(PROTOCOL_MAJOR)) {
        return Ok(Inbound::Hello);
    }
    let got = major.map_or("missing".to_owned(), brief);
    let error = unsupported("hello.protocol.major", &got, &PROTOCOL_MAJOR.to_string());
    Err(Refused { id: None, error, then: AfterRefusal::Close })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const LIMITS: JsonLimits = JsonLimits { depth_max: 64, values_max: 1 << 20 };

    fn kind_of(line: &str) -> (Value, String) {
        let refused = read_line(line.as_bytes(), LIMITS).unwrap_err();
        (refused.id.map_or(Value::Null, |id| id.to_json()), refused.error.data.kind)
    }

    #[test]
    fn ids_come_back_exactly_and_bad_ones_are_refused() {
        let longest = json!("x".repeat(128));
        for good in [json!(0), json!(-7), json!(ID_NUMBER_MAX), json!("a"), json!("1"), longest] {
            let line = json!({"id": good, "method": "ping"}).to_string();
            let Ok(Inbound::Command(command)) = read_line(line.as_bytes(), LIMITS) else {
                panic!("{line}")
            };
            assert_eq!(command.id.to_json(), good);
            assert_eq!(serde_json::to_value(&command.id).unwrap(), good);
        }
        let bad = ["null", "1.0", "1e3", "true", "[]", "{}", "\"\"", "9007199254740992"];
        for id in bad.map(str::to_owned).into_iter().chain([json!("x".repeat(129)).to_string()]) {
            let wanted = (Value::Null, "invalid_request".to_owned());
            assert_eq!(kind_of(&format!(r#"{{"id":{id},"method":"ping"}}"#)), wanted, "{id}");
        }
    }

    #[test]
    fn the_envelope_is_checked_and_the_id_echoed() {
        for (line, id, kind) in [
            ("[]", json!(null), "invalid_request"),
            ("3", json!(null), "invalid_request"),
            (r#"{"method":"ping"}"#, json!(null), "invalid_request"),
            (r#"{"id":3}"#, json!(3), "invalid_request"),
            (r#"{"id":"3","method":4}"#, json!("3"), "invalid_request"),
            (r#"{"id":3,"method":"ping","params":[]}"#, json!(3), "invalid_params"),
            (r#"{"id":3,"method":"ping","jsonrpc":2}"#, json!(3), "invalid_request"),
            (r#"{"id":3,"method":"ping","jsonrpc":"1.0"}"#, json!(3), "unsupported_version"),
            (r#"{"hello":{"protocol":{"major":2}}}"#, json!(null), "unsupported_version"),
            (r#"{"hello":7}"#, json!(null), "unsupported_version"),
        ] {
            assert_eq!(kind_of(line), (id, kind.to_owned()), "{line}");
        }
    }

    #[test]
    fn unknown_fields_of_the_envelope_are_warned_about() {
        let line = br#"{"id":1,"method":"ping","jsonrpc":"2.0","trace":7,"params":null}"#;
        let Ok(Inbound::Command(command)) = read_line(line, LIMITS) else { panic!() };
        assert_eq!(command.warnings, [r#""trace" is unknown here and was ignored"#]);
    }
}
