//! Reads the small text files of `/proc` and `/sys`, below any root, so that tests can make theirs.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Linux numbers its processors below this in every configuration; a larger number in a file is a
/// mistake, and must not become that many entries.
const ID_MAX: u32 = 1 << 16;

/// A root with `proc` and `sys` in it.
pub(super) struct SystemFiles {
    root: PathBuf,
}

impl SystemFiles {
    pub fn new(root: &Path) -> SystemFiles {
        SystemFiles { root: root.to_owned() }
    }

    /// The trimmed text of a file; `None` when it is missing, unreadable or empty.
    pub fn text(&self, path: &str) -> Option<String> {
        let text = fs::read_to_string(self.root.join(path)).ok()?;
        let text = text.trim();
        (!text.is_empty()).then(|| text.to_owned())
    }

    /// Where a symbolic link points; `None` when there is none, or it can't be read.
    pub fn link(&self, path: &str) -> Option<PathBuf> {
        fs::read_link(self.root.join(path)).ok()
    }

    /// A file that holds one number.
    pub fn number<T: FromStr>(&self, path: &str) -> Option<T> {
        self.text(path)?.parse().ok()
    }

    /// A file that holds a list such as `0-3,8`.
    pub fn id_list(&self, path: &str) -> Option<BTreeSet<u32>> {
        parse_id_list(&self.text(path)?)
    }

    /// Names in a folder that are `prefix` and a number, as those numbers in ascending order.
    pub fn numbered(&self, folder: &str, prefix: &str) -> BTreeSet<u32> {
        let Ok(entries) = fs::read_dir(self.root.join(folder)) else { return BTreeSet::new() };
        entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.strip_prefix(prefix)?.parse().ok())
            .collect()
    }

    /// The value of `name` in a file of lines `name: value` or `name value`.
    pub fn field(&self, path: &str, name: &str) -> Option<String> {
        field(&self.text(path)?, name).map(str::to_owned)
    }
}

/// The value of `name` in lines `name: value` or `name value`.
pub(super) fn field<'t>(text: &'t str, name: &str) -> Option<&'t str> {
    text.lines().find_map(|line| {
        let rest = line.strip_prefix(name)?;
        let value = rest.strip_prefix(':').or_else(|| rest.strip_prefix(' '))?;
        Some(value.trim())
    })
}

/// Parses `0-3,8` into its members; `None` for anything else, empty lists included.
pub(super) fn parse_id_list(text: &str) -> Option<BTreeSet<u32>> {
    let mut ids = BTreeSet::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        if first > last || last >= ID_MAX {
            return None;
        }
        ids.extend(first..=last);
    }
    Some(ids)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_and_nonsense_is_refused() {
        let ids = |text| parse_id_list(text).map(|ids| ids.into_iter().collect::<Vec<_>>());
        assert_eq!(ids("0-3,8\n"), Some(vec![0, 1, 2, 3, 8]));
        assert_eq!(ids("5"), Some(vec![5]));
        for text in ["", "a", "3-1", "0-", "1,,2", "0-4294967295", "-1"] {
            assert_eq!(ids(text), None, "{text:?}");
        }
    }
}
