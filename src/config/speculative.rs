//! What the section `[speculative]` asks for.

use super::{ConfigError, refuse};
use serde::{Deserialize, Serialize};

/// Tokens of the longest draft that can be set. With the token before it that is a run of 15, to
/// which a GPU attends as it does to single tokens, so with the same bits.
pub const DRAFT_MAX: usize = 14;
/// Most equal tokens that can be asked for.
const NGRAM_MAX: usize = 64;

/// Section `[speculative]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "config/default.toml documents every field")]
pub struct SpeculativeConfig {
    pub method: String,
    pub draft_max: usize,
    pub ngram_min: usize,
    pub ngram_max: usize,
}

/// Where drafts come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpeculativeMethod {
    /// There are none.
    Off,
    /// From what followed the same tokens earlier in the sequence.
    Ngram,
}

impl SpeculativeConfig {
    /// Where drafts come from.
    ///
    /// # Errors
    /// Another word than `off` and `ngram`, or a number outside its range.
    pub fn method(&self) -> Result<SpeculativeMethod, ConfigError> {
        let counts = [
            ("speculative.draft_max", self.draft_max, 1, DRAFT_MAX),
            ("speculative.ngram_min", self.ngram_min, 1, NGRAM_MAX),
            ("speculative.ngram_max", self.ngram_max, self.ngram_min, NGRAM_MAX),
        ];
        for (field, got, low, high) in counts {
            if !(low..=high).contains(&got) {
                return Err(refuse(field, got, format!("{low} to {high}")));
            }
        }
        match self.method.as_str() {
            "off" => Ok(SpeculativeMethod::Off),
            "ngram" => Ok(SpeculativeMethod::Ngram),
            other => Err(refuse("speculative.method", other, "off, ngram".into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::config::Config;

    #[test]
    fn a_knob_of_speculation_out_of_range_is_named() {
        type Spoil = fn(&mut super::SpeculativeConfig);
        let spoilt: [(&str, Spoil); 5] = [
            ("speculative.method", |speculative| speculative.method = "draft".into()),
            ("speculative.draft_max", |speculative| speculative.draft_max = 0),
            ("speculative.draft_max", |speculative| speculative.draft_max = 15),
            ("speculative.ngram_min", |speculative| speculative.ngram_min = 0),
            ("speculative.ngram_max", |speculative| speculative.ngram_max = 0),
        ];
        for (field, spoil) in spoilt {
            let mut config = Config::default();
            spoil(&mut config.speculative);
            assert_eq!(config.validate().unwrap_err().field, field);
        }
    }
}
