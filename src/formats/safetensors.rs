//! Reads one safetensors file's header (the format: the README of the crate of that name):
//!
//! ```text
//! header length u64 | JSON: { NAME: { dtype, shape, data_offsets: [start, end] }, … } | data
//! ```
//! Offsets count from the end of the header. The crate knows the types; names that stand twice,
//! sizes and places are checked here, so that an error can say where in the file it is.

use super::{FormatError, MappedFile, lookalike};
pub(super) use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use serde::de::{Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;
use std::collections::HashSet;
use std::fmt;
use std::ops::Range;

/// The largest published header, of a file with 60,000 expert matrices, has some 10 MB.
const HEADER_BYTES_MAX: u64 = 64 << 20;
/// As of a GGUF file.
const TENSORS_MAX: usize = 1 << 17;
const LENGTH_BYTES: usize = size_of::<u64>();

/// One tensor of a file, checked to lie inside it.
#[derive(Clone, Debug)]
pub(super) struct Stored {
    pub name: String,
    pub dtype: Dtype,
    /// Extents, slowest first.
    pub shape: Vec<usize>,
    /// Where its description stands in the file.
    pub info_at: usize,
    /// Where its data lies in the file.
    pub bytes: Range<usize>,
}

impl Stored {
    /// An error about one of its properties.
    pub fn refuse(
        &self,
        file: &MappedFile,
        property: &str,
        message: impl Into<String>,
    ) -> FormatError {
        let field = format!("tensor {}: {property}", self.name);
        FormatError::new(file.path(), self.info_at as u64, field, message)
    }
}

/// Names and their descriptions, unread, in file order.
struct Entries<'a>(Vec<(String, &'a RawValue)>);

impl<'de: 'a, 'a> Visitor<'de> for Entries<'a> {
    type Value = Self;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Self, A::Error> {
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            if self.0.len() == TENSORS_MAX {
                return Err(A::Error::custom(format!("more than {TENSORS_MAX} tensors")));
            }
            self.0.push((name, map.next_value()?));
        }
        Ok(self)
    }
}

/// Reads and checks a whole header.
pub(super) fn read(file: &MappedFile) -> Result<Vec<Stored>, FormatError> {
    let data_at = data_start(file)?;
    let refuse = |message: String| FormatError::new(file.path(), 8, "header", message);
    let header = std::str::from_utf8(&file.bytes()[LENGTH_BYTES..data_at])
        .map_err(|error| refuse(format!("is no UTF-8: {error}")))?;
    let mut parser = serde_json::Deserializer::from_str(header);
    let entries = parser
        .deserialize_map(Entries(Vec::new()))
        .and_then(|entries| parser.end().map(|()| entries))
        .map_err(|error| refuse(format!("is no list of tensors: {error}")))?;
    let mut names = HashSet::with_capacity(entries.0.len());
    let mut tensors = Vec::with_capacity(entries.0.len());
    for (name, raw) in &entries.0 {
        let info_at = LENGTH_BYTES + (raw.get().as_ptr() as usize - header.as_ptr() as usize);
        if !names.insert(name) {
            let field = format!("tensor {name}");
            let message = "the name stands twice";
            return Err(FormatError::new(file.path(), info_at as u64, field, message));
        }
        tensors.push(read_tensor(file, (name, raw.get()), info_at, data_at)?);
    }
    check_overlaps(file, &tensors)?;
    Ok(tensors)
}

/// Where the header ends.
fn data_start(file: &MappedFile) -> Result<usize, FormatError> {
    let bytes = file.bytes();
    let refuse = |message: String| FormatError::new(file.path(), 0, "header length", message);
    let Some(length) = bytes.first_chunk::<LENGTH_BYTES>() else {
        return Err(refuse(format!("the file has only {} bytes", bytes.len())));
    };
    let length = u64::from_le_bytes(*length);
    let remain = (bytes.len() - LENGTH_BYTES) as u64;
    if length > remain || bytes.get(LENGTH_BYTES) != Some(&b'{') {
        return Err(refuse(format!(
            "{length}, of {remain} bytes that follow; is the download complete? The file looks \
             like {}",
            lookalike::describe(bytes)
        )));
    }
    if length > HEADER_BYTES_MAX {
        return Err(refuse(format!("{length}; allowed: at most {HEADER_BYTES_MAX}")));
    }
    Ok(LENGTH_BYTES + length as usize)
}

fn read_tensor(
    file: &MappedFile,
    (name, json): (&str, &str),
    info_at: usize,
    data_at: usize,
) -> Result<Stored, FormatError> {
    let mut stored =
        Stored { name: name.to_owned(), dtype: Dtype::U8, shape: Vec::new(), info_at, bytes: 0..0 };
    let info: TensorInfo = serde_json::from_str(json)
        .map_err(|error| stored.refuse(file, "description", error.to_string()))?;
    stored.dtype = info.dtype;
    let elements = info.shape.iter().try_fold(1_usize, |all, extent| all.checked_mul(*extent));
    let bits = elements.and_then(|elements| elements.checked_mul(info.dtype.bitsize()));
    let Some(bits) = bits.filter(|bits| bits.is_multiple_of(8)) else {
        let message = format!("{:?} of {} is no number of bytes", info.shape, info.dtype);
        return Err(stored.refuse(file, "shape", message));
    };
    let (start, end) = info.data_offsets;
    if end.checked_sub(start) != Some(bits / 8) {
        let message = format!(
            "[{start}, {end}], but {:?} of {} takes {} bytes",
            info.shape,
            info.dtype,
            bits / 8
        );
        return Err(stored.refuse(file, "data_offsets", message));
    }
    let data_bytes = file.bytes().len() - data_at;
    if end > data_bytes {
        let message = format!(
            "[{start}, {end}], but the file has {data_bytes} bytes of data; is the download \
             complete?"
        );
        return Err(stored.refuse(file, "data_offsets", message));
    }
    stored.shape = info.shape;
    stored.bytes = data_at + start..data_at + end;
    Ok(stored)
}

fn check_overlaps(file: &MappedFile, tensors: &[Stored]) -> Result<(), FormatError> {
    let mut by_start: Vec<&Stored> = tensors.iter().filter(|one| !one.bytes.is_empty()).collect();
    by_start.sort_unstable_by_key(|one| one.bytes.start);
    match by_start.windows(2).find(|pair| pair[0].bytes.end > pair[1].bytes.start) {
        None => Ok(()),
        Some(pair) => {
            let message = format!("its data overlaps that of {}", pair[0].name);
            Err(pair[1].refuse(file, "data_offsets", message))
        }
    }
}
