//! What is read from sound files.

use super::real_files::real;
use super::tiny_model::gguf_writer::{Gguf, array_bytes, id};
use super::{open, small};
use tandem::formats::{Checkpoint, StoredType, Value, ValueType};
use tandem::tensor::DType;

#[test]
fn tensors_are_found_by_name_with_shape_type_and_bytes() {
    let checkpoint = open(&small()).unwrap();
    let first = checkpoint.tensor("first").unwrap();
    assert_eq!((first.dtype, first.shape.cols(), first.shape.rows()), (DType::F32, 4, 2));
    assert_eq!((first.bytes.len(), first.row_bytes()), (32, 16));
    assert_eq!(first.rows(1..2)[..4], 4.0_f32.to_le_bytes());
    assert_eq!(first.bytes.as_ptr() as usize % 8, 0);
    let names: Vec<&str> = checkpoint.tensors().map(|info| info.name).collect();
    assert_eq!(names, ["first", "second"]);
    let info = checkpoint.tensor_info("second").unwrap();
    assert_eq!(info.bytes, Some(12));
    assert_eq!(info.info_offset, small().info_at("second"));
    assert!(checkpoint.tensor_info("third").is_none());
}

#[test]
fn version_2_reads_like_version_3() {
    let mut gguf = small();
    gguf.version = 2;
    assert_eq!(open(&gguf).unwrap().tensor("first").unwrap().bytes.len(), 32);
}

#[test]
fn every_value_type_is_read() {
    let mut gguf = Gguf::default();
    for (type_id, bytes) in [
        (0, vec![200]),
        (1, vec![0x80]),
        (2, vec![0x34, 0x12]),
        (3, vec![0xff, 0xff]),
        (4, vec![0xff; 4]),
        (5, vec![0xfe, 0xff, 0xff, 0xff]),
        (10, vec![0xff; 8]),
        (11, vec![0xff; 8]),
    ] {
        gguf.raw(&format!("i{type_id}"), type_id, bytes);
    }
    gguf.f32("f", 1.5).raw("d", id::F64, 2.5_f64.to_le_bytes().to_vec()).bool("b", true);
    let checkpoint = open(&gguf).unwrap();
    let metadata = checkpoint.metadata();
    let integers: Vec<i128> = metadata
        .iter()
        .filter_map(|(_, value)| match value {
            Value::Integer(integer) => Some(integer),
            _ => None,
        })
        .collect();
    let wanted = [200, -128, 0x1234, -1, 0xffff_ffff, -2, u64::MAX.into(), -1];
    assert_eq!(integers, wanted);
    assert_eq!((metadata.f32("f").unwrap(), metadata.f32("d").unwrap()), (1.5, 2.5));
    assert!(metadata.bool("b").unwrap());
    assert_eq!(metadata.u32("i2").unwrap(), 0x1234);
    assert_eq!((metadata.len(), metadata.contains("f"), metadata.contains("g")), (11, true, false));
}

#[test]
fn arrays_are_read_in_order() {
    let mut gguf = small();
    gguf.i32s("a.ints", &[1, -2, 3]).f32s("a.floats", &[0.5, -0.5]);
    gguf.raw("a.bools", id::ARRAY, array_bytes(id::BOOL, 2, &[1, 0]));
    gguf.texts::<&str>("a.none", &[]);
    let checkpoint = open(&gguf).unwrap();
    let metadata = checkpoint.metadata();
    let array = |key: &str| metadata.array(key).unwrap();
    assert_eq!(array("a.ints").integers().unwrap().collect::<Vec<_>>(), [1, -2, 3]);
    assert_eq!(array("a.floats").floats().unwrap().collect::<Vec<_>>(), [0.5, -0.5]);
    assert_eq!(array("a.bools").bools().unwrap().collect::<Vec<_>>(), [true, false]);
    let texts: Vec<&str> = metadata.texts("a.texts").unwrap().map(Result::unwrap).collect();
    assert_eq!(texts, ["x", "", "yz"]);
    assert!(array("a.none").is_empty());
    assert_eq!(array("a.ints").element_type(), ValueType::I32);
}

#[test]
fn a_value_of_another_type_is_refused_when_it_is_asked_for() {
    let checkpoint = open(&small()).unwrap();
    let metadata = checkpoint.metadata();
    let error = metadata.str("a.count").unwrap_err();
    assert_eq!(error.message, "the integer 7, wanted: a text in UTF-8");
    assert_eq!((error.field.as_str(), error.offset), ("a.count", small().value_at("a.count")));
    let error = metadata.array("a.texts").unwrap().integers().err().unwrap();
    assert_eq!(error.message, "an array of text, wanted: integers");
    assert_eq!(metadata.u32("a.gone").unwrap_err().message, "the key is missing");
    assert_eq!(metadata.u32_opt("a.gone").unwrap(), None);
}

#[test]
fn texts_that_are_no_utf8_are_refused_when_they_are_asked_for() {
    let mut gguf = small();
    gguf.raw("bad", id::TEXT, [&2_u64.to_le_bytes()[..], b"\xff\xfe"].concat());
    let elements = [&1_u64.to_le_bytes()[..], b"a", &1_u64.to_le_bytes()[..], b"\xff"].concat();
    gguf.raw("bads", id::ARRAY, array_bytes(id::TEXT, 2, &elements));
    let checkpoint = open(&gguf).unwrap();
    let metadata = checkpoint.metadata();
    assert!(matches!(metadata.get("bad"), Some(Value::Bytes(b"\xff\xfe"))));
    let error = metadata.str("bad").unwrap_err();
    assert_eq!(error.message, "a text that is no UTF-8, wanted: a text in UTF-8");
    let mut texts = metadata.texts("bads").unwrap();
    assert_eq!(texts.next().unwrap().unwrap(), "a");
    let error = texts.next().unwrap().unwrap_err();
    assert_eq!((error.field.as_str(), error.message.as_str()), ("bads[1]", "is no UTF-8"));
    assert_eq!(error.offset, gguf.value_at("bads") + 12 + 9);
    assert!(texts.next().is_none());
}

#[test]
fn alignment_is_the_files_own() {
    for alignment in [8, 64, 4096] {
        let mut gguf = small();
        gguf.alignment = alignment;
        gguf.u32("general.alignment", alignment as u32);
        let checkpoint = open(&gguf).unwrap();
        let second = checkpoint.tensor("second").unwrap();
        assert_eq!(second.bytes[4..8], 1.0_f32.to_le_bytes());
        assert_eq!(checkpoint.tensor_info("second").unwrap().data_offset % alignment as u64, 0);
    }
}

#[test]
fn types_without_kernels_are_listed_with_their_size_and_refused_when_used() {
    let mut gguf = small();
    gguf.tensor("iq2", &[256, 2], 16, vec![0; 132]).tensor("new", &[64], 77, vec![0; 9]);
    let checkpoint = open(&gguf).unwrap();
    let known = checkpoint.tensor_info("iq2").unwrap();
    assert_eq!((known.stored, known.bytes), (StoredType::Other(16), Some(132)));
    assert_eq!(checkpoint.tensor_info("new").unwrap().bytes, None);
    for (name, what) in [("iq2", "IQ2_XXS"), ("new", "type 77")] {
        let error = checkpoint.tensor(name).unwrap_err();
        assert!(error.message.starts_with(&format!("its elements are {what}, ")), "{error}");
        assert_eq!(error.offset, gguf.info_at(name));
    }
}

#[test]
fn a_file_without_tensors_is_sound() {
    let mut gguf = small();
    gguf.tensors.clear();
    assert_eq!(open(&gguf).unwrap().tensors().len(), 0);
}

/// Counts that ggml's own Python reader gives for this file.
#[test]
fn smollm2_opens_with_all_its_keys_and_tensors() {
    let Some(path) = real("SmolLM2-135M-Instruct.Q4_1.gguf") else { return };
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!((checkpoint.tensors().len(), checkpoint.metadata().len()), (272, 33));
    let mut tokens = checkpoint.metadata().texts("tokenizer.ggml.tokens").unwrap();
    assert_eq!(tokens.next().unwrap().unwrap(), "<|endoftext|>");
    assert_eq!(tokens.map(Result::unwrap).count(), 49_151);
    let embedding = checkpoint.tensor("token_embd.weight").unwrap();
    assert_eq!(embedding.shape.to_string(), "[576, 49152]");
    assert_eq!((embedding.dtype, embedding.bytes.len()), (DType::Q8_0, 49_152 * 612));
    let end = checkpoint.tensors().map(|t| t.data_offset + t.bytes.unwrap() as u64).max();
    let file_bytes = path.metadata().unwrap().len();
    assert!(end.is_some_and(|end| end <= file_bytes && file_bytes - end < 32));
    checkpoint.check_unchanged().unwrap();
}

#[test]
fn every_vocabulary_opens_and_all_its_tokens_are_text() {
    let Some(folder) = real("vocabs") else { return };
    let mut vocabularies = 0;
    for entry in folder.read_dir().unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "gguf") {
            continue;
        }
        let checkpoint = Checkpoint::open(&path).unwrap_or_else(|error| panic!("{error}"));
        let mut tokens = checkpoint.metadata().texts("tokenizer.ggml.tokens").unwrap();
        assert!(tokens.all(|token| token.is_ok()), "{}", path.display());
        vocabularies += 1;
    }
    assert!(vocabularies >= 15, "{vocabularies}");
}
