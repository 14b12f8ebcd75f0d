//! Real model files and vocabularies below `.cache/models`, which `scripts/fetch-model` brings.

#![allow(dead_code, clippy::print_stdout, reason = "tests say what they skip; each uses its part")]

use std::path::{Path, PathBuf};

/// A file below the models' folder, or `None` where it was not fetched. With
/// `TANDEM_REQUIRE_MODELS=1` the two that CI fetches must be there.
pub fn real(name: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(".cache/models").join(name);
    if path.exists() {
        return Some(path);
    }
    let required = std::env::var("TANDEM_REQUIRE_MODELS").is_ok_and(|value| value == "1");
    let fetched = name.starts_with("SmolLM2") || name.starts_with("vocabs");
    assert!(!(required && fetched), "{} is missing", path.display());
    println!("skipped: {} is not here", path.display());
    None
}
