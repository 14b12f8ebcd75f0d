//! Says what a file is that should have been GGUF: most "corrupt" models are a web page.

/// First bytes and what they mean. GGUF's elder relatives stand in the byte order of the disk.
const SIGNATURES: [(&[u8], &str); 17] = [
    (b"FUGG", "a GGUF file with its bytes swapped"),
    (b"tjgg", "a GGJT file of 2023, the format before GGUF; convert it again from the original"),
    (b"fmgg", "a GGMF file of 2023, a format before GGUF; convert it again from the original"),
    (b"lmgg", "a GGML file of 2023, a format before GGUF; convert it again from the original"),
    (b"algg", "a GGLA adapter of 2023, a format before GGUF"),
    (
        b"version https://git-lfs",
        "a git-lfs pointer; run `git lfs pull` to fetch the file it stands for",
    ),
    (b"PK\x03\x04", "a ZIP archive, perhaps a PyTorch checkpoint; convert it to GGUF"),
    (b"\x80\x02", "a Python pickle, perhaps a PyTorch checkpoint; convert it to GGUF"),
    (b"\x89HDF", "an HDF5 file; convert it to GGUF"),
    (b"\x1f\x8b", "gzip data; unpack it"),
    (b"BZh", "bzip2 data; unpack it"),
    (b"\xfd7zXZ", "xz data; unpack it"),
    (b"(\xb5/\xfd", "zstd data; unpack it"),
    (b"7z\xbc\xaf", "a 7-Zip archive; unpack it"),
    (b"\x7fELF", "a program"),
    (b"%PDF", "a PDF document"),
    (b"#!", "a script"),
];

/// How many leading bytes are looked at.
const LOOK_BYTES: usize = 512;

/// What a file that does not start with GGUF's magic looks like.
pub(super) fn describe(bytes: &[u8]) -> &'static str {
    let head = &bytes[..bytes.len().min(LOOK_BYTES)];
    if let Some((_, what)) = SIGNATURES.iter().find(|(start, _)| head.starts_with(start)) {
        return what;
    }
    // safetensors: a little-endian length, then that much JSON.
    if head.len() > 9 && head[8] == b'{' && head[6] == 0 && head[7] == 0 {
        return "a safetensors file; name it so, in a folder with its config.json";
    }
    if head.iter().all(|byte| *byte == 0) {
        return "nothing but zeros at its start; was the download interrupted?";
    }
    describe_text(head).unwrap_or("no format that is known here")
}

fn describe_text(head: &[u8]) -> Option<&'static str> {
    let text = match std::str::from_utf8(head) {
        Ok(text) => text,
        // The look may end inside a character.
        Err(error) if error.error_len().is_none() => {
            std::str::from_utf8(&head[..error.valid_up_to()]).ok()?
        }
        Err(_) => return None,
    };
    let text = text.trim_start_matches('\u{feff}').trim_start().to_ascii_lowercase();
    if text.starts_with("<!doctype html") || text.contains("<html") || text.starts_with("<head") {
        return Some("an HTML page; the download gave a web page instead of the file");
    }
    if text.starts_with("<?xml") || text.starts_with('<') {
        return Some("an XML document, perhaps a server's error message");
    }
    if text.starts_with('{') || text.starts_with('[') {
        return Some("JSON, perhaps a server's error message or a model's configuration");
    }
    let printable = text.chars().all(|c| !c.is_control() || c.is_whitespace());
    (printable && !text.is_empty()).then_some("a text, perhaps a server's error message")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_file_looks_like_is_said() {
        for (bytes, word) in [
            (&b"<!DOCTYPE html><html lang=en>"[..], "HTML"),
            (b"\xef\xbb\xbf\n  <HTML><body>", "HTML"),
            (b"<?xml version='1.0'?><Error><Code>AccessDenied", "XML"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git-lfs"),
            (b"PK\x03\x04\x14\x00", "ZIP"),
            (b"\x10\x01\x00\x00\x00\x00\x00\x00{\"__metadata__\":{}}", "safetensors"),
            (b"{\"error\":\"Repository not found\"}", "JSON"),
            (b"Not Found", "a text"),
            (b"tjgg\x03\x00\x00\x00", "GGJT"),
            (&[0; 600], "zeros"),
            (b"\xde\xad\xbe\xef\x01\x02", "no format"),
        ] {
            let said = describe(bytes);
            assert!(said.contains(word), "{said:?} lacks {word:?}");
        }
    }

    #[test]
    fn a_character_cut_by_the_look_is_no_binary() {
        let page = format!("<html>{}", "é".repeat(LOOK_BYTES));
        assert!(describe(page.as_bytes()).contains("HTML"));
    }
}
