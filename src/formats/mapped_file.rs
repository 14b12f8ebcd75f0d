//! The bytes of one file, mapped read-only; the only unsafe code of this module.

use super::FormatError;
use memmap2::{Advice, Mmap, UncheckedAdvice};
use rustix::fs::{Mode, OFlags};
use std::fs::{File, Metadata};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// A file's bytes, either mapped or held in memory. Their start is 8-byte aligned.
#[derive(Debug)]
pub struct MappedFile {
    path: PathBuf,
    content: Content,
}

#[derive(Debug)]
enum Content {
    Mapped {
        map: Mmap,
        file: File,
        modified: Option<SystemTime>,
    },
    /// `words` hold `len` bytes: a `Vec<u8>` would promise no alignment.
    Owned {
        words: Vec<u64>,
        len: usize,
    },
}

impl MappedFile {
    /// Maps a regular file.
    ///
    /// # Errors
    /// The path is absent, unreadable, a directory or other special file, or empty.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let refuse = |message: String| FormatError::new(path, 0, "file", message);
        let failed = |error: std::io::Error| refuse(format!("cannot be read: {error}"));
        // NONBLOCK: opening a pipe that nobody writes to would wait forever.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| failed(e.into()))?;
        let file = File::from(file);
        let found = file.metadata().map_err(failed)?;
        if found.is_dir() {
            return Err(refuse(
                "is a directory without config.json; give the .gguf file inside it".into(),
            ));
        }
        if !found.is_file() {
            return Err(refuse("is no regular file".into()));
        }
        if found.len() == 0 {
            return Err(refuse("is empty; was the download interrupted?".into()));
        }
        // SAFETY: the mapping is read-only and private to this struct, which keeps the file open.
        // Other processes may still change the file: the bytes are only read as plain data and
        // every text is checked again at each use, so a change gives wrong values or an error,
        // never a broken invariant. Cutting the file shorter faults on access; `check_unchanged` is
        // called before and after weights are read, and the documentation says not to do it.
        let map = unsafe { Mmap::map(&file) }.map_err(failed)?;
        if map.len() as u64 != found.len() {
            return Err(refuse("changed its length while it was opened".into()));
        }
        let modified = found.modified().ok();
        Ok(Self { path: path.to_owned(), content: Content::Mapped { map, file, modified } })
    }

    /// Holds a copy of bytes that came from elsewhere; `path` only names them in errors.
    pub fn from_bytes(path: &Path, bytes: &[u8]) -> Self {
        let mut words = vec![0_u64; bytes.len().div_ceil(size_of::<u64>())];
        bytemuck::cast_slice_mut(&mut words)[..bytes.len()].copy_from_slice(bytes);
        Self { path: path.to_owned(), content: Content::Owned { words, len: bytes.len() } }
    }

    /// The file's path as it was given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All bytes.
    pub fn bytes(&self) -> &[u8] {
        match &self.content {
            Content::Mapped { map, .. } => map,
            Content::Owned { words, len } => &bytemuck::cast_slice(words)[..*len],
        }
    }

    /// Tells the kernel that these bytes are about to be read from front to back.
    pub fn will_read(&self, bytes: Range<usize>) {
        if let Content::Mapped { map, .. } = &self.content {
            // Advice only: a kernel that refuses it reads the same bytes, later.
            map.advise_range(Advice::WillNeed, bytes.start, bytes.len()).ok();
        }
    }

    /// Takes the pages of these bytes out of the process's memory. They stay in the system's cache,
    /// from where reading them again brings them back.
    pub fn unmap_pages(&self, bytes: Range<usize>) {
        if let Content::Mapped { map, .. } = &self.content {
            // SAFETY: the mapping is read-only and backed by its file, so no content can be lost,
            // not even of the neighbours that share the first and last page.
            let advised = unsafe {
                map.unchecked_advise_range(UncheckedAdvice::DontNeed, bytes.start, bytes.len())
            };
            // A kernel that refuses keeps pages that it can take back at any time.
            advised.ok();
        }
    }

    /// Whether the file on disk is still the one that was opened: same length, same modification
    /// time.
    ///
    /// # Errors
    /// What changed.
    pub fn check_unchanged(&self) -> Result<(), FormatError> {
        let Content::Mapped { map, file, modified } = &self.content else { return Ok(()) };
        let refuse = |message: String| Err(FormatError::new(&self.path, 0, "file", message));
        let now: Metadata = match file.metadata() {
            Ok(now) => now,
            Err(error) => return refuse(format!("cannot be read any more: {error}")),
        };
        let was = map.len() as u64;
        if now.len() < was {
            return refuse(format!("shrank from {was} to {} bytes since it was opened", now.len()));
        }
        if now.len() != was || now.modified().ok() != *modified {
            return refuse("was written to since it was opened".into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owned_bytes_are_aligned_and_whole() {
        for len in [0, 1, 7, 8, 9] {
            let bytes: Vec<u8> = (0..len).collect();
            let file = MappedFile::from_bytes(Path::new("memory"), &bytes);
            assert_eq!(file.bytes(), bytes);
            assert_eq!(file.bytes().as_ptr() as usize % 8, 0);
        }
    }
}
