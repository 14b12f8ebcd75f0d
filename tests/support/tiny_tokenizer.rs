//! A byte-level BPE vocabulary of 320 tokens: 256 bytes, merges of common English, three special
//! tokens, and fillers.

use super::gguf_writer::Gguf;

pub const VOCAB_SIZE: usize = 320;
/// `<|endoftext|>`, `<|im_start|>` and `<|im_end|>` follow the bytes.
pub const END_OF_TEXT: u32 = 256;
pub const TURN_START: u32 = 257;
pub const TURN_END: u32 = 258;

const SPECIALS: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

/// In order of priority; "Ġ" is a space in GPT-2's byte alphabet.
const MERGES: [(&str, &str); 28] = [
    ("Ġ", "t"),
    ("Ġ", "a"),
    ("h", "e"),
    ("i", "n"),
    ("r", "e"),
    ("o", "n"),
    ("Ġt", "he"),
    ("e", "r"),
    ("Ġ", "s"),
    ("a", "t"),
    ("Ġ", "w"),
    ("Ġ", "o"),
    ("e", "n"),
    ("Ġ", "c"),
    ("i", "t"),
    ("i", "s"),
    ("a", "n"),
    ("o", "r"),
    ("e", "s"),
    ("Ġ", "b"),
    ("e", "d"),
    ("Ġ", "f"),
    ("in", "g"),
    ("Ġ", "p"),
    ("o", "u"),
    ("Ġa", "n"),
    ("a", "l"),
    ("Ġan", "d"),
];

const CHAT_TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + \
    '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// GPT-2's alphabet: printable bytes stand for themselves, the others for U+0100 and up.
fn byte_alphabet() -> Vec<String> {
    let printable = |byte: u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut next = 0x100_u32;
    (0..=255_u8)
        .map(|byte| {
            let code = if printable(byte) {
                u32::from(byte)
            } else {
                next += 1;
                next - 1
            };
            char::from_u32(code).map(String::from).unwrap_or_default()
        })
        .collect()
}

/// All tokens in the order of their ids.
pub fn tokens() -> Vec<String> {
    let mut tokens = byte_alphabet();
    tokens.extend(SPECIALS.map(str::to_owned));
    tokens.extend(MERGES.map(|(left, right)| format!("{left}{right}")));
    while tokens.len() < VOCAB_SIZE {
        tokens.push(format!("<|unused_{}|>", tokens.len()));
    }
    tokens
}

/// The same vocabulary as a `tokenizer.json`, and its `tokenizer_config.json`.
pub fn hugging_face() -> [serde_json::Value; 2] {
    let tokens = tokens();
    let plain = |id: &usize| *id < 256 || (259..259 + MERGES.len()).contains(id);
    let vocab: serde_json::Map<_, _> = (0..tokens.len())
        .filter(plain)
        .map(|id| (tokens[id].clone(), serde_json::json!(id)))
        .collect();
    let added = SPECIALS.iter().enumerate().map(|(index, content)| {
        serde_json::json!({ "id": 256 + index, "content": content, "special": true })
    });
    let byte_level = serde_json::json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true,
    });
    let merges = MERGES.map(|(left, right)| [left, right]);
    let tokenizer = serde_json::json!({
        "version": "1.0",
        "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": null,
        "decoder": byte_level,
        "model": { "type": "BPE", "vocab": vocab, "merges": merges },
    });
    let settings = serde_json::json!({
        "bos_token": SPECIALS[0],
        "eos_token": { "content": SPECIALS[2], "special": true },
        "add_bos_token": false,
        "chat_template": CHAT_TEMPLATE,
    });
    [tokenizer, settings]
}

/// Adds the tokenizer's keys.
pub fn add(gguf: &mut Gguf) {
    const NORMAL: i32 = 1;
    const CONTROL: i32 = 3;
    const UNUSED: i32 = 5;
    let tokens = tokens();
    let merged = 256 + SPECIALS.len();
    let kind = |index: usize| match index {
        256.. if index < merged => CONTROL,
        _ if index >= merged + MERGES.len() => UNUSED,
        _ => NORMAL,
    };
    let kinds: Vec<i32> = (0..tokens.len()).map(kind).collect();
    let merges = MERGES.map(|(left, right)| format!("{left} {right}"));
    gguf.text("tokenizer.ggml.model", "gpt2");
    gguf.text("tokenizer.ggml.pre", "gpt-2");
    gguf.texts("tokenizer.ggml.tokens", &tokens);
    gguf.i32s("tokenizer.ggml.token_type", &kinds);
    gguf.texts("tokenizer.ggml.merges", &merges);
    gguf.u32("tokenizer.ggml.bos_token_id", END_OF_TEXT);
    gguf.u32("tokenizer.ggml.eos_token_id", TURN_END);
    gguf.bool("tokenizer.ggml.add_bos_token", false);
    gguf.text("tokenizer.chat_template", CHAT_TEMPLATE);
}
