//! The files that hold a folder's tensors: one, or those that `model.safetensors.index.json` lists.

use crate::formats::hf_config::Fields;
use crate::formats::safetensors::{self, Stored};
use crate::formats::{FormatError, MappedFile};
use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::sync::Arc;

const WHOLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// DeepSeek V3's lists 90,000 tensors in 9 MB.
const INDEX_BYTES_MAX: usize = 64 << 20;
/// Each is one mapping and one open file.
const SHARDS_MAX: usize = 512;

/// Opened files, and their tensors with the index of the file.
#[derive(Debug, Default)]
pub(super) struct Shards {
    pub files: Vec<Arc<MappedFile>>,
    pub tensors: Vec<(usize, Stored)>,
}

impl Shards {
    /// Of a folder; `named` is the file that was asked for, if one was.
    pub fn open(folder: &Path, named: Option<&Path>) -> Result<Self, FormatError> {
        let index = folder.join(INDEX);
        let mut shards = Self::default();
        match named {
            Some(file) if !is_listed(&index, file)? => shards.add(file)?,
            None if !index.exists() => shards.add(&folder.join(WHOLE))?,
            _ => shards.add_listed(folder, &Fields::open(&index, INDEX_BYTES_MAX)?)?,
        }
        let mut names = HashSet::new();
        let twice = shards.tensors.iter().find(|(_, stored)| !names.insert(stored.name.as_str()));
        if let Some((file, stored)) = twice {
            let message = "another file has a tensor of that name too";
            return Err(stored.refuse(&shards.files[*file], "name", message));
        }
        Ok(shards)
    }

    fn add(&mut self, path: &Path) -> Result<(), FormatError> {
        let file = MappedFile::open(path)?;
        let number = self.files.len();
        self.tensors.extend(safetensors::read(&file)?.into_iter().map(|one| (number, one)));
        self.files.push(Arc::new(file));
        Ok(())
    }

    fn add_listed(&mut self, folder: &Path, index: &Fields) -> Result<(), FormatError> {
        let map = index.object_opt("weight_map")?;
        let map = map.ok_or_else(|| index.refuse("weight_map", "the field is missing"))?;
        let mut numbers = BTreeMap::new();
        for (tensor, _) in map.iter() {
            let file = map.text(tensor)?;
            check_name(&map, tensor, file)?;
            numbers.entry(file).or_insert(0);
        }
        if numbers.len() > SHARDS_MAX {
            let message = format!("{} files; allowed: at most {SHARDS_MAX}", numbers.len());
            return Err(index.refuse("weight_map", message));
        }
        for (number, (file, slot)) in numbers.iter_mut().enumerate() {
            let path = folder.join(file);
            if !path.exists() {
                let message =
                    format!("lists {file}, which is not there; is the download complete?");
                return Err(index.refuse("weight_map", message));
            }
            *slot = number;
            self.add(&path)?;
        }
        let held: HashSet<(usize, &str)> =
            self.tensors.iter().map(|(file, one)| (*file, one.name.as_str())).collect();
        for (tensor, _) in map.iter() {
            let file = map.text(tensor)?;
            if !held.contains(&(numbers[file], tensor)) {
                let message = format!("{file} has no tensor of that name");
                return Err(map.refuse(tensor, message));
            }
        }
        Ok(())
    }
}

/// A file beside the index, not one somewhere else.
fn check_name(map: &Fields, tensor: &str, file: &str) -> Result<(), FormatError> {
    let plain = Path::new(file).file_name().is_some_and(|name| name == file);
    if plain && file.ends_with(".safetensors") {
        return Ok(());
    }
    let message = format!("{file:?}; allowed: the name of a .safetensors file in the folder");
    Err(map.refuse(tensor, message))
}

/// Whether the index is there and lists the file.
fn is_listed(index: &Path, file: &Path) -> Result<bool, FormatError> {
    if !index.exists() {
        return Ok(false);
    }
    let index = Fields::open(index, INDEX_BYTES_MAX)?;
    let Some(map) = index.object_opt("weight_map")? else { return Ok(false) };
    let name = file.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
    Ok(map.iter().any(|(_, listed)| listed.as_str() == Some(&name)))
}
