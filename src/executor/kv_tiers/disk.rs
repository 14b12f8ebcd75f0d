//! KV blocks in a file that has no name: it is gone however the process ends. Each block has a
//! checksum in memory, and comes back as it went or not at all.

use super::TierOptions;
use crate::executor::ExecutorError;
use crate::step::CopyOutcome;
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use std::fs::{File, OpenOptions, remove_file};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

/// Blocks in a file.
pub(super) struct DiskTier {
    file: File,
    block_bytes: usize,
    /// By block: the checksum of what was written last, if that ended well.
    checksums: Vec<Option<u32>>,
    is_stopped: bool,
}

impl DiskTier {
    /// Makes the file, with all its space where the file system can promise that.
    ///
    /// # Errors
    /// [`ExecutorError::DiskTier`]: no file can be made in the folder, or not of that size.
    pub fn create(options: &TierOptions, block_bytes: usize) -> Result<Self, ExecutorError> {
        let (folder, blocks) = (&options.disk_folder, options.disk_blocks);
        let bytes = blocks as u64 * block_bytes as u64;
        let refused = |source| ExecutorError::DiskTier { folder: folder.clone(), bytes, source };
        let file = nameless(folder).map_err(refused)?;
        match fallocate(&file, FallocateFlags::empty(), 0, bytes) {
            // Others fill a hole as they go.
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => file.set_len(bytes),
            done => done.map_err(io::Error::from),
        }
        .map_err(refused)?;
        Ok(Self { file, block_bytes, checksums: vec![None; blocks], is_stopped: false })
    }

    /// Number of blocks.
    pub fn len(&self) -> usize {
        self.checksums.len()
    }

    /// Bytes of all blocks.
    pub fn bytes(&self) -> usize {
        self.checksums.len() * self.block_bytes
    }

    /// Whether nothing is written any more.
    pub fn is_stopped(&self) -> bool {
        self.is_stopped
    }

    /// Takes what is in a block as nothing.
    pub fn forget(&mut self, block: usize) {
        self.checksums[block] = None;
    }

    /// Writes a block that was forgotten. A disk that fails gets no other.
    pub fn write(&mut self, block: usize, from: &[u8]) -> CopyOutcome {
        if self.is_stopped {
            return CopyOutcome::Failed;
        }
        if let Err(error) = self.file.write_all_at(from, self.start(block)) {
            self.stop(block, &error.to_string());
            return CopyOutcome::Failed;
        }
        self.checksums[block] = Some(crc32fast::hash(from));
        CopyOutcome::Done
    }

    /// Reads a block that was written. After wrong bytes or a failure it is gone, and nothing is
    /// written any more.
    pub fn read(&mut self, block: usize, to: &mut [u8]) -> CopyOutcome {
        let Some(wanted) = self.checksums[block] else { return CopyOutcome::Failed };
        let wrong = match self.file.read_exact_at(to, self.start(block)) {
            Ok(()) if crc32fast::hash(to) == wanted => return CopyOutcome::Done,
            Ok(()) => "what was read is not what had been written".to_owned(),
            Err(error) => error.to_string(),
        };
        self.forget(block);
        self.stop(block, &wrong);
        CopyOutcome::Failed
    }

    /// Where a block lies in the file.
    fn start(&self, block: usize) -> u64 {
        block as u64 * self.block_bytes as u64
    }

    fn stop(&mut self, block: usize, reason: &str) {
        self.is_stopped = true;
        tracing::error!(block, reason, "kv.disk_folder: no KV blocks are written there any more");
    }
}

/// A new file in a folder, for this process alone, whose name is taken away.
fn nameless(folder: &Path) -> io::Result<File> {
    let mut number = [0; 8];
    getrandom::fill(&mut number).map_err(io::Error::other)?;
    let path = folder.join(format!("tandem-kv-{:016x}", u64::from_ne_bytes(number)));
    let file =
        OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
    remove_file(&path)?;
    Ok(file)
}
