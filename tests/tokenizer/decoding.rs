//! Text from tokens: nothing lost, nothing split, stop strings never shown.

use crate::vocabularies::{byte_level, score_merges, tokenizer};
use proptest::prelude::*;
use tandem::request::{AddSpecial, ParseSpecial};
use tandem::tokenizer::{IncrementalDecoder, StopMatcher, Tokenizer};
use tandem::units::TokenId;

/// Every byte that any token sequence of these vocabularies can give comes up: most tokens are
/// single bytes.
fn any_tokens(vocab_size: usize) -> impl Strategy<Value = Vec<TokenId>> {
    let emoji = vec![0xF0u32, 0x9F, 0x98, 0x80];
    let byte = prop_oneof![
        3 => (0..vocab_size as u32).prop_map(|id| vec![id]),
        1 => Just(emoji.into_iter().map(|byte| byte + 3).collect::<Vec<_>>()),
        1 => Just(vec![0xC3 + 3, 0xA9 + 3]),
        1 => (0x80u32..0xF5).prop_map(|byte| vec![byte + 3]),
    ];
    proptest::collection::vec(byte, 0..40)
        .prop_map(|runs| runs.into_iter().flatten().map(TokenId).collect())
}

fn pushed(mut decoder: IncrementalDecoder, ids: &[TokenId]) -> String {
    let mut text: String = ids.iter().map(|id| decoder.push(*id)).collect();
    text.push_str(&decoder.finish());
    text
}

proptest! {
    #[test]
    fn pushed_tokens_give_what_decoding_all_gives(ids in any_tokens(270), byte in any::<bool>()) {
        let tokenizer = tokenizer(if byte { byte_level() } else { score_merges() });
        let whole = tokenizer.decode(&ids);
        let start = IncrementalDecoder::at_text_start(tokenizer.clone());
        prop_assert_eq!(pushed(start, &ids), whole);
        let whole = tokenizer.decode_continuation(&ids);
        prop_assert_eq!(pushed(IncrementalDecoder::new(tokenizer), &ids), whole);
    }

    #[test]
    fn text_comes_back_from_its_tokens(text in "\\PC{0,40}|[ \n\ta-e<|>]{0,60}") {
        for tokenizer in [tokenizer(byte_level()), tokenizer(score_merges())] {
            let ids = tokenizer.encode(&text, AddSpecial::Yes, ParseSpecial::No).unwrap();
            prop_assert_eq!(tokenizer.decode(&ids), text.clone());
        }
    }

    #[test]
    fn stop_strings_are_found_however_the_text_is_cut(
        text in "[abc]{0,30}",
        stops in proptest::collection::vec("[abc]{1,4}", 0..4),
        cuts in proptest::collection::vec(0usize..4, 1..40),
    ) {
        let mut matcher = StopMatcher::new(&stops);
        let (mut shown, mut stopped, mut at) = (String::new(), None, 0);
        // After the cuts, the rest comes whole.
        for cut in cuts.into_iter().chain([text.len()]) {
            let end = (at + cut).min(text.len());
            let output = matcher.push(&text[at..end]);
            shown.push_str(&output.text);
            stopped = stopped.or(output.stopped);
            at = end;
        }
        shown.push_str(&matcher.finish());
        let first = naive_stop(&text, &stops);
        prop_assert_eq!(stopped, first.map(|(which, _)| which));
        prop_assert_eq!(shown, &text[..first.map_or(text.len(), |(_, start)| start)]);
    }
}

/// The stop string that is complete first, the longest of those, and where it starts.
fn naive_stop(text: &str, stops: &[String]) -> Option<(usize, usize)> {
    for end in 1..=text.len() {
        let found = (0..stops.len()).filter(|which| text[..end].ends_with(stops[*which].as_str()));
        let longest = found.max_by_key(|which| (stops[*which].len(), usize::MAX - which));
        if let Some(which) = longest {
            return Some((which, end - stops[which].len()));
        }
    }
    None
}

#[test]
fn characters_come_whole() {
    let tokenizer = tokenizer(score_merges());
    let mut decoder = IncrementalDecoder::new(tokenizer);
    let parts: Vec<String> =
        "😀".bytes().map(|byte| decoder.push(TokenId(3 + u32::from(byte)))).collect();
    assert_eq!(parts, ["", "", "", "😀"]);
    assert_eq!(decoder.push(TokenId(3 + 0xC3)), "");
    assert!(decoder.is_mid_character());
    assert_eq!(decoder.push(TokenId(3 + u32::from(b'x'))), "\u{FFFD}x");
    assert_eq!(decoder.push(TokenId(3 + 0xE2)), "");
    assert_eq!(decoder.finish(), "\u{FFFD}");
}

#[test]
fn the_tokenizer_s_own_space_is_taken_away_only_at_a_text_s_start() {
    let tokenizer = tokenizer(score_merges());
    let ids = tokenizer.encode("the", AddSpecial::ModelDefault, ParseSpecial::No).unwrap();
    assert_eq!(tokenizer.decode(&ids), "the");
    assert_eq!(tokenizer.decode_continuation(&ids), " the");
    let ids = tokenizer.encode(" the", AddSpecial::No, ParseSpecial::No).unwrap();
    assert_eq!(tokenizer.decode(&ids), " the");
}

fn fed(stops: &[&str], parts: &[&str]) -> (Vec<String>, Option<usize>, String) {
    let stops: Vec<String> = stops.iter().map(|stop| (*stop).to_owned()).collect();
    let mut matcher = StopMatcher::new(&stops);
    let outputs: Vec<_> = parts.iter().map(|part| matcher.push(part)).collect();
    let stopped = outputs.iter().find_map(|output| output.stopped);
    (outputs.into_iter().map(|output| output.text).collect(), stopped, matcher.finish())
}

#[test]
fn partial_stop_strings_are_held_back_and_let_go() {
    let (texts, stopped, rest) = fed(&["\nUser:"], &["Hi\nUs", "ers", " of\n"]);
    assert_eq!(texts, ["Hi", "\nUsers", " of"]);
    assert_eq!((stopped, rest.as_str()), (None, "\n"));
    let (texts, stopped, rest) = fed(&["\nUser:", "END"], &["Hi E", "N", "D\nUser:", "more"]);
    assert_eq!(texts, ["Hi ", "", "", ""]);
    assert_eq!((stopped, rest.as_str()), (Some(1), ""));
    let (texts, stopped, _) = fed(&["é!"], &["caf", "é", "!", "x"]);
    assert_eq!((texts.concat().as_str(), stopped), ("caf", Some(0)));
}

#[test]
fn huge_stop_strings_cost_no_more_than_the_text() {
    let stop = "a".repeat(1 << 20) + "b";
    let mut matcher = StopMatcher::new(&[stop]);
    let mut shown = 0;
    for _ in 0..64 {
        shown += matcher.push(&"a".repeat(1 << 15)).text.len();
    }
    assert_eq!(shown, (1 << 21) - (1 << 20));
    assert_eq!(matcher.push("b").stopped, Some(0));
}

#[test]
fn tokens_show_their_own_text() {
    let tokenizer: &Tokenizer = &tokenizer(byte_level());
    assert_eq!(tokenizer.token_text(TokenId(1)), "<|im_start|>");
    assert_eq!(tokenizer.token_text(TokenId(3 + 0xC3)), "\u{FFFD}");
    assert_eq!(tokenizer.token_bytes(TokenId(3 + 0xC3)), [0xC3]);
    assert_eq!(tokenizer.token_bytes(TokenId(u32::MAX)), [0u8; 0]);
    assert_eq!(tokenizer.decode(&[TokenId(1), TokenId(3 + 0x41), TokenId(u32::MAX)]), "A");
}
