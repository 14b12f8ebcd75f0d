//! SentencePiece's byte pair encoding (Llama, Gemma): of all neighbours whose joined text is a
//! token, the pair with the best score is joined, the leftmost of equals, until none is left; what
//! is then no token is spelled in byte tokens.
//!
//! ```text
//! symbols = characters of the text, a linked list
//! heap = every neighbouring pair whose text is a token, by (score, leftmost)
//! while pop (left, right): if neither changed since: join; push the two new neighbouring pairs
//! ```
//! A join removes a symbol and pushes at most two pairs, so the heap sees at most 3n entries:
//! O(n log n). The `tokenizers` crate ranks merges by pair, not by the joined token's score, and so
//! breaks ties between two spellings of one token differently.

use super::vocabulary::{TokenKind, Vocabulary};
use super::{SPACE_MARK, TokenizerError};
use crate::units::TokenId;
use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

/// No symbol.
const NONE: u32 = u32::MAX;

/// A run of the text that is, for now, one piece.
#[derive(Clone, Copy)]
struct Symbol {
    /// Where it starts, in bytes.
    start: u32,
    /// Its bytes; 0 once it was joined to its left neighbour.
    bytes: u32,
    previous: u32,
    next: u32,
}

/// Two neighbours that may be joined.
struct Pair {
    score: f32,
    left: u32,
    right: u32,
    /// Bytes of both when the pair was found; a difference shows that one changed since.
    bytes: u32,
}

impl Ord for Pair {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then_with(|| other.left.cmp(&self.left))
    }
}

impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Pair {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Pair {}

/// Buffers of one text, used again for each word.
#[derive(Default)]
struct Scratch {
    symbols: Vec<Symbol>,
    heap: BinaryHeap<Pair>,
}

/// Joins characters by the scores of the joined tokens.
pub(super) struct ScoreMerges {
    tokens: HashMap<Box<str>, (TokenId, f32)>,
    bytes: Box<[Option<TokenId>; 256]>,
    unknown: Option<TokenId>,
    token_bytes_max: usize,
    /// No token has a space after something else, so no join reaches across the start of a word and
    /// words can be joined one by one: the same tokens with a heap of a few entries.
    words_apart: bool,
}

impl ScoreMerges {
    /// The `llama` kind.
    pub(super) fn new(vocabulary: &Vocabulary) -> Result<Self, TokenizerError> {
        if vocabulary.scores.is_empty() {
            return Err(TokenizerError::invalid("tokenizer.ggml.scores", "there are none"));
        }
        let mut tokens = HashMap::with_capacity(vocabulary.tokens.len());
        let mut token_bytes_max = 0;
        let mut words_apart = true;
        for (id, token) in vocabulary.spellable() {
            words_apart &= next_word(token).is_none();
            token_bytes_max = token_bytes_max.max(token.len());
            tokens.insert(token.into(), (id, vocabulary.scores[id.index()]));
        }
        let bytes = vocabulary.byte_tokens();
        // A padding entry or a control token that is called unknown would steer the model.
        let unknown = vocabulary.roles.unknown.or_else(|| {
            let at = vocabulary.kinds.iter().position(|kind| *kind == TokenKind::Unknown)?;
            Some(TokenId(at as u32))
        });
        if unknown.is_none() && bytes.contains(&None) {
            let message = "neither all 256 byte tokens nor an unknown token are there";
            return Err(TokenizerError::invalid("tokenizer.ggml.tokens", message));
        }
        Ok(Self { tokens, bytes, unknown, token_bytes_max, words_apart })
    }

    /// Appends the tokens of a run of plain text.
    pub(super) fn encode(&self, text: &str, ids: &mut Vec<TokenId>) -> Result<(), TokenizerError> {
        let marked = text.replace(' ', SPACE_MARK);
        if u32::try_from(marked.len()).is_err() {
            let message = format!("{} bytes at once; at most 4 GiB", marked.len());
            return Err(TokenizerError::invalid("text", message));
        }
        let mut scratch = Scratch::default();
        let mut rest = marked.as_str();
        while !rest.is_empty() {
            let end = next_word(rest).filter(|_| self.words_apart).unwrap_or(rest.len());
            let (word, after) = rest.split_at(end);
            self.encode_word(word, &mut scratch, ids);
            rest = after;
        }
        Ok(())
    }

    fn encode_word(&self, word: &str, scratch: &mut Scratch, ids: &mut Vec<TokenId>) {
        list_characters(word, &mut scratch.symbols);
        self.join(word, scratch);
        for symbol in scratch.symbols.iter().filter(|symbol| symbol.bytes > 0) {
            let start = symbol.start as usize;
            let piece = &word[start..start + symbol.bytes as usize];
            match self.tokens.get(piece) {
                Some((id, _)) => ids.push(*id),
                None => self.spell_in_bytes(piece, ids),
            }
        }
    }

    fn spell_in_bytes(&self, piece: &str, ids: &mut Vec<TokenId>) {
        let bytes = piece.bytes().map(|byte| self.bytes[usize::from(byte)]);
        if bytes.clone().all(|id| id.is_some()) {
            ids.extend(bytes.flatten());
        } else {
            ids.extend(self.unknown);
        }
    }

    fn join(&self, text: &str, Scratch { symbols, heap }: &mut Scratch) {
        let pairs = (1..symbols.len() as u32)
            .filter_map(|right| self.pair(text, symbols, right - 1, right));
        heap.extend(pairs);
        while let Some(pair) = heap.pop() {
            let (left, right) = (symbols[pair.left as usize], symbols[pair.right as usize]);
            let stale = left.bytes == 0 || right.bytes == 0;
            if stale || left.bytes + right.bytes != pair.bytes {
                continue;
            }
            symbols[pair.left as usize].bytes = pair.bytes;
            symbols[pair.left as usize].next = right.next;
            symbols[pair.right as usize].bytes = 0;
            if right.next != NONE {
                symbols[right.next as usize].previous = pair.left;
                heap.extend(self.pair(text, symbols, pair.left, right.next));
            }
            if left.previous != NONE {
                heap.extend(self.pair(text, symbols, left.previous, pair.left));
            }
        }
    }

    /// The pair of two neighbours, if their joined text is a token.
    fn pair(&self, text: &str, symbols: &[Symbol], left: u32, right: u32) -> Option<Pair> {
        let (first, second) = (symbols[left as usize], symbols[right as usize]);
        let bytes = first.bytes + second.bytes;
        if bytes as usize > self.token_bytes_max {
            return None;
        }
        let start = first.start as usize;
        let (_, score) = self.tokens.get(&text[start..start + bytes as usize])?;
        Some(Pair { score: *score, left, right, bytes })
    }
}

/// Where a text's second word starts: at the first `▁` that follows something else.
fn next_word(text: &str) -> Option<usize> {
    let first = text.len() - text.trim_start_matches(SPACE_MARK).len();
    text[first..].find(SPACE_MARK).map(|at| first + at)
}

/// One symbol per character, linked.
fn list_characters(text: &str, symbols: &mut Vec<Symbol>) {
    symbols.clear();
    symbols.extend(text.char_indices().zip(0u32..).map(|((start, character), at)| Symbol {
        start: start as u32,
        bytes: character.len_utf8() as u32,
        previous: at.checked_sub(1).unwrap_or(NONE),
        next: at + 1,
    }));
    if let Some(last) = symbols.last_mut() {
        last.next = NONE;
    }
}
