//! Paths that are no readable model file, files that change, and files built to waste time or
//! memory.

use super::counting_allocator::measure;
use super::small;
use super::tiny_model::gguf_writer::{Gguf, id};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, Instant};
use tandem::formats::{Checkpoint, FormatError};

fn refused(path: &Path) -> FormatError {
    let start = Instant::now();
    let (result, usage) = measure(|| Checkpoint::open(path).map(drop));
    let error = result.unwrap_err();
    assert!(start.elapsed() < Duration::from_secs(1), "{error}: {:?}", start.elapsed());
    assert!(usage.peak_bytes < 64 << 10, "{error}: {usage:?}");
    error
}

#[test]
fn paths_that_are_no_regular_file_are_refused_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let absent = refused(&folder.path().join("absent.gguf"));
    assert!(absent.message.starts_with("cannot be read: No such file"), "{absent}");
    let directory = refused(folder.path());
    assert_eq!(
        directory.message,
        "is a directory without config.json; give the .gguf file inside it"
    );
    let device = refused(Path::new("/dev/zero"));
    assert_eq!(device.message, "is no regular file");

    let pipe = folder.path().join("pipe.gguf");
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    let kind = rustix::fs::FileType::Fifo;
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, kind, mode, 0).unwrap();
    assert_eq!(refused(&pipe).message, "is no regular file");

    let empty = folder.path().join("empty.gguf");
    File::create(&empty).unwrap();
    assert_eq!(refused(&empty).message, "is empty; was the download interrupted?");
    for error in [absent, directory, device, refused(&empty)] {
        assert_eq!((error.offset, error.field.as_str()), (0, "file"));
    }
}

#[test]
fn an_unreadable_file_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("secret.gguf");
    small().write(&path);
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o000)).unwrap();
    if File::open(&path).is_ok() {
        // A test that runs as root can read everything.
        return;
    }
    let error = refused(&path);
    assert!(error.message.starts_with("cannot be read: Permission denied"), "{error}");
}

#[test]
fn a_file_that_shrinks_grows_or_is_written_to_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    small().write(&path);
    let length = path.metadata().unwrap().len();
    let checkpoint = Checkpoint::open(&path).unwrap();
    checkpoint.check_unchanged().unwrap();

    let mut file = OpenOptions::new().append(true).open(&path).unwrap();
    file.write_all(b"more").unwrap();
    let error = checkpoint.check_unchanged().unwrap_err();
    assert_eq!(error.message, "was written to since it was opened");

    file.set_len(10).unwrap();
    let error = checkpoint.check_unchanged().unwrap_err();
    let message = format!("shrank from {length} to 10 bytes since it was opened");
    assert_eq!((error.file, error.message), (path, message));
}

#[test]
fn a_file_that_is_replaced_by_renaming_stays_usable() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    small().write(&path);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let other = folder.path().join("other.gguf");
    std::fs::write(&other, b"something else").unwrap();
    std::fs::rename(&other, &path).unwrap();
    checkpoint.check_unchanged().unwrap();
    assert_eq!(checkpoint.tensor("first").unwrap().bytes.len(), 32);
}

/// A header followed by zeros up to `length` bytes, which take no room on disk.
fn sparse(path: &Path, header: &[u8], length: u64) {
    let file = File::create(path).unwrap();
    file.write_all_at(header, 0).unwrap();
    file.set_len(length).unwrap();
}

/// The start of a file with one key `k` that is an array, up to and with its count.
fn array_start(element: u32, count: u64) -> Vec<u8> {
    let mut gguf = Gguf { tensor_count: Some(0), ..Gguf::default() };
    gguf.raw("k", id::ARRAY, [&element.to_le_bytes()[..], &count.to_le_bytes()[..]].concat());
    gguf.bytes()
}

/// Headers that ask for terabytes in files that are that large, if only on paper.
#[test]
fn huge_files_cost_neither_time_nor_memory() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("huge.gguf");
    let terabyte = 1_u64 << 40;
    let counts = |tensors: u64, entries: u64| {
        let (tensor_count, metadata_count) = (Some(tensors), Some(entries));
        Gguf { tensor_count, metadata_count, ..Gguf::default() }.bytes()
    };
    for (header, field) in [
        (counts(1 << 30, 0), "tensor_count"),
        (counts(0, 1 << 30), "metadata_kv_count"),
        (counts(1 << 17, 1 << 14), "metadata[0].key"),
        (array_start(id::TEXT, 1 << 36), "k"),
        (Vec::new(), "magic"),
    ] {
        sparse(&path, &header, terabyte);
        assert_eq!(refused(&path).field, field);
    }
}

/// The most texts that are allowed, all empty: read, within the second, without memory.
#[test]
fn the_longest_array_of_texts_is_walked_without_memory() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("texts.gguf");
    sparse(&path, &array_start(id::TEXT, 1 << 22), (8 << 22) + 4096);
    let start = Instant::now();
    let (checkpoint, usage) = measure(|| Checkpoint::open(&path).unwrap());
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    assert!(usage.peak_bytes < 64 << 10, "{usage:?}");
    assert_eq!(checkpoint.metadata().array("k").unwrap().len(), 1 << 22);
}

#[test]
fn opening_a_large_vocabulary_copies_nothing() {
    let mut gguf = small();
    let tokens: Vec<String> = (0..150_000).map(|index| format!("token {index}")).collect();
    gguf.texts("tokenizer.ggml.tokens", &tokens).i32s("types", &vec![1; 150_000]);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vocabulary.gguf");
    gguf.write(&path);
    let (checkpoint, usage) = measure(|| Checkpoint::open(&path).unwrap());
    assert!(usage.peak_bytes < 16 << 10, "{usage:?}");
    let (found, usage) = measure(|| checkpoint.metadata().texts("tokenizer.ggml.tokens").unwrap());
    assert_eq!(usage.allocations, 0);
    assert!(found.map(Result::unwrap).eq(&tokens));
}
