//! How fast a file is read, past the system's memory of it where its file system allows that.

use super::measured::DiskRate;
use rustix::fs::{Advice, Mode, OFlags};
use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Pieces that are read at a time, and how many threads read: enough to keep an NVMe drive busy.
const PIECE_BYTES: usize = 4 << 20;
const READERS: usize = 4;
/// What direct reads want of addresses and lengths, of every drive there is.
const ALIGNMENT: usize = 4096;

/// Reads a file from its start until `most` is over, or to its end.
///
/// # Errors
/// There is no such file, it is empty, or what the system refuses.
pub fn disk_read_rate(file: &Path, most: Duration) -> Result<DiskRate> {
    let (open, is_direct) = open(file)?;
    let bytes = open.metadata()?.len();
    if bytes == 0 {
        return Err(Error::new(ErrorKind::UnexpectedEof, "the file is empty"));
    }
    let (next, started) = (AtomicU64::new(0), Instant::now());
    let read = || -> Result<u64> {
        let (mut buffer, mut done) = (Piece::new(), 0);
        while started.elapsed() < most {
            let at = next.fetch_add(PIECE_BYTES as u64, Ordering::Relaxed);
            if at >= bytes {
                break;
            }
            done += open.read_at(buffer.bytes(), at)? as u64;
        }
        Ok(done)
    };
    let done: Result<Vec<u64>> = std::thread::scope(|scope| {
        let readers: Vec<_> = (0..READERS).map(|_| scope.spawn(read)).collect();
        let results = readers.into_iter().map(|reader| match reader.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        results.collect()
    });
    let seconds = started.elapsed().as_secs_f64().max(1e-9);
    let bytes_per_second = done?.iter().sum::<u64>() as f64 / seconds;
    Ok(DiskRate { file: file.to_owned(), bytes_per_second, is_direct })
}

/// The file, and whether it is read directly.
fn open(path: &Path) -> Result<(File, bool)> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    if let Ok(file) = rustix::fs::open(path, flags | OFlags::DIRECT, Mode::empty()) {
        let file = File::from(file);
        // Some file systems refuse only when they are asked for bytes.
        if file.read_at(Piece::new().bytes(), 0).is_ok() {
            return Ok((file, true));
        }
    }
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    // What is forgotten must come from the disk; that the system may refuse it is told anyway.
    let _ = rustix::fs::fadvise(&file, 0, None, Advice::DontNeed);
    Ok((file, false))
}

/// Aligned memory for one piece.
struct Piece {
    memory: Vec<u8>,
    start: usize,
}

impl Piece {
    fn new() -> Self {
        let memory = vec![0; PIECE_BYTES + ALIGNMENT];
        let start = memory.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        Self { memory, start }
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..][..PIECE_BYTES]
    }
}
