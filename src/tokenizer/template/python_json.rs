//! JSON as Python's `json.dumps` spells it, which models are trained on: a space after `,` and `:`.

use minijinja::Value;
use minijinja::value::ValueKind;
use std::fmt::Write;

/// The arguments of `json.dumps` that templates use.
#[derive(Clone, Debug, Default)]
pub(super) struct JsonStyle {
    /// Spaces per level on lines of their own; `None` is all on one line.
    pub indent: Option<usize>,
    /// Everything beyond ASCII as `\uXXXX`.
    pub ascii: bool,
    /// Keys in ascending order.
    pub sorted: bool,
}

/// Deepest nesting that is written.
const DEPTH_MAX: usize = 64;
/// Most spaces per level.
const INDENT_MAX: usize = 16;

/// Writes a value, or says why it can't be.
pub(super) fn write(value: &Value, style: &JsonStyle) -> Result<String, String> {
    if style.indent.is_some_and(|indent| indent > INDENT_MAX) {
        return Err(format!("tojson: indent is at most {INDENT_MAX}"));
    }
    let mut text = String::new();
    Writer { text: &mut text, style }.value(value, 0)?;
    Ok(text)
}

struct Writer<'a> {
    text: &'a mut String,
    style: &'a JsonStyle,
}

impl Writer<'_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), String> {
        if depth > DEPTH_MAX {
            return Err(format!("tojson: nested deeper than {DEPTH_MAX} levels"));
        }
        match value.kind() {
            ValueKind::Undefined => return Err("tojson: the value is undefined".to_owned()),
            ValueKind::None => self.text.push_str("null"),
            ValueKind::Bool | ValueKind::Number => self.text.push_str(&value.to_string()),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Map => self.map(value, depth)?,
            ValueKind::Seq | ValueKind::Iterable => self.sequence(value, depth)?,
            other => return Err(format!("tojson: a {other} has no JSON form")),
        }
        Ok(())
    }

    fn sequence(&mut self, value: &Value, depth: usize) -> Result<(), String> {
        let items: Vec<Value> = value.try_iter().map_err(|e| e.to_string())?.collect();
        self.text.push('[');
        for (at, item) in items.iter().enumerate() {
            self.separate(at, depth + 1);
            self.value(item, depth + 1)?;
        }
        self.close(items.is_empty(), depth, ']');
        Ok(())
    }

    fn map(&mut self, value: &Value, depth: usize) -> Result<(), String> {
        let mut keys: Vec<Value> = value.try_iter().map_err(|e| e.to_string())?.collect();
        if self.style.sorted {
            keys.sort();
        }
        self.text.push('{');
        for (at, key) in keys.iter().enumerate() {
            self.separate(at, depth + 1);
            self.string(&key.to_string());
            self.text.push_str(": ");
            let item = value.get_item(key).map_err(|error| error.to_string())?;
            self.value(&item, depth + 1)?;
        }
        self.close(keys.is_empty(), depth, '}');
        Ok(())
    }

    /// Before the item at a place of its list.
    fn separate(&mut self, at: usize, depth: usize) {
        match self.style.indent {
            Some(indent) => {
                self.text.push_str(if at > 0 { ",\n" } else { "\n" });
                self.text.extend(std::iter::repeat_n(' ', indent * depth));
            }
            None if at > 0 => self.text.push_str(", "),
            None => {}
        }
    }

    fn close(&mut self, is_empty: bool, depth: usize, bracket: char) {
        if let Some(indent) = self.style.indent.filter(|_| !is_empty) {
            self.text.push('\n');
            self.text.extend(std::iter::repeat_n(' ', indent * depth));
        }
        self.text.push(bracket);
    }

    fn string(&mut self, text: &str) {
        self.text.push('"');
        for character in text.chars() {
            match character {
                '"' => self.text.push_str("\\\""),
                '\\' => self.text.push_str("\\\\"),
                '\n' => self.text.push_str("\\n"),
                '\r' => self.text.push_str("\\r"),
                '\t' => self.text.push_str("\\t"),
                '\u{8}' => self.text.push_str("\\b"),
                '\u{c}' => self.text.push_str("\\f"),
                control if control < ' ' => self.escape(control),
                wide if self.style.ascii && !wide.is_ascii() => self.escape(wide),
                other => self.text.push(other),
            }
        }
        self.text.push('"');
    }

    fn escape(&mut self, character: char) {
        for unit in character.encode_utf16(&mut [0; 2]) {
            // Writing to a String does not fail.
            let _ = write!(self.text, "\\u{unit:04x}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_spelled_as_python_spells_it() {
        let list = Value::from(vec![Value::from("a\"é\n\u{1}😀"), Value::from(1), Value::from(())]);
        let map = Value::from_pairs([("b", list), ("a", Value::from(Vec::<Value>::new()))]);
        let spell = |style| write(&map, &style).expect("a plain value");
        let plain = spell(JsonStyle::default());
        assert_eq!(plain, r#"{"b": ["a\"é\n\u0001😀", 1, null], "a": []}"#);
        let ascii = spell(JsonStyle { ascii: true, sorted: true, ..JsonStyle::default() });
        let wanted = r#"{"a": [], "b": ["a\"\u00e9\n\u0001\ud83d\ude00", 1, null]}"#;
        assert_eq!(ascii, wanted);
        let lines = spell(JsonStyle { indent: Some(2), ..JsonStyle::default() });
        assert!(lines.starts_with("{\n  \"b\": [\n    \"a"), "{lines}");
        assert!(lines.ends_with("  ],\n  \"a\": []\n}"), "{lines}");
    }
}
