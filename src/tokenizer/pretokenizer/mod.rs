//! Owns the cut of a text into the pieces inside which byte pairs are merged, one recipe per name
//! of `tokenizer.ggml.pre`. It must not know tokens or ids. `segmenter` calls it for every run of
//! plain text.
//!
//! The published patterns end in `\s+(?!\S)|\s+`: a run of white space leaves its last character to
//! the word that follows. Look-ahead would mean a backtracking matcher, whose stack grows with the
//! run; here the run is matched by `\s+` and its last character handed back, so that every pattern
//! is a plain regular expression and runs in linear time.

mod recipes;

use super::TokenizerError;
use std::ops::Range;
use tokenizers::utils::SysRegex;

/// What happens to the last character of a match that is white space and is followed by more text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SpaceRun {
    /// It stays.
    Keep,
    /// It goes to the next piece, if the match has another character.
    HandBack,
    /// The same, but a match that ends with a line break stays whole: the pattern has an
    /// alternative for those that comes before white space.
    HandBackUnlessLine,
}

/// One cut: matches of the pattern and the gaps between them become pieces.
struct Stage {
    pattern: SysRegex,
    space_run: SpaceRun,
}

/// How the vocabularies of one name cut text.
pub(super) struct Pretokenizer {
    stages: Vec<Stage>,
    /// A piece that is a token as a whole is that token, whatever the merges say.
    pub(super) whole_pieces: bool,
    /// The kind's default for putting BOS first.
    pub(super) add_bos: bool,
}

impl Pretokenizer {
    /// The recipe of a name; `None` is what files without a name get.
    ///
    /// # Errors
    /// [`TokenizerError::Unknown`] with all known names.
    pub(super) fn named(name: Option<&str>) -> Result<Self, TokenizerError> {
        let wanted = name.unwrap_or("default");
        let recipe = recipes::RECIPES.iter().find(|recipe| recipe.names.contains(&wanted));
        let Some(recipe) = recipe else {
            let mut known: Vec<_> =
                recipes::RECIPES.iter().flat_map(|recipe| recipe.names).copied().collect();
            known.sort_unstable();
            let got = wanted.to_owned();
            return Err(TokenizerError::Unknown { field: "tokenizer.ggml.pre", got, known });
        };
        Ok(Self {
            stages: compile(wanted, recipe.stages)?,
            whole_pieces: recipe.whole_pieces,
            add_bos: recipe.add_bos,
        })
    }

    /// Cuts between lines only.
    pub(super) fn lines() -> Result<Self, TokenizerError> {
        let stages = compile("lines", recipes::LINE_STAGES)?;
        Ok(Self { stages, whole_pieces: false, add_bos: true })
    }

    /// The pieces of a text, in order, without gaps, as byte ranges.
    pub(super) fn cut(&self, text: &str) -> Vec<Range<usize>> {
        let mut pieces = Vec::from([Range { start: 0, end: text.len() }]);
        let mut finer = Vec::new();
        for stage in &self.stages {
            finer.clear();
            for piece in pieces.drain(..) {
                stage.cut(text, piece, &mut finer);
            }
            std::mem::swap(&mut pieces, &mut finer);
        }
        pieces
    }
}

fn compile(name: &str, stages: &[(&'static str, SpaceRun)]) -> Result<Vec<Stage>, TokenizerError> {
    let compiled = stages.iter().map(|(pattern, space_run)| {
        let pattern = SysRegex::new(pattern).map_err(|error| {
            TokenizerError::invalid("tokenizer.ggml.pre", format!("{name}: {error}"))
        })?;
        Ok(Stage { pattern, space_run: *space_run })
    });
    compiled.collect()
}

impl Stage {
    fn cut(&self, text: &str, piece: Range<usize>, pieces: &mut Vec<Range<usize>>) {
        let mut at = piece.start;
        while at < piece.end {
            let rest = &text[at..piece.end];
            match self.cut_until_hand_back(rest, at, pieces) {
                Some(next) => at = next,
                None => break,
            }
        }
    }

    /// Cuts `rest`, which starts at byte `base` of the text, up to the first match that hands a
    /// character back, and says where to go on; `None` when `rest` is used up.
    fn cut_until_hand_back(
        &self,
        rest: &str,
        base: usize,
        pieces: &mut Vec<Range<usize>>,
    ) -> Option<usize> {
        let mut done = 0;
        for (start, end) in self.pattern.find_iter(rest) {
            if start > done {
                pieces.push(base + done..base + start);
            }
            let kept = end - self.handed_back(rest, start, end);
            if kept > start {
                pieces.push(base + start..base + kept);
            }
            if kept < end {
                return Some(base + kept);
            }
            done = end;
        }
        if done < rest.len() {
            pieces.push(base + done..base + rest.len());
        }
        None
    }

    /// Bytes of the match's last character if it goes to the next piece, else 0.
    fn handed_back(&self, rest: &str, start: usize, end: usize) -> usize {
        let run = &rest[start..end];
        let Some(last) = run.chars().next_back() else { return 0 };
        let stays = match self.space_run {
            SpaceRun::Keep => true,
            SpaceRun::HandBack => false,
            SpaceRun::HandBackUnlessLine => matches!(last, '\r' | '\n'),
        };
        let alone = run.len() == last.len_utf8();
        if stays || alone || end == rest.len() || !run.chars().all(char::is_whitespace) {
            return 0;
        }
        last.len_utf8()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces<'a>(name: &str, text: &'a str) -> Vec<&'a str> {
        let pretokenizer = Pretokenizer::named(Some(name)).expect("a known name");
        pretokenizer.cut(text).into_iter().map(|piece| &text[piece]).collect()
    }

    #[test]
    fn every_recipe_compiles_and_loses_nothing() {
        let text = "Hello,  World!\r\n\n\t It's 12345 o'CLOCK   \u{3000}日本語 ١٢٣ e\u{301} 🦙  ";
        for name in recipes::RECIPES.iter().flat_map(|recipe| recipe.names) {
            assert_eq!(pieces(name, text).concat(), text, "{name}");
            assert_eq!(pieces(name, ""), [""; 0], "{name}");
        }
    }

    #[test]
    fn a_run_of_spaces_leaves_its_last_to_the_next_word() {
        assert_eq!(pieces("gpt-2", "a   b"), ["a", "  ", " b"]);
        assert_eq!(pieces("gpt-2", "a \n\nb  "), ["a", " \n", "\n", "b", "  "]);
        assert_eq!(pieces("llama-bpe", "a \n\nb  c"), ["a", " \n\n", "b", " ", " c"]);
        assert_eq!(pieces("llama-bpe", "\t\tx\t\t1"), ["\t", "\tx", "\t", "\t", "1"]);
    }

    #[test]
    fn an_unknown_name_is_refused_with_the_known_ones() {
        let Err(TokenizerError::Unknown { known, got, .. }) = Pretokenizer::named(Some("x1"))
        else {
            panic!("a name nobody knows was taken");
        };
        assert_eq!(got, "x1");
        assert!(known.contains(&"qwen2") && known.contains(&"smollm"));
    }
}
