//! Seeded mutations of a folder's files: each is read or refused, never a panic, never slow.

use super::hf_folder::{Folder, Format, put};
use super::tiny_model::{Family, TinyModel, split_mix};
use std::time::{Duration, Instant};
use tandem::formats::{Checkpoint, FormatError};
use tandem::model::ModelSpec;
use tandem::tensor::DType;
use tandem::tokenizer::Tokenizer;

/// Of each file of each folder.
const MUTATIONS: u64 = 600;

/// Tokens of JSON that break careless code.
const PIECES: [&str; 14] = [
    "-1",
    "0",
    "1e999",
    "18446744073709551615",
    "null",
    "true",
    "[]",
    "{}",
    "\"\"",
    "\"\\u0000\"",
    ",",
    "[[[[",
    "3.5",
    "\"F8_E4M3\"",
];

fn below(seed: &mut u64, bound: usize) -> usize {
    (split_mix(seed) % bound.max(1) as u64) as usize
}

fn mutate(bytes: &mut Vec<u8>, seed: &mut u64, reach: usize) {
    let reach = reach.min(bytes.len());
    let (at, other) = (below(seed, reach), below(seed, reach));
    let span = (1 + below(seed, 40)).min(bytes.len() - at.max(other));
    match below(seed, 6) {
        0 => bytes[at] ^= 1 << below(seed, 8),
        1 => bytes.truncate(at.max(1)),
        2 => bytes.copy_within(other..other + span, at),
        3 => drop(bytes.drain(at..at + span)),
        4 => {
            // Replaces a number, a text, whatever starts after a colon.
            let after =
                bytes[at..].iter().position(|byte| *byte == b':').map_or(at, |n| at + n + 1);
            let end = bytes[after..].iter().position(|byte| b",}]".contains(byte));
            let piece = PIECES[below(seed, PIECES.len())].bytes();
            bytes.splice(after..end.map_or(after, |n| after + n), piece);
        }
        _ => {
            let inserted = bytes[other..other + span].to_vec();
            bytes.splice(at..at, inserted);
        }
    }
}

/// Opens, checks and reads everything.
fn use_all(path: &std::path::Path) -> Result<(), FormatError> {
    let checkpoint = Checkpoint::open(path)?;
    if let Ok(tokenizer) = Tokenizer::from_metadata(checkpoint.metadata()) {
        std::hint::black_box(tokenizer.vocab_size());
    }
    let names: Vec<String> = checkpoint.tensors().map(|info| info.name.to_owned()).collect();
    for name in names {
        let info = checkpoint.tensor_info(&name).unwrap();
        if checkpoint.dtype(&name).is_ok() {
            let row = info.shape.rows() - 1;
            let mut bytes = vec![0; info.bytes.unwrap() / info.shape.rows()];
            checkpoint.read_rows(&name, row..row + 1, &mut bytes).ok();
        }
    }
    ModelSpec::from_checkpoint(&checkpoint).map(drop)
}

fn folder(family: Family, dtype: DType, format: Format) -> Folder {
    let mut model = TinyModel::new(family).dtype(dtype).layers(1);
    model.embedding_dtype = DType::F32;
    (model.embedding_dim, model.n_ff, model.n_heads) = (128, 128, 2);
    (model.n_kv_heads, model.head_dim) = (1, 64);
    Folder::new(&model, &model.gguf(), format)
}

#[test]
fn mutations_of_every_file_are_read_or_refused() {
    let (mut refused, mut tried) = (0, 0);
    for (family, dtype, format) in [
        (Family::Llama, DType::F16, Format::Floats),
        (Family::Qwen3Moe, DType::INT4_128, Format::Awq),
        (Family::Qwen2, DType::INT4_32, Format::Gptq),
        (Family::Gemma3, DType::E4M3_32, Format::Fp8),
    ] {
        let written = folder(family, dtype, format).write();
        use_all(written.path()).unwrap();
        for name in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
        {
            let valid = std::fs::read(written.path().join(name)).unwrap();
            // Of tensors' data a change breaks nothing.
            let reach = if name.ends_with("json") { valid.len() } else { 6000 };
            for start in 0..MUTATIONS {
                let (mut seed, mut bytes) = (start, valid.clone());
                for _ in 0..=below(&mut seed, 3) {
                    mutate(&mut bytes, &mut seed, reach);
                }
                put(written.path(), name, &bytes);
                let begun = Instant::now();
                let outcome = std::panic::catch_unwind(|| use_all(written.path()));
                let Ok(result) = outcome else {
                    panic!("{family:?} {name}, seed {start} panicked")
                };
                let took = begun.elapsed();
                assert!(took < Duration::from_secs(2), "{name}, seed {start}: {took:?}");
                tried += 1;
                refused += usize::from(result.is_err());
            }
            put(written.path(), name, &valid);
        }
    }
    println!("{refused} of {tried} refused");
    assert!(refused > tried / 3, "{refused} of {tried}");
}
