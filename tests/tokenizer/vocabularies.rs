//! Small vocabularies made here, so that these tests need no file.

use std::sync::Arc;
use tandem::tokenizer::{RoleTokens, TokenKind, Tokenizer, Vocabulary};
use tandem::units::TokenId;

/// GPT-2's character for a byte.
fn byte_character(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|byte| !printable(*byte)).count();
    char::from_u32(0x100 + before as u32).unwrap()
}

/// Control tokens first, then 256 bytes, then the products of the merges.
pub fn byte_level() -> Vocabulary {
    let controls = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
    let mut tokens: Vec<String> = controls.map(str::to_owned).to_vec();
    let mut kinds = vec![TokenKind::Control; tokens.len()];
    tokens.extend((0..=u8::MAX).map(|byte| byte_character(byte).to_string()));
    let merges =
        ["Ġ Ġ", "ĠĠ ĠĠ", "a a", "aa aa", "t h", "th e", "Ġ the", "ð Ł", "ðŁ ĺ", "< |", "| >"];
    tokens.extend(merges.iter().map(|merge| merge.replace(' ', "")));
    kinds.resize(tokens.len(), TokenKind::Normal);
    tokens.push("<tool>".to_owned());
    kinds.push(TokenKind::UserDefined);
    Vocabulary {
        model: "gpt2".to_owned(),
        pre: Some("gpt-2".to_owned()),
        tokens,
        kinds,
        merges: merges.map(str::to_owned).to_vec(),
        roles: RoleTokens { bos: Some(TokenId(1)), eos: Some(TokenId(2)), ..RoleTokens::default() },
        ..Vocabulary::default()
    }
}

/// Three role tokens, 256 bytes, then pieces; earlier pieces have better scores.
pub fn score_merges() -> Vocabulary {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
    let mut kinds = vec![TokenKind::Unknown, TokenKind::Control, TokenKind::Control];
    tokens.extend((0..=u8::MAX).map(|byte| format!("<0x{byte:02X}>")));
    kinds.resize(tokens.len(), TokenKind::Byte);
    let pieces = [
        "▁▁",
        "▁▁▁▁",
        "▁t",
        "he",
        "▁the",
        "aa",
        "aaa",
        "aaaa",
        "s>",
        "▁",
        "<",
        ">",
        "/",
        "t",
        "h",
        "e",
        "a",
        "s",
        "é",
    ];
    tokens.extend(pieces.map(str::to_owned));
    kinds.resize(tokens.len(), TokenKind::Normal);
    let scores = (0..tokens.len()).map(|id| -(id as f32)).collect();
    Vocabulary {
        model: "llama".to_owned(),
        tokens,
        kinds,
        scores,
        roles: RoleTokens {
            bos: Some(TokenId(1)),
            eos: Some(TokenId(2)),
            unknown: Some(TokenId(0)),
            ..RoleTokens::default()
        },
        ..Vocabulary::default()
    }
}

pub fn tokenizer(vocabulary: Vocabulary) -> Arc<Tokenizer> {
    Arc::new(Tokenizer::new(vocabulary).unwrap())
}
