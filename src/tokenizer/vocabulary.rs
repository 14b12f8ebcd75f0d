//! A model's vocabulary as data: what GGUF's `tokenizer.ggml.*` keys say, read and checked once.

use super::TokenizerError;
use super::huggingface::{self, Pipeline};
use crate::formats::{FormatError, Metadata};
use crate::units::TokenId;
use std::collections::HashMap;

/// What a token stands for (GGUF's `tokenizer.ggml.token_type`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TokenKind {
    /// A piece of text.
    #[default]
    Normal,
    /// Stands for what the vocabulary can't spell.
    Unknown,
    /// Steers the model and is no text: BOS, end of turn.
    Control,
    /// A piece of text that is found before all others, whole.
    UserDefined,
    /// Fills the table; nothing is ever encoded as it.
    Unused,
    /// One byte, spelled `<0x0A>`.
    Byte,
}

impl TokenKind {
    /// GGUF's number; what it doesn't name is unused.
    fn from_gguf_id(id: i64) -> Self {
        match id {
            1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            6 => Self::Byte,
            _ => Self::Unused,
        }
    }
}

/// Tokens with a role, by id. Those that lie outside the vocabulary are dropped on reading.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RoleTokens {
    /// Beginning of sequence.
    pub bos: Option<TokenId>,
    /// End of sequence.
    pub eos: Option<TokenId>,
    /// End of turn.
    pub eot: Option<TokenId>,
    /// End of message.
    pub eom: Option<TokenId>,
    /// Stands for what can't be spelled.
    pub unknown: Option<TokenId>,
    /// Fills batches.
    pub padding: Option<TokenId>,
    /// Further tokens after which an answer is over: for filling in the middle those for padding,
    /// repository and file, and all that a Hugging Face folder lists.
    pub fim_ends: Vec<TokenId>,
}

/// Everything that a tokenizer is built from.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Vocabulary {
    /// The kind of tokenizer, `tokenizer.ggml.model`: `gpt2`, `llama`, `gemma4`, `t5`,
    /// `huggingface`.
    pub model: String,
    /// How text is cut before merging, `tokenizer.ggml.pre`.
    pub pre: Option<String>,
    /// `[vocab_size]`, each token's text as the file spells it.
    pub tokens: Vec<String>,
    /// `[vocab_size]` or empty.
    pub scores: Vec<f32>,
    /// `[vocab_size]`.
    pub kinds: Vec<TokenKind>,
    /// Byte pair merges, best first, as `left right`.
    pub merges: Vec<String>,
    /// Tokens with a role.
    pub roles: RoleTokens,
    /// Whether BOS is put before a text; `None` is the kind's default.
    pub add_bos: Option<bool>,
    /// Whether EOS is put after a text; `None` is the kind's default.
    pub add_eos: Option<bool>,
    /// Whether a space is put before a text; `None` is the kind's default.
    pub add_space_prefix: Option<bool>,
    /// Whether runs of spaces become one (`t5` only).
    pub remove_extra_whitespaces: bool,
    /// SentencePiece's compiled normalisation rules (`t5` only).
    pub precompiled_charsmap: Vec<u8>,
    /// How text is cut and merged (`huggingface` only).
    pub huggingface: Option<Pipeline>,
}

fn key(name: &str) -> String {
    format!("tokenizer.ggml.{name}")
}

impl Vocabulary {
    /// Most tokens of a vocabulary: four times the largest published.
    pub const TOKENS_MAX: usize = 1 << 20;
    /// Most bytes of one token.
    pub const TOKEN_BYTES_MAX: usize = 1 << 16;

    /// Reads the vocabulary of a checkpoint.
    ///
    /// # Errors
    /// [`TokenizerError::File`] if a key is missing or has the wrong type,
    /// [`TokenizerError::Invalid`] if the arrays don't fit each other.
    pub fn from_metadata(metadata: &Metadata) -> Result<Self, TokenizerError> {
        if metadata.str(&key("model"))? == "huggingface" {
            return huggingface::vocabulary(metadata);
        }
        let tokens = texts(metadata, &key("tokens"), Self::TOKENS_MAX)?;
        let array = |name: &str| metadata.array_opt(&key(name));
        let scores = match array("scores")? {
            Some(array) => array.floats()?.take(Self::TOKENS_MAX + 1).collect(),
            None => Vec::new(),
        };
        let kinds = match array("token_type")? {
            Some(array) => array.integers()?.map(TokenKind::from_gguf_id).collect(),
            None => vec![TokenKind::Normal; tokens.len()],
        };
        let merges = match array("merges")? {
            Some(_) => texts(metadata, &key("merges"), 4 * Self::TOKENS_MAX)?,
            None => Vec::new(),
        };
        let precompiled_charsmap = match array("precompiled_charsmap")? {
            Some(array) => array.integers()?.map(|byte| byte as u8).collect(),
            None => Vec::new(),
        };
        let vocabulary = Self {
            model: metadata.str(&key("model"))?.to_owned(),
            pre: metadata.str_opt(&key("pre"))?.map(str::to_owned),
            roles: roles(metadata, tokens.len())?,
            tokens,
            scores,
            kinds,
            merges,
            add_bos: metadata.bool_opt(&key("add_bos_token"))?,
            add_eos: metadata.bool_opt(&key("add_eos_token"))?,
            add_space_prefix: metadata.bool_opt(&key("add_space_prefix"))?,
            remove_extra_whitespaces: metadata
                .bool_opt(&key("remove_extra_whitespaces"))?
                .unwrap_or(false),
            precompiled_charsmap,
            huggingface: None,
        };
        vocabulary.check()?;
        Ok(vocabulary)
    }

    /// Checks that the arrays fit each other and that every text is there once.
    ///
    /// # Errors
    /// [`TokenizerError::Invalid`] naming the key.
    pub fn check(&self) -> Result<(), TokenizerError> {
        let refuse = |name: &str, message| Err(TokenizerError::invalid(key(name), message));
        let n_tokens = self.tokens.len();
        if n_tokens == 0 || n_tokens > Self::TOKENS_MAX {
            let message = format!("{n_tokens} tokens; allowed: 1 to {}", Self::TOKENS_MAX);
            return refuse("tokens", message);
        }
        if self.kinds.len() != n_tokens {
            let message = format!("{} entries for {n_tokens} tokens", self.kinds.len());
            return refuse("token_type", message);
        }
        if !self.scores.is_empty() && self.scores.len() != n_tokens {
            let message = format!("{} entries for {n_tokens} tokens", self.scores.len());
            return refuse("scores", message);
        }
        if let Some(at) = self.scores.iter().position(|score| score.is_nan()) {
            return refuse(&format!("scores[{at}]"), "is not a number".to_owned());
        }
        let long = self.tokens.iter().position(|token| token.len() > Self::TOKEN_BYTES_MAX);
        if let Some(at) = long {
            let message = format!("{} bytes; at most 65536", self.tokens[at].len());
            return refuse(&format!("tokens[{at}]"), message);
        }
        let roles = &self.roles;
        let named = [roles.bos, roles.eos, roles.eot, roles.eom, roles.unknown, roles.padding];
        let mut named = named.iter().flatten().chain(&roles.fim_ends);
        if let Some(outside) = named.find(|id| id.index() >= n_tokens) {
            let message = format!("a role is token {}'s, of {n_tokens} tokens", outside.0);
            return refuse("tokens", message);
        }
        self.check_unique()
    }

    fn check_unique(&self) -> Result<(), TokenizerError> {
        let mut seen: HashMap<&str, usize> = HashMap::with_capacity(self.tokens.len());
        for (at, token) in self.tokens.iter().enumerate() {
            // Empty texts fill tables and are never encoded.
            if token.is_empty() {
                continue;
            }
            if let Some(first) = seen.insert(token, at) {
                let message = format!("{token:?} stands twice, first at {first}");
                return Err(TokenizerError::invalid(key(&format!("tokens[{at}]")), message));
            }
        }
        Ok(())
    }

    /// Whether tokens are spelled in GPT-2's byte characters.
    pub(super) fn is_byte_level(&self) -> bool {
        let pipeline = self.huggingface.as_ref();
        self.model == "gpt2" || pipeline.is_some_and(|pipeline| pipeline.is_byte_level)
    }

    /// Every token that a text may be cut into, with its text.
    pub(super) fn spellable(&self) -> impl Iterator<Item = (TokenId, &str)> {
        self.tokens.iter().zip(&self.kinds).enumerate().filter_map(|(id, (token, kind))| {
            let plain = matches!(kind, TokenKind::Normal | TokenKind::UserDefined);
            (plain && !token.is_empty()).then_some((TokenId(id as u32), token.as_str()))
        })
    }

    /// The 256 byte tokens spelled `<0x00>` to `<0xFF>`, where there.
    pub(super) fn byte_tokens(&self) -> Box<[Option<TokenId>; 256]> {
        let mut found = Box::new([None; 256]);
        for (id, token) in self.tokens.iter().enumerate() {
            if let Some(byte) = byte_of(token).filter(|_| self.kinds[id] == TokenKind::Byte) {
                found[usize::from(byte)] = Some(TokenId(id as u32));
            }
        }
        found
    }
}

/// The byte that a text such as `<0x0A>` names.
pub(super) fn byte_of(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let plain = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    plain.then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

fn texts(metadata: &Metadata, key: &str, most: usize) -> Result<Vec<String>, TokenizerError> {
    let texts = metadata.texts(key)?;
    let count = metadata.array(key)?.len();
    if count > most {
        let message = format!("{count} entries; at most {most}");
        return Err(metadata.refuse(key, message).into());
    }
    Ok(texts.map(|text| text.map(str::to_owned)).collect::<Result<_, FormatError>>()?)
}

fn roles(metadata: &Metadata, n_tokens: usize) -> Result<RoleTokens, TokenizerError> {
    let role = |name: &str| -> Result<Option<TokenId>, FormatError> {
        let id = metadata.u32_opt(&key(&format!("{name}_token_id")))?;
        Ok(id.filter(|id| (*id as usize) < n_tokens).map(TokenId))
    };
    let mut fim_ends = Vec::new();
    for name in ["fim_pad", "fim_rep", "fim_sep"] {
        fim_ends.extend(role(name)?);
    }
    Ok(RoleTokens {
        bos: role("bos")?,
        eos: role("eos")?,
        eot: role("eot")?,
        eom: role("eom")?,
        unknown: role("unknown")?,
        padding: role("padding")?,
        fim_ends,
    })
}
