//! Ids and sizes as newtypes, so that a block can't be passed for a token. Knows nothing else;
//! every layer above uses it.

use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::str::FromStr;

/// One entry of the vocabulary.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct TokenId(pub u32);

impl TokenId {
    /// The token as an index into a vocabulary-sized array.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for TokenId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}", self.0)
    }
}

/// One sequence inside the engine. Never reused while the process lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct SequenceId(pub u64);

/// One KV block of a tier: an index into that tier's store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct BlockId(pub u32);

impl BlockId {
    /// The block as an index into its tier's store.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// One batch pass. Counts up from 1 over the engine's whole life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct StepId(pub u64);

/// A number of bytes, written as `1536`, `24GiB`, `1.5 MiB`, `512KB` in configuration and flags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(pub u64);

/// Why a text is not a [`ByteSize`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{got:?} is no size in bytes; write a number with an optional unit, such as 24GiB")]
pub struct ByteSizeError {
    /// The text that came.
    pub got: String,
}

const UNITS: [(&str, f64); 9] = [
    ("", 1.0),
    ("b", 1.0),
    ("kb", 1e3),
    ("mb", 1e6),
    ("gb", 1e9),
    ("kib", 1024.0),
    ("mib", 1_048_576.0),
    ("gib", 1_073_741_824.0),
    ("tib", 1_099_511_627_776.0),
];

impl FromStr for ByteSize {
    type Err = ByteSizeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refuse = || ByteSizeError { got: text.to_owned() };
        let trimmed = text.trim();
        let split = trimmed
            .find(|c: char| !c.is_ascii_digit() && c != '.' && c != '_')
            .unwrap_or(trimmed.len());
        let (digits, unit) = trimmed.split_at(split);
        let digits = digits.replace('_', "");
        let unit = unit.trim().to_ascii_lowercase();
        let factor =
            UNITS.iter().find(|(name, _)| *name == unit).map(|(_, f)| *f).ok_or_else(refuse)?;
        if let (true, Ok(whole)) = (factor == 1.0, digits.parse::<u64>()) {
            return Ok(Self(whole));
        }
        let value = digits.parse::<f64>().map_err(|_| refuse())? * factor;
        if value.is_finite() && value < u64::MAX as f64 {
            Ok(Self(value as u64))
        } else {
            Err(refuse())
        }
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.0 as f64;
        let (unit, factor) = match self.0 {
            0..1024 => return write!(formatter, "{} B", self.0),
            1024..1_048_576 => ("KiB", 1024.0),
            1_048_576..1_073_741_824 => ("MiB", 1_048_576.0),
            _ => ("GiB", 1_073_741_824.0),
        };
        write!(formatter, "{:.2} {unit}", bytes / factor)
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ByteSizeVisitor)
    }
}

struct ByteSizeVisitor;

impl Visitor<'_> for ByteSizeVisitor {
    type Value = ByteSize;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a number of bytes or a text such as 24GiB")
    }

    fn visit_u64<E: Error>(self, bytes: u64) -> Result<ByteSize, E> {
        Ok(ByteSize(bytes))
    }

    fn visit_i64<E: Error>(self, bytes: i64) -> Result<ByteSize, E> {
        self.visit_str(&bytes.to_string())
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<ByteSize, E> {
        text.parse().map_err(E::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_and_without_units() {
        for (text, bytes) in [
            ("0", 0),
            ("1536", 1536),
            ("1_000", 1000),
            ("24GiB", 24 << 30),
            ("1.5 MiB", 3 << 19),
            ("512KB", 512_000),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
    }

    #[test]
    fn nonsense_sizes_are_refused_with_the_text() {
        for text in ["", "GiB", "-1", "12 parsecs", "1e400", "99999999999999999999GiB"] {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
    }
}
