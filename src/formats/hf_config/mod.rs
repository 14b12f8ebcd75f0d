//! Owns what the JSON files of a Hugging Face folder say: `config.json` and its companions, put
//! into the words of GGUF's metadata, so that no layer above has to know which format a model came
//! in. It must not know tensors' data. `Checkpoint::open` reads folders through it.

mod family;
mod fields;
mod quantization;
mod rope;
mod tokenizer;

pub(super) use family::Family;
pub(super) use fields::{Fields, read_text};
pub(super) use quantization::Quantization;

use super::metadata_writer::MetadataWriter;
use super::{FormatError, Metadata};
use std::path::Path;

/// Published ones have some kilobytes; one that lists 2 KB for each of 1000 modules still fits.
const CONFIG_BYTES_MAX: usize = 4 << 20;

/// Everything that a folder says about its model besides the weights.
#[derive(Debug)]
pub(super) struct HfConfig {
    pub family: Family,
    pub quantization: Quantization,
    /// Whether the output is the embedding.
    pub is_tied: bool,
    /// Llama 3's divisors of the rotation's frequencies.
    pub frequency_factors: Option<Vec<f32>>,
    pub metadata: Metadata,
}

impl HfConfig {
    /// Reads all files of a folder.
    pub fn open(folder: &Path) -> Result<Self, FormatError> {
        let file = folder.join("config.json");
        let config = Fields::open(&file, CONFIG_BYTES_MAX)?;
        let family = Family::read(&config)?;
        let mut writer = MetadataWriter::default();
        let architecture = family.architecture();
        let model_type = (&config, "model_type");
        writer.text("general.architecture", architecture, model_type);
        let name = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
        if let Some(name) = name.file_name() {
            writer.text("general.name", &name.to_string_lossy(), model_type);
        }
        family.write(&config, &mut writer)?;
        let frequency_factors = rope::write(&config, family, &mut writer)?;
        tokenizer::write(folder, &config, &mut writer)?;
        Ok(Self {
            quantization: Quantization::read(&config)?,
            is_tied: config.bool_opt("tie_word_embeddings")?.unwrap_or(family.is_tied_by_default()),
            family,
            frequency_factors,
            metadata: writer.finish(&file)?,
        })
    }
}
