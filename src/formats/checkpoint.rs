//! A model's metadata and tensors, whichever file format and however many files they came in.

use super::gguf::{self, Header, Info};
use super::hf_config::{Family, HfConfig};
use super::hf_weights::{self, Assembled};
use super::{FormatError, MappedFile, Metadata, StoredType, split};
use crate::tensor::{DType, Shape, TensorView};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// What a checkpoint says about a tensor, without its data.
#[derive(Clone, Copy, Debug)]
pub struct TensorInfo<'a> {
    /// The tensor's name.
    pub name: &'a str,
    /// What the file calls it, where that is not its name.
    pub file_name: Option<&'a str>,
    /// Its element type, computable or not.
    pub stored: StoredType,
    /// Extents, fastest first.
    pub shape: Shape,
    /// Bytes of data; `None` if the element type is unknown to ggml too.
    pub bytes: Option<usize>,
    /// The file that holds it.
    pub file: &'a Path,
    /// Where its description starts in that file.
    pub info_offset: u64,
    /// Where its data starts in that file.
    pub data_offset: u64,
}

/// An opened model file, or all files of a split one. Opening reads the header only; data is mapped
/// and comes from disk when it is first touched.
#[derive(Debug)]
pub struct Checkpoint {
    files: Vec<Arc<MappedFile>>,
    metadata: Metadata,
    /// In file order, with the index of the file.
    tensors: Vec<(usize, Info)>,
    /// Indices into `tensors`, ascending by name.
    order: Vec<u32>,
    /// Where the first file lists its tensors.
    tensors_at: usize,
    /// Whose names the files have for tensors, where they are not GGUF's.
    naming: Option<Family>,
}

impl Checkpoint {
    /// Opens a GGUF file; of a split model, the first part, which finds the others beside it. Or a
    /// Hugging Face folder with `config.json`, or a `.safetensors` file in one.
    ///
    /// The files stay mapped: they may be deleted or replaced by renaming, but must not be cut
    /// shorter while the checkpoint is in use.
    ///
    /// # Errors
    /// Whatever is wrong with any of the files, with file, byte offset and field.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        if path.join("config.json").is_file() {
            return Self::open_folder(path, None);
        }
        if path.extension().is_some_and(|ending| ending == "safetensors") {
            let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
            return Self::open_folder(folder.unwrap_or(Path::new(".")), Some(path));
        }
        let first = Arc::new(MappedFile::open(path)?);
        let header = gguf::read(&first)?;
        let parts = split::parts(&header.metadata, path)?;
        let mut checkpoint = Self::from_header(first, header);
        for part in &parts {
            let file = Arc::new(MappedFile::open(part)?);
            let header = gguf::read(&file)?;
            split::check_part(&header.metadata, checkpoint.files.len(), parts.len() + 1)?;
            checkpoint.append(file, header);
        }
        split::check_total(&checkpoint.metadata, checkpoint.tensors.len())?;
        checkpoint.index()
    }

    fn open_folder(folder: &Path, named: Option<&Path>) -> Result<Self, FormatError> {
        let config = HfConfig::open(folder)?;
        let Assembled { files, tensors } = hf_weights::open(folder, named, &config)?;
        let (metadata, naming) = (config.metadata, Some(config.family));
        Self { files, metadata, tensors, order: Vec::new(), tensors_at: 8, naming }.index()
    }

    /// Reads a GGUF file that lies in memory; `name` stands for its path in errors.
    ///
    /// # Errors
    /// As [`Checkpoint::open`]; a part of a split model is refused.
    pub fn from_bytes(name: &Path, bytes: &[u8]) -> Result<Self, FormatError> {
        let file = Arc::new(MappedFile::from_bytes(name, bytes));
        let header = gguf::read(&file)?;
        split::refuse(&header.metadata)?;
        Self::from_header(file, header).index()
    }

    fn from_header(file: Arc<MappedFile>, header: Header) -> Self {
        let Header { metadata, tensors, tensors_at } = header;
        let tensors = tensors.into_iter().map(|info| (0, info)).collect();
        let (files, order) = (vec![file], Vec::new());
        Self { files, metadata, tensors, order, tensors_at, naming: None }
    }

    fn append(&mut self, file: Arc<MappedFile>, header: Header) {
        let number = self.files.len();
        self.files.push(file);
        self.tensors.extend(header.tensors.into_iter().map(|info| (number, info)));
    }

    /// Sorts names and refuses duplicates.
    fn index(mut self) -> Result<Self, FormatError> {
        let name = |index: u32| self.tensors[index as usize].1.name.as_str();
        let mut order: Vec<u32> = (0..self.tensors.len() as u32).collect();
        order.sort_unstable_by(|a, b| name(*a).cmp(name(*b)).then(a.cmp(b)));
        if let Some(pair) = order.windows(2).find(|pair| name(pair[0]) == name(pair[1])) {
            let first = self.info(&self.tensors[pair[0] as usize]);
            let second = self.info(&self.tensors[pair[1] as usize]);
            let message = format!("the name stands twice, first at byte {}", first.info_offset);
            return Err(self.refuse_tensor(&second, message));
        }
        self.order = order;
        Ok(self)
    }

    /// The key-value pairs; of a split model, those of the first part.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The mapped files, one unless the model is split.
    pub fn files(&self) -> impl ExactSizeIterator<Item = &MappedFile> {
        self.files.iter().map(Arc::as_ref)
    }

    /// The mapped file of an index that [`Checkpoint::place`] or [`Checkpoint::pieces`] gave.
    ///
    /// # Panics
    /// When there is no such file.
    pub fn file(&self, index: usize) -> &MappedFile {
        &self.files[index]
    }

    /// All tensors in file order, usable or not.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = TensorInfo<'_>> {
        self.tensors.iter().map(|tensor| self.info(tensor))
    }

    /// What is known about a tensor, or `None` if there is none of that name.
    pub fn tensor_info(&self, name: &str) -> Option<TensorInfo<'_>> {
        self.find(name).map(|tensor| self.info(tensor))
    }

    /// The type of a tensor that can be computed with, and its bytes in that type.
    fn usable(&self, name: &str) -> Result<(&(usize, Info), DType, usize), FormatError> {
        let found = self.find(name).ok_or_else(|| self.refuse_missing(name))?;
        match (found.1.stored, found.1.bytes) {
            (StoredType::Known(dtype), Some(bytes)) => Ok((found, dtype, bytes)),
            (stored, _) => Err(self.refuse_tensor(&self.info(found), unsupported(stored))),
        }
    }

    /// A tensor's element type.
    ///
    /// # Errors
    /// There is no such tensor, or its element type cannot be computed with.
    pub fn dtype(&self, name: &str) -> Result<DType, FormatError> {
        self.usable(name).map(|(_, dtype, _)| dtype)
    }

    /// A tensor's data, of one that stands in its file as it is.
    ///
    /// # Errors
    /// There is no such tensor, its element type cannot be computed with, or [`Self::place`] is
    /// `None`.
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>, FormatError> {
        let (found, dtype, bytes) = self.usable(name)?;
        let (file, info) = found;
        if info.recipe().is_some() {
            let message = "is made of several tensors as its rows are read";
            return Err(self.refuse_tensor(&self.info(found), message));
        }
        let bytes = &self.files[*file].bytes()[info.start..info.start + bytes];
        Ok(TensorView { name: &info.name, dtype, shape: info.shape, bytes })
    }

    /// Where a tensor's rows stand: the index of the file, and their bytes. `None` if
    /// [`Self::read_rows`] makes them from other tensors.
    ///
    /// # Errors
    /// There is no such tensor, or its element type cannot be computed with.
    pub fn place(&self, name: &str) -> Result<Option<(usize, Range<usize>)>, FormatError> {
        let ((file, info), _, bytes) = self.usable(name)?;
        let place = (*file, info.start..info.start + bytes);
        Ok(info.recipe().is_none().then_some(place))
    }

    /// The bytes of files that a tensor's rows are, or are made from.
    ///
    /// # Errors
    /// As [`Self::place`].
    pub fn pieces(&self, name: &str) -> Result<Vec<(usize, Range<usize>)>, FormatError> {
        let ((file, info), _, bytes) = self.usable(name)?;
        Ok(match info.recipe() {
            Some(recipe) => recipe.pieces().collect(),
            None => vec![(*file, info.start..info.start + bytes)],
        })
    }

    /// Copies rows of a tensor, wherever they come from: `rows.len()` rows of its type in file
    /// order.
    ///
    /// # Errors
    /// As [`Self::place`]; and rows that are made hold something that is no number.
    ///
    /// # Panics
    /// When there are no such rows, or `out` is not as long as they are.
    pub fn read_rows(
        &self,
        name: &str,
        rows: Range<usize>,
        out: &mut [u8],
    ) -> Result<(), FormatError> {
        let (found, _, bytes) = self.usable(name)?;
        let (file, info) = found;
        let all = info.shape.rows();
        assert!(rows.end <= all, "rows {rows:?} of {all}");
        match info.recipe() {
            Some(recipe) => recipe
                .read_rows(&self.files, rows, out)
                .map_err(|message| self.refuse_tensor(&self.info(found), message)),
            None => {
                let start = info.start + rows.start * (bytes / all);
                out.copy_from_slice(&self.files[*file].bytes()[start..][..out.len()]);
                Ok(())
            }
        }
    }

    /// Whether all files are still as they were when they were opened.
    ///
    /// # Errors
    /// The first file that was written to or cut shorter.
    pub fn check_unchanged(&self) -> Result<(), FormatError> {
        self.files.iter().try_for_each(|file| file.check_unchanged())
    }

    /// An error about a tensor's description.
    pub fn refuse_tensor(&self, info: &TensorInfo<'_>, message: impl Into<String>) -> FormatError {
        let field = match info.file_name {
            Some(file_name) => format!("tensor {file_name} ({})", info.name),
            None => format!("tensor {}", info.name),
        };
        FormatError::new(info.file, info.info_offset, field, message)
    }

    /// An error about a tensor that is not there; the offset is that of the tensor list.
    pub fn refuse_missing(&self, name: &str) -> FormatError {
        let message = "the tensor is missing";
        let file = self.files[0].path();
        let field = match self.naming {
            Some(family) => format!("tensor {} ({name})", hf_weights::file_name(family, name)),
            None => format!("tensor {name}"),
        };
        FormatError::new(file, self.tensors_at as u64, field, message)
    }

    fn find(&self, name: &str) -> Option<&(usize, Info)> {
        let named = |index: &u32| self.tensors[*index as usize].1.name.as_str().cmp(name);
        let at = self.order.binary_search_by(named).ok()?;
        self.tensors.get(*self.order.get(at)? as usize)
    }

    fn info<'a>(&'a self, (file, info): &'a (usize, Info)) -> TensorInfo<'a> {
        TensorInfo {
            name: &info.name,
            file_name: info.file_name(),
            stored: info.stored,
            shape: info.shape,
            bytes: info.bytes,
            file: self.files[*file].path(),
            info_offset: info.info_at as u64,
            data_offset: info.start as u64,
        }
    }
}

/// Why an element type cannot be computed with.
fn unsupported(stored: StoredType) -> String {
    let known = DType::ALL.map(DType::name).join(", ");
    format!("its elements are {stored}, which is not supported; supported: {known}")
}
