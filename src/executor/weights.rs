//! A stage's weights as its kernels read them. Matrices that are multiplied with are interleaved
//! by all workers into one arena; the others stay in the mapped file. Weights outlive their stage:
//! a new one is made from them without touching a file.

use super::ExecutorError;
use super::cpu_pool::CpuPool;
use super::program::{ExpertShape, MatrixEntry, MatrixId, MatrixUse, Program, StagePart, VectorId};
use super::rotations::Rotations;
use super::weight_made::{MadeMatrix, make};
use super::weight_repack::{FileMatrix, read_in_place, repack};
use super::weight_source::{WeightSource, fill_random};
use crate::memory::{ALIGNMENT, AlignedBytes, HugePages};
use crate::model::{ModelSpec, TensorRef};
use crate::tensor::DType;
use std::ops::Range;
use std::sync::Arc;
use tandem_cpu_kernels::repack::ROWS;
use tandem_cpu_kernels::{Isa, Kernels, Layout, MatrixView, layout_for, packed_bytes};

/// How far loading has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadProgress {
    /// Bytes of weights that are ready.
    pub done_bytes: usize,
    /// Bytes of all weights.
    pub total_bytes: usize,
}

/// Where a matrix's bytes are.
#[derive(Clone, Debug)]
enum Place {
    /// In the arena.
    Arena(Range<usize>),
    /// In a file of the checkpoint.
    File { file: usize, bytes: Range<usize> },
}

#[derive(Clone, Debug)]
struct Matrix {
    dtype: DType,
    layout: Layout,
    rows: usize,
    cols: usize,
    place: Place,
}

/// The loaded weights of one stage, with the program that uses them.
pub struct Weights {
    source: WeightSource,
    program: Program,
    kernels: &'static Kernels,
    arena: AlignedBytes,
    matrices: Vec<Matrix>,
    vectors: Vec<Vec<f32>>,
    rotations: Rotations,
    vocab_size: usize,
}

/// What is to be loaded.
#[derive(Clone, Debug)]
pub struct WeightsRequest {
    /// Where the tensors are.
    pub source: WeightSource,
    /// What they mean.
    pub spec: Arc<ModelSpec>,
    /// Which of them.
    pub part: StagePart,
    /// Whose kernels; `None` for the widest this CPU has.
    pub isa: Option<Isa>,
    /// Whether repacked weights ask for huge pages.
    pub huge_pages: HugePages,
}

impl Weights {
    /// Loads the weights of a part of a model, in parallel; `progress` is called on this thread
    /// every few megabytes. Pages of the file that have been read are given back meanwhile: memory
    /// never holds more than the weights and some megabytes.
    ///
    /// # Errors
    /// A bad tensor, an instruction set that is not there, or a layer unlike the others.
    pub fn load(
        request: &WeightsRequest,
        pool: &mut CpuPool,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, ExecutorError> {
        let kernels = Kernels::for_isa(request.isa.unwrap_or_else(Isa::detect))?;
        let program = Program::lower(&request.spec, &request.part)?;
        let source = request.source.clone();
        let (matrices, arena_bytes) = place_matrices(&source, &program, kernels.isa())?;
        let read_ahead = program.matrices.iter().map(|entry| &entry.tensor);
        source.will_read(read_ahead.chain(&program.vectors))?;
        let vectors = program.vectors.iter().map(|vector| source.vector(vector));
        let vectors = vectors.collect::<Result<_, _>>()?;
        let rotations = load_rotations(&source, &program)?;
        let arena = AlignedBytes::zeroed(arena_bytes, request.huge_pages)
            .map_err(|source| ExecutorError::Memory { what: "repacked weights", source })?;
        let mut weights = Self {
            source,
            program,
            kernels,
            arena,
            matrices,
            vectors,
            rotations,
            vocab_size: request.spec.vocab_size,
        };
        let arena_bytes = weights.arena.len();
        let total_bytes = arena_bytes + weights.file_bytes();
        let mut report = |done_bytes| progress(LoadProgress { done_bytes, total_bytes });
        weights.repack(pool, &mut report)?;
        weights.read_in_place(pool, &mut |done| report(arena_bytes + done))?;
        report(total_bytes);
        Ok(weights)
    }

    /// Bytes of weights that stay in the file.
    fn file_bytes(&self) -> usize {
        let in_file = self.matrices.iter().filter(|matrix| matrix.is_in_file());
        in_file.map(|matrix| self.bytes_of(matrix).len()).sum()
    }

    /// Bytes of memory held beside the mapped file.
    pub fn bytes(&self) -> usize {
        let vectors: usize = self.vectors.iter().map(Vec::len).sum();
        self.arena.len() + vectors * size_of::<f32>()
    }

    /// Bytes that a step of one token reads: all matrices that are multiplied with, and of experts
    /// those in use.
    pub fn bytes_per_token(&self) -> usize {
        let bytes = |(matrix, entry): (&Matrix, &MatrixEntry)| match entry.used_for {
            MatrixUse::Lookup => 0,
            MatrixUse::Multiply => self.bytes_of(matrix).len(),
            MatrixUse::Experts(ExpertShape { n_experts, n_used }) => {
                self.bytes_of(matrix).len() / n_experts * n_used
            }
        };
        self.matrices.iter().zip(&self.program.matrices).map(bytes).sum()
    }

    /// The program that these weights serve.
    pub fn program(&self) -> &Program {
        &self.program
    }

    /// The kernels that the layouts were chosen for.
    pub fn kernels(&self) -> &'static Kernels {
        self.kernels
    }

    /// Tokens of the model's vocabulary.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    pub(super) fn rotations(&self) -> &Rotations {
        &self.rotations
    }

    /// A matrix of the program.
    pub fn matrix(&self, id: MatrixId) -> MatrixView<'_> {
        let matrix = &self.matrices[id.0 as usize];
        let Matrix { dtype, layout, rows, cols, .. } = *matrix;
        MatrixView::new(dtype, layout, rows, cols, self.bytes_of(matrix))
            .expect("the shape was checked when the matrix was placed")
    }

    /// Rows of one expert of a matrix of the program, counted from the expert's first.
    ///
    /// # Panics
    /// When the matrix has no experts or there are no such rows; in [`Layout::Rows16`] also when
    /// `rows` does not start and end with a multiple of 16.
    pub fn expert(&self, id: MatrixId, expert: usize, rows: Range<usize>) -> MatrixView<'_> {
        let (matrix, entry) = (&self.matrices[id.0 as usize], self.program.matrix(id));
        let MatrixUse::Experts(shape) = entry.used_for else { panic!("{id:?} has no experts") };
        let (bytes, each) = (self.bytes_of(matrix), matrix.rows / shape.n_experts);
        assert!(expert < shape.n_experts && rows.end <= each, "{rows:?} of expert {expert}");
        let row_bytes = bytes.len() / matrix.rows;
        let first = expert * each;
        let bytes = &bytes[(first + rows.start) * row_bytes..(first + rows.end) * row_bytes];
        MatrixView::new(matrix.dtype, matrix.layout, rows.len(), matrix.cols, bytes)
            .expect("rows of an expert start and end with a group of the layout")
    }

    /// A vector of the program, in f32.
    pub fn vector(&self, id: VectorId) -> &[f32] {
        &self.vectors[id.0 as usize]
    }

    fn bytes_of(&self, matrix: &Matrix) -> &[u8] {
        match &matrix.place {
            Place::Arena(bytes) => &self.arena[bytes.clone()],
            Place::File { file, bytes } => file_bytes(&self.source, *file, bytes),
        }
    }

    /// All interleaved matrices.
    pub(super) fn arena(&self) -> &[u8] {
        &self.arena
    }

    /// Where a matrix lies in the arena, if it is interleaved there.
    pub(super) fn arena_place(&self, id: MatrixId) -> Option<Range<usize>> {
        match &self.matrices[id.0 as usize] {
            Matrix { place: Place::Arena(bytes), layout: Layout::Rows16, .. } => {
                Some(bytes.clone())
            }
            _ => None,
        }
    }

    /// Fills the place of every matrix in the arena; `progress` hears the bytes that are done.
    fn repack(
        &mut self,
        pool: &mut CpuPool,
        progress: &mut dyn FnMut(usize),
    ) -> Result<(), ExecutorError> {
        let mut arena = &mut self.arena[..];
        let mut offset = 0;
        for (matrix, entry) in self.matrices.iter().zip(&self.program.matrices) {
            let Place::Arena(target) = &matrix.place else { continue };
            let (own, rest) = arena[target.start - offset..].split_at_mut(target.len());
            match &self.source {
                WeightSource::Checkpoint(checkpoint) => {
                    let &Matrix { dtype, layout, rows, cols, .. } = matrix;
                    let name = entry.tensor.name.as_str();
                    let mut report = |done| progress(target.start + done);
                    match checkpoint.place(name)? {
                        Some((file, bytes)) => {
                            let file = checkpoint.file(file);
                            let matrix = FileMatrix { dtype, rows, cols, file, bytes };
                            repack(pool, &matrix, own, &mut report)?;
                        }
                        None => {
                            let matrix = MadeMatrix { checkpoint, name, dtype, layout, rows, cols };
                            make(pool, &matrix, own, &mut report)?;
                        }
                    }
                }
                WeightSource::Random { seed } => {
                    fill_random(pool, *seed, (&entry.tensor, matrix.layout), own)?;
                }
            }
            (arena, offset) = (rest, target.end);
            progress(offset);
        }
        Ok(())
    }

    /// Gives back what was read of the files, also of their headers, and reads what stays in them.
    fn read_in_place(
        &self,
        pool: &mut CpuPool,
        progress: &mut dyn FnMut(usize),
    ) -> Result<(), ExecutorError> {
        let WeightSource::Checkpoint(checkpoint) = &self.source else { return Ok(()) };
        checkpoint.files().for_each(|file| file.unmap_pages(0..file.bytes().len()));
        let mut read = 0;
        for matrix in self.matrices.iter().filter(|matrix| matrix.is_in_file()) {
            let bytes = self.bytes_of(matrix);
            read_in_place(pool, bytes, &mut |done| progress(read + done))?;
            read += bytes.len();
        }
        checkpoint.check_unchanged()?;
        Ok(())
    }
}

impl Matrix {
    fn is_in_file(&self) -> bool {
        matches!(self.place, Place::File { .. })
    }
}

/// Decides where each matrix lies; returns the arena's size too.
fn place_matrices(
    source: &WeightSource,
    program: &Program,
    isa: Isa,
) -> Result<(Vec<Matrix>, usize), ExecutorError> {
    let mut arena_bytes = 0;
    let mut matrices = Vec::with_capacity(program.matrices.len());
    for entry in &program.matrices {
        let TensorRef { dtype, rows, cols, .. } = stored(source, &entry.tensor)?;
        let layout = match entry.used_for {
            MatrixUse::Lookup => Layout::RowMajor,
            MatrixUse::Multiply => layout_for(dtype, isa),
            // Every expert must start with a group of rows of its own.
            MatrixUse::Experts(shape) if (rows / shape.n_experts).is_multiple_of(ROWS) => {
                layout_for(dtype, isa)
            }
            MatrixUse::Experts(_) => Layout::RowMajor,
        };
        let in_file = match (source, layout) {
            (WeightSource::Checkpoint(checkpoint), Layout::RowMajor) => {
                checkpoint.place(&entry.tensor.name)?
            }
            _ => None,
        };
        let place = match in_file {
            Some((file, bytes)) => Place::File { file, bytes },
            None => {
                let bytes = packed_bytes(dtype, layout, rows, cols).ok_or_else(|| {
                    ExecutorError::Misshapen { tensor: entry.tensor.name.clone(), dtype, cols }
                })?;
                let start = arena_bytes;
                arena_bytes = (start + bytes).next_multiple_of(ALIGNMENT);
                Place::Arena(start..start + bytes)
            }
        };
        matrices.push(Matrix { dtype, layout, rows, cols, place });
    }
    Ok((matrices, arena_bytes))
}

/// A matrix as its source has it.
pub(super) fn stored(
    source: &WeightSource,
    tensor: &TensorRef,
) -> Result<TensorRef, ExecutorError> {
    let WeightSource::Checkpoint(checkpoint) = source else { return Ok(tensor.clone()) };
    let name = tensor.name.clone();
    let dtype = checkpoint.dtype(&name)?;
    let info = checkpoint.tensor_info(&name).ok_or_else(|| checkpoint.refuse_missing(&name))?;
    let (rows, cols) = (info.shape.rows(), info.shape.cols());
    match packed_bytes(dtype, Layout::RowMajor, rows, cols) {
        Some(bytes) if info.bytes == Some(bytes) => Ok(TensorRef { name, dtype, rows, cols }),
        _ => Err(ExecutorError::Misshapen { tensor: name, dtype, cols }),
    }
}

fn file_bytes<'a>(source: &'a WeightSource, file: usize, bytes: &Range<usize>) -> &'a [u8] {
    let WeightSource::Checkpoint(checkpoint) = source else {
        unreachable!("random weights all lie in the arena")
    };
    let file = checkpoint.file(file);
    &file.bytes()[bytes.clone()]
}

pub(super) fn load_rotations(
    source: &WeightSource,
    program: &Program,
) -> Result<Rotations, ExecutorError> {
    let mut rotations = Rotations::default();
    for rope in &program.ropes {
        let factors = rope.frequency_factors.as_ref();
        let factors = factors.map(|factors| source.vector(factors)).transpose()?;
        rotations.push(rope, factors.as_deref())?;
    }
    Ok(rotations)
}
