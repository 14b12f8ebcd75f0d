//! Typed access to a JSON object of a checkpoint's folder: an error names file, place and field,
//! what came, and what is allowed.

use crate::formats::{FormatError, MappedFile};
use serde_json::{Map, Value};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

/// An object, and where it came from.
#[derive(Clone, Debug)]
pub(in crate::formats) struct Fields {
    file: PathBuf,
    /// The whole file, to find a field's place in.
    text: String,
    /// Names of the objects around this one, each with a dot.
    prefix: String,
    object: Map<String, Value>,
}

impl Fields {
    /// Reads a file of at most `bytes_max`.
    pub fn open(path: &Path, bytes_max: usize) -> Result<Self, FormatError> {
        let text = read_text(path, bytes_max)?;
        let refuse = |message: String| FormatError::new(path, 0, "file", message);
        let object = match serde_json::from_str(&text) {
            Ok(Value::Object(object)) => object,
            Ok(other) => return Err(refuse(format!("{}, wanted: an object", describe(&other)))),
            Err(error) => return Err(refuse(format!("is no JSON: {error}"))),
        };
        Ok(Self { file: path.to_owned(), text, prefix: String::new(), object })
    }

    /// The file's path.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// The name of a field with those of the objects around it.
    pub fn full_name(&self, field: &str) -> String {
        format!("{}{field}", self.prefix)
    }

    /// Where a field's name stands in the file; 0 where it doesn't.
    pub fn place(&self, field: &str) -> usize {
        self.text.find(&format!("\"{field}\"")).unwrap_or(0)
    }

    /// An error about a field.
    pub fn refuse(&self, field: &str, message: impl Into<String>) -> FormatError {
        FormatError::new(&self.file, self.place(field) as u64, self.full_name(field), message)
    }

    /// A value that is there and is not null.
    pub fn get(&self, field: &str) -> Option<&Value> {
        self.object.get(field).filter(|value| !value.is_null())
    }

    fn typed<'a, T>(
        &'a self,
        field: &str,
        wanted: &str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, FormatError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let wrong = || self.refuse(field, format!("{}, wanted: {wanted}", describe(value)));
        convert(value).map(Some).ok_or_else(wrong)
    }

    fn required<T>(&self, field: &str, found: Option<T>) -> Result<T, FormatError> {
        found.ok_or_else(|| self.refuse(field, "the field is missing"))
    }

    /// A whole number within bounds.
    pub fn count_opt(
        &self,
        field: &str,
        allowed: RangeInclusive<u32>,
    ) -> Result<Option<u32>, FormatError> {
        let wanted = format!("a whole number from {} to {}", allowed.start(), allowed.end());
        self.typed(field, &wanted, |value| {
            let number = u32::try_from(value.as_u64()?).ok()?;
            allowed.contains(&number).then_some(number)
        })
    }

    /// A whole number within bounds.
    pub fn count(&self, field: &str, allowed: RangeInclusive<u32>) -> Result<u32, FormatError> {
        let found = self.count_opt(field, allowed)?;
        self.required(field, found)
    }

    /// A finite number, with or without a point.
    pub fn number_opt(&self, field: &str) -> Result<Option<f32>, FormatError> {
        self.typed(field, "a number", |value| {
            value.as_f64().map(|number| number as f32).filter(|number| number.is_finite())
        })
    }

    /// A finite number, with or without a point.
    pub fn number(&self, field: &str) -> Result<f32, FormatError> {
        let found = self.number_opt(field)?;
        self.required(field, found)
    }

    /// A truth value.
    pub fn bool_opt(&self, field: &str) -> Result<Option<bool>, FormatError> {
        self.typed(field, "true or false", Value::as_bool)
    }

    /// A text.
    pub fn text_opt(&self, field: &str) -> Result<Option<&str>, FormatError> {
        self.typed(field, "a text", Value::as_str)
    }

    /// A text.
    pub fn text(&self, field: &str) -> Result<&str, FormatError> {
        let found = self.text_opt(field)?;
        self.required(field, found)
    }

    /// A list.
    pub fn list_opt(&self, field: &str) -> Result<Option<&[Value]>, FormatError> {
        self.typed(field, "a list", |value| value.as_array().map(Vec::as_slice))
    }

    /// An object inside this one.
    pub fn object_opt(&self, field: &str) -> Result<Option<Self>, FormatError> {
        let object = self.typed(field, "an object", Value::as_object)?;
        Ok(object.map(|object| Self {
            file: self.file.clone(),
            text: self.text.clone(),
            prefix: format!("{}{field}.", self.prefix),
            object: object.clone(),
        }))
    }

    /// Refuses a text that is not among the known ones; absent is the first of them.
    pub fn one_of<'k>(&self, field: &str, known: &[&'k str]) -> Result<&'k str, FormatError> {
        let got = self.text_opt(field)?.unwrap_or(known[0]);
        let found = known.iter().find(|known| known.eq_ignore_ascii_case(got));
        found.copied().ok_or_else(|| {
            self.refuse(field, format!("{got:?} is not supported; supported: {}", known.join(", ")))
        })
    }

    /// All pairs.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.object.iter().map(|(name, value)| (name.as_str(), value))
    }
}

/// A file's text, if it is there, no longer than `bytes_max`, and UTF-8.
pub(in crate::formats) fn read_text(path: &Path, bytes_max: usize) -> Result<String, FormatError> {
    let file = MappedFile::open(path)?;
    let bytes = file.bytes();
    let refuse = |message: String| FormatError::new(path, 0, "file", message);
    if bytes.len() > bytes_max {
        return Err(refuse(format!("{} bytes long; allowed: at most {bytes_max}", bytes.len())));
    }
    String::from_utf8(bytes.to_vec()).map_err(|error| refuse(format!("is no UTF-8: {error}")))
}

/// What a value is, for messages.
fn describe(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(truth) => truth.to_string(),
        Value::Number(number) => number.to_string(),
        Value::String(text) if text.len() <= 64 => format!("{text:?}"),
        Value::String(text) => format!("a text of {} bytes", text.len()),
        Value::Array(list) => format!("a list of {}", list.len()),
        Value::Object(_) => "an object".to_owned(),
    }
}
