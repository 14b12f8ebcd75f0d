//! The published cases: `X.gguf.inp` holds texts separated by a line, `X.gguf.out` one line of ids
//! per text, without special tokens.

use crate::files::{model, tokenizer_of};
use tandem::request::{AddSpecial, ParseSpecial};
use tandem::tokenizer::Tokenizer;

const SEPARATOR: &str = "\n__ggml_vocab_test__\n";

fn cases(name: &str) -> Vec<(String, Vec<u32>)> {
    let read = |suffix: &str| {
        let path = model(&format!("vocabs/ggml-vocab-{name}.gguf{suffix}"));
        std::fs::read_to_string(path.expect("the cases lie beside the vocabulary")).unwrap()
    };
    let (texts, ids) = (read(".inp"), read(".out"));
    // Some files end with a separator, some with the last text.
    let texts = texts.strip_suffix(SEPARATOR).unwrap_or(&texts);
    let texts: Vec<&str> = texts.split(SEPARATOR).collect();
    let ids: Vec<Vec<u32>> = ids
        .lines()
        .map(|line| line.split_whitespace().map(|id| id.parse().unwrap()).collect())
        .collect();
    assert_eq!(texts.len(), ids.len(), "{name}: as many texts as answers");
    texts.into_iter().map(str::to_owned).zip(ids).collect()
}

fn encode(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    let ids = tokenizer.encode(text, AddSpecial::No, ParseSpecial::No).unwrap();
    ids.into_iter().map(|id| id.0).collect()
}

fn passes_its_cases(name: &str) {
    let Some(tokenizer) = tokenizer_of(&format!("vocabs/ggml-vocab-{name}.gguf")) else { return };
    let cases = cases(name);
    for (text, ids) in &cases {
        assert_eq!(encode(&tokenizer, text), *ids, "{name}: {text:?}");
    }
    println!("{name}: {} cases", cases.len());
}

macro_rules! vocabularies {
    ($($test:ident: $name:literal,)*) => {
        $(
            #[test]
            fn $test() {
                passes_its_cases($name);
            }
        )*
    };
}

vocabularies! {
    command_r_passes_its_cases: "command-r",
    deepseek_coder_passes_its_cases: "deepseek-coder",
    deepseek_llm_passes_its_cases: "deepseek-llm",
    falcon_passes_its_cases: "falcon",
    gemma_4_passes_its_cases: "gemma-4",
    gpt_2_passes_its_cases: "gpt-2",
    llama_bpe_passes_its_cases: "llama-bpe",
    llama_spm_passes_its_cases: "llama-spm",
    mpt_passes_its_cases: "mpt",
    phi_3_passes_its_cases: "phi-3",
    qwen2_passes_its_cases: "qwen2",
    qwen35_passes_its_cases: "qwen35",
    refact_passes_its_cases: "refact",
    starcoder_passes_its_cases: "starcoder",
}
