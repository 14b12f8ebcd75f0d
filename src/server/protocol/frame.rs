//! Cuts a byte stream into lines with a bound on their length. Knows bytes only.

/// Capacity that a buffer may keep while it is empty of large lines.
const KEPT_BYTES_MAX: usize = 64 * 1024;

/// A line is longer than allowed; nothing more can be read from its stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameTooLarge {
    /// Longest line allowed, without its line end.
    pub limit: usize,
}

/// Bytes that came and are not yet lines. Holds at most the longest line, its end, and one read.
#[derive(Debug)]
pub struct FrameBuffer {
    bytes: Vec<u8>,
    /// Everything before is consumed.
    start: usize,
    /// No line end lies before.
    scanned: usize,
    frame_bytes_max: usize,
}

impl FrameBuffer {
    /// An empty buffer for lines of at most `frame_bytes_max` bytes.
    pub fn new(frame_bytes_max: usize) -> Self {
        Self { bytes: Vec::new(), start: 0, scanned: 0, frame_bytes_max }
    }

    /// Where the next bytes are to be appended, with room for at least `room_bytes`.
    pub fn space(&mut self, room_bytes: usize) -> &mut Vec<u8> {
        self.compact();
        self.bytes.reserve(room_bytes);
        &mut self.bytes
    }

    /// The next whole line without `\n` and without a `\r` before it; `None` if there is none yet.
    ///
    /// # Errors
    /// [`FrameTooLarge`] once a line is known to be too long, with or without its end.
    pub fn next_frame(&mut self) -> Result<Option<&[u8]>, FrameTooLarge> {
        let end = self.bytes[self.scanned..].iter().position(|byte| *byte == b'\n');
        let Some(end) = end.map(|offset| self.scanned + offset) else {
            self.scanned = self.bytes.len();
            // One byte more may be the `\r` of a line that is just short enough.
            let has_return = self.bytes.last() == Some(&b'\r');
            self.check(self.bytes.len() - self.start - usize::from(has_return))?;
            return Ok(None);
        };
        let mut stop = end;
        if stop > self.start && self.bytes[stop - 1] == b'\r' {
            stop -= 1;
        }
        self.check(stop - self.start)?;
        let start = std::mem::replace(&mut self.start, end + 1);
        self.scanned = end + 1;
        Ok(Some(&self.bytes[start..stop]))
    }

    /// Bytes of a line whose end has not come.
    pub fn partial_bytes(&self) -> usize {
        self.bytes.len() - self.start
    }

    /// Gives back memory that the bytes at hand don't need.
    pub fn release(&mut self) {
        self.compact();
        if self.bytes.is_empty() {
            self.bytes = Vec::new();
        } else if self.bytes.capacity() > KEPT_BYTES_MAX && self.bytes.len() < KEPT_BYTES_MAX / 2 {
            self.bytes.shrink_to(KEPT_BYTES_MAX);
        }
    }

    fn check(&self, frame_bytes: usize) -> Result<(), FrameTooLarge> {
        if frame_bytes > self.frame_bytes_max {
            return Err(FrameTooLarge { limit: self.frame_bytes_max });
        }
        Ok(())
    }

    fn compact(&mut self) {
        if self.start > 0 {
            self.bytes.drain(..self.start);
            self.scanned -= self.start;
            self.start = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames(buffer: &mut FrameBuffer) -> Vec<Vec<u8>> {
        let mut found = Vec::new();
        while let Some(frame) = buffer.next_frame().unwrap() {
            found.push(frame.to_vec());
        }
        found
    }

    #[test]
    fn a_text_split_anywhere_gives_the_same_lines() {
        let text = b"one\r\n\ntwo\n\r\nthree";
        for split in 0..=text.len() {
            let mut buffer = FrameBuffer::new(5);
            let mut found = Vec::new();
            for part in [&text[..split], &text[split..]] {
                buffer.space(part.len()).extend_from_slice(part);
                found.extend(frames(&mut buffer));
                buffer.release();
            }
            let wanted: [&[u8]; 4] = [b"one", b"", b"two", b""];
            assert_eq!(found, wanted, "split at {split}");
            assert_eq!(buffer.partial_bytes(), 5);
        }
    }

    #[test]
    fn the_longest_line_passes_and_one_byte_more_does_not() {
        for end in ["\n", "\r\n"] {
            let mut buffer = FrameBuffer::new(8);
            buffer.space(16).extend_from_slice(format!("12345678{end}").as_bytes());
            assert_eq!(frames(&mut buffer), [b"12345678"]);
            buffer.space(16).extend_from_slice(format!("123456789{end}").as_bytes());
            assert_eq!(buffer.next_frame(), Err(FrameTooLarge { limit: 8 }));
        }
        let mut buffer = FrameBuffer::new(8);
        buffer.space(16).extend_from_slice(b"12345678\r");
        assert_eq!(buffer.next_frame(), Ok(None));
        buffer.space(16).extend_from_slice(b"9");
        assert_eq!(buffer.next_frame(), Err(FrameTooLarge { limit: 8 }));
    }

    #[test]
    fn memory_is_given_back_after_a_long_line() {
        let mut buffer = FrameBuffer::new(1 << 20);
        buffer.space(1 << 20).resize(1 << 20, b'x');
        buffer.space(1).push(b'\n');
        assert_eq!(frames(&mut buffer).len(), 1);
        buffer.release();
        assert_eq!(buffer.bytes.capacity(), 0);
    }
}
