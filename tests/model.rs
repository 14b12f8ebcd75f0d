//! Models as data: real files, tiny models of every family, and everything that is refused.

use std::path::{Path, PathBuf};
use tandem::formats::Checkpoint;
use tandem::model::ModelSpec;

/// A real model file, or `None` where it was not fetched.
fn real(name: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(".cache/models").join(name);
    if path.exists() {
        return Some(path);
    }
    let required = std::env::var("TANDEM_REQUIRE_MODELS").is_ok_and(|value| value == "1");
    assert!(!(required && name.starts_with("SmolLM2")), "{} is missing", path.display());
    println!("skipped: {} is not here", path.display());
    None
}

#[test]
fn dump() {
    for n in [
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "gemma-3-270m-q4_k_m.gguf",
        "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        "tinyllama-1.1b-chat-iq2_xxs.gguf",
    ] {
        let p = real(n).unwrap();
        let t = std::time::Instant::now();
        let c = Checkpoint::open(&p);
        let e = t.elapsed();
        let c = c.unwrap();
        let s = ModelSpec::from_checkpoint(&c);
        println!("{n} {e:?} {:?}", t.elapsed());
        match s {
            Ok(s) => println!(
                "{:?} kv {} w {} p {}",
                s.layers[5],
                s.kv_bytes_per_token(),
                s.weight_bytes(),
                s.parameters()
            ),
            Err(e) => println!("{e}"),
        }
    }
}
