//! Stop strings in a text that comes in parts.

use std::sync::Arc;

/// What a part of text gave.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StopOutput {
    /// Text that is certainly before any stop string.
    pub text: String,
    /// The stop string that was found: its place in the list given.
    pub stopped: Option<usize>,
}

/// One stop string: Knuth, Morris and Pratt's automaton over its bytes. The automaton is shared by
/// clones.
#[derive(Clone)]
struct Pattern {
    bytes: Arc<[u8]>,
    /// `borders[k]`: length of the longest proper prefix of `bytes[..k]` that is also its suffix.
    borders: Arc<[usize]>,
    /// How many of the pattern's first bytes the text ends with.
    matched: usize,
}

impl Pattern {
    fn new(text: &str) -> Self {
        let bytes = text.as_bytes().to_vec();
        let mut borders = vec![0; bytes.len() + 1];
        let mut border = 0;
        for at in 1..bytes.len() {
            while border > 0 && bytes[at] != bytes[border] {
                border = borders[border];
            }
            border += usize::from(bytes[at] == bytes[border]);
            borders[at + 1] = border;
        }
        Self { bytes: bytes.into(), borders: borders.into(), matched: 0 }
    }

    /// Whether the pattern ends with this byte.
    fn push(&mut self, byte: u8) -> bool {
        while self.matched > 0 && self.bytes[self.matched] != byte {
            self.matched = self.borders[self.matched];
        }
        self.matched += usize::from(self.bytes[self.matched] == byte);
        self.matched == self.bytes.len()
    }
}

/// Finds the first stop string that is complete (of those complete at the same byte, the longest),
/// however the text is cut into parts. Text that may be the start of one is held back. Linear in
/// the text, whatever the stop strings.
#[derive(Clone)]
pub struct StopMatcher {
    patterns: Vec<Pattern>,
    held: String,
    stopped: bool,
}

impl StopMatcher {
    /// For a list of stop strings; empty ones are never found.
    pub fn new(stops: &[String]) -> Self {
        let patterns = stops.iter().map(|stop| Pattern::new(stop)).collect();
        Self { patterns, held: String::new(), stopped: false }
    }

    /// Takes the next part. After a stop string was found, everything is swallowed.
    pub fn push(&mut self, part: &str) -> StopOutput {
        if self.stopped {
            return StopOutput::default();
        }
        let before = self.held.len();
        self.held.push_str(part);
        for (at, byte) in part.bytes().enumerate() {
            if let Some((which, bytes)) = self.step(byte) {
                self.stopped = true;
                let mut text = std::mem::take(&mut self.held);
                // A match starts at a pattern's first byte, so at a character.
                text.truncate(before + at + 1 - bytes);
                return StopOutput { text, stopped: Some(which) };
            }
        }
        let held_back = self.patterns.iter().map(|pattern| pattern.matched).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - held_back);
        StopOutput { text: std::mem::replace(&mut self.held, rest), stopped: None }
    }

    /// The longest pattern that ends with this byte: its place and length.
    fn step(&mut self, byte: u8) -> Option<(usize, usize)> {
        let mut found: Option<(usize, usize)> = None;
        for (which, pattern) in self.patterns.iter_mut().enumerate() {
            if pattern.bytes.is_empty() || !pattern.push(byte) {
                continue;
            }
            if found.is_none_or(|(_, bytes)| pattern.bytes.len() > bytes) {
                found = Some((which, pattern.bytes.len()));
            }
        }
        found
    }

    /// The end of the text: what was held back is no stop string.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Whether text is held back.
    pub fn holds_text(&self) -> bool {
        !self.held.is_empty()
    }
}
