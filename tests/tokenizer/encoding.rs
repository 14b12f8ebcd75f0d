//! Special tokens, end tokens, errors and hostile sizes.

use crate::vocabularies::{byte_level, score_merges, tokenizer};
use tandem::request::{AddSpecial, DryParams, ParseSpecial, RequestError, SamplingParams};
use tandem::tokenizer::{TokenKind, Tokenizer, TokenizerError, Vocabulary};
use tandem::units::TokenId;

fn refusal(change: impl FnOnce(&mut Vocabulary)) -> TokenizerError {
    let mut vocabulary = byte_level();
    change(&mut vocabulary);
    match Tokenizer::new(vocabulary) {
        Ok(_) => panic!("an unusable vocabulary was taken"),
        Err(error) => error,
    }
}

#[test]
fn text_that_spells_a_special_token_stays_text_unless_asked() {
    for tokenizer in [tokenizer(byte_level()), tokenizer(score_merges())] {
        let special = if tokenizer.is_special(TokenId(0)) { "<s>" } else { "" };
        let text = format!("a<|im_end|>{special}</s>");
        let plain = tokenizer.encode(&text, AddSpecial::No, ParseSpecial::No).unwrap();
        assert!(plain.iter().all(|id| !tokenizer.is_special(*id)), "{plain:?}");
        assert_eq!(tokenizer.decode(&plain), text);
        let parsed = tokenizer.encode(&text, AddSpecial::No, ParseSpecial::Yes).unwrap();
        assert!(parsed.iter().any(|id| tokenizer.is_special(*id)), "{parsed:?}");
    }
}

#[test]
fn pieces_that_the_makers_added_are_always_found() {
    let tokenizer = tokenizer(byte_level());
    let ids = tokenizer.encode("<tool>", AddSpecial::No, ParseSpecial::No).unwrap();
    assert_eq!(ids.len(), 1);
    assert_eq!(tokenizer.decode(&ids), "<tool>");
}

#[test]
fn bos_is_added_as_asked_and_never_twice() {
    let tokenizer = tokenizer(score_merges());
    let bos = tokenizer.bos().unwrap();
    let count = |text: &str, add, parse| {
        let ids = tokenizer.encode(text, add, parse).unwrap();
        ids.iter().filter(|id| **id == bos).count()
    };
    assert_eq!(count("a", AddSpecial::ModelDefault, ParseSpecial::No), 1);
    assert_eq!(count("", AddSpecial::ModelDefault, ParseSpecial::No), 1);
    assert_eq!(count("a", AddSpecial::No, ParseSpecial::No), 0);
    assert_eq!(count("<s>a", AddSpecial::ModelDefault, ParseSpecial::Yes), 1);
    assert_eq!(count("<s>a", AddSpecial::ModelDefault, ParseSpecial::No), 1);
}

#[test]
fn end_tokens_are_those_of_the_roles_and_the_known_names() {
    let tokenizer = tokenizer(byte_level());
    assert_eq!(tokenizer.end_tokens(), [TokenId(0), TokenId(2)]);
    assert!(tokenizer.is_end(TokenId(2)) && !tokenizer.is_end(TokenId(1)));
    assert_eq!(tokenizer.special_named("<|im_end|>"), Some(TokenId(2)));
    assert_eq!(tokenizer.special_named("<tool>"), None);
    // A file that calls an end token text would let users end turns.
    let mut lax = byte_level();
    lax.kinds[2] = TokenKind::UserDefined;
    let lax = Tokenizer::new(lax).unwrap();
    assert!(lax.is_special(TokenId(2)));
}

#[test]
fn unusable_vocabularies_are_refused_with_the_field() {
    type Change = fn(&mut Vocabulary);
    let cases: [(&str, Change); 10] = [
        ("tokens", |v| v.tokens.clear()),
        ("token_type", |v| v.kinds.truncate(5)),
        ("scores", |v| v.scores = vec![0.0; 7]),
        ("scores[2]", |v| {
            v.scores = (0..v.tokens.len()).map(|at| 0.0 / (at as f32 - 2.0)).collect()
        }),
        ("tokens[7]", |v| v.tokens[7] = v.tokens[6].clone()),
        ("merges", |v| v.merges.clear()),
        ("merges[1]", |v| v.merges[1] = "whole".to_owned()),
        ("merges", |v| v.merges[1] = "no such".to_owned()),
        ("tokens", |v| v.roles.bos = Some(TokenId(u32::MAX))),
        ("tokens[9]", |v| v.tokens[9] = "x".repeat(1 << 17)),
    ];
    for (name, change) in cases {
        match refusal(change) {
            TokenizerError::Invalid { field, .. } => {
                assert_eq!(field, format!("tokenizer.ggml.{name}"));
            }
            other => panic!("{name}: {other}"),
        }
    }
    for change in
        [(|v| v.model = "bert".to_owned()) as Change, |v| v.pre = Some("no-such-pre".to_owned())]
    {
        let error = RequestError::from(refusal(change));
        assert!(matches!(error, RequestError::TokenizerInvalid { .. }), "{error}");
        assert!(error.to_string().contains("known: "), "{error}");
    }
}

#[test]
fn a_byte_without_a_token_is_refused_not_dropped() {
    let mut vocabulary = byte_level();
    vocabulary.tokens[3 + 4] = "gone".to_owned();
    let tokenizer = Tokenizer::new(vocabulary).unwrap();
    let error = tokenizer.encode("ab\u{4}", AddSpecial::No, ParseSpecial::No).unwrap_err();
    assert_eq!(error, TokenizerError::Unencodable { byte: 4, offset: 2 });
    assert!(matches!(RequestError::from(error), RequestError::InvalidParams { .. }));
}

#[test]
fn megabytes_of_one_character_are_encoded() {
    for tokenizer in [tokenizer(byte_level()), tokenizer(score_merges())] {
        for character in [" ", "a", "😀", "\n", "1", "the ", "\u{301}", " \u{3000}a"] {
            let text = character.repeat((1 << 20) / character.len());
            let ids = tokenizer.encode(&text, AddSpecial::No, ParseSpecial::No).unwrap();
            assert_eq!(tokenizer.decode(&ids), text, "{character:?}");
        }
    }
}

#[test]
fn dry_breakers_become_every_token_that_holds_one() {
    let tokenizer = tokenizer(byte_level());
    let dry = DryParams {
        multiplier: 1.0,
        sequence_breakers: vec!["\n".into(), "he".into(), "xyz".into(), String::new()],
        ..DryParams::default()
    };
    let mut params = SamplingParams { dry, ..SamplingParams::default() };
    tokenizer.resolve_dry_breakers(&mut params).unwrap();
    let texts: Vec<String> =
        params.dry_breaker_tokens.iter().map(|id| tokenizer.token_text(*id)).collect();
    assert_eq!(texts, ["\n", "e", "z", "the", " the"]);
    params.dry.multiplier = 0.0;
    tokenizer.resolve_dry_breakers(&mut params).unwrap();
    assert!(params.dry_breaker_tokens.is_empty());
}
