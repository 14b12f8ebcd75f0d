//! Reads one JSON text into a tree, strictly: bounded depth, bounded number of values, and no key
//! twice in an object (serde_json would keep the last one silently).

use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use std::cell::Cell;
use std::fmt;

/// What a text may hold.
#[derive(Clone, Copy, Debug)]
pub struct JsonLimits {
    /// Deepest nesting of arrays and objects; the outermost counts as 1.
    pub depth_max: usize,
    /// Most values, all depths: it bounds the tree's memory (32 bytes and more per value).
    pub values_max: usize,
}

/// Reads a whole text.
///
/// # Errors
/// What is wrong and where, in words: bytes that are no UTF-8, syntax, a limit, a duplicate key.
pub fn parse(text: &[u8], limits: JsonLimits) -> Result<Value, String> {
    let text = std::str::from_utf8(text).map_err(|error| {
        format!("not UTF-8 after byte {}; a line is one UTF-8 JSON object", error.valid_up_to())
    })?;
    let budget = Cell::new(limits.values_max);
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let seed = Tree { depth_left: limits.depth_max, budget: &budget, limits };
    let value = seed.deserialize(&mut deserializer).map_err(|error| error.to_string())?;
    deserializer.end().map_err(|error| error.to_string())?;
    Ok(value)
}

#[derive(Clone, Copy)]
struct Tree<'a> {
    depth_left: usize,
    budget: &'a Cell<usize>,
    limits: JsonLimits,
}

impl Tree<'_> {
    fn count<E: de::Error>(&self) -> Result<(), E> {
        let left = self.budget.get().checked_sub(1);
        let max = self.limits.values_max;
        self.budget.set(left.ok_or_else(|| E::custom(format!("more than {max} values")))?);
        Ok(())
    }

    fn deeper<E: de::Error>(self) -> Result<Self, E> {
        let max = self.limits.depth_max;
        let depth_left = self.depth_left.checked_sub(1);
        let depth_left =
            depth_left.ok_or_else(|| E::custom(format!("nested deeper than {max} levels")))?;
        Ok(Self { depth_left, ..self })
    }
}

impl<'de> DeserializeSeed<'de> for Tree<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Tree<'_> {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a JSON value")
    }

    fn visit_unit<E: de::Error>(self) -> Result<Value, E> {
        self.count().map(|()| Value::Null)
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<Value, E> {
        self.count().map(|()| Value::Bool(value))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Value, E> {
        self.count().map(|()| Value::Number(value.into()))
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Value, E> {
        self.count().map(|()| Value::Number(value.into()))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Value, E> {
        self.count()?;
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("a number not finite"))
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<Value, E> {
        self.visit_string(value.to_owned())
    }

    fn visit_string<E: de::Error>(self, value: String) -> Result<Value, E> {
        self.count().map(|()| Value::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        self.count()?;
        let inner = self.deeper()?;
        let mut list = Vec::new();
        while let Some(entry) = entries.next_element_seed(inner)? {
            list.push(entry);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        self.count()?;
        let inner = self.deeper()?;
        let mut object = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            if object.contains_key(&key) {
                return Err(de::Error::custom(format!("duplicate key {}", brief_text(&key))));
            }
            let value = entries.next_value_seed(inner)?;
            object.insert(key, value);
        }
        Ok(Value::Object(object))
    }
}

/// Longest rendering of a client's value inside a message, in characters.
const BRIEF_CHARS_MAX: usize = 80;

/// A value as JSON, shortened if long: what error messages call `got`.
pub fn brief(value: &Value) -> String {
    match value {
        Value::Array(entries) => format!("an array of {} entries", entries.len()),
        Value::Object(fields) => format!("an object of {} fields", fields.len()),
        Value::String(text) => brief_text(text),
        other => other.to_string(),
    }
}

/// A text in JSON's quotes, shortened if long.
pub fn brief_text(text: &str) -> String {
    let mut characters = text.chars();
    let shown: String = characters.by_ref().take(BRIEF_CHARS_MAX).collect();
    let quoted = Value::String(shown).to_string();
    if characters.next().is_none() {
        return quoted;
    }
    format!("{quoted}… ({} bytes)", text.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: JsonLimits = JsonLimits { depth_max: 64, values_max: 1000 };

    fn nested(depth: usize) -> Vec<u8> {
        format!("{}{}", "[".repeat(depth), "]".repeat(depth)).into_bytes()
    }

    #[test]
    fn a_text_gives_the_tree_that_serde_json_gives() {
        let text =
            r#" {"a":[1,-2,3.5,18446744073709551615,true,null,"x\u00e9\ud83d\ude00"],"b":{}} "#;
        let wanted: Value = serde_json::from_str(text).unwrap();
        assert_eq!(parse(text.as_bytes(), LIMITS), Ok(wanted));
    }

    #[test]
    fn depth_is_bounded() {
        assert!(parse(&nested(64), LIMITS).is_ok());
        assert!(parse(&nested(65), LIMITS).unwrap_err().contains("deeper than 64"));
        assert!(parse(&nested(100_000), LIMITS).is_err());
        let objects = format!("{}1{}", r#"{"a":"#.repeat(65), "}".repeat(65));
        assert!(parse(objects.as_bytes(), LIMITS).unwrap_err().contains("deeper than 64"));
    }

    #[test]
    fn the_number_of_values_is_bounded() {
        let list = |n: usize| format!("[{}]", vec!["0"; n].join(",")).into_bytes();
        assert!(parse(&list(999), LIMITS).is_ok());
        assert!(parse(&list(1000), LIMITS).unwrap_err().contains("more than 1000 values"));
    }

    #[test]
    fn duplicate_keys_are_refused_at_every_depth() {
        let texts = [r#"{"a":1,"a":1}"#, r#"[{"b":{"a":1,"c":2,"a":3}}]"#, r#"{"a":1,"\u0061":2}"#];
        for text in texts {
            let error = parse(text.as_bytes(), LIMITS).unwrap_err();
            assert!(error.contains(r#"duplicate key "a""#), "{text}: {error}");
        }
        assert!(parse(br#"{"a":{"a":{"a":1}}}"#, LIMITS).is_ok());
    }

    #[test]
    fn what_is_no_json_is_refused() {
        for text in [&b"{"[..], b"", b"{} {}", b"nul", b"{\"a\":1e999}", b"{'a':1}", b"\xff{}"] {
            assert!(parse(text, LIMITS).is_err(), "{text:?}");
        }
    }

    #[test]
    fn long_values_are_shown_short() {
        assert!(brief(&Value::String("é".repeat(5000))).chars().count() < 110);
        assert_eq!(brief(&serde_json::json!([1, 2])), "an array of 2 entries");
    }
}
