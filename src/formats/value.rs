//! Metadata values, read where they stand: nothing is copied until a caller asks for a number.

use super::{FormatError, MappedFile};
use std::fmt;
use std::ops::Range;

/// The type of a metadata value or of an array's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "each variant is GGUF's type of the same name")]
pub enum ValueType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    Text,
    Array,
    U64,
    I64,
    F64,
}

impl ValueType {
    /// Indexed by GGUF's value type id.
    const ALL: [Self; 13] = [
        Self::U8,
        Self::I8,
        Self::U16,
        Self::I16,
        Self::U32,
        Self::I32,
        Self::F32,
        Self::Bool,
        Self::Text,
        Self::Array,
        Self::U64,
        Self::I64,
        Self::F64,
    ];

    /// The type of a GGUF value type id.
    pub fn from_gguf_id(id: u32) -> Option<Self> {
        Self::ALL.get(id as usize).copied()
    }

    /// Bytes of a value, or `None` for texts and arrays.
    pub fn bytes(self) -> Option<usize> {
        match self {
            Self::U8 | Self::I8 | Self::Bool => Some(1),
            Self::U16 | Self::I16 => Some(2),
            Self::U32 | Self::I32 | Self::F32 => Some(4),
            Self::U64 | Self::I64 | Self::F64 => Some(8),
            Self::Text | Self::Array => None,
        }
    }

    fn is_integer(self) -> bool {
        !matches!(self, Self::F32 | Self::F64 | Self::Bool | Self::Text | Self::Array)
    }

    fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F64)
    }
}

impl fmt::Display for ValueType {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::U8 => "u8",
            Self::I8 => "i8",
            Self::U16 => "u16",
            Self::I16 => "i16",
            Self::U32 => "u32",
            Self::I32 => "i32",
            Self::F32 => "f32",
            Self::Bool => "bool",
            Self::Text => "text",
            Self::Array => "array",
            Self::U64 => "u64",
            Self::I64 => "i64",
            Self::F64 => "f64",
        })
    }
}

/// A metadata value, borrowed from the file.
#[derive(Clone, Copy, Debug)]
pub enum Value<'a> {
    /// Any integer type; GGUF's u64 and i64 both fit.
    Integer(i128),
    /// F32 or F64.
    Float(f64),
    /// One byte, 0 or 1.
    Bool(bool),
    /// UTF-8.
    Text(&'a str),
    /// A text that is no UTF-8.
    Bytes(&'a [u8]),
    /// An array.
    Array(ArrayView<'a>),
}

impl Value<'_> {
    /// What the value is, for messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Integer(_) => "an integer",
            Self::Float(_) => "a float",
            Self::Bool(_) => "a bool",
            Self::Text(_) => "a text",
            Self::Bytes(_) => "a text that is no UTF-8",
            Self::Array(_) => "an array",
        }
    }
}

/// Reads a value of a fixed size; `None` if the bytes are too few or a bool is neither 0 nor 1.
pub(super) fn scalar<'a>(value_type: ValueType, bytes: &[u8]) -> Option<Value<'a>> {
    let integer = |value: i128| Some(Value::Integer(value));
    match value_type {
        ValueType::U8 => integer(u8::from_le_bytes(bytes.try_into().ok()?).into()),
        ValueType::I8 => integer(i8::from_le_bytes(bytes.try_into().ok()?).into()),
        ValueType::U16 => integer(u16::from_le_bytes(bytes.try_into().ok()?).into()),
        ValueType::I16 => integer(i16::from_le_bytes(bytes.try_into().ok()?).into()),
        ValueType::U32 => integer(u32::from_le_bytes(bytes.try_into().ok()?).into()),
        ValueType::I32 => integer(i32::from_le_bytes(bytes.try_into().ok()?).into()),
        ValueType::U64 => integer(u64::from_le_bytes(bytes.try_into().ok()?).into()),
        ValueType::I64 => integer(i64::from_le_bytes(bytes.try_into().ok()?).into()),
        ValueType::F32 => Some(Value::Float(f32::from_le_bytes(bytes.try_into().ok()?).into())),
        ValueType::F64 => Some(Value::Float(f64::from_le_bytes(bytes.try_into().ok()?))),
        ValueType::Bool => match bytes {
            [0] => Some(Value::Bool(false)),
            [1] => Some(Value::Bool(true)),
            _ => None,
        },
        ValueType::Text | ValueType::Array => None,
    }
}

/// An array value, borrowed from the file.
#[derive(Clone, Copy)]
pub struct ArrayView<'a> {
    pub(super) file: &'a MappedFile,
    pub(super) key: &'a str,
    pub(super) element: ValueType,
    pub(super) len: usize,
    /// Where the elements lie in the file.
    pub(super) start: usize,
    pub(super) end: usize,
}

impl fmt::Debug for ArrayView<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "[{}; {}]", self.element, self.len)
    }
}

impl<'a> ArrayView<'a> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements' type.
    pub fn element_type(&self) -> ValueType {
        self.element
    }

    /// The texts of an array of texts.
    ///
    /// # Errors
    /// The elements are no texts.
    pub fn texts(&self) -> Result<Texts<'a>, FormatError> {
        match self.element {
            ValueType::Text => Ok(Texts { array: *self, at: self.start, left: self.len }),
            _ => Err(self.wrong_elements("texts")),
        }
    }

    /// The numbers of an array of any integer type; u64 beyond `i64::MAX` wraps.
    ///
    /// # Errors
    /// The elements are no integers.
    pub fn integers(&self) -> Result<impl ExactSizeIterator<Item = i64> + use<'a>, FormatError> {
        if !self.element.is_integer() {
            return Err(self.wrong_elements("integers"));
        }
        Ok(self.scalars().map(|value| match value {
            Some(Value::Integer(integer)) => integer as i64,
            _ => 0,
        }))
    }

    /// The numbers of an array of f32 or f64.
    ///
    /// # Errors
    /// The elements are no floats.
    pub fn floats(&self) -> Result<impl ExactSizeIterator<Item = f32> + use<'a>, FormatError> {
        if !self.element.is_float() {
            return Err(self.wrong_elements("floats"));
        }
        Ok(self.scalars().map(|value| match value {
            Some(Value::Float(float)) => float as f32,
            _ => 0.0,
        }))
    }

    /// The truth values of an array of bools.
    ///
    /// # Errors
    /// The elements are no bools.
    pub fn bools(&self) -> Result<impl ExactSizeIterator<Item = bool> + use<'a>, FormatError> {
        if self.element != ValueType::Bool {
            return Err(self.wrong_elements("bools"));
        }
        Ok(self.scalars().map(|value| matches!(value, Some(Value::Bool(true)))))
    }

    fn scalars(&self) -> impl ExactSizeIterator<Item = Option<Value<'a>>> + use<'a> {
        let element = self.element;
        let bytes = element.bytes().unwrap_or(1);
        self.file.bytes()[self.start..self.end].chunks_exact(bytes).map(move |b| scalar(element, b))
    }

    fn wrong_elements(&self, wanted: &str) -> FormatError {
        let message = format!("an array of {}, wanted: {wanted}", self.element);
        FormatError::new(self.file.path(), self.start as u64, self.key, message)
    }
}

/// The texts of an array, in order. An item is an error if it is no UTF-8.
#[derive(Clone)]
pub struct Texts<'a> {
    array: ArrayView<'a>,
    at: usize,
    left: usize,
}

impl<'a> Texts<'a> {
    fn refuse(&self, message: &str) -> FormatError {
        let field = format!("{}[{}]", self.array.key, self.array.len - self.left);
        FormatError::new(self.array.file.path(), self.at as u64, field, message)
    }

    /// The next text's place, checked again although it was checked at opening: the file may have
    /// been written to.
    fn place(&self) -> Option<Range<usize>> {
        let bytes = &self.array.file.bytes()[..self.array.end];
        let start = self.at + size_of::<u64>();
        let length = bytes.get(self.at..start)?;
        let length = u64::from_le_bytes(length.try_into().ok()?);
        let end = start.checked_add(usize::try_from(length).ok()?)?;
        (end <= bytes.len()).then_some(start..end)
    }
}

impl<'a> Iterator for Texts<'a> {
    type Item = Result<&'a str, FormatError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let Some(place) = self.place() else {
            let error = self.refuse("the file changed while it was read");
            self.left = 0;
            return Some(Err(error));
        };
        let end = place.end;
        let text = std::str::from_utf8(&self.array.file.bytes()[place])
            .map_err(|_| self.refuse("is no UTF-8"));
        self.at = end;
        self.left -= 1;
        Some(text)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (0, Some(self.left))
    }
}
