//! The patterns by name: facts published in the models' own `tokenizer.json`, each without the
//! look-ahead that [`SpaceRun`] stands for.

use super::SpaceRun::{self, HandBack, HandBackUnlessLine, Keep};

/// How the vocabularies of some names cut text: each stage cuts the pieces of the one before.
pub(super) struct Recipe {
    pub(super) names: &'static [&'static str],
    pub(super) stages: &'static [(&'static str, SpaceRun)],
    pub(super) whole_pieces: bool,
    pub(super) add_bos: bool,
}

const fn recipe(
    names: &'static [&'static str],
    stages: &'static [(&'static str, SpaceRun)],
) -> Recipe {
    Recipe { names, stages, whole_pieces: false, add_bos: false }
}

impl Recipe {
    const fn whole_pieces(self) -> Self {
        Self { whole_pieces: true, ..self }
    }

    const fn add_bos(self) -> Self {
        Self { add_bos: true, ..self }
    }
}

/// English contractions in any case.
macro_rules! contraction {
    () => {
        "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
    };
}

/// Words whose letters go from upper to lower case, then (second) words that may end in capitals.
macro_rules! cased_words {
    ($after:expr) => {
        concat!(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
            $after,
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
            $after
        )
    };
}

/// Punctuation with what follows it, line breaks, white space.
macro_rules! marks_and_spaces {
    ($after:literal) => {
        concat!(r"| ?[^\s\p{L}\p{N}]+[\r\n", $after, r"]*|\s*[\r\n]+|\s+")
    };
}

/// The family that Llama 3 began; numbers are cut as `$digits` says.
macro_rules! words {
    ($digits:literal) => {
        concat!(contraction!(), r"|[^\r\n\p{L}\p{N}]?\p{L}+|", $digits, marks_and_spaces!(""))
    };
}

/// One ASCII mark with the letters after it, words with their accents, marks, spaces.
macro_rules! marked_words {
    () => {
        concat!(
            r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"##,
            r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
            r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+"
        )
    };
}

const GPT2: (&str, SpaceRun) =
    (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+", HandBack);
const DIGIT: (&str, SpaceRun) = (r"\p{N}", Keep);
const THREE_DIGITS: (&str, SpaceRun) = ("[0-9][0-9][0-9]", Keep);
const LINE_BREAK: (&str, SpaceRun) = (r"[\r\n]", Keep);
const LINES: (&str, SpaceRun) = (r"[^\n]+|\n+", Keep);
const HAN_HANGUL: (&str, SpaceRun) = (r"[一-龥ࠀ-一가-퟿]+", Keep);
const QWEN2: (&str, SpaceRun) = (words!(r"\p{N}"), HandBackUnlessLine);
const LLAMA3: (&str, SpaceRun) = (words!(r"\p{N}{1,3}"), HandBackUnlessLine);

/// Letters of the scripts that have upper and lower case, as DeepSeek LLM lists them.
const CASED_WORDS: &str = concat!(
    r"\s?[A-Za-z",
    r"\x{B5}\x{C0}-\x{D6}\x{D8}-\x{F6}\x{F8}-\x{1BA}\x{1BC}-\x{1BF}\x{1C4}-\x{293}",
    r"\x{295}-\x{2AF}\x{370}-\x{373}\x{376}\x{377}\x{37B}-\x{37D}\x{37F}\x{386}",
    r"\x{388}-\x{38A}\x{38C}\x{38E}-\x{3A1}\x{3A3}-\x{3F5}\x{3F7}-\x{481}",
    r"\x{48A}-\x{52F}\x{531}-\x{556}\x{10A0}-\x{10C5}\x{13A0}-\x{13F5}",
    r"\x{13F8}-\x{13FD}\x{1C90}-\x{1CBA}\x{1CBD}-\x{1CBF}\x{1D00}-\x{1D2B}",
    r"\x{1D6B}-\x{1D77}\x{1D79}-\x{1D9A}\x{1E00}-\x{1F15}\x{1F18}-\x{1F1D}",
    r"\x{1F20}-\x{1F45}\x{1F48}-\x{1F4D}\x{1F50}-\x{1F57}\x{1F59}\x{1F5B}\x{1F5D}",
    r"\x{1F5F}-\x{1F7D}\x{1F80}-\x{1FB4}\x{1FB6}-\x{1FBC}\x{1FBE}\x{1FC2}-\x{1FC4}",
    r"\x{1FC6}-\x{1FCC}\x{1FD0}-\x{1FD3}\x{1FD6}-\x{1FDB}\x{1FE0}-\x{1FEC}",
    r"\x{1FF2}-\x{1FF4}\x{1FF6}-\x{1FFC}\x{2102}\x{2107}\x{210A}-\x{2113}\x{2115}",
    r"\x{2119}-\x{211D}\x{2124}\x{2126}\x{2128}\x{212A}-\x{212D}\x{212F}-\x{2134}",
    r"\x{2139}\x{213C}-\x{213F}\x{2145}-\x{2149}\x{214E}\x{2183}\x{2184}",
    r"\x{2C00}-\x{2C7B}\x{2C7E}-\x{2CE4}\x{2CEB}-\x{2CEE}\x{2CF2}\x{2CF3}",
    r"\x{A640}-\x{A66D}\x{A680}-\x{A69B}\x{A722}-\x{A76F}\x{A771}-\x{A787}",
    r"\x{A78B}-\x{A78E}\x{AB70}-\x{ABBF}\x{FB00}-\x{FB06}\x{FB13}-\x{FB17}",
    r"\x{FF21}-\x{FF3A}\x{FF41}-\x{FF5A}\x{10400}-\x{1044F}\x{104B0}-\x{104D3}",
    r"\x{104D8}-\x{104FB}\x{10C80}-\x{10CB2}\x{10CC0}-\x{10CF2}\x{118A0}-\x{118DF}",
    r"\x{1E900}-\x{1E943}",
    "]+"
);

pub(super) const RECIPES: &[Recipe] = &[
    recipe(&["default"], &[(r"[\p{P}\$\+<=>\^~\|]+", Keep), GPT2, (r"\p{N}+", Keep), THREE_DIGITS]),
    recipe(&["llama-bpe", "llama3", "llama-v3"], &[LLAMA3]).whole_pieces().add_bos(),
    recipe(&["falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"], &[LLAMA3])
        .whole_pieces()
        .add_bos(),
    recipe(&["dbrx", "smaug-bpe", "glm4", "chatglm-bpe"], &[LLAMA3]),
    recipe(&["qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez"], &[QWEN2]),
    recipe(&["stablelm2", "hunyuan", "solar-open", "grok-2"], &[QWEN2]),
    recipe(
        &["qwen35"],
        &[(
            concat!(
                contraction!(),
                r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
                r"|\s*[\r\n]+|\s+"
            ),
            HandBackUnlessLine,
        )],
    ),
    recipe(
        &["deepseek-llm"],
        &[
            LINE_BREAK,
            (CASED_WORDS, Keep),
            (r"\s?[!-/:-~！-／：-～‘-‟　-。]+", Keep),
            (r"\s+$", Keep),
            HAN_HANGUL,
            (r"\p{N}+", Keep),
        ],
    ),
    recipe(
        &["deepseek-coder"],
        &[LINE_BREAK, (r"\s?\p{L}+", Keep), (r"\s?\p{P}+", Keep), HAN_HANGUL, DIGIT],
    ),
    recipe(
        &["deepseek-v3", "hunyuan-dense", "joyai-llm"],
        &[
            (r"\p{N}{1,3}", Keep),
            (r"[一-龥぀-ゟ゠-ヿ]+", Keep),
            (marked_words!(), HandBackUnlessLine),
        ],
    ),
    recipe(&["falcon"], &[(r"[\p{P}\$\+<=>\^~\|`]+", Keep), GPT2, THREE_DIGITS]),
    recipe(&["starcoder", "refact", "command-r", "smollm", "codeshell"], &[DIGIT, GPT2]),
    recipe(&["exaone", "minerva-7b", "mellum2"], &[DIGIT, GPT2]),
    recipe(&["gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling"], &[GPT2]),
    recipe(&["gigachat", "a.x-4.0", "mellum", "modern-bert", "exaone4"], &[GPT2]),
    recipe(&["jina-es", "jina-de", "jina-v2-es", "jina-v2-de"], &[GPT2]),
    recipe(&["poro-chat", "bloom", "gpt3-finnish"], &[(BLOOM, Keep)]),
    recipe(&["viking"], &[(BLOOM, Keep), DIGIT]),
    recipe(
        &["tekken"],
        &[(concat!(cased_words!(""), r"|\p{N}", marks_and_spaces!("/")), HandBackUnlessLine)],
    )
    .whole_pieces()
    .add_bos(),
    recipe(
        &["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"],
        &[(
            concat!(
                cased_words!(concat!(contraction!(), "?")),
                r"|\p{N}{1,3}",
                marks_and_spaces!("/")
            ),
            HandBackUnlessLine,
        )],
    ),
    recipe(
        &["bailingmoe", "bailingmoe2", "llada-moe"],
        &[(
            concat!(
                "'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])",
                r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+"
            ),
            HandBackUnlessLine,
        )],
    ),
    recipe(
        &["seed-coder"],
        &[(
            concat!(
                contraction!(),
                r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+"
            ),
            HandBackUnlessLine,
        )],
    ),
    recipe(&["minicpm5"], &[(r"\p{N}{1,3}", Keep), (words!(r"\p{N}+"), HandBackUnlessLine)])
        .whole_pieces(),
    recipe(&["laguna"], &[LINES, QWEN2]),
];

/// Words up to a mark of BLOOM's list.
const BLOOM: &str = r" ?[^(\s|.,!?…。，、।۔،)]+";

/// Gemma 4 merges across words; only line breaks cut.
pub(super) const LINE_STAGES: &[(&str, SpaceRun)] = &[LINES];
