//! `docs/protocol.md` says what the code does.

use serde_json::Value;
use tandem::request::ErrorKind;
use tandem::server::protocol::{Catalogue, Inbound, JsonLimits, Method, read_line};

const TEXT: &str = include_str!("../../docs/protocol.md");
const LIMITS: JsonLimits = JsonLimits { depth_max: 64, values_max: 1 << 20 };

/// Every name of a property that a schema describes.
fn properties(schema: &Value, found: &mut Vec<String>) {
    match schema {
        Value::Object(fields) => {
            if let Some(Value::Object(named)) = fields.get("properties") {
                found.extend(named.keys().cloned());
            }
            fields.values().for_each(|inner| properties(inner, found));
        }
        Value::Array(entries) => entries.iter().for_each(|inner| properties(inner, found)),
        _ => {}
    }
}

#[test]
fn the_error_table_is_the_codes() {
    for (_, kind, code, http, retryable) in ErrorKind::TABLE {
        let retryable = if retryable { "yes" } else { "no" };
        let row = format!("| `{kind}` | {code} | {http} | {retryable} |");
        assert!(TEXT.contains(&row), "no row {row}");
    }
}

#[test]
fn every_method_parameter_and_event_is_described() {
    let catalogue = Catalogue::default();
    for (method, name) in Method::ALL {
        assert!(TEXT.contains(&format!("| `{name}` |")), "no row of method {name}");
        let mut names = Vec::new();
        properties(catalogue.params_schema(method), &mut names);
        for parameter in names {
            let described =
                [format!("`{parameter}`"), format!("{{{parameter},"), format!(" {parameter}}}")];
            assert!(described.iter().any(|text| TEXT.contains(text)), "{name}: {parameter}");
        }
    }
    let described = serde_json::to_value(catalogue.describe()).expect("JSON");
    let mut names = Vec::new();
    properties(&described["events"], &mut names);
    properties(&described["hello"], &mut names);
    for name in names {
        assert!(TEXT.contains(&name), "no word on {name}");
    }
}

#[test]
fn the_examples_are_lines_of_the_protocol() {
    let mut requests = 0;
    for line in TEXT.lines() {
        if let Some(request) = line.strip_prefix("→ ") {
            requests += 1;
            let read = read_line(request.as_bytes(), LIMITS).expect("a good line");
            let Inbound::Command(command) = read else { continue };
            assert!(Method::named(&command.method).is_ok(), "{line}");
        } else if let Some(answer) = line.strip_prefix("← ") {
            let value: Value = serde_json::from_str(answer).expect("JSON");
            let known = ["hello", "result", "error", "method"];
            assert!(known.iter().any(|field| value.get(field).is_some()), "{line}");
        }
    }
    assert!(requests > 5, "{requests} examples");
}
