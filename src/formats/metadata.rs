//! A checkpoint's key-value pairs with typed access. Values are read lazily from the file.

use super::value::{ArrayView, Texts, Value, ValueType, scalar};
use super::{FormatError, MappedFile};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

/// What a value is, and how many elements it has.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    Scalar(ValueType),
    Text,
    Array { element: ValueType, len: usize },
}

/// Where a key and its value lie in the file.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub key: Range<usize>,
    pub kind: Kind,
    /// The value's bytes: a scalar's, a text's without its length, an array's elements.
    pub data: Range<usize>,
    /// What a value stands for that no GGUF file holds.
    pub origin: Option<Box<Origin>>,
}

/// A field of another file.
#[derive(Clone, Debug)]
pub(super) struct Origin {
    pub file: PathBuf,
    pub offset: u64,
    pub field: String,
}

/// Key-value pairs of a checkpoint, in file order, found by key in logarithmic time.
#[derive(Debug)]
pub struct Metadata {
    file: Arc<MappedFile>,
    entries: Vec<Entry>,
    /// Indices into `entries`, ascending by key.
    order: Vec<u32>,
}

impl Metadata {
    /// Indexes entries by key.
    ///
    /// # Errors
    /// Two entries have the same key.
    pub(super) fn new(file: Arc<MappedFile>, entries: Vec<Entry>) -> Result<Self, FormatError> {
        let mut order: Vec<u32> = (0..entries.len() as u32).collect();
        let bytes = file.bytes();
        let key = |index: u32| &bytes[entries[index as usize].key.clone()];
        order.sort_unstable_by(|a, b| key(*a).cmp(key(*b)).then(a.cmp(b)));
        let twice = order.windows(2).find(|pair| key(pair[0]) == key(pair[1]));
        if let Some(pair) = twice {
            let (first, second) = (&entries[pair[0] as usize], &entries[pair[1] as usize]);
            let name = String::from_utf8_lossy(key(pair[1]));
            let message = format!("the key stands twice, first at byte {}", first.key.start);
            return Err(FormatError::new(file.path(), second.key.start as u64, name, message));
        }
        Ok(Self { file, entries, order })
    }

    /// Number of keys.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are no keys.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// All pairs in file order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, Value<'_>)> {
        self.entries.iter().map(|entry| (self.key(entry), self.value(entry)))
    }

    /// Whether a key is present.
    pub fn contains(&self, key: &str) -> bool {
        self.entry(key).is_some()
    }

    /// A value of any type.
    pub fn get(&self, key: &str) -> Option<Value<'_>> {
        self.entry(key).map(|entry| self.value(entry))
    }

    /// An error about a key: names the file and the value's place, or the file's start if the key
    /// is missing.
    pub fn refuse(&self, key: &str, message: impl Into<String>) -> FormatError {
        let entry = self.entry(key);
        if let Some(origin) = entry.and_then(|entry| entry.origin.as_deref()) {
            return FormatError::new(&origin.file, origin.offset, &origin.field, message);
        }
        let offset = entry.map_or(0, |entry| entry.data.start);
        FormatError::new(self.file.path(), offset as u64, key, message)
    }

    fn key(&self, entry: &Entry) -> &str {
        // Checked at opening; empty if the file was written to since.
        std::str::from_utf8(&self.file.bytes()[entry.key.clone()]).unwrap_or("")
    }

    fn entry(&self, key: &str) -> Option<&Entry> {
        let bytes = self.file.bytes();
        let at = self
            .order
            .binary_search_by(|index| {
                bytes[self.entries[*index as usize].key.clone()].cmp(key.as_bytes())
            })
            .ok()?;
        self.entries.get(*self.order.get(at)? as usize)
    }

    fn value(&self, entry: &Entry) -> Value<'_> {
        let bytes = &self.file.bytes()[entry.data.clone()];
        match entry.kind {
            Kind::Scalar(value_type) => scalar(value_type, bytes).unwrap_or(Value::Bytes(bytes)),
            Kind::Text => std::str::from_utf8(bytes).map_or(Value::Bytes(bytes), Value::Text),
            Kind::Array { element, len } => Value::Array(ArrayView {
                file: &self.file,
                key: self.key(entry),
                element,
                len,
                start: entry.data.start,
                end: entry.data.end,
            }),
        }
    }

    /// The value if the key is present, converted; an error names what was wanted.
    fn typed<'a, T>(
        &'a self,
        key: &str,
        wanted: &str,
        convert: impl FnOnce(Value<'a>) -> Option<T>,
    ) -> Result<Option<T>, FormatError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        if let Some(converted) = convert(value) {
            return Ok(Some(converted));
        }
        let kind = match value {
            Value::Integer(integer) => format!("the integer {integer}"),
            other => other.kind().to_owned(),
        };
        Err(self.refuse(key, format!("{kind}, wanted: {wanted}")))
    }

    fn required<T>(&self, key: &str, found: Option<T>) -> Result<T, FormatError> {
        found.ok_or_else(|| self.refuse(key, "the key is missing"))
    }

    /// An integer of any width that fits `u32`.
    ///
    /// # Errors
    /// The value is something else.
    pub fn u32_opt(&self, key: &str) -> Result<Option<u32>, FormatError> {
        self.typed(key, "an integer from 0 to 4294967295", |value| match value {
            Value::Integer(integer) => u32::try_from(integer).ok(),
            _ => None,
        })
    }

    /// An integer of any width that fits `u32`.
    ///
    /// # Errors
    /// The key is missing, or its value is something else.
    pub fn u32(&self, key: &str) -> Result<u32, FormatError> {
        let found = self.u32_opt(key)?;
        self.required(key, found)
    }

    /// A float, finite or not.
    ///
    /// # Errors
    /// The value is something else.
    pub fn f32_opt(&self, key: &str) -> Result<Option<f32>, FormatError> {
        self.typed(key, "a float", |value| match value {
            Value::Float(float) => Some(float as f32),
            _ => None,
        })
    }

    /// A float, finite or not.
    ///
    /// # Errors
    /// The key is missing, or its value is something else.
    pub fn f32(&self, key: &str) -> Result<f32, FormatError> {
        let found = self.f32_opt(key)?;
        self.required(key, found)
    }

    /// A truth value.
    ///
    /// # Errors
    /// The value is something else.
    pub fn bool_opt(&self, key: &str) -> Result<Option<bool>, FormatError> {
        self.typed(key, "a bool", |value| match value {
            Value::Bool(truth) => Some(truth),
            _ => None,
        })
    }

    /// A truth value.
    ///
    /// # Errors
    /// The key is missing, or its value is something else.
    pub fn bool(&self, key: &str) -> Result<bool, FormatError> {
        let found = self.bool_opt(key)?;
        self.required(key, found)
    }

    /// A text.
    ///
    /// # Errors
    /// The value is something else, or no UTF-8.
    pub fn str_opt(&self, key: &str) -> Result<Option<&str>, FormatError> {
        self.typed(key, "a text in UTF-8", |value| match value {
            Value::Text(text) => Some(text),
            _ => None,
        })
    }

    /// A text.
    ///
    /// # Errors
    /// The key is missing, or its value is something else, or no UTF-8.
    pub fn str(&self, key: &str) -> Result<&str, FormatError> {
        let found = self.str_opt(key)?;
        self.required(key, found)
    }

    /// An array of any element type.
    ///
    /// # Errors
    /// The value is something else.
    pub fn array_opt(&self, key: &str) -> Result<Option<ArrayView<'_>>, FormatError> {
        self.typed(key, "an array", |value| match value {
            Value::Array(array) => Some(array),
            _ => None,
        })
    }

    /// An array of any element type.
    ///
    /// # Errors
    /// The key is missing, or its value is something else.
    pub fn array(&self, key: &str) -> Result<ArrayView<'_>, FormatError> {
        let found = self.array_opt(key)?;
        self.required(key, found)
    }

    /// The texts of an array of texts.
    ///
    /// # Errors
    /// The key is missing, or its value is something else.
    pub fn texts(&self, key: &str) -> Result<Texts<'_>, FormatError> {
        self.array(key)?.texts()
    }
}
