//! Owns the way from text to tokens and back, and from a chat to the text that a model wants.
//! It must not know requests in flight, sockets or threads. The tokenizer actor encodes and renders
//! with it, the stream tasks decode with it.

mod byte_level;
mod byte_pairs;
mod decoder;
mod ends;
mod error;
mod huggingface;
mod pretokenizer;
mod score_merges;
mod special;
mod stop;
pub mod template;
mod unigram;
mod vocabulary;

pub use decoder::IncrementalDecoder;
pub use error::TokenizerError;
pub use huggingface::Pipeline;
pub use stop::{StopMatcher, StopOutput};
pub use template::{
    ChatTemplate, GenerationPrompt, MessageSpan, Rendered, TemplateConfig, TemplateError,
};
pub use vocabulary::{RoleTokens, TokenKind, Vocabulary};

use crate::formats::Metadata;
use crate::request::{AddSpecial, ParseSpecial, SamplingParams};
use crate::units::TokenId;
use aho_corasick::AhoCorasick;
use byte_pairs::BytePairs;
use huggingface::{PlainText, Position};
use score_merges::ScoreMerges;
use special::{Fragment, SpecialTokens};
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use unigram::UnigramScores;

/// What SentencePiece writes for a space.
const SPACE_MARK: &str = "▁";

/// How plain text becomes tokens.
enum Segmenter {
    BytePairs(BytePairs),
    ScoreMerges(ScoreMerges),
    Unigram(UnigramScores),
    PlainText(Box<PlainText>),
}

/// A model's tokenizer. Shared by reference; encoding and decoding change nothing in it.
pub struct Tokenizer {
    segmenter: Segmenter,
    special: SpecialTokens,
    kinds: Vec<TokenKind>,
    roles: RoleTokens,
    /// Ascending.
    ends: Vec<TokenId>,
    /// Texts of all tokens, one after the other.
    bytes: Vec<u8>,
    /// `[vocab_size + 1]`, where each token's bytes start.
    starts: Vec<u32>,
    add_bos: bool,
    add_eos: bool,
    /// A space is put before text (Llama's SentencePiece).
    space_prefix: bool,
    warnings: Vec<String>,
}

/// Every kind of tokenizer that can be built.
const MODELS: [&str; 5] = ["gpt2", "llama", "gemma4", "t5", "huggingface"];

impl Tokenizer {
    /// Builds the tokenizer of a checkpoint.
    ///
    /// # Errors
    /// [`TokenizerError`] naming the metadata key.
    pub fn from_metadata(metadata: &Metadata) -> Result<Self, TokenizerError> {
        Self::new(Vocabulary::from_metadata(metadata)?)
    }

    /// Builds the tokenizer of a vocabulary.
    ///
    /// # Errors
    /// [`TokenizerError`] naming the metadata key.
    pub fn new(vocabulary: Vocabulary) -> Result<Self, TokenizerError> {
        vocabulary.check()?;
        // The crates below index by what the file says; a panic there is the file's fault.
        catch_unwind(AssertUnwindSafe(|| Self::build(vocabulary))).unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            let message = text.unwrap_or_else(|| "it can't be built".to_owned());
            Err(TokenizerError::invalid("tokenizer.ggml", message))
        })
    }

    fn build(mut vocabulary: Vocabulary) -> Result<Self, TokenizerError> {
        let ends = ends::end_tokens(&vocabulary);
        ends::mark_control_tokens(&mut vocabulary, &ends);
        let mut warnings = Vec::new();
        let segmenter = segmenter(&vocabulary, &mut warnings)?;
        let (add_bos, add_eos) = match &segmenter {
            Segmenter::BytePairs(pairs) => (pairs.adds_bos(), false),
            Segmenter::ScoreMerges(_) => (true, false),
            Segmenter::Unigram(_) => (false, true),
            Segmenter::PlainText(_) => (false, false),
        };
        let prefixes = matches!(segmenter, Segmenter::ScoreMerges(_));
        let space_prefix = match &segmenter {
            Segmenter::BytePairs(_) => false,
            _ => vocabulary.add_space_prefix.unwrap_or(prefixes),
        };
        let (bytes, starts) = texts(&vocabulary);
        Ok(Self {
            special: SpecialTokens::new(&vocabulary)?,
            segmenter,
            ends,
            bytes,
            starts,
            add_bos: vocabulary.add_bos.unwrap_or(add_bos),
            add_eos: vocabulary.add_eos.unwrap_or(add_eos),
            space_prefix,
            kinds: vocabulary.kinds,
            roles: vocabulary.roles,
            warnings,
        })
    }

    /// What was assumed because the file doesn't say it, in words.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Turns text into tokens. BOS is never doubled: a text that spells it (and is parsed for
    /// special tokens) gets no other. [`AddSpecial::Yes`] puts BOS before the text even where the
    /// metadata doesn't ask for it, and EOS after it where the metadata does.
    ///
    /// # Errors
    /// [`TokenizerError::Unencodable`] for a byte that the vocabulary can't spell.
    pub fn encode(
        &self,
        text: &str,
        add: AddSpecial,
        parse: ParseSpecial,
    ) -> Result<Vec<TokenId>, TokenizerError> {
        let bos = self.roles.bos.filter(|_| match add {
            AddSpecial::ModelDefault => self.add_bos,
            AddSpecial::Yes => true,
            AddSpecial::No => false,
        });
        self.encode_fragments(self.special.split(text, parse), bos, add)
    }

    /// Turns a rendered chat into tokens: the template's special tokens are parsed, those that
    /// messages spell stay text. BOS and EOS as the metadata says.
    ///
    /// # Errors
    /// [`TokenizerError::Unencodable`] for a byte that the vocabulary can't spell.
    pub fn encode_chat(&self, chat: &Rendered) -> Result<Vec<TokenId>, TokenizerError> {
        let bos = self.roles.bos.filter(|_| self.add_bos);
        let fragments = self.special.split_chat(&chat.text, &chat.message_spans);
        self.encode_fragments(fragments, bos, AddSpecial::ModelDefault)
    }

    fn encode_fragments(
        &self,
        fragments: Vec<Fragment<'_>>,
        bos: Option<TokenId>,
        add: AddSpecial,
    ) -> Result<Vec<TokenId>, TokenizerError> {
        let mut ids = Vec::new();
        let spelled = fragments.first().is_some_and(|first| match first {
            Fragment::Token(id) => Some(*id) == bos,
            Fragment::Text(_) => false,
        });
        ids.extend(bos.filter(|_| !spelled));
        let (mut after_token, mut position) = (true, Position::Start);
        for fragment in fragments {
            match fragment {
                Fragment::Token(id) => ids.push(id),
                Fragment::Text(text) => {
                    self.encode_plain(text, (after_token, position), &mut ids)?;
                }
            }
            after_token = matches!(fragment, Fragment::Token(_));
            position = Position::Later;
        }
        if self.add_eos && add != AddSpecial::No {
            ids.extend(self.roles.eos);
        }
        Ok(ids)
    }

    fn encode_plain(
        &self,
        text: &str,
        (after_token, position): (bool, Position),
        ids: &mut Vec<TokenId>,
    ) -> Result<(), TokenizerError> {
        match &self.segmenter {
            Segmenter::BytePairs(pairs) => pairs.encode(text, ids),
            Segmenter::ScoreMerges(merges) if self.space_prefix && after_token => {
                merges.encode(&format!(" {text}"), ids)
            }
            Segmenter::ScoreMerges(merges) => merges.encode(text, ids),
            Segmenter::Unigram(scores) => scores.encode(text, ids),
            Segmenter::PlainText(plain) => plain.encode(text, position, ids),
        }
    }

    /// The text of tokens that begin a text: special tokens have none, bytes that are no UTF-8
    /// become U+FFFD, and the space that [`Tokenizer::encode`] puts before a text is taken away.
    pub fn decode(&self, ids: &[TokenId]) -> String {
        let bytes = self.visible_bytes(ids);
        let prefix = usize::from(self.space_prefix && bytes.first() == Some(&b' '));
        String::from_utf8_lossy(&bytes[prefix..]).into_owned()
    }

    /// The text of tokens that continue a text: as [`Tokenizer::decode`], with the leading space.
    pub fn decode_continuation(&self, ids: &[TokenId]) -> String {
        String::from_utf8_lossy(&self.visible_bytes(ids)).into_owned()
    }

    fn visible_bytes(&self, ids: &[TokenId]) -> Vec<u8> {
        ids.iter().flat_map(|id| self.text_bytes(*id)).copied().collect()
    }

    /// What a token adds to a text; nothing for special tokens, fillers and ids out of range.
    pub(super) fn text_bytes(&self, id: TokenId) -> &[u8] {
        match self.kinds.get(id.index()) {
            Some(TokenKind::Normal | TokenKind::UserDefined | TokenKind::Byte) => {
                self.token_bytes(id)
            }
            _ => &[],
        }
    }

    /// A token's own bytes, not always UTF-8; a special token's are its name. Empty for ids out of
    /// range.
    pub fn token_bytes(&self, id: TokenId) -> &[u8] {
        match self.starts.get(id.index()..).and_then(|starts| starts.first_chunk::<2>()) {
            Some([start, end]) => &self.bytes[*start as usize..*end as usize],
            None => &[],
        }
    }

    /// A token's own text for showing (log-probabilities): bytes that are no UTF-8 by themselves
    /// come as U+FFFD, special tokens by name.
    pub fn token_text(&self, id: TokenId) -> String {
        String::from_utf8_lossy(self.token_bytes(id)).into_owned()
    }

    /// Number of tokens.
    pub fn vocab_size(&self) -> usize {
        self.kinds.len()
    }

    /// Beginning of sequence.
    pub fn bos(&self) -> Option<TokenId> {
        self.roles.bos
    }

    /// End of sequence.
    pub fn eos(&self) -> Option<TokenId> {
        self.roles.eos
    }

    /// Whether BOS is put before a text by default.
    pub fn adds_bos(&self) -> bool {
        self.add_bos && self.roles.bos.is_some()
    }

    /// All tokens that end an answer (EOS, end of turn, end of message and their kin), ascending.
    pub fn end_tokens(&self) -> &[TokenId] {
        &self.ends
    }

    /// Whether a token ends an answer.
    pub fn is_end(&self, id: TokenId) -> bool {
        self.ends.binary_search(&id).is_ok()
    }

    /// Whether a token steers the model and is no text.
    pub fn is_special(&self, id: TokenId) -> bool {
        matches!(self.kinds.get(id.index()), Some(TokenKind::Control | TokenKind::Unknown))
    }

    /// The special token of a name such as `<|im_end|>`.
    pub fn special_named(&self, name: &str) -> Option<TokenId> {
        self.special.named(name).filter(|id| self.is_special(*id))
    }

    /// Fills `dry_breaker_tokens` from `dry.sequence_breakers` if the DRY penalty is on: every
    /// token whose text contains a breaker, and the last token of a breaker that is several tokens.
    /// Ascending.
    ///
    /// # Errors
    /// [`TokenizerError`] if a breaker can't be encoded.
    pub fn resolve_dry_breakers(&self, params: &mut SamplingParams) -> Result<(), TokenizerError> {
        params.dry_breaker_tokens.clear();
        if params.dry.multiplier == 0.0 {
            return Ok(());
        }
        let breakers: Vec<&String> =
            params.dry.sequence_breakers.iter().filter(|text| !text.is_empty()).collect();
        let finder = AhoCorasick::new(&breakers)
            .map_err(|error| TokenizerError::invalid("dry_sequence_breakers", error.to_string()))?;
        let mut found: BTreeSet<TokenId> = (0..self.vocab_size() as u32)
            .map(TokenId)
            .filter(|id| finder.is_match(self.text_bytes(*id)))
            .collect();
        for breaker in breakers {
            // After a letter, as it stands inside a text: no space prefix gets into it.
            let inside = format!("a{breaker}");
            found.extend(self.encode(&inside, AddSpecial::No, ParseSpecial::No)?.last());
        }
        params.dry_breaker_tokens.extend(found);
        Ok(())
    }
}

fn segmenter(
    vocabulary: &Vocabulary,
    warnings: &mut Vec<String>,
) -> Result<Segmenter, TokenizerError> {
    match vocabulary.model.as_str() {
        "gpt2" => {
            if vocabulary.pre.is_none() {
                warnings.push(
                    "the file names no tokenizer.ggml.pre; text is cut as by \"default\", which \
                     the model may not have been trained with"
                        .to_owned(),
                );
            }
            Ok(Segmenter::BytePairs(BytePairs::byte_level(vocabulary)?))
        }
        "llama" => Ok(Segmenter::ScoreMerges(ScoreMerges::new(vocabulary)?)),
        "gemma4" => Ok(Segmenter::BytePairs(BytePairs::raw(vocabulary)?)),
        "t5" => Ok(Segmenter::Unigram(UnigramScores::new(vocabulary)?)),
        "huggingface" => {
            let missing = || TokenizerError::invalid("tokenizer.huggingface.json", "is missing");
            let pipeline = vocabulary.huggingface.as_ref().ok_or_else(missing)?;
            warnings.extend(pipeline.warnings.iter().cloned());
            Ok(Segmenter::PlainText(Box::new(PlainText::new(pipeline)?)))
        }
        other => Err(TokenizerError::Unknown {
            field: "tokenizer.ggml.model",
            got: other.to_owned(),
            known: MODELS.to_vec(),
        }),
    }
}

/// What every token adds to a text, one after the other, and where each starts.
fn texts(vocabulary: &Vocabulary) -> (Vec<u8>, Vec<u32>) {
    let byte_level = vocabulary.is_byte_level();
    let marks_spaces = vocabulary.huggingface.is_some() && !byte_level;
    let mut bytes = Vec::new();
    let mut starts = vec![0];
    for (token, kind) in vocabulary.tokens.iter().zip(&vocabulary.kinds) {
        match kind {
            TokenKind::Byte => bytes.extend(vocabulary::byte_of(token)),
            TokenKind::Normal if byte_level => bytes.extend(byte_level::bytes_of(token)),
            TokenKind::Normal => bytes.extend(token.replace(SPACE_MARK, " ").bytes()),
            // GGUF files have spaces in what was added; Gemma's tokenizer.json has marks.
            TokenKind::UserDefined if marks_spaces => {
                bytes.extend(token.replace(SPACE_MARK, " ").bytes());
            }
            _ => bytes.extend(token.bytes()),
        }
        // The vocabulary is bounded: 2^20 tokens of 2^16 bytes in a file; 4 GiB of text saturates.
        starts.push(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
    }
    (bytes, starts)
}
