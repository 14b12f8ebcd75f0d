//! Which tokens end an answer: the roles that the metadata names, and texts that published models
//! end turns with, since many files name only one of theirs.

use super::vocabulary::{TokenKind, Vocabulary};
use crate::units::TokenId;

/// Texts that end an answer in whatever vocabulary they stand as a token of their own.
const TURN_ENDS: [&str; 24] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
    "<end_of_turn>",
    "<turn|>",
    "<|tool_response>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "<|END_OF_TURN_TOKEN|>",
    "<end_of_utterance>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<|fim_pad|>",
    "<|fim_repo|>",
    "<|repo_name|>",
    "<|file_sep|>",
];

/// Texts that end an answer only where the vocabulary says that they are no text.
const CONTROL_ENDS: [&str; 5] = ["</s>", "<eos>", "[EOS]", "<fim_pad>", "<reponame>"];

/// Sets of which all present means that `<|end|>` ends a message inside an answer, not the answer
/// (the Harmony format and its kin).
const MESSAGE_FORMATS: [[&str; 2]; 2] = [["<|return|>", "<|call|>"], ["<|flush|>", "<|calls|>"]];

/// The end tokens of a vocabulary, ascending.
pub(super) fn end_tokens(vocabulary: &Vocabulary) -> Vec<TokenId> {
    let roles = &vocabulary.roles;
    let mut ends: Vec<TokenId> = [roles.eos, roles.eot, roles.eom].into_iter().flatten().collect();
    ends.extend(&roles.fim_ends);
    let has = |wanted: &str| vocabulary.tokens.iter().any(|token| token == wanted);
    let has_messages = MESSAGE_FORMATS.iter().any(|format| format.iter().all(|token| has(token)));
    let has_calls = has("<|tool_response>");
    for (id, (token, kind)) in vocabulary.tokens.iter().zip(&vocabulary.kinds).enumerate() {
        let plain = matches!(kind, TokenKind::Normal | TokenKind::Byte);
        let ends_answer = match token.as_str() {
            "<|end|>" => !has_messages,
            "</s>" => !plain && !has_calls,
            text => TURN_ENDS.contains(&text) || (!plain && CONTROL_ENDS.contains(&text)),
        };
        if ends_answer {
            ends.push(TokenId(id as u32));
        }
    }
    ends.sort_unstable();
    ends.dedup();
    ends
}

/// Makes control tokens of those that files call text although they steer the model: end tokens and
/// markers such as `<|START_OF_TURN_TOKEN|>`. Otherwise a user's text could end or begin a turn.
pub(super) fn mark_control_tokens(vocabulary: &mut Vocabulary, ends: &[TokenId]) {
    for end in ends {
        vocabulary.kinds[end.index()] = TokenKind::Control;
    }
    for (token, kind) in vocabulary.tokens.iter().zip(&mut vocabulary.kinds) {
        let marker = token.starts_with("<|") && token.ends_with("|>");
        if marker && *kind == TokenKind::UserDefined {
            *kind = TokenKind::Control;
        }
    }
}
