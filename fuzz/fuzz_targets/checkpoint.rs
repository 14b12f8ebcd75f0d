//! Any bytes are either a model file or a `FormatError` that points into them: never a panic, never
//! much memory (libFuzzer's `-rss_limit_mb` and `-malloc_limit_mb` hold that).

#![no_main]

use libfuzzer_sys::fuzz_target;
use std::path::Path;
use tandem::formats::{ArrayView, Checkpoint, FormatError, Value};
use tandem::model::ModelSpec;

fn walk(array: &ArrayView<'_>) -> Result<(), FormatError> {
    let mut walked = array.integers().map_or(0, Iterator::count);
    walked += array.floats().map_or(0, Iterator::count);
    walked += array.bools().map_or(0, Iterator::count);
    assert!(walked <= array.len());
    array.texts()?.try_for_each(|text| text.map(drop))
}

fn read(bytes: &[u8]) -> Result<(), FormatError> {
    let checkpoint = Checkpoint::from_bytes(Path::new("fuzz.gguf"), bytes)?;
    for (_, value) in checkpoint.metadata().iter() {
        if let Value::Array(array) = value {
            walk(&array).ok();
        }
    }
    for info in checkpoint.tensors() {
        if let Ok(view) = checkpoint.tensor(info.name) {
            assert_eq!(view.bytes.len(), view.row_bytes() * view.shape.rows());
        }
    }
    let spec = ModelSpec::from_checkpoint(&checkpoint)?;
    assert!(spec.weight_bytes() <= bytes.len() as u64);
    Ok(())
}

fuzz_target!(|bytes: &[u8]| {
    if let Err(error) = read(bytes) {
        assert!(error.offset <= bytes.len() as u64, "{error}");
    }
});
