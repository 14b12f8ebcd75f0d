//! Holds a request's parameters against the JSON Schema that `describe` hands out, so that what is
//! said and what is enforced is one thing. Knows the few words of JSON Schema that ours use.

use super::ErrorObject;
use super::inbound::ignored;
use super::json::{brief, brief_text};
use serde_json::{Map, Value};

/// Checks `params` against an object schema without references. Unknown fields become warnings.
///
/// # Errors
/// `invalid_params` with the path of the first offending field, what came and what is allowed.
pub fn check(
    schema: &Value,
    params: &Map<String, Value>,
    warnings: &mut Vec<String>,
) -> Result<(), ErrorObject> {
    check_object(schema, params, "", warnings)
}

fn check_value(
    schema: &Value,
    value: &Value,
    path: &str,
    warnings: &mut Vec<String>,
) -> Result<(), ErrorObject> {
    let refuse = || ErrorObject::invalid_value(path, value, &allowed(schema));
    if let Some(branches) = branches(schema) {
        let branch = branches.iter().find(|branch| has_type(branch, value));
        let branch = branch.ok_or_else(refuse)?;
        return check_value(branch, value, path, warnings);
    }
    if !has_type(schema, value) {
        return Err(refuse());
    }
    match value {
        Value::Number(number) => {
            let number = number.as_f64().unwrap_or(f64::NAN);
            if in_range(schema, number) { Ok(()) } else { Err(refuse()) }
        }
        Value::String(text) => check_text(schema, text).then_some(()).ok_or_else(refuse),
        Value::Array(entries) => {
            if !count_is_allowed(schema, "minItems", "maxItems", entries.len()) {
                return Err(refuse());
            }
            let Some(items) = schema.get("items") else { return Ok(()) };
            for (index, entry) in entries.iter().enumerate() {
                check_value(items, entry, &format!("{path}[{index}]"), warnings)?;
            }
            Ok(())
        }
        Value::Object(fields) => {
            if !count_is_allowed(schema, "minProperties", "maxProperties", fields.len()) {
                return Err(refuse());
            }
            check_object(schema, fields, path, warnings)
        }
        Value::Null | Value::Bool(_) => Ok(()),
    }
}

fn check_object(
    schema: &Value,
    fields: &Map<String, Value>,
    path: &str,
    warnings: &mut Vec<String>,
) -> Result<(), ErrorObject> {
    let inner = |field: &str| {
        if path.is_empty() { field.to_owned() } else { format!("{path}.{field}") }
    };
    let properties = schema.get("properties").and_then(Value::as_object);
    let required = schema.get("required").and_then(Value::as_array);
    for name in required.into_iter().flatten().filter_map(Value::as_str) {
        if !fields.contains_key(name) {
            let property = properties.and_then(|properties| properties.get(name));
            let allowed = property.map_or("a value".to_owned(), allowed);
            return Err(ErrorObject::invalid_params(&inner(name), "missing", &allowed));
        }
    }
    let other = schema.get("additionalProperties").filter(|other| other.is_object());
    for (name, value) in fields {
        let property = properties.and_then(|properties| properties.get(name));
        match property.or(other) {
            Some(property) => check_value(property, value, &inner(name), warnings)?,
            None => warnings.push(ignored(&inner(name))),
        }
    }
    Ok(())
}

fn branches(schema: &Value) -> Option<&Vec<Value>> {
    schema.get("anyOf").or_else(|| schema.get("oneOf")).and_then(Value::as_array)
}

/// The names in `type`, which is one name or a list.
fn type_names(schema: &Value) -> Vec<&str> {
    match schema.get("type") {
        Some(Value::String(name)) => vec![name],
        Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    }
}

fn has_type(schema: &Value, value: &Value) -> bool {
    if let Some(branches) = branches(schema) {
        return branches.iter().any(|branch| has_type(branch, value));
    }
    if schema.get("const").is_some_and(|only| only != value) {
        return false;
    }
    let names = type_names(schema);
    // Without `type` an enumeration of strings, or anything at all.
    (names.is_empty() && (schema.get("enum").is_none() || value.is_string()))
        || names.iter().any(|name| match *name {
            "null" => value.is_null(),
            "boolean" => value.is_boolean(),
            "integer" => value.is_i64() || value.is_u64(),
            "number" => value.is_number(),
            "string" => value.is_string(),
            "array" => value.is_array(),
            "object" => value.is_object(),
            _ => false,
        })
}

/// Largest number of an integer format that JSON Schema leaves to the reader.
fn format_max(schema: &Value) -> Option<f64> {
    match schema.get("format")?.as_str()? {
        "uint32" => Some(f64::from(u32::MAX)),
        _ => None,
    }
}

fn bound(schema: &Value, word: &str) -> Option<f64> {
    schema.get(word).and_then(Value::as_f64)
}

fn in_range(schema: &Value, number: f64) -> bool {
    bound(schema, "minimum").is_none_or(|low| number >= low)
        && bound(schema, "exclusiveMinimum").is_none_or(|low| number > low)
        && bound(schema, "maximum").or(format_max(schema)).is_none_or(|high| number <= high)
}

fn count_is_allowed(schema: &Value, low: &str, high: &str, count: usize) -> bool {
    let limit = |word: &str| schema.get(word).and_then(Value::as_u64);
    limit(low).is_none_or(|low| count as u64 >= low)
        && limit(high).is_none_or(|high| count as u64 <= high)
}

fn check_text(schema: &Value, text: &str) -> bool {
    let listed = schema.get("enum").and_then(Value::as_array);
    listed.is_none_or(|words| words.iter().any(|word| word.as_str() == Some(text)))
        && count_is_allowed(schema, "minLength", "maxLength", text.chars().count())
}

/// What a schema allows, in words.
pub fn allowed(schema: &Value) -> String {
    if let Some(branches) = branches(schema) {
        let texts: Vec<String> =
            branches.iter().map(allowed).filter(|text| text != "null").collect();
        return texts.join(" or ");
    }
    if let Some(only) = schema.get("const") {
        return brief(only);
    }
    if let Some(words) = schema.get("enum").and_then(Value::as_array) {
        let words: Vec<String> = words.iter().filter_map(Value::as_str).map(brief_text).collect();
        return format!("one of {}", words.join(", "));
    }
    let name = type_names(schema).into_iter().find(|name| *name != "null");
    match name {
        Some("integer") => format!("an integer{}", range_text(schema)),
        Some("number") => format!("a number{}", range_text(schema)),
        Some("boolean") => "true or false".to_owned(),
        Some("string") => {
            format!("a string{}", count_text(schema, "minLength", "maxLength", "characters"))
        }
        Some("array") => {
            let entry = schema.get("items").map_or("anything".to_owned(), allowed);
            let count = count_text(schema, "minItems", "maxItems", "entries");
            format!("an array{count}, each {entry}")
        }
        Some("object") => {
            format!("an object{}", count_text(schema, "minProperties", "maxProperties", "fields"))
        }
        _ => "null".to_owned(),
    }
}

fn range_text(schema: &Value) -> String {
    let shown = |word: &str| schema.get(word).map(brief);
    let high = shown("maximum").or_else(|| format_max(schema).map(|high| high.to_string()));
    match (shown("minimum"), shown("exclusiveMinimum"), high) {
        (Some(low), _, Some(high)) => format!(" from {low} to {high}"),
        (_, Some(low), Some(high)) => format!(" above {low} and up to {high}"),
        (Some(low), _, None) => format!(" of at least {low}"),
        (None, Some(low), None) => format!(" above {low}"),
        (None, None, Some(high)) => format!(" up to {high}"),
        (None, None, None) => String::new(),
    }
}

fn count_text(schema: &Value, low: &str, high: &str, noun: &str) -> String {
    let limit = |word: &str| schema.get(word).and_then(Value::as_u64);
    match (limit(low).filter(|low| *low > 0), limit(high)) {
        (Some(low), Some(high)) => format!(" of {low} to {high} {noun}"),
        (Some(low), None) => format!(" of at least {low} {noun}"),
        (None, Some(high)) => format!(" of at most {high} {noun}"),
        (None, None) => String::new(),
    }
}
