//! Owns the way from the tensors of a Hugging Face folder to those that GGUF would have: names,
//! shapes, and for quantised layers a recipe that makes blocks of several tensors as rows are read.
//! It must not know what a model computes. `Checkpoint::open` assembles folders through it.

mod fp8;
mod int4;
mod layers;
mod names;
mod recipe;
mod shards;

pub(super) use names::file_name;
pub(super) use recipe::Recipe;

use super::gguf::{Foreign, Info};
use super::hf_config::HfConfig;
use super::safetensors::{Dtype, Stored};
use super::{FormatError, MappedFile, StoredType};
use crate::tensor::{DType, Shape};
use layers::{Made, Module};
use recipe::{Part, Piece};
use shards::Shards;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// Files, and tensors under GGUF's names with the index of the file.
pub(super) struct Assembled {
    pub files: Vec<Arc<MappedFile>>,
    pub tensors: Vec<(usize, Info)>,
}

/// Experts of one name, by their number.
type Experts<'a> = BTreeMap<String, BTreeMap<usize, Made<'a>>>;

/// Opens a folder's files; `named` is the one that was asked for, if one was.
pub(super) fn open(
    folder: &Path,
    named: Option<&Path>,
    config: &HfConfig,
) -> Result<Assembled, FormatError> {
    let Shards { files, tensors } = Shards::open(folder, named)?;
    let mut assembly = Assembly { files: &files, config, tensors: Vec::new() };
    let mut experts = Experts::new();
    for (name, module) in modules(&files, &tensors) {
        if config.is_tied && name == "lm_head" {
            continue;
        }
        assembly.add_module(name, &module, &mut experts)?;
    }
    for (name, experts) in experts {
        assembly.add_experts(name, experts)?;
    }
    assembly.add_frequency_factors();
    let has_output = assembly.tensors.iter().any(|(_, info)| info.name == "output.weight");
    if !has_output && !config.is_tied {
        let message = "the tensor is missing, and tie_word_embeddings is not true in config.json";
        return Err(FormatError::new(files[0].path(), 8, "tensor lm_head.weight", message));
    }
    let tensors = assembly.tensors;
    Ok(Assembled { files, tensors })
}

/// Tensors by what their names have before the last dot.
fn modules<'a>(
    files: &'a [Arc<MappedFile>],
    tensors: &'a [(usize, Stored)],
) -> BTreeMap<&'a str, Module<'a>> {
    let mut modules: BTreeMap<&str, Module<'_>> = BTreeMap::new();
    for (file, stored) in tensors.iter().filter(|(_, stored)| !names::is_needless(&stored.name)) {
        let (module, suffix) = stored.name.rsplit_once('.').unwrap_or((&stored.name, ""));
        modules.entry(module).or_insert_with(|| Module::new(files)).add(suffix, *file, stored);
    }
    modules
}

struct Assembly<'a> {
    files: &'a [Arc<MappedFile>],
    config: &'a HfConfig,
    tensors: Vec<(usize, Info)>,
}

impl<'a> Assembly<'a> {
    fn add_module(
        &mut self,
        name: &str,
        module: &Module<'a>,
        experts: &mut Experts<'a>,
    ) -> Result<(), FormatError> {
        let target = names::target(self.config.family, name);
        let weight = module.weight(self.config)?;
        for (suffix, file, stored) in module.others() {
            let name =
                format!("{}{}{suffix}", target.name, if suffix.is_empty() { "" } else { "." });
            self.add_plain(name, file, stored)?;
        }
        let Some(made) = weight else { return Ok(()) };
        let weight = format!("{}.weight", target.name);
        match target.expert {
            Some(expert) => {
                let stored = made.stored;
                let twice = experts.entry(weight).or_default().insert(expert, made).is_some();
                if twice {
                    let message = "another tensor is of the same expert";
                    return Err(stored.refuse(module.file(stored), "name", message));
                }
                Ok(())
            }
            None if self.config.family.adds_one_to(&target.name) => {
                self.add_one_plus(weight, made, module)
            }
            None => match made.part {
                Part::Plain(_) => self.add_plain(weight, made.file, made.stored),
                part => self.add_made(
                    weight,
                    &[made.cols, made.rows],
                    (made.dtype, vec![part]),
                    (made.file, made.stored),
                ),
            },
        }
    }

    /// A tensor as it stands in its file.
    fn add_plain(&mut self, name: String, file: usize, stored: &Stored) -> Result<(), FormatError> {
        let dims: Vec<usize> = stored.shape.iter().rev().copied().collect();
        let shape = Shape::new(if dims.is_empty() { &[1] } else { &dims });
        let shape = shape.ok_or_else(|| {
            let message = format!("{:?}; allowed: 1 to 4 extents from 1", stored.shape);
            stored.refuse(&self.files[file], "shape", message)
        })?;
        let info = Info {
            name,
            shape,
            stored: stored_type(stored.dtype),
            info_at: stored.info_at,
            start: stored.bytes.start,
            bytes: Some(stored.bytes.len()),
            foreign: foreign(Some(stored), None),
        };
        self.tensors.push((file, info));
        Ok(())
    }

    /// A tensor that is made as it is read; `dims` are fastest first.
    fn add_made(
        &mut self,
        name: String,
        dims: &[usize],
        (dtype, parts): (DType, Vec<Part>),
        (file, stored): (usize, &Stored),
    ) -> Result<(), FormatError> {
        let shape = Shape::new(dims);
        let row_bytes = dtype.row_bytes(dims[0]).filter(|row_bytes| *row_bytes > 0);
        let (Some(shape), Some(row_bytes)) = (shape, row_bytes) else {
            let message = format!("{:?} is no matrix of {dtype}", stored.shape);
            return Err(stored.refuse(&self.files[file], "shape", message));
        };
        let rows = shape.rows() / parts.len();
        let info = Info {
            name,
            shape,
            stored: StoredType::Known(dtype),
            info_at: stored.info_at,
            start: stored.bytes.start,
            bytes: Some(row_bytes * shape.rows()),
            foreign: foreign(Some(stored), Some(Recipe { parts, rows, row_bytes })),
        };
        self.tensors.push((file, info));
        Ok(())
    }

    fn add_one_plus(
        &mut self,
        name: String,
        made: Made<'a>,
        module: &Module<'a>,
    ) -> Result<(), FormatError> {
        let (Part::Plain(piece), 1) = (made.part, made.rows) else {
            let message =
                format!("{:?} of {}; wanted: a vector of floats", made.stored.shape, made.dtype);
            return Err(made.stored.refuse(module.file(made.stored), "shape", message));
        };
        let part = Part::OnePlus(piece, made.dtype);
        self.add_made(name, &[made.cols], (DType::F32, vec![part]), (made.file, made.stored))
    }

    /// Matrices of all experts, one after the other.
    fn add_experts(
        &mut self,
        name: String,
        experts: BTreeMap<usize, Made<'a>>,
    ) -> Result<(), FormatError> {
        let count = experts.len();
        let mut parts = Vec::with_capacity(count);
        let mut like: Option<(DType, usize, usize, usize, &Stored)> = None;
        for (index, (expert, made)) in experts.into_iter().enumerate() {
            let Made { file, stored, dtype, rows, cols, part } = made;
            let refuse = |message: String| Err(stored.refuse(&self.files[file], "expert", message));
            if expert != index {
                return refuse(format!("number {expert} of {count}; number {index} is missing"));
            }
            let first = *like.get_or_insert((dtype, rows, cols, file, stored));
            if (dtype, rows, cols) != (first.0, first.1, first.2) {
                let of = |dtype, rows, cols| format!("[{rows}, {cols}] of {dtype}");
                let (got, wanted) = (of(dtype, rows, cols), of(first.0, first.1, first.2));
                return refuse(format!("is {got}, but number 0 is {wanted}"));
            }
            parts.push(part);
        }
        let Some((dtype, rows, cols, file, stored)) = like else { return Ok(()) };
        self.add_made(name, &[cols, rows, count], (dtype, parts), (file, stored))
    }

    fn add_frequency_factors(&mut self) {
        let Some(factors) = &self.config.frequency_factors else { return };
        let Some(shape) = Shape::new(&[factors.len()]) else { return };
        let row_bytes = size_of_val(&factors[..]);
        let parts = vec![Part::Values(factors.clone())];
        let info = Info {
            name: "rope_freqs.weight".to_owned(),
            shape,
            stored: StoredType::Known(DType::F32),
            info_at: 0,
            start: 0,
            bytes: Some(row_bytes),
            foreign: foreign(None, Some(Recipe { parts, rows: 1, row_bytes })),
        };
        self.tensors.push((0, info));
    }
}

fn foreign(stored: Option<&Stored>, recipe: Option<Recipe>) -> Option<Box<Foreign>> {
    let file_name = stored.map(|stored| stored.name.clone());
    Some(Box::new(Foreign { file_name, recipe }))
}

/// The type of a tensor that is as its file has it.
fn stored_type(dtype: Dtype) -> StoredType {
    match float_type(dtype) {
        Some(dtype) => StoredType::Known(dtype),
        None => StoredType::named(&dtype.to_string()),
    }
}

/// Floats that are computed with as they are.
fn float_type(dtype: Dtype) -> Option<DType> {
    match dtype {
        Dtype::F32 => Some(DType::F32),
        Dtype::F16 => Some(DType::F16),
        Dtype::BF16 => Some(DType::BF16),
        _ => None,
    }
}

fn piece(file: usize, stored: &Stored) -> Piece {
    Piece { file, bytes: stored.bytes.clone() }
}
