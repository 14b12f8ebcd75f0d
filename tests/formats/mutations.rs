//! Ten thousand seeded mutations of a valid model: each is read or refused, never a panic, never
//! slow, never more memory than a small multiple of the file.

use super::counting_allocator::measure;
use super::open_bytes;
use super::tiny_model::gguf_writer::Gguf;
use super::tiny_model::{Family, TinyModel, split_mix};
use std::time::{Duration, Instant};
use tandem::formats::{ArrayView, FormatError, Value};
use tandem::model::ModelSpec;
use tandem::tensor::DType;

const MUTATIONS: u64 = 10_000;

/// Heap bytes per byte of the file: the copy that `from_bytes` makes, and an index of keys (14
/// bytes become 60) or tensors (33 bytes become 160).
const GROWTH_MAX: usize = 12;

/// Numbers that break careless arithmetic.
const EXTREMES: [u64; 10] = [
    0,
    1,
    0x7f,
    0xffff,
    1 << 31,
    u32::MAX as u64,
    1 << 61,
    i64::MAX as u64,
    u64::MAX - 31,
    u64::MAX,
];

struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        (split_mix(&mut self.0) % bound.max(1) as u64) as usize
    }
}

/// A complete llama of a few kilobytes.
fn model() -> Gguf {
    let mut model = TinyModel::new(Family::Llama).dtype(DType::F32).layers(1);
    (model.embedding_dim, model.n_ff, model.n_heads) = (8, 16, 2);
    (model.n_kv_heads, model.head_dim) = (1, 4);
    model.gguf()
}

/// Half of all places are near a count, a value or a tensor info: elsewhere a change breaks little.
fn place(random: &mut Random, landmarks: &[usize], length: usize) -> usize {
    let near = landmarks[random.below(landmarks.len())] + random.below(24);
    let anywhere = random.below(length);
    if random.below(2) == 0 { near.min(length.saturating_sub(1)) } else { anywhere }
}

fn mutate(bytes: &mut Vec<u8>, landmarks: &[usize], random: &mut Random) {
    let at = place(random, landmarks, bytes.len());
    let other = place(random, landmarks, bytes.len());
    let span = (1 + random.below(64)).min(bytes.len() - at.max(other));
    match random.below(7) {
        0 => bytes[at] ^= 1 << random.below(8),
        1 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][random.below(5)],
        2 => bytes.truncate(at.max(1)),
        3 => {
            let extreme = EXTREMES[random.below(EXTREMES.len())].to_le_bytes();
            let width = [4, 8][random.below(2)].min(bytes.len() - at);
            bytes[at..at + width].copy_from_slice(&extreme[..width]);
        }
        4 => bytes.copy_within(other..other + span, at),
        5 => drop(bytes.drain(at..at + span)),
        _ => {
            let inserted = bytes[other..other + span].to_vec();
            bytes.splice(at..at, inserted);
        }
    }
}

fn walk(array: &ArrayView<'_>) -> Result<usize, FormatError> {
    let mut walked = array.integers().map_or(0, Iterator::count);
    walked += array.floats().map_or(0, Iterator::count);
    walked += array.bools().map_or(0, Iterator::count);
    for text in array.texts()? {
        walked += text?.len();
    }
    Ok(walked)
}

/// Reads everything that the file offers.
fn use_all(bytes: &[u8]) -> Result<(), FormatError> {
    let checkpoint = open_bytes(bytes)?;
    for (_, value) in checkpoint.metadata().iter() {
        if let Value::Array(array) = value {
            walk(&array).ok();
        }
    }
    for info in checkpoint.tensors() {
        if let Ok(view) = checkpoint.tensor(info.name) {
            std::hint::black_box(view.rows(view.shape.rows() - 1..view.shape.rows()));
        }
    }
    ModelSpec::from_checkpoint(&checkpoint).map(drop)
}

#[test]
fn ten_thousand_mutations_are_read_or_refused() {
    let gguf = model();
    let valid = gguf.bytes();
    use_all(&valid).unwrap();
    let (_, values, infos) = gguf.header();
    let landmarks: Vec<usize> = [0, 8, 16].into_iter().chain(values).chain(infos).collect();
    let mut refused = 0;
    for seed in 0..MUTATIONS {
        let mut random = Random(seed);
        let mut bytes = valid.clone();
        for _ in 0..=random.below(3) {
            mutate(&mut bytes, &landmarks, &mut random);
        }
        let start = Instant::now();
        let outcome = std::panic::catch_unwind(|| measure(|| use_all(&bytes)));
        let Ok((result, usage)) = outcome else { panic!("seed {seed} panicked") };
        let took = start.elapsed();
        assert!(took < Duration::from_secs(1), "seed {seed}: {took:?}");
        let bound = bytes.len() * GROWTH_MAX + 4096;
        assert!(usage.peak_bytes < bound, "seed {seed}: {usage:?} of {} bytes", bytes.len());
        if let Err(error) = result {
            refused += 1;
            assert!(error.offset <= bytes.len() as u64, "seed {seed}: {error}");
            assert!(!error.field.is_empty() && !error.message.is_empty(), "seed {seed}: {error}");
        }
    }
    // The others changed a weight, a token or a name: nothing that a reader could notice.
    assert!(refused > MUTATIONS / 3, "{refused}");
}

/// The densest hostile files: as many minimal keys or tensors as fit.
#[test]
fn indexes_grow_no_faster_than_the_file() {
    let mut keys = Gguf::default();
    for index in 0..5000 {
        let name = char::from_u32(0x100 + index).map(String::from).unwrap_or_default();
        keys.entries.push(super::tiny_model::gguf_writer::Entry {
            key: name,
            type_id: 0,
            value: vec![0],
        });
    }
    let mut tensors = Gguf::default();
    for index in 0..5000 {
        let name = char::from_u32(0x100 + index).map(String::from).unwrap_or_default();
        tensors.tensor(&name, &[1], 99, Vec::new());
    }
    for gguf in [keys, tensors] {
        let bytes = gguf.bytes();
        let (result, usage) = measure(|| open_bytes(&bytes));
        result.unwrap();
        assert!(usage.peak_bytes < bytes.len() * GROWTH_MAX, "{usage:?} of {}", bytes.len());
    }
}
