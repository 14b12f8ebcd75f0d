//! Finds the parts of a template's expressions: enough of Jinja's syntax to see operators, brackets
//! and texts.

use std::ops::Range;

/// A part of an expression.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Name,
    Number,
    Text,
    /// `(`, `[`, `{`.
    Open,
    /// `)`, `]`, `}`.
    Close,
    Mark,
}

#[derive(Clone, Debug)]
pub(super) struct Part {
    pub kind: Kind,
    pub place: Range<usize>,
}

/// The insides of `{{ }}` and `{% %}`, without comments and raw blocks.
pub(super) fn tags(source: &str) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(open) = source[at..].find('{').map(|found| at + found) {
        let close = match source.as_bytes().get(open + 1) {
            Some(b'{') => "}}",
            Some(b'%') => "%}",
            Some(b'#') => {
                let inside = open + 2;
                let end = source[inside..].find("#}");
                let end = end.map_or(source.len(), |end| inside + end + 2);
                at = end;
                continue;
            }
            _ => {
                at = open + 1;
                continue;
            }
        };
        let end = tag_end(source, open + 2, close);
        found.push(open + 2..end);
        let word =
            source[open + 2..end].trim_matches(|c: char| c.is_whitespace() || "-+".contains(c));
        at = if close == "%}" && word == "raw" { raw_end(source, end) } else { end };
    }
    found
}

fn raw_end(source: &str, from: usize) -> usize {
    source[from..].find("endraw").map_or(source.len(), |end| from + end)
}

/// Where a tag closes: its mark outside of texts and brackets.
fn tag_end(source: &str, from: usize, close: &str) -> usize {
    let bytes = source.as_bytes();
    let (mut at, mut depth) = (from, 0usize);
    while at < bytes.len() {
        match bytes[at] {
            b'"' | b'\'' => {
                at = text_end(bytes, at);
                continue;
            }
            _ if depth == 0 && source.as_bytes()[at..].starts_with(close.as_bytes()) => return at,
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        at += 1;
    }
    bytes.len()
}

/// Behind the closing quote of the text that starts here.
fn text_end(bytes: &[u8], start: usize) -> usize {
    let mut at = start + 1;
    while at < bytes.len() && bytes[at] != bytes[start] {
        at += if bytes[at] == b'\\' { 2 } else { 1 };
    }
    (at + 1).min(bytes.len())
}

pub(super) fn parts(source: &str, tag: Range<usize>) -> Vec<Part> {
    let bytes = source.as_bytes();
    let mut parts = Vec::new();
    let mut at = tag.start;
    while at < tag.end {
        let byte = bytes[at];
        let name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte >= 0x80;
        let run = |from: usize| {
            let length = bytes[from..tag.end].iter().position(|byte| !name(*byte));
            length.map_or(tag.end, |length| from + length)
        };
        let (kind, end) = match byte {
            b'"' | b'\'' => (Kind::Text, text_end(bytes, at).min(tag.end)),
            b'0'..=b'9' => (Kind::Number, run(at)),
            byte if name(byte) => (Kind::Name, run(at)),
            b'(' | b'[' | b'{' => (Kind::Open, at + 1),
            b')' | b']' | b'}' => (Kind::Close, at + 1),
            byte if byte.is_ascii_whitespace() => {
                at += 1;
                continue;
            }
            _ => (Kind::Mark, at + 1),
        };
        parts.push(Part { kind, place: at..end });
        at = end;
    }
    parts
}
