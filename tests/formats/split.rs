//! Models split over several files.

use super::tiny_model::gguf_writer::{Gguf, id};
use std::path::{Path, PathBuf};
use tandem::formats::{Checkpoint, FormatError};

/// Part `number` of 3 with one tensor, `t0`, `t1` or `t2`, whose elements are its number.
fn part(number: u16) -> Gguf {
    let mut gguf = Gguf::default();
    if number == 0 {
        gguf.text("general.architecture", "none");
    }
    gguf.raw("split.no", id::U16, number.to_le_bytes().to_vec());
    gguf.raw("split.count", id::U16, 3_u16.to_le_bytes().to_vec());
    gguf.raw("split.tensors.count", id::I32, 3_i32.to_le_bytes().to_vec());
    let data = f32::from(number).to_le_bytes().repeat(8);
    gguf.tensor(&format!("t{number}"), &[8], 0, data);
    gguf
}

fn name(number: usize) -> String {
    format!("model-0000{}-of-00003.gguf", number + 1)
}

/// Writes the parts and opens the first.
fn open(folder: &Path, parts: &[Gguf]) -> Result<Checkpoint, FormatError> {
    for (number, part) in parts.iter().enumerate() {
        part.write(&folder.join(name(number)));
    }
    Checkpoint::open(&folder.join(name(0)))
}

fn refused(change: impl FnOnce(&mut [Gguf; 3])) -> (String, String, String) {
    let folder = tempfile::tempdir().unwrap();
    let mut parts = [part(0), part(1), part(2)];
    change(&mut parts);
    let error = open(folder.path(), &parts).unwrap_err();
    let file = error.file.file_name().unwrap().to_string_lossy().into_owned();
    (file, error.field, error.message)
}

#[test]
fn all_parts_are_found_beside_the_first() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = open(folder.path(), &[part(0), part(1), part(2)]).unwrap();
    for number in 0..3_u8 {
        let tensor = checkpoint.tensor(&format!("t{number}")).unwrap();
        assert_eq!(tensor.bytes[..4], f32::from(number).to_le_bytes());
        let info = checkpoint.tensor_info(&format!("t{number}")).unwrap();
        assert_eq!(info.file, folder.path().join(name(number.into())));
    }
    let files: Vec<PathBuf> = checkpoint.files().map(|f| f.path().to_owned()).collect();
    assert_eq!(files.len(), 3);
    assert_eq!(checkpoint.metadata().str("general.architecture").unwrap(), "none");
}

#[test]
fn a_missing_part_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let error = open(folder.path(), &[part(0), part(1)]).unwrap_err();
    assert_eq!(error.file, folder.path().join(name(2)));
    assert!(error.message.starts_with("cannot be read: No such file"), "{error}");
}

#[test]
fn a_later_part_says_which_one_to_open() {
    let folder = tempfile::tempdir().unwrap();
    open(folder.path(), &[part(0), part(1), part(2)]).unwrap();
    let error = Checkpoint::open(&folder.path().join(name(1))).unwrap_err();
    assert_eq!(error.field, "split.no");
    let wanted = "this is part 2 of 3; open the first, whose name ends in -00001-of-00003.gguf";
    assert_eq!(error.message, wanted);
}

#[test]
fn a_renamed_first_part_says_what_its_name_must_be() {
    let folder = tempfile::tempdir().unwrap();
    part(0).write(&folder.path().join("renamed.gguf"));
    let error = Checkpoint::open(&folder.path().join("renamed.gguf")).unwrap_err();
    assert_eq!(error.field, "split.count");
    assert!(error.message.ends_with("it must end in -00001-of-00003.gguf"), "{error}");
}

#[test]
fn parts_of_different_models_are_refused() {
    let wrong_number = refused(|parts| parts[2] = part(1));
    let message = "1, wanted: 2; the parts belong to different models";
    assert_eq!(wrong_number, (name(2), "split.no".into(), message.into()));
    let wrong_count = refused(|parts| _ = parts[1].u32("split.count", 4));
    let message = "4, wanted: 3; the parts belong to different models";
    assert_eq!(wrong_count, (name(1), "split.count".into(), message.into()));
    let wrong_total = refused(|parts| _ = parts[0].u32("split.tensors.count", 9));
    let message = "9, but the files hold 3 tensors";
    assert_eq!(wrong_total, (name(0), "split.tensors.count".into(), message.into()));
}

#[test]
fn a_name_that_stands_in_two_parts_is_refused() {
    let (file, field, message) = refused(|parts| parts[2].tensors[0].name = "t1".into());
    assert_eq!((file, field.as_str()), (name(2), "tensor t1"));
    assert!(message.starts_with("the name stands twice"), "{message}");
}

#[test]
fn a_broken_part_is_named() {
    let (file, field, _) = refused(|parts| parts[1].tensor_count = Some(1 << 50));
    assert_eq!((file, field.as_str()), (name(1), "tensor_count"));
}

#[test]
fn absurd_numbers_of_parts_are_refused() {
    let (_, field, message) = refused(|parts| _ = parts[0].u32("split.count", u32::MAX));
    assert_eq!(field, "split.count");
    assert_eq!(message, "4294967295; allowed: at most 512");
}
