//! Models split over several files: `NAME-00001-of-00003.gguf` and so on, each a GGUF file with
//! `split.no`, `split.count` and `split.tensors.count` (llama.cpp's `gguf-split`).

use super::{FormatError, Metadata};
use std::path::{Path, PathBuf};

const NUMBER: &str = "split.no";
const COUNT: &str = "split.count";
const TENSORS: &str = "split.tensors.count";

/// Each part is one mapping and one open file.
const PARTS_MAX: u32 = 512;

/// The ending of part `number`, counted from 0.
fn ending(number: usize, count: usize) -> String {
    format!("-{:05}-of-{count:05}.gguf", number + 1)
}

/// The paths of the parts after the first; none unless the model is split.
pub(super) fn parts(metadata: &Metadata, path: &Path) -> Result<Vec<PathBuf>, FormatError> {
    let count = metadata.u32_opt(COUNT)?.unwrap_or(0);
    if count <= 1 {
        return Ok(Vec::new());
    }
    if count > PARTS_MAX {
        return Err(metadata.refuse(COUNT, format!("{count}; allowed: at most {PARTS_MAX}")));
    }
    let count = count as usize;
    let number = metadata.u32(NUMBER)?;
    if number != 0 {
        let message = format!(
            "this is part {} of {count}; open the first, whose name ends in {}",
            u64::from(number) + 1,
            ending(0, count)
        );
        return Err(metadata.refuse(NUMBER, message));
    }
    let name = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
    let Some(stem) = name.strip_suffix(&ending(0, count)) else {
        let message = format!(
            "the model has {count} parts, which are found by name: it must end in {}",
            ending(0, count)
        );
        return Err(metadata.refuse(COUNT, message));
    };
    Ok((1..count)
        .map(|number| path.with_file_name(format!("{stem}{}", ending(number, count))))
        .collect())
}

/// Holds a later part's own numbering against its place.
pub(super) fn check_part(
    metadata: &Metadata,
    number: usize,
    count: usize,
) -> Result<(), FormatError> {
    for (key, wanted) in [(NUMBER, number), (COUNT, count)] {
        let got = metadata.u32(key)?;
        if got as usize != wanted {
            let message = format!("{got}, wanted: {wanted}; the parts belong to different models");
            return Err(metadata.refuse(key, message));
        }
    }
    Ok(())
}

/// Holds the first part's count of all tensors against what was found.
pub(super) fn check_total(metadata: &Metadata, found: usize) -> Result<(), FormatError> {
    match metadata.u32_opt(TENSORS)? {
        Some(wanted) if wanted as usize != found => {
            Err(metadata.refuse(TENSORS, format!("{wanted}, but the files hold {found} tensors")))
        }
        _ => Ok(()),
    }
}

/// Refuses a part of a split model.
pub(super) fn refuse(metadata: &Metadata) -> Result<(), FormatError> {
    match metadata.u32_opt(COUNT)? {
        Some(2..) => Err(metadata.refuse(COUNT, "a split model cannot be read from memory")),
        _ => Ok(()),
    }
}
