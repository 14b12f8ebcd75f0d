//! A stage's weights as its kernels read them. Matrices that are multiplied with are brought by all
//! workers into one arena, on huge pages, quantised ones interleaved; the others stay in the mapped
//! file. Weights outlive their stage:
//! a new one is made from them without touching a file.

use super::ExecutorError;
use super::cpu_pool::CpuPool;
use super::program::{ExpertShape, MatrixEntry, MatrixId, MatrixUse, Program, StagePart, VectorId};
use super::rotations::Rotations;
use super::weight_fill::{disjoint, groups_of};
use super::weight_made::{MadeMatrix, make};
use super::weight_places::{Matrix, Part, Place, StoredRows, place_matrices};
use super::weight_repack::{FileMatrix, read_in_place, repack};
use super::weight_source::{WeightSource, fill_random};
use crate::memory::{AlignedBytes, HugePages};
use crate::model::ModelSpec;
use crate::tensor::DType;
use std::ops::Range;
use std::sync::Arc;
use tandem_cpu_kernels::{Isa, Kernels, Layout, MatrixView, dequantize_packed_row};

/// How far loading has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadProgress {
    /// Bytes of weights that are ready.
    pub done_bytes: usize,
    /// Bytes of all weights.
    pub total_bytes: usize,
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
        source.check_unchanged()?;
        let (matrices, regions) = place_matrices(&source, &program, kernels.isa(), pool.nodes())?;
        let read_ahead = program.matrices.iter().map(|entry| &entry.tensor);
        source.will_read(read_ahead.chain(&program.vectors))?;
        let vectors = program.vectors.iter().map(|vector| source.vector(vector));
        let vectors = vectors.collect::<Result<_, _>>()?;
        let rotations = load_rotations(&source, &program)?;
        let arena = AlignedBytes::zeroed(regions.bytes(), request.huge_pages)
            .map_err(|source| ExecutorError::Memory { what: "repacked weights", source })?;
        regions.ask_for_nodes(&arena, pool.nodes());
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
        regions.tell_nodes(&weights.arena, pool.nodes());
        report(total_bytes);
        Ok(weights)
    }

    /// Bytes of weights that stay in the file.
    fn file_bytes(&self) -> usize {
        let in_file = self.matrices.iter().filter(|matrix| matrix.is_in_file());
        in_file.map(Matrix::bytes).sum()
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
            MatrixUse::Multiply => matrix.bytes(),
            MatrixUse::Experts(ExpertShape { n_experts, n_used }) => {
                matrix.bytes() / n_experts * n_used
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

    /// Type of a matrix of the program.
    pub fn dtype(&self, id: MatrixId) -> DType {
        self.at(id).dtype
    }

    /// Rows of a matrix of the program, of all its experts.
    pub fn rows(&self, id: MatrixId) -> usize {
        self.at(id).rows
    }

    /// Bytes of a matrix of the program.
    pub fn matrix_bytes(&self, id: MatrixId) -> usize {
        self.at(id).bytes()
    }

    /// Some rows of a matrix of the program that has no experts, as they lie: in one piece, or in
    /// one for each NUMA node.
    pub(super) fn stored(
        &self,
        id: MatrixId,
        rows: Range<usize>,
    ) -> impl Iterator<Item = StoredRows<'_>> {
        let matrix = self.at(id);
        matrix.stored(rows, move |part| self.bytes_of(matrix, part))
    }

    /// Row `row` of a matrix without experts, in f32.
    ///
    /// # Panics
    /// When there is none.
    pub fn copy_row(&self, id: MatrixId, row: usize, target: &mut [f32]) {
        let stored = self.stored(id, row..row + 1).next();
        let stored = stored.unwrap_or_else(|| panic!("row {row} of {}", self.rows(id)));
        dequantize_packed_row(&stored.view, stored.rows.start, target);
    }

    /// `rows` of each expert of a matrix of the program, cut where one does not lie beside the
    /// next.
    pub(super) fn uncut(
        &self,
        id: MatrixId,
        rows: Range<usize>,
    ) -> impl Iterator<Item = Range<usize>> {
        let cut = move |part: Range<usize>| rows.start.max(part.start)..rows.end.min(part.end);
        self.at(id).parts().map(cut).filter(|rows| !rows.is_empty())
    }

    /// Rows of one expert of a matrix of the program, counted from the expert's first.
    ///
    /// # Panics
    /// When the matrix has no experts, there are no such rows, or they do not lie side by side
    /// (`Weights::uncut`); in [`Layout::Rows16`] also when `rows` does not start and end with a
    /// multiple of 16.
    pub fn expert(&self, id: MatrixId, expert: usize, rows: Range<usize>) -> MatrixView<'_> {
        let matrix = self.at(id);
        assert!(expert < matrix.experts, "expert {expert} of {}", matrix.experts);
        let found = matrix.parts().enumerate().find(|(_, part)| rows.start < part.end);
        let (index, part) = found.unwrap_or_else(|| panic!("{rows:?} of expert {expert}"));
        assert!(rows.end <= part.end, "{rows:?} of {part:?} of expert {expert}");
        let bytes = self.bytes_of(matrix, index);
        let row_bytes = bytes.len() / (matrix.experts * part.len());
        let first = expert * part.len();
        let [start, end] = [rows.start, rows.end].map(|row| (first + row - part.start) * row_bytes);
        let bytes = &bytes[start..end];
        matrix.view(rows.len(), bytes)
    }

    /// A vector of the program, in f32.
    pub fn vector(&self, id: VectorId) -> &[f32] {
        &self.vectors[id.0 as usize]
    }

    fn at(&self, id: MatrixId) -> &Matrix {
        &self.matrices[id.0 as usize]
    }

    /// The bytes of a part of a matrix.
    fn bytes_of(&self, matrix: &Matrix, part: usize) -> &[u8] {
        match &matrix.place {
            Place::Arena(parts) => &self.arena[parts[part].bytes.clone()],
            Place::File { file, bytes } => file_bytes(&self.source, *file, bytes),
        }
    }

    /// All matrices but those that stay in a file.
    pub(super) fn arena(&self) -> &[u8] {
        &self.arena
    }

    /// Layout of a matrix of the program, and where its rows lie in the arena: rows, and their
    /// bytes, in ascending order.
    ///
    /// # Panics
    /// When it lies in a file, or has experts of which each lies in several parts.
    pub(super) fn arena_parts(
        &self,
        id: MatrixId,
    ) -> (Layout, impl Iterator<Item = (Range<usize>, Range<usize>)>) {
        let matrix = self.at(id);
        let Place::Arena(parts) = &matrix.place else { panic!("{id:?} lies in a file") };
        assert!(matrix.experts == 1 || parts.len() == 1, "{id:?} has experts in several parts");
        let (is_whole, all) = (parts.len() == 1, matrix.rows);
        let rows = move |part: &Part| if is_whole { 0..all } else { part.rows.clone() };
        (matrix.layout, parts.iter().map(move |part| (rows(part), part.bytes.clone())))
    }

    /// Fills the place of every matrix in the arena; `progress` hears the bytes that are done.
    fn repack(
        &mut self,
        pool: &mut CpuPool,
        progress: &mut dyn FnMut(usize),
    ) -> Result<(), ExecutorError> {
        let mut ready = 0;
        for (matrix, entry) in self.matrices.iter().zip(&self.program.matrices) {
            let Place::Arena(places) = &matrix.place else { continue };
            let groups = groups_of(matrix);
            let places = places.iter().map(|part| part.bytes.clone());
            let targets = (&groups[..], disjoint(&mut self.arena, places));
            let name = entry.tensor.name.as_str();
            let mut report = |done| progress(ready + done);
            match &self.source {
                WeightSource::Checkpoint(checkpoint) => match checkpoint.place(name)? {
                    Some((file, bytes)) => {
                        let (dtype, cols) = (matrix.dtype, matrix.cols);
                        let file = checkpoint.file(file);
                        let matrix = FileMatrix { dtype, cols, file, bytes };
                        repack(pool, &matrix, targets, &mut report)?;
                    }
                    None => {
                        let (dtype, cols) = (matrix.dtype, matrix.cols);
                        let matrix = MadeMatrix { checkpoint, name, dtype, cols };
                        make(pool, &matrix, targets, &mut report)?;
                    }
                },
                WeightSource::Random { seed } => {
                    fill_random(pool, *seed, &entry.tensor, targets)?;
                }
            }
            ready += matrix.bytes();
            progress(ready);
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
            let bytes = self.bytes_of(matrix, 0);
            read_in_place(pool, bytes, &mut |done| progress(read + done))?;
            read += bytes.len();
        }
        self.source.check_unchanged()
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
