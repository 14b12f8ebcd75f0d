//! Where the fetched models lie, and what to do when they don't.

use std::path::{Path, PathBuf};
use tandem::formats::Checkpoint;
use tandem::tokenizer::Tokenizer;

/// A file of the model cache; says so when it is absent, and fails where models are required.
pub fn model(name: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(".cache/models").join(name);
    if path.exists() {
        return Some(path);
    }
    let required = std::env::var_os("TANDEM_REQUIRE_MODELS").is_some();
    let fetched = name.starts_with("vocabs/") || name.starts_with("SmolLM2");
    assert!(!(required && fetched), "{name} is required; fetch it with scripts/fetch-model");
    println!("skipped: {name} is not fetched");
    None
}

pub fn tokenizer_of(name: &str) -> Option<Tokenizer> {
    let checkpoint = Checkpoint::open(&model(name)?).unwrap();
    Some(Tokenizer::from_metadata(checkpoint.metadata()).unwrap_or_else(|e| panic!("{name}: {e}")))
}
