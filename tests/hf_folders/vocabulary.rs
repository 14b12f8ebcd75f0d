//! Tokens of `tokenizer.json` against those of the same vocabulary in a GGUF file.

use super::hf_folder::{Folder, Format};
use super::tiny_model::{Family, TinyModel};
use serde_json::{Value, json};
use std::path::Path;
use tandem::formats::Checkpoint;
use tandem::request::{AddSpecial, ChatMessage, ParseSpecial};
use tandem::tensor::DType;
use tandem::tokenizer::{
    ChatTemplate, GenerationPrompt, TemplateConfig, Tokenizer, TokenizerError,
};
use tandem::units::TokenId;

const TEXTS: [&str; 8] = [
    "",
    "the cat and the hat",
    "  two  spaces\n\n\nlines\t",
    "It's 12345 o'clock",
    "<|im_start|>user\nhi<|im_end|>",
    "Ünïcödé 日本語 🦙",
    "a<|unused_300|>b",
    " ",
];

fn folder() -> Folder {
    let model = TinyModel::new(Family::Llama).dtype(DType::F32).layers(1);
    Folder::new(&model, &model.gguf(), Format::Floats)
}

fn tokenizer(folder: &Folder) -> Result<Tokenizer, TokenizerError> {
    let written = folder.write();
    Tokenizer::from_metadata(Checkpoint::open(written.path()).unwrap().metadata())
}

#[test]
fn a_byte_level_vocabulary_has_the_tokens_of_its_gguf_form() {
    let model = TinyModel::new(Family::Llama).dtype(DType::F32).layers(1);
    let gguf = Checkpoint::from_bytes(Path::new("tiny.gguf"), &model.gguf().bytes()).unwrap();
    let theirs = Tokenizer::from_metadata(gguf.metadata()).unwrap();
    let ours = tokenizer(&folder()).unwrap();
    for text in TEXTS {
        for parse in [ParseSpecial::No, ParseSpecial::Yes] {
            let encode = |tokenizer: &Tokenizer| {
                tokenizer.encode(text, AddSpecial::ModelDefault, parse).unwrap()
            };
            let ids = encode(&ours);
            assert_eq!(ids, encode(&theirs), "{text:?}");
            assert_eq!(ours.decode(&ids), theirs.decode(&ids), "{text:?}");
        }
    }
    assert_eq!((ours.bos(), ours.eos()), (theirs.bos(), theirs.eos()));
    assert_eq!(ours.end_tokens(), theirs.end_tokens());
    assert_eq!((ours.vocab_size(), ours.adds_bos()), (theirs.vocab_size(), theirs.adds_bos()));
}

#[test]
fn chats_render_by_the_settings_or_a_file_of_their_own() {
    let written = folder().write();
    let render = || {
        let checkpoint = Checkpoint::open(written.path()).unwrap();
        let tokenizer = Tokenizer::from_metadata(checkpoint.metadata()).unwrap();
        let config = TemplateConfig::default();
        let template =
            ChatTemplate::from_metadata(checkpoint.metadata(), &tokenizer, config).unwrap();
        let message = ChatMessage { role: "user".into(), content: "hi <|im_end|>".into() };
        let rendered = template.render(&[message], GenerationPrompt::Add).unwrap();
        let ids = tokenizer.encode_chat(&rendered).unwrap();
        let special = ids.iter().filter(|id| tokenizer.is_special(**id)).count();
        (rendered.text, special)
    };
    let (text, special) = render();
    assert_eq!(text, "<|im_start|>user\nhi <|im_end|><|im_end|>\n<|im_start|>assistant\n");
    // What a user spells is text.
    assert_eq!(special, 3);
    std::fs::write(written.path().join("chat_template.jinja"), "{{ messages[0].content }}!")
        .unwrap();
    assert_eq!(render().0, "hi <|im_end|>!");
}

/// SentencePiece's way, as Llama 2's file has it: `▁` for spaces, bytes for what is no token.
fn sentence_pieces(prefix: Value) -> Folder {
    let mut folder = folder();
    let mut vocab = serde_json::Map::new();
    for (id, token) in ["<unk>", "<s>", "</s>"].iter().enumerate() {
        vocab.insert((*token).to_owned(), json!(id));
    }
    for byte in 0..256 {
        vocab.insert(format!("<0x{byte:02X}>"), json!(3 + byte));
    }
    for (at, token) in ["▁", "h", "i", "▁h", "hi", "▁hi"].iter().enumerate() {
        vocab.insert((*token).to_owned(), json!(259 + at));
    }
    let spaces = json!({ "id": 265, "content": "▁▁", "special": false });
    let control = ["<unk>", "<s>", "</s>"]
        .map(|content| json!({ "id": vocab[content], "content": content, "special": true }));
    folder.tokenizer["added_tokens"] = json!(control);
    folder.tokenizer["added_tokens"].as_array_mut().unwrap().push(spaces);
    folder.tokenizer["model"] = json!({
        "type": "BPE", "byte_fallback": true, "unk_token": "<unk>", "fuse_unk": true,
        "vocab": vocab, "merges": ["▁ h", "h i", "▁h i", "▁ hi"],
    });
    let replace = |from: &str, to: &str| {
        let pattern = json!({ "String": from });
        json!({ "type": "Replace", "pattern": pattern, "content": to })
    };
    if prefix.is_null() {
        let prepend = json!({ "type": "Prepend", "prepend": "▁" });
        folder.tokenizer["normalizer"] =
            json!({ "type": "Sequence", "normalizers": [prepend, replace(" ", "▁")] });
    }
    folder.tokenizer["pre_tokenizer"] = prefix;
    folder.tokenizer["decoder"] = json!({ "type": "Sequence", "decoders": [
        replace("▁", " "), { "type": "ByteFallback" }, { "type": "Fuse" },
    ] });
    folder.tokenizer["post_processor"] = json!({
        "type": "TemplateProcessing",
        "single": [{ "SpecialToken": { "id": "<s>", "type_id": 0 } },
                   { "Sequence": { "id": "A", "type_id": 0 } }],
        "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }],
        "special_tokens": { "<s>": { "id": "<s>", "ids": [1], "tokens": ["<s>"] } },
    });
    folder.settings = json!({ "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>" });
    (folder.config["bos_token_id"], folder.config["eos_token_id"]) = (json!(1), json!(2));
    folder
}

fn ids(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    let ids = tokenizer.encode(text, AddSpecial::ModelDefault, ParseSpecial::Yes).unwrap();
    ids.into_iter().map(|TokenId(id)| id).collect()
}

#[test]
fn sentence_pieces_get_their_prefix_and_their_bytes() {
    let everywhere = tokenizer(&sentence_pieces(Value::Null)).unwrap();
    assert!(everywhere.adds_bos());
    assert_eq!(ids(&everywhere, "hi hi"), [1, 264, 264]);
    assert_eq!(ids(&everywhere, "hi</s>hi"), [1, 264, 2, 264]);
    assert_eq!(ids(&everywhere, "é"), [1, 259, 3 + 0xc3, 3 + 0xa9]);
    assert_eq!(everywhere.decode(&[264, 264].map(TokenId)), "hi hi");
    // An added run of spaces, as Gemma has them.
    assert_eq!(everywhere.decode_continuation(&[264, 265, 263].map(TokenId)), " hi  hi");
    assert_eq!(everywhere.decode(&[259, 3 + 0xc3, 3 + 0xa9].map(TokenId)), "é");

    let first = json!({ "type": "Metaspace", "replacement": "▁", "prepend_scheme": "first",
                        "split": false });
    let first = tokenizer(&sentence_pieces(first)).unwrap();
    assert_eq!(ids(&first, "hi</s>hi"), [1, 264, 2, 263]);
    assert_eq!(ids(&first, "</s>hi"), [1, 2, 263]);
    let never = json!({ "type": "Metaspace", "replacement": "▁", "prepend_scheme": "never",
                        "split": false });
    let never = tokenizer(&sentence_pieces(never)).unwrap();
    assert_eq!(ids(&never, "hi hi"), [1, 263, 264]);
    assert_eq!(never.decode(&[264].map(TokenId)), " hi");
}

#[test]
fn tokens_beyond_the_model_are_left_out_or_refused() {
    let mut more = folder();
    let added = json!({ "id": 320, "content": "<image>", "special": true });
    more.tokenizer["added_tokens"].as_array_mut().unwrap().push(added);
    let tokenizer_of_more = tokenizer(&more).unwrap();
    assert_eq!(tokenizer_of_more.vocab_size(), 320);
    assert!(tokenizer_of_more.warnings()[0].contains("<image>"));
    let refused = |change: &dyn Fn(&mut Value), field: &str, word: &str| {
        let mut folder = folder();
        change(&mut folder.tokenizer);
        let Err(error) = tokenizer(&folder) else { panic!("{field}") };
        let text = error.to_string();
        assert!(text.contains(field) && text.contains(word), "{text}");
    };
    refused(&|json| json["model"]["vocab"]["far"] = json!(900), "model.vocab", "900");
    refused(&|json| json["model"]["vocab"]["again"] = json!(7), "model.vocab", "twice");
    refused(&|json| json["model"]["type"] = json!("WordPiece"), "model.type", "BPE");
    refused(
        &|json| json["model"]["merges"] = json!([["x", "nowhere"]]),
        "tokenizer.json",
        "nowhere",
    );
    refused(&|json| json["pre_tokenizer"] = json!({ "type": "Guess" }), "tokenizer.json", "");
}
