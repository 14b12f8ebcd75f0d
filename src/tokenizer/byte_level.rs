//! GPT-2's way to write any byte as a printable character, so that byte pair merges can be written
//! as text: bytes that are printable in Latin-1 stand for themselves, the others follow from U+0100
//! on, in ascending order.

use std::sync::LazyLock;

/// Latin-1's printable characters without the soft hyphen.
fn is_printable(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF)
}

static CHARS: LazyLock<[char; 256]> = LazyLock::new(|| {
    let mut chars = ['\0'; 256];
    let mut next = '\u{100}';
    for (byte, slot) in (0..=u8::MAX).zip(&mut chars) {
        *slot = if is_printable(byte) { char::from(byte) } else { next };
        if !is_printable(byte) {
            // 68 bytes are not printable, so `next` stays below U+0144.
            next = char::from_u32(u32::from(next) + 1).unwrap_or(next);
        }
    }
    chars
});

/// The bytes of U+0100 and up, in order.
static UNPRINTABLE: LazyLock<Vec<u8>> =
    LazyLock::new(|| (0..=u8::MAX).filter(|byte| !is_printable(*byte)).collect());

/// The character that stands for a byte.
pub(super) fn char_of(byte: u8) -> char {
    CHARS[usize::from(byte)]
}

/// The byte that a character stands for, if any.
pub(super) fn byte_of(character: char) -> Option<u8> {
    match u32::from(character) {
        code @ 0..=0xFF => u8::try_from(code).ok().filter(|byte| is_printable(*byte)),
        code => UNPRINTABLE.get(code as usize - 0x100).copied(),
    }
}

/// Appends the characters of a text's bytes.
pub(super) fn spell(text: &str, spelled: &mut String) {
    spelled.extend(text.bytes().map(char_of));
}

/// The bytes of a token's text; characters that stand for no byte give their own UTF-8.
pub(super) fn bytes_of(token: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(token.len());
    for character in token.chars() {
        match byte_of(character) {
            Some(byte) => bytes.push(byte),
            None => bytes.extend(character.encode_utf8(&mut [0; 4]).bytes()),
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_its_own_character_and_comes_back() {
        for byte in 0..=u8::MAX {
            assert_eq!(byte_of(char_of(byte)), Some(byte));
        }
        assert_eq!((char_of(b' '), char_of(b'\n')), ('Ġ', 'Ċ'));
        assert_eq!(byte_of(' '), None);
        assert_eq!(byte_of('▁'), None);
    }
}
