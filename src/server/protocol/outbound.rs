//! Writes the lines that the server sends.

use super::{ErrorObject, RequestId, WireEvent};
use crate::request::ErrorKind;
use serde::Serialize;
use serde_json::{Value, json};

/// One line with its line end, ready for the socket.
pub type Line = Vec<u8>;

fn line(message: &impl Serialize) -> Line {
    let mut bytes = serde_json::to_vec(message).unwrap_or_else(|error| {
        // Only a foreign `Serialize` can fail; the client still gets an answer that it can read.
        let error = ErrorObject::new(ErrorKind::Internal, format!("unwritable answer: {error}"));
        json!({"id": null, "error": error}).to_string().into_bytes()
    });
    bytes.push(b'\n');
    bytes
}

#[derive(Serialize)]
struct Answer<'a, T> {
    id: Option<&'a RequestId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    result: Option<T>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a ErrorObject>,
}

#[derive(Serialize)]
struct Notification<'a> {
    method: &'static str,
    params: EventParams<'a>,
}

#[derive(Serialize)]
struct EventParams<'a> {
    id: &'a RequestId,
    seq: u64,
    #[serde(flatten)]
    event: &'a WireEvent,
}

/// `{"id","result"}`; warnings become a field of the result.
pub fn result_line(id: &RequestId, result: &impl Serialize, warnings: &[String]) -> Line {
    let written = if warnings.is_empty() {
        // Straight to bytes: as a tree, the tokens of a long text take ten times their size.
        serde_json::to_vec(&Answer { id: Some(id), result: Some(result), error: None })
    } else {
        serde_json::to_value(result).and_then(|mut value| {
            if let Value::Object(fields) = &mut value {
                fields.insert("warnings".to_owned(), json!(warnings));
            }
            serde_json::to_vec(&Answer { id: Some(id), result: Some(value), error: None })
        })
    };
    match written {
        Ok(mut bytes) => {
            bytes.push(b'\n');
            bytes
        }
        Err(error) => {
            let message = format!("unwritable result: {error}");
            error_line(Some(id), &ErrorObject::new(ErrorKind::Internal, message))
        }
    }
}

/// `{"id","error"}`; an id that could not be read is `null`.
pub fn error_line(id: Option<&RequestId>, error: &ErrorObject) -> Line {
    line(&Answer::<()> { id, result: None, error: Some(error) })
}

/// `{"method":"event","params":{"id","seq","type",…}}`.
pub fn event_line(id: &RequestId, seq: u64, event: &WireEvent) -> Line {
    line(&Notification { method: "event", params: EventParams { id, seq, event } })
}

/// `{"hello":{…}}`.
pub fn hello_line(hello: &super::Hello) -> Line {
    #[derive(Serialize)]
    struct Speech<'a> {
        hello: &'a super::Hello,
    }
    line(&Speech { hello })
}
