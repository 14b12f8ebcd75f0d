//! Vocabularies that come as a `tokenizer.json`: the `tokenizers` crate cuts and merges plain text
//! as the file says. Special tokens, BOS and decoding are ours, as for every other kind, so that a
//! user's text never becomes a special token.

use super::vocabulary::{RoleTokens, TokenKind, Vocabulary, byte_of};
use super::{TokenizerError, byte_level};
use crate::formats::Metadata;
use crate::units::TokenId;
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// GGUF's own key for the file's text.
const JSON: &str = "tokenizer.huggingface.json";

/// How errors name a part of the file.
fn field(name: &str) -> String {
    format!("tokenizer.json: {name}")
}

/// The parts of the file that are looked at here; the crate reads the others.
#[derive(Deserialize)]
struct File<'a> {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    #[serde(borrow)]
    normalizer: Option<&'a RawValue>,
    #[serde(borrow)]
    pre_tokenizer: Option<&'a RawValue>,
    post_processor: Option<Value>,
    decoder: Option<Value>,
    #[serde(borrow)]
    model: &'a RawValue,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
    #[serde(default)]
    special: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
}

#[derive(Deserialize)]
struct ModelHead {
    #[serde(rename = "type")]
    kind: Option<String>,
    #[serde(default)]
    byte_fallback: bool,
    vocab: HashMap<String, u32>,
}

/// How plain text becomes tokens, as data.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pipeline {
    /// A `tokenizer.json` with normaliser, pre-tokenizer and model alone.
    json: String,
    /// The same for text after the first fragment, where that is not prefixed.
    json_later: Option<String>,
    /// Tokens are spelled in GPT-2's byte characters.
    pub(super) is_byte_level: bool,
    /// What this version does otherwise than the file says, in words.
    pub(super) warnings: Vec<String>,
}

/// The vocabulary of a checkpoint whose `tokenizer.ggml.model` is `huggingface`.
pub(super) fn vocabulary(metadata: &Metadata) -> Result<Vocabulary, TokenizerError> {
    let architecture = metadata.str("general.architecture")?;
    let size = metadata.u32(&format!("{architecture}.vocab_size"))? as usize;
    if size > Vocabulary::TOKENS_MAX {
        let message = format!("{size} tokens; allowed: at most {}", Vocabulary::TOKENS_MAX);
        return Err(TokenizerError::invalid("vocab_size", message));
    }
    let missing = || TokenizerError::invalid("tokenizer.json", "is missing beside config.json");
    let text = metadata.str_opt(JSON)?.ok_or_else(missing)?;
    let file: File<'_> = serde_json::from_str(text)
        .map_err(|error| TokenizerError::invalid(field("file"), error.to_string()))?;
    let head: ModelHead = serde_json::from_str(file.model.get())
        .map_err(|error| TokenizerError::invalid(field("model"), error.to_string()))?;
    if head.kind.as_deref().is_some_and(|kind| kind != "BPE") {
        return Err(TokenizerError::Unknown {
            field: "tokenizer.json: model.type",
            got: head.kind.unwrap_or_default(),
            known: vec!["BPE"],
        });
    }
    let mut pipeline = pipeline(&file)?;
    let mut vocabulary = Vocabulary {
        model: "huggingface".to_owned(),
        tokens: vec![String::new(); size],
        kinds: vec![TokenKind::Unused; size],
        add_bos: metadata.bool_opt("tokenizer.ggml.add_bos_token")?,
        add_eos: metadata.bool_opt("tokenizer.ggml.add_eos_token")?,
        add_space_prefix: Some(prefixes_space(&file)?),
        ..Vocabulary::default()
    };
    for (token, id) in head.vocab {
        let byte = head.byte_fallback && byte_of(&token).is_some();
        let kind = if byte { TokenKind::Byte } else { TokenKind::Normal };
        let Some(slot) = vocabulary.kinds.get_mut(id as usize) else {
            let message = format!("{token:?} is token {id}; vocab_size in config.json is {size}");
            return Err(TokenizerError::invalid(field("model.vocab"), message));
        };
        if *slot != TokenKind::Unused {
            let message = format!("token {id} stands twice, once as {token:?}");
            return Err(TokenizerError::invalid(field("model.vocab"), message));
        }
        *slot = kind;
        vocabulary.tokens[id as usize] = token;
    }
    for added in &file.added_tokens {
        add(added, &mut vocabulary, &mut pipeline.warnings);
    }
    let (bos, eos) = roles(metadata, &mut vocabulary)?;
    let template = file.post_processor.as_ref();
    let starts_with = |id: Option<TokenId>, at: Side| {
        let id = id.map(|id| vocabulary.tokens[id.index()].as_str());
        id.is_some() && template.and_then(|template| template_token(template, at)) == id
    };
    let (adds_bos, adds_eos) = (starts_with(bos, Side::First), starts_with(eos, Side::Last));
    vocabulary.add_bos = vocabulary.add_bos.or(Some(adds_bos));
    vocabulary.add_eos = vocabulary.add_eos.or(Some(adds_eos));
    vocabulary.huggingface = Some(pipeline);
    vocabulary.check()?;
    Ok(vocabulary)
}

fn add(added: &AddedToken, vocabulary: &mut Vocabulary, warnings: &mut Vec<String>) {
    let at = added.id as usize;
    if at >= vocabulary.tokens.len() {
        // Gemma's has a token for images, which its text model lacks.
        warnings.push(format!(
            "tokenizer.json: token {at}, {:?}, is beyond the model's vocabulary and left out",
            added.content
        ));
        return;
    }
    if added.lstrip || added.rstrip {
        warnings.push(format!(
            "tokenizer.json: spaces beside {:?} stay, although it asks to drop them",
            added.content
        ));
    }
    vocabulary.tokens[at].clone_from(&added.content);
    let kind = if added.special { TokenKind::Control } else { TokenKind::UserDefined };
    vocabulary.kinds[at] = kind;
}

/// Sets the roles; returns the tokens that begin and end a sequence.
fn roles(
    metadata: &Metadata,
    vocabulary: &mut Vocabulary,
) -> Result<(Option<TokenId>, Option<TokenId>), TokenizerError> {
    let size = vocabulary.tokens.len();
    let within = |id: &u32| (*id as usize) < size;
    let ends = match metadata.array_opt("tokenizer.huggingface.eos_token_ids")? {
        Some(ids) => ids.integers()?.map(|id| id as u32).filter(within).map(TokenId).collect(),
        None => Vec::new(),
    };
    let by_id = metadata.u32_opt("tokenizer.ggml.bos_token_id")?.filter(within).map(TokenId);
    let by_name = |name: &str| -> Result<Option<TokenId>, TokenizerError> {
        let text = metadata.str_opt(&format!("tokenizer.huggingface.{name}"))?;
        let found = text.and_then(|text| vocabulary.tokens.iter().position(|token| token == text));
        Ok(found.map(|id| TokenId(id as u32)))
    };
    let (bos, eos) = (by_name("bos_token")?.or(by_id), by_name("eos_token")?);
    let eos = eos.or(ends.first().copied());
    let (unknown, padding) = (by_name("unk_token")?, by_name("pad_token")?);
    vocabulary.roles =
        RoleTokens { bos, eos, eot: None, eom: None, unknown, padding, fim_ends: ends };
    for id in [bos, eos].into_iter().flatten().chain(vocabulary.roles.fim_ends.clone()) {
        vocabulary.kinds[id.index()] = TokenKind::Control;
    }
    Ok((bos, eos))
}

/// An end of a sequence.
#[derive(Clone, Copy)]
enum Side {
    First,
    Last,
}

/// The special token that the post-processor puts at one end of a text.
fn template_token(processor: &Value, side: Side) -> Option<&str> {
    if let Some(list) = processor["processors"].as_array() {
        return list.iter().find_map(|one| template_token(one, side));
    }
    let single = processor["single"].as_array()?;
    let piece = match side {
        Side::First => single.first(),
        Side::Last => single.last(),
    };
    piece?["SpecialToken"]["id"].as_str()
}

/// Whether some part of a nested description is of a type.
fn has_type(part: Option<&Value>, wanted: &str) -> bool {
    let Some(part) = part else { return false };
    let lists = ["pretokenizers", "normalizers", "decoders"].iter();
    let inside = lists.filter_map(|list| part[*list].as_array()).flatten();
    part["type"].as_str() == Some(wanted) || inside.into_iter().any(|p| has_type(Some(p), wanted))
}

fn parsed(part: Option<&RawValue>, name: &str) -> Result<Option<Value>, TokenizerError> {
    let parse = |raw: &RawValue| {
        serde_json::from_str(raw.get())
            .map_err(|error| TokenizerError::invalid(field(name), error.to_string()))
    };
    part.map(parse).transpose()
}

/// Whether a space is put before a text, and taken away again when it is decoded.
fn prefixes_space(file: &File<'_>) -> Result<bool, TokenizerError> {
    let normalizer = parsed(file.normalizer, "normalizer")?;
    let pre_tokenizer = parsed(file.pre_tokenizer, "pre_tokenizer")?;
    let never = metaspace(pre_tokenizer.as_ref())
        .is_some_and(|part| part["prepend_scheme"] == "never" || part["add_prefix_space"] == false);
    Ok(has_type(normalizer.as_ref(), "Prepend")
        || (has_type(pre_tokenizer.as_ref(), "Metaspace") && !never))
}

/// The description of a `Metaspace`, alone or in a sequence.
fn metaspace(part: Option<&Value>) -> Option<&Value> {
    let part = part?;
    if part["type"] == "Metaspace" {
        return Some(part);
    }
    part["pretokenizers"].as_array()?.iter().find(|part| part["type"] == "Metaspace")
}

fn pipeline(file: &File<'_>) -> Result<Pipeline, TokenizerError> {
    let compose = |pre_tokenizer: &str| {
        format!(
            r#"{{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],
            "normalizer":{},"pre_tokenizer":{pre_tokenizer},"post_processor":null,"decoder":null,
            "model":{}}}"#,
            file.normalizer.map_or("null", RawValue::get),
            file.model.get()
        )
    };
    let pre_tokenizer = parsed(file.pre_tokenizer, "pre_tokenizer")?;
    let first_only =
        metaspace(pre_tokenizer.as_ref()).is_some_and(|part| part["prepend_scheme"] == "first");
    let json_later = pre_tokenizer.clone().filter(|_| first_only).map(|mut later| {
        never_prefix(&mut later);
        compose(&later.to_string())
    });
    let byte_level = has_type(file.decoder.as_ref(), "ByteLevel")
        || has_type(pre_tokenizer.as_ref(), "ByteLevel");
    Ok(Pipeline {
        json: compose(file.pre_tokenizer.map_or("null", RawValue::get)),
        json_later,
        is_byte_level: byte_level,
        warnings: Vec::new(),
    })
}

fn never_prefix(part: &mut Value) {
    if part["type"] == "Metaspace" {
        part["prepend_scheme"] = "never".into();
        if let Some(part) = part.as_object_mut() {
            part.remove("add_prefix_space");
        }
    }
    for part in part["pretokenizers"].as_array_mut().into_iter().flatten() {
        never_prefix(part);
    }
}

/// Where a run of plain text stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Position {
    /// At the start of the whole text.
    Start,
    /// After a special token.
    Later,
}

/// Cuts and merges plain text.
pub(super) struct PlainText {
    first: tokenizers::Tokenizer,
    later: Option<tokenizers::Tokenizer>,
    /// The bytes that the vocabulary has, where it is spelled in byte characters.
    present: Option<Box<[bool; 256]>>,
}

impl PlainText {
    pub(super) fn new(pipeline: &Pipeline) -> Result<Self, TokenizerError> {
        let read = |json: &String| {
            json.parse::<tokenizers::Tokenizer>()
                .map_err(|error| TokenizerError::invalid(field("file"), error.to_string()))
        };
        let first = read(&pipeline.json)?;
        let later = pipeline.json_later.as_ref().map(read).transpose()?;
        let present = pipeline.is_byte_level.then(|| {
            let has = |byte: usize| {
                first.token_to_id(&byte_level::char_of(byte as u8).to_string()).is_some()
            };
            Box::new(std::array::from_fn(has))
        });
        Ok(Self { first, later, present })
    }

    /// Appends the tokens of a run of plain text.
    pub(super) fn encode(
        &self,
        text: &str,
        position: Position,
        ids: &mut Vec<TokenId>,
    ) -> Result<(), TokenizerError> {
        let later = self.later.as_ref().filter(|_| position == Position::Later);
        let tokenizer = later.unwrap_or(&self.first);
        if let Some(present) = &self.present {
            // The crate would drop such a byte without a word.
            let absent = text.bytes().position(|byte| !present[usize::from(byte)]);
            if let Some(offset) = absent {
                return Err(TokenizerError::Unencodable { byte: text.as_bytes()[offset], offset });
            }
        }
        // A panic in the crate is one text's fault, or the file's: never the service's.
        let encoded = catch_unwind(AssertUnwindSafe(|| tokenizer.encode_fast(text, false)));
        let failed = |message: String| TokenizerError::invalid(field("model"), message);
        let encoding = encoded
            .map_err(|_| failed("the text can't be encoded with it".to_owned()))?
            .map_err(|error| failed(error.to_string()))?;
        ids.extend(encoding.get_ids().iter().map(|id| TokenId(*id)));
        Ok(())
    }
}
