//! Every class of broken header: the field, the offset and the reason are asserted.

use super::tiny_model::gguf_writer::{Gguf, array_bytes, id, text_bytes};
use super::{open, open_bytes, small};
use tandem::formats::FormatError;

fn refused(gguf: &Gguf) -> (u64, String, String) {
    parts(open(gguf).map(drop).unwrap_err())
}

fn parts(error: FormatError) -> (u64, String, String) {
    (error.offset, error.field, error.message)
}

fn said(offset: u64, field: &str, message: &str) -> (u64, String, String) {
    (offset, field.to_owned(), message.to_owned())
}

const VERSION_AT: usize = 4;
const TENSOR_COUNT_AT: u64 = 8;
const METADATA_COUNT_AT: u64 = 16;

#[test]
fn files_that_are_no_gguf_are_told_what_they_look_like() {
    for (bytes, what) in [
        (&b"<!DOCTYPE html>\n<html><head><title>Sign in</title>"[..], "an HTML page; "),
        (b"version https://git-lfs.github.com/spec/v1\n", "a git-lfs pointer; "),
        (b"PK\x03\x04rest of the archive", "a ZIP archive, "),
        (b"\x40\x00\x00\x00\x00\x00\x00\x00{\"__metadata__\":", "a safetensors file; "),
        (b"{\"error\": \"Invalid credentials\"}", "JSON, "),
        (b"Entry not found", "a text, "),
        (&[0; 4096], "nothing but zeros "),
        (b"\xde\xad\xbe\xef", "no format that is known here"),
        (b"GGU", "a text, "),
    ] {
        let (offset, field, message) = parts(open_bytes(bytes).map(drop).unwrap_err());
        assert_eq!((offset, field.as_str()), (0, "magic"));
        assert!(message.starts_with(&format!("no GGUF file: it looks like {what}")), "{message}");
    }
}

#[test]
fn versions_and_byte_orders_that_cannot_be_read_are_named() {
    for (version, message) in [
        (1, "version 1, of August 2023; versions 2 and 3 can be read: convert it again"),
        (3_u32.swap_bytes(), "version 3 in big-endian byte order; only little-endian can be read"),
        (2_u32.swap_bytes(), "version 2 in big-endian byte order; only little-endian can be read"),
        (0, "version 0; versions 2 and 3 can be read"),
        (4, "version 4; versions 2 and 3 can be read"),
    ] {
        let mut gguf = small();
        gguf.version = version;
        assert_eq!(refused(&gguf), said(VERSION_AT as u64, "version", message));
    }
}

#[test]
fn a_file_cut_at_any_byte_is_refused_inside_the_file() {
    let bytes = small().bytes();
    for length in 0..bytes.len() {
        let error = open_bytes(&bytes[..length]).map(drop).unwrap_err();
        assert!(error.offset as usize <= length, "cut at {length}: {error}");
    }
    let error = open_bytes(&bytes[..6]).map(drop).unwrap_err();
    let message = "the file ends too early: 4 bytes are wanted and 2 remain; \
                   is the download complete?";
    assert_eq!(parts(error), said(4, "version", message));
    let error = open_bytes(&bytes[..bytes.len() - 1]).map(drop).unwrap_err();
    assert_eq!(
        (error.offset, error.field.as_str()),
        (small().info_at("second"), { "tensor second: offset" })
    );
    assert!(error.message.contains("is the download complete?"), "{error}");
}

#[test]
fn counts_that_the_file_cannot_hold_are_refused() {
    let room = small().bytes().len() as u64 - 24;
    let mut gguf = small();
    gguf.metadata_count = Some(u64::MAX);
    let message = format!(
        "{}, but the {room} bytes that remain hold at most {}; is the download complete?",
        u64::MAX,
        room / 14
    );
    assert_eq!(refused(&gguf), said(METADATA_COUNT_AT, "metadata_kv_count", &message));
    let mut gguf = small();
    gguf.tensor_count = Some(1 << 60);
    let (offset, field, message) = refused(&gguf);
    assert_eq!((offset, field.as_str()), (TENSOR_COUNT_AT, "tensor_count"));
    assert!(message.starts_with("1152921504606846976, but "), "{message}");
}

#[test]
fn counts_beyond_the_limits_are_refused_even_if_the_file_could_hold_them() {
    for (field, offset, limit) in [
        ("metadata_kv_count", METADATA_COUNT_AT, 1 << 14),
        ("tensor_count", TENSOR_COUNT_AT, 1 << 17),
    ] {
        let mut gguf = Gguf::default();
        let count = Some(limit + 1);
        match field {
            "tensor_count" => gguf.tensor_count = count,
            _ => gguf.metadata_count = count,
        }
        let mut bytes = gguf.bytes();
        bytes.resize(64 * limit as usize, 0);
        let message = format!("{}; allowed: at most {limit}", limit + 1);
        let error = open_bytes(&bytes).map(drop).unwrap_err();
        assert_eq!(parts(error), said(offset, field, &message));
    }
}

#[test]
fn keys_are_bounded_and_utf8() {
    for (key, message) in [
        (&b""[..], "0 bytes long; allowed: 1 to 65535"),
        (&[b'k'; 65_536], "65536 bytes long; allowed: 1 to 65535"),
        (b"\xff\xfe", "is no UTF-8"),
    ] {
        let mut bytes = b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0".to_vec();
        bytes.extend_from_slice(&(key.len() as u64).to_le_bytes());
        bytes.extend_from_slice(key);
        bytes.extend_from_slice(&[0; 64]);
        let error = open_bytes(&bytes).map(drop).unwrap_err();
        assert_eq!(parts(error), said(24, "metadata[0].key", message));
    }
}

/// A key `k` whose value is wrong, in front of the small file's keys; the offset is relative to the
/// value.
fn refused_value(type_id: u32, value: Vec<u8>) -> (i64, String) {
    let mut gguf = small();
    let mut entries = std::mem::take(&mut gguf.entries);
    gguf.raw("k", type_id, value);
    gguf.entries.append(&mut entries);
    let (offset, field, message) = refused(&gguf);
    assert_eq!(field, "k");
    (offset as i64 - gguf.value_at("k") as i64, message)
}

#[test]
fn values_of_unknown_types_and_nested_arrays_are_refused() {
    let nested = array_bytes(id::ARRAY, 1, &array_bytes(id::U8, 1, &[1]));
    assert_eq!(refused_value(id::ARRAY, nested), (0, "an array of arrays".into()));
    assert_eq!(refused_value(13, vec![0; 8]), (-4, "value type 13; known: 0 to 12".into()));
    let unknown = array_bytes(u32::MAX, 1, &[0; 8]);
    let message = "value type 4294967295; known: 0 to 12".into();
    assert_eq!(refused_value(id::ARRAY, unknown), (0, message));
    assert_eq!(refused_value(id::BOOL, vec![2]), (0, "a bool is neither 0 nor 1".into()));
}

#[test]
fn lengths_that_the_file_cannot_hold_are_refused() {
    let (offset, message) = refused_value(id::TEXT, u64::MAX.to_le_bytes().to_vec());
    assert_eq!(offset, 0);
    assert!(message.starts_with("a length of 18446744073709551615 bytes, but only "), "{message}");
    // A count whose product with the element's size overflows.
    for (element, count) in [(id::U64, 1 << 61), (id::F32, u64::MAX), (id::TEXT, 1 << 61)] {
        let (offset, message) = refused_value(id::ARRAY, array_bytes(element, count, &[]));
        assert_eq!(offset, 4);
        assert!(message.starts_with(&format!("{count}, but the ")), "{message}");
    }
    let elements = [text_bytes("fine"), (1_u64 << 40).to_le_bytes().to_vec()].concat();
    let (offset, message) = refused_value(id::ARRAY, array_bytes(id::TEXT, 2, &elements));
    assert_eq!(offset, 4 + 8 + 12);
    assert!(message.starts_with("a length of 1099511627776 bytes"), "{message}");
}

#[test]
fn alignments_other_than_sane_powers_of_two_are_refused() {
    let key = "general.alignment";
    for alignment in [0, 1, 4, 12, 33, 1 << 22, 1 << 31, u32::MAX] {
        let mut gguf = small();
        gguf.u32(key, alignment);
        let message = format!("{alignment}; allowed: a power of two from 8 to 2097152");
        assert_eq!(refused(&gguf), said(gguf.value_at(key), key, &message));
    }
    let mut gguf = small();
    gguf.text(key, "32");
    let message = "a text, wanted: an integer from 0 to 4294967295";
    assert_eq!(refused(&gguf), said(gguf.value_at(key) + 8, key, message));
}

#[test]
fn a_key_that_stands_twice_is_refused() {
    let mut gguf = small();
    gguf.entries.push(gguf.entries[1].clone());
    let keys_at = |index: usize| gguf.header().1[index] as u64 - 4 - "a.count".len() as u64;
    let message = format!("the key stands twice, first at byte {}", keys_at(1));
    assert_eq!(refused(&gguf), said(keys_at(3), "a.count", &message));
}

#[test]
fn a_tensor_that_stands_twice_is_refused() {
    let mut gguf = small();
    gguf.tensor("first", &[1], 0, vec![0; 4]);
    let infos = gguf.header().2;
    let message = format!("the name stands twice, first at byte {}", infos[0]);
    assert_eq!(refused(&gguf), said(infos[2] as u64, "tensor first", &message));
}

#[test]
fn tensor_names_are_bounded_and_utf8() {
    let mut gguf = small();
    gguf.tensors[1].name = "n".repeat(256);
    let at = gguf.header().2[1] as u64;
    let message = "256 bytes long; allowed: 1 to 255";
    assert_eq!(refused(&gguf), said(at, "tensors[1].name", message));
    gguf.tensors[1].name = String::new();
    let message = "0 bytes long; allowed: 1 to 255";
    assert_eq!(refused(&gguf), said(at, "tensors[1].name", message));
}

/// Where the number of dimensions of "second" stands.
fn dims_at(gguf: &Gguf) -> u64 {
    gguf.info_at("second") + 8 + "second".len() as u64
}

#[test]
fn dimensions_that_are_absent_zero_too_many_or_overflow_are_refused() {
    let field = "tensor second: dimensions";
    for (dims, type_id, message) in [
        (vec![], 0, "0 of them; allowed: 1 to 4".to_owned()),
        (vec![1; 5], 0, "5 of them; allowed: 1 to 4".to_owned()),
        (vec![4, 0], 0, "[4, 0]: each has to be at least 1 and the product below 2^64".to_owned()),
        (
            vec![1 << 32, 1 << 32],
            0,
            "[4294967296, 4294967296]: each has to be at least 1 and the product below 2^64"
                .to_owned(),
        ),
        (vec![1 << 62], 0, "[4611686018427387904] of F32 is too large".to_owned()),
        (vec![33], 2, "rows of 33 elements are no whole number of Q4_0 blocks of 32".to_owned()),
        (vec![32], 12, "rows of 32 elements are no whole number of Q4_K blocks of 256".to_owned()),
    ] {
        let mut gguf = small();
        gguf.tensor_mut("second").dims = dims;
        gguf.tensor_mut("second").type_id = type_id;
        assert_eq!(refused(&gguf), said(dims_at(&gguf), field, &message));
    }
}

#[test]
fn offsets_past_the_end_unaligned_or_overflowing_are_refused() {
    let field = "tensor second: offset";
    let mut gguf = small();
    let offset_at = dims_at(&gguf) + 4 + 8 + 4;
    gguf.tensor_mut("second").offset = Some(33);
    let message = "33 is no multiple of the alignment, 32";
    assert_eq!(refused(&gguf), said(offset_at, field, message));
    for offset in [32 * 1000, 1 << 40, u64::MAX - 31] {
        gguf.tensor_mut("second").offset = Some(offset);
        let (at, got_field, message) = refused(&gguf);
        assert_eq!((at, got_field.as_str()), (gguf.info_at("second"), field));
        assert!(message.starts_with(&format!("12 bytes at {offset} after byte ")), "{message}");
    }
    // A tensor that is larger than the file.
    gguf.tensor_mut("second").offset = Some(32);
    gguf.tensor_mut("second").dims = vec![1 << 50];
    let (at, _, message) = refused(&gguf);
    assert_eq!(at, gguf.info_at("second"));
    assert!(message.starts_with("4503599627370496 bytes at 32 after byte "), "{message}");
}

#[test]
fn data_that_overlaps_is_refused() {
    let mut gguf = small();
    gguf.tensor_mut("second").offset = Some(0);
    let message = "its data overlaps that of second";
    let (at, field, said) = refused(&gguf);
    assert_eq!((at, field.as_str()), (gguf.info_at("first"), "tensor first: offset"));
    assert_eq!(said, message);
    // The larger of the two starts first.
    let mut gguf = small();
    gguf.tensors[0].dims = vec![11];
    let (at, field, said) = refused(&gguf);
    assert_eq!((at, field.as_str()), (gguf.info_at("second"), "tensor second: offset"));
    assert_eq!(said, "its data overlaps that of first");
}

#[test]
fn counts_off_by_one_are_refused() {
    for (tensors, entries) in [(3, 3), (2, 4), (2, 2), (100, 3)] {
        let mut gguf = small();
        gguf.tensor_count = Some(tensors);
        gguf.metadata_count = Some(entries);
        assert!(open(&gguf).is_err(), "{tensors} tensors, {entries} keys");
    }
}
