//! Reads one GGUF file's header, versions 2 and 3 (the format: ggml's `docs/gguf.md`):
//!
//! ```text
//! "GGUF" | version u32 | tensor count u64 | metadata count u64
//! metadata:  key | type u32 | value                              (a text is: length u64, bytes)
//! tensors:   name | n_dims u32 | dims u64 each | type u32 | offset u64
//! padding to general.alignment | tensor data
//! ```
//!
//! Every count is held against the bytes that remain before memory is taken for it, and the work
//! against fixed limits, so that a hostile file costs milliseconds and no memory.

use super::cursor::{Cursor, Field};
use super::hf_weights::Recipe;
use super::lookalike;
use super::metadata::{Entry, Kind, Metadata};
use super::value::{ValueType, scalar};
use super::{FormatError, MappedFile, StoredType};
use crate::tensor::Shape;
use std::sync::Arc;

/// DeepSeek V3 has 1,100 tensors, and would have 47,000 with one per expert matrix.
const TENSORS_MAX: u64 = 1 << 17;
/// Real files have fewer than 100.
const METADATA_MAX: u64 = 1 << 14;
/// Texts in all arrays of a file: vocabularies reach 262,144 tokens and half a million merges.
const TEXTS_MAX: u64 = 1 << 22;
/// GGUF's own limit.
const KEY_BYTES_MAX: usize = (1 << 16) - 1;
/// ggml's limit is 64.
const NAME_BYTES_MAX: usize = 255;
/// GGUF wants a multiple of 8; no writer goes beyond a huge page.
const ALIGNMENTS: std::ops::RangeInclusive<u32> = 8..=1 << 21;
const ALIGNMENT_DEFAULT: u32 = 32;

/// Entries that memory is taken for before the first is read; more as they come.
const CAPACITY_START: u64 = 512;

/// Fewest bytes of a metadata entry: key length, one byte of key, type, one byte of value.
const ENTRY_BYTES_MIN: u64 = 8 + 1 + 4 + 1;
/// Fewest bytes of a tensor info: name length, one byte of name, n_dims, one dim, type, offset.
const INFO_BYTES_MIN: u64 = 8 + 1 + 4 + 8 + 4 + 8;

/// One tensor of a file, checked to lie inside it.
#[derive(Debug)]
pub(super) struct Info {
    pub name: String,
    pub shape: Shape,
    pub stored: StoredType,
    /// Where the info stands in the file.
    pub info_at: usize,
    /// Where the data starts in the file.
    pub start: usize,
    /// Bytes of data, unless the type's block size is unknown.
    pub bytes: Option<usize>,
    /// Of a tensor that no GGUF file holds.
    pub foreign: Option<Box<Foreign>>,
}

/// What another format's tensor has besides.
#[derive(Debug)]
pub(super) struct Foreign {
    /// What its file calls it.
    pub file_name: Option<String>,
    /// How its rows are made, where they don't stand in the file.
    pub recipe: Option<Recipe>,
}

impl Info {
    /// What its file calls it, where that is not its name.
    pub fn file_name(&self) -> Option<&str> {
        self.foreign.as_ref()?.file_name.as_deref()
    }

    /// How its rows are made, where they don't stand in the file.
    pub fn recipe(&self) -> Option<&Recipe> {
        self.foreign.as_ref()?.recipe.as_ref()
    }
}

/// A file's header.
#[derive(Debug)]
pub(super) struct Header {
    pub metadata: Metadata,
    /// In file order.
    pub tensors: Vec<Info>,
    /// Where the tensor infos start.
    pub tensors_at: usize,
}

/// Reads and checks a whole header.
pub(super) fn read(file: &Arc<MappedFile>) -> Result<Header, FormatError> {
    let mut cursor = Cursor::new(file);
    check_magic(&mut cursor)?;
    check_version(&mut cursor)?;
    let counts_at = cursor.at();
    let tensors = cursor.u64(Field::Header("tensor_count"))?;
    let entries = cursor.u64(Field::Header("metadata_kv_count"))?;
    let metadata_field = Field::Header("metadata_kv_count");
    check_count(&cursor, counts_at + 8, metadata_field, [entries, METADATA_MAX, ENTRY_BYTES_MIN])?;
    let tensors_field = Field::Header("tensor_count");
    check_count(&cursor, counts_at, tensors_field, [tensors, TENSORS_MAX, INFO_BYTES_MIN])?;

    let metadata = Metadata::new(Arc::clone(file), read_entries(&mut cursor, entries)?)?;
    let alignment = alignment(&metadata)?;
    let tensors_at = cursor.at();
    check_count(&cursor, counts_at, tensors_field, [tensors, TENSORS_MAX, INFO_BYTES_MIN])?;
    let mut infos = Vec::with_capacity(tensors.min(CAPACITY_START) as usize);
    for index in 0..tensors {
        infos.push(read_info(&mut cursor, index, alignment)?);
    }
    place(&cursor, &mut infos, alignment)?;
    check_overlaps(&cursor, &infos)?;
    Ok(Header { metadata, tensors: infos, tensors_at })
}

fn check_magic(cursor: &mut Cursor<'_>) -> Result<(), FormatError> {
    let bytes = cursor.file().bytes();
    if !bytes.starts_with(b"GGUF") {
        let message = format!("no GGUF file: it looks like {}", lookalike::describe(bytes));
        return Err(cursor.refuse(0, Field::Header("magic"), message));
    }
    cursor.skip(4, Field::Header("magic")).map(|_| ())
}

fn check_version(cursor: &mut Cursor<'_>) -> Result<(), FormatError> {
    let at = cursor.at();
    let field = Field::Header("version");
    let version = cursor.u32(field)?;
    let message = match version {
        2 | 3 => return Ok(()),
        1 => "version 1, of August 2023; versions 2 and 3 can be read: convert it again".into(),
        _ if (1..=3).contains(&version.swap_bytes()) => {
            let version = version.swap_bytes();
            format!("version {version} in big-endian byte order; only little-endian can be read")
        }
        _ => format!("version {version}; versions 2 and 3 can be read"),
    };
    Err(cursor.refuse(at, field, message))
}

/// Holds `[count, most, least bytes of one]` against the limit and the bytes that remain.
fn check_count(
    cursor: &Cursor<'_>,
    at: usize,
    field: Field<'_>,
    [count, count_max, bytes_min]: [u64; 3],
) -> Result<(), FormatError> {
    let fit = cursor.remaining() / bytes_min;
    if count > fit {
        let message = format!(
            "{count}, but the {} bytes that remain hold at most {fit}; \
             is the download complete?",
            cursor.remaining()
        );
        return Err(cursor.refuse(at, field, message));
    }
    if count > count_max {
        return Err(cursor.refuse(at, field, format!("{count}; allowed: at most {count_max}")));
    }
    Ok(())
}

fn read_entries(cursor: &mut Cursor<'_>, count: u64) -> Result<Vec<Entry>, FormatError> {
    let mut entries = Vec::with_capacity(count.min(CAPACITY_START) as usize);
    let mut texts_left = TEXTS_MAX;
    for index in 0..count {
        let key = cursor.name(KEY_BYTES_MAX, Field::Key(index))?;
        let key_end = cursor.at();
        let (kind, data) = read_value(cursor, key, &mut texts_left)?;
        let key = key_end - key.len()..key_end;
        entries.push(Entry { key, kind, data, origin: None });
    }
    Ok(entries)
}

fn read_type(cursor: &mut Cursor<'_>, key: &str) -> Result<ValueType, FormatError> {
    let (at, field) = (cursor.at(), Field::Value(key));
    let id = cursor.u32(field)?;
    let unknown = || cursor.refuse(at, field, format!("value type {id}; known: 0 to 12"));
    ValueType::from_gguf_id(id).ok_or_else(unknown)
}

/// Steps over a value: its kind, and where its bytes lie.
fn read_value(
    cursor: &mut Cursor<'_>,
    key: &str,
    texts_left: &mut u64,
) -> Result<(Kind, std::ops::Range<usize>), FormatError> {
    let field = Field::Value(key);
    match read_type(cursor, key)? {
        ValueType::Text => Ok((Kind::Text, cursor.counted(field)?)),
        ValueType::Array => read_array(cursor, key, texts_left),
        value_type => {
            let data = cursor.skip(value_type.bytes().unwrap_or(0) as u64, field)?;
            if scalar(value_type, &cursor.file().bytes()[data.clone()]).is_none() {
                let message = "a bool is neither 0 nor 1";
                return Err(cursor.refuse(data.start, field, message));
            }
            Ok((Kind::Scalar(value_type), data))
        }
    }
}

fn read_array(
    cursor: &mut Cursor<'_>,
    key: &str,
    texts_left: &mut u64,
) -> Result<(Kind, std::ops::Range<usize>), FormatError> {
    let field = Field::Value(key);
    let type_at = cursor.at();
    let element = read_type(cursor, key)?;
    let count_at = cursor.at();
    let count = cursor.u64(field)?;
    let bytes_min = match element {
        ValueType::Array => return Err(cursor.refuse(type_at, field, "an array of arrays")),
        ValueType::Text => size_of::<u64>() as u64,
        _ => element.bytes().unwrap_or(1) as u64,
    };
    let most = if element == ValueType::Text { *texts_left } else { u64::MAX };
    check_count(cursor, count_at, field, [count, most, bytes_min])?;
    let start = cursor.at();
    if element == ValueType::Text {
        *texts_left -= count;
        for _ in 0..count {
            cursor.counted(field)?;
        }
    } else {
        // No overflow: `check_count` held the product against the bytes that remain.
        cursor.skip(count * bytes_min, field)?;
    }
    Ok((Kind::Array { element, len: count as usize }, start..cursor.at()))
}

fn alignment(metadata: &Metadata) -> Result<usize, FormatError> {
    let key = "general.alignment";
    let alignment = metadata.u32_opt(key)?.unwrap_or(ALIGNMENT_DEFAULT);
    if !alignment.is_power_of_two() || !ALIGNMENTS.contains(&alignment) {
        let (low, high) = ALIGNMENTS.into_inner();
        let message = format!("{alignment}; allowed: a power of two from {low} to {high}");
        return Err(metadata.refuse(key, message));
    }
    Ok(alignment as usize)
}

/// Reads a tensor info. `start` is still relative to the data section.
fn read_info(cursor: &mut Cursor<'_>, index: u64, alignment: usize) -> Result<Info, FormatError> {
    let info_at = cursor.at();
    let name = cursor.name(NAME_BYTES_MAX, Field::TensorName(index))?;
    let (dims_at, dims_field) = (cursor.at(), Field::Tensor(name, "dimensions"));
    let rank = cursor.u32(dims_field)?;
    if rank == 0 || rank as usize > Shape::RANK_MAX {
        let message = format!("{rank} of them; allowed: 1 to {}", Shape::RANK_MAX);
        return Err(cursor.refuse(dims_at, dims_field, message));
    }
    let mut dims = [0_u64; Shape::RANK_MAX];
    for dim in &mut dims[..rank as usize] {
        *dim = cursor.u64(dims_field)?;
    }
    let stored = StoredType::from_gguf_id(cursor.u32(Field::Tensor(name, "type"))?);
    let (shape, bytes) = tensor_bytes(&dims[..rank as usize], stored)
        .map_err(|message| cursor.refuse(dims_at, dims_field, message))?;
    let (offset_at, offset_field) = (cursor.at(), Field::Tensor(name, "offset"));
    let offset = cursor.u64(offset_field)?;
    if !offset.is_multiple_of(alignment as u64) {
        let message = format!("{offset} is no multiple of the alignment, {alignment}");
        return Err(cursor.refuse(offset_at, offset_field, message));
    }
    let start = usize::try_from(offset)
        .map_err(|_| cursor.refuse(offset_at, offset_field, format!("{offset} is too large")))?;
    Ok(Info { name: name.to_owned(), shape, stored, info_at, start, bytes, foreign: None })
}

/// The only place where a tensor's size is computed: dims times block bytes, no step unchecked.
/// The size is `None` for types that ggml does not define.
fn tensor_bytes(dims: &[u64], stored: StoredType) -> Result<(Shape, Option<usize>), String> {
    let mut extents = [0_usize; Shape::RANK_MAX];
    for (extent, dim) in extents.iter_mut().zip(dims) {
        *extent = usize::try_from(*dim).map_err(|_| format!("{dims:?} is too large"))?;
    }
    let shape = Shape::new(&extents[..dims.len()])
        .ok_or_else(|| format!("{dims:?}: each has to be at least 1 and the product below 2^64"))?;
    let Some((block_elements, block_bytes)) = stored.block() else { return Ok((shape, None)) };
    let cols = shape.cols();
    if !cols.is_multiple_of(block_elements) {
        return Err(format!(
            "rows of {cols} elements are no whole number of {stored} blocks of {block_elements}"
        ));
    }
    (cols / block_elements)
        .checked_mul(block_bytes)
        .and_then(|row_bytes| row_bytes.checked_mul(shape.rows()))
        .map(|bytes| (shape, Some(bytes)))
        .ok_or_else(|| format!("{dims:?} of {stored} is too large"))
}

/// Makes data offsets absolute and holds them against the file's end.
fn place(cursor: &Cursor<'_>, infos: &mut [Info], alignment: usize) -> Result<(), FormatError> {
    let file_bytes = cursor.file().bytes().len();
    // No overflow: files are shorter than 2^63 and the alignment at most 2^21.
    let data_at = cursor.at().next_multiple_of(alignment);
    for info in infos {
        let start = data_at.checked_add(info.start);
        let end = start.and_then(|start| start.checked_add(info.bytes.unwrap_or(0)));
        let (Some(start), Some(end)) = (start, end) else {
            return Err(past_end(cursor, info, data_at));
        };
        if end > file_bytes {
            return Err(past_end(cursor, info, data_at));
        }
        info.start = start;
    }
    Ok(())
}

fn past_end(cursor: &Cursor<'_>, info: &Info, data_at: usize) -> FormatError {
    let file_bytes = cursor.file().bytes().len();
    let message = format!(
        "{} bytes at {} after byte {data_at}, but the file ends at byte {file_bytes}; \
         is the download complete?",
        info.bytes.unwrap_or(0),
        info.start
    );
    cursor.refuse(info.info_at, Field::Tensor(&info.name, "offset"), message)
}

fn check_overlaps(cursor: &Cursor<'_>, infos: &[Info]) -> Result<(), FormatError> {
    let mut by_start: Vec<&Info> = infos.iter().collect();
    by_start.sort_unstable_by_key(|info| (info.start, info.bytes, info.info_at));
    for pair in by_start.windows(2) {
        let (before, after) = (pair[0], pair[1]);
        // Starts are equal only if the first has no known size, or they overlap.
        if before.start + before.bytes.unwrap_or(0) > after.start {
            let message = format!("its data overlaps that of {}", before.name);
            let field = Field::Tensor(&after.name, "offset");
            return Err(cursor.refuse(after.info_at, field, message));
        }
    }
    Ok(())
}
