//! What a template pays for where the engine or its Python methods ask nothing: the values in what
//! it puts into containers, and the texts that methods make.

use super::charges::{CHARGED, COUNTED};
use minijinja::value::{Rest, ValueKind, ValueOrKwargs};
use minijinja::{Environment, Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat::unknown_method_callback;

/// Bytes that one unit of fuel pays for.
const BYTES_PER_FUEL: usize = 64;

/// Puts the functions that charge into an environment.
pub(super) fn install(environment: &mut Environment<'_>) {
    environment.add_function(CHARGED, charged);
    environment.add_function(COUNTED, counted);
    environment.set_unknown_method_callback(call_method);
    // Whatever name a template gives to them, they charge.
    let globals: Vec<_> =
        environment.globals().map(|(name, value)| (name.to_owned(), value)).collect();
    for (name, original) in globals {
        if CONTAINERS.contains(&name.as_str()) {
            environment.add_function(name, move |state: &mut State, args: Arguments| {
                let args = into_values(args);
                args.iter().try_for_each(|arg| count(state, arg))?;
                original.call(state, &args)
            });
        }
    }
    let map = Value::from_function(minijinja::filters::map);
    environment.add_filter("map", move |state: &mut State, args: Arguments| {
        let mapped = map.call(state, &into_values(args))?;
        counted(state, mapped)
    });
}

type Arguments = Rest<ValueOrKwargs>;

fn into_values(args: Arguments) -> Vec<Value> {
    args.0.into_iter().map(ValueOrKwargs::into_value).collect()
}

/// Functions that make containers of their arguments.
const CONTAINERS: [&str; 2] = ["dict", "namespace"];

fn refuse(message: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.to_owned())
}

/// Charges an operand of a sum for its items.
fn charged(state: &State, operand: Value) -> Result<Value, Error> {
    if matches!(operand.kind(), ValueKind::Seq | ValueKind::Iterable) {
        let Some(items) = operand.len() else {
            return Err(refuse("a sequence without a length can't be added"));
        };
        state.consume_fuel(items as u64)?;
    }
    Ok(operand)
}

/// Charges an element for all values in it.
fn counted(state: &State, element: Value) -> Result<Value, Error> {
    count(state, &element)?;
    Ok(element)
}

/// Charges for all values in a value. A namespace is the only value that can be changed and so the
/// only one that could come to hold itself, as which it would be written without an end: none may
/// be in anything.
fn count(state: &State, element: &Value) -> Result<(), Error> {
    let mut pending = vec![element.clone()];
    while let Some(value) = pending.pop() {
        state.consume_fuel(1)?;
        if value.as_object().is_some_and(|object| object.type_name().ends_with("::Namespace")) {
            return Err(refuse("a namespace can't be put into another value"));
        }
        // What has no length is made as it is read, and is charged then.
        let items = value.len().filter(|_| value.kind() != ValueKind::String);
        if let (Some(_), Ok(items)) = (items, value.try_iter()) {
            for item in items {
                state.consume_fuel(1)?;
                if value.kind() == ValueKind::Map {
                    pending.extend(value.get_item(&item).ok());
                }
                pending.push(item);
            }
        }
    }
    Ok(())
}

/// Python's methods, paid for before they are called: they know no fuel.
fn call_method(
    state: &mut State,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    for arg in args {
        count(state, arg)?;
    }
    let own = value.as_str().map_or(value.len().unwrap_or(0), |text| text.len() / BYTES_PER_FUEL);
    state.consume_fuel(own as u64)?;
    if let Some(text) = value.as_str() {
        let made = match method {
            "join" => joined_bytes(text, args),
            "replace" => replaced_bytes(text, args),
            "format" => formatted_bytes(text, args)?,
            _ => 0,
        };
        state.consume_fuel((made / BYTES_PER_FUEL) as u64)?;
    }
    unknown_method_callback(state, value, method, args)
}

/// Bytes of a text, or more than the values in another value need when they are written.
fn text_bytes(value: &Value) -> usize {
    match (value.as_str(), value.len()) {
        (Some(text), _) => text.len(),
        (None, Some(_)) => value.to_string().len(),
        // A number or the like.
        (None, None) => BYTES_PER_FUEL,
    }
}

fn joined_bytes(separator: &str, args: &[Value]) -> usize {
    let Some(items) = args.first().and_then(|items| items.try_iter().ok()) else { return 0 };
    let bytes = items.map(|item| separator.len().saturating_add(text_bytes(&item)));
    bytes.fold(0, usize::saturating_add)
}

fn replaced_bytes(text: &str, args: &[Value]) -> usize {
    let [Some(old), Some(new)] = [0, 1].map(|at| args.get(at).and_then(Value::as_str)) else {
        return 0;
    };
    text.matches(old).count().saturating_mul(new.len()).saturating_add(text.len())
}

/// Bytes of a formatted text at most: each field may hold every argument, and each number may be a
/// width.
fn formatted_bytes(format: &str, args: &[Value]) -> Result<usize, Error> {
    let (mut fields, mut depth, mut widths) = (0usize, 0usize, 0usize);
    for character in format.chars() {
        match character {
            '{' => {
                fields += 1;
                depth += 1;
            }
            '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        // `{{` is a brace; a width that is an argument stands behind a colon.
        if character == ':' && depth > 0 && format.contains(":{") {
            return Err(refuse("format: a width can't be an argument"));
        }
    }
    for number in format.split(|c: char| !c.is_ascii_digit()).filter(|number| !number.is_empty()) {
        widths = widths.saturating_add(number.parse().unwrap_or(usize::MAX));
    }
    let values = args.iter().map(text_bytes).fold(0, usize::saturating_add);
    Ok(fields.saturating_mul(values).saturating_add(widths).saturating_add(format.len()))
}
