//! The weights of a model in a GPU's memory: matrices in the layout of its kernels, vectors in f32.
//! Rows of an embedding that is not multiplied with stay where they are and travel with each step.

use super::spill_weights::SpilledWeights;
use super::supported::check;
use super::vram::{Vram, VramPlan};
use crate::executor::ExecutorError;
use crate::executor::cpu_pool::CpuPool;
use crate::executor::program::{
    Buffer, MatrixEntry, MatrixId, MatrixUse, Op, Program, StagePart, VectorId,
};
use crate::executor::rotations::Rotations;
use crate::executor::weight_fill::PartGroups;
use crate::executor::weight_made::{MadeMatrix, make};
use crate::executor::weight_places::stored;
use crate::executor::weight_source::{WeightSource, fill_random};
use crate::executor::weights::{WeightsRequest, load_rotations};
use crate::formats::Checkpoint;
use crate::memory::Commitment;
use crate::model::{ModelSpec, TensorRef};
use crate::tensor::DType;
use std::ops::Range;
use std::time::Duration;
use tandem_cpu_kernels::Layout;
use tandem_kernels::{DeviceMatrix, DeviceMemory, Gpu, GpuError, Span, Staging};

/// Rows that the host looks up.
struct Lookup {
    dtype: DType,
    cols: usize,
    bytes: LookupBytes,
}

enum LookupBytes {
    File {
        file: usize,
        bytes: Range<usize>,
    },
    Memory(Vec<u8>),
    /// Not here: on the GPU, which looks them up.
    OnGpu,
}

/// The loaded weights of a model on a GPU, with the program that uses them.
pub struct GpuWeights {
    source: WeightSource,
    program: Program,
    /// By [`MatrixId`]; none where rows are only looked up.
    matrices: Vec<Option<DeviceMatrix>>,
    lookup: Option<Lookup>,
    vectors: Vec<DeviceMemory>,
    rotations: Rotations,
    vocab_size: usize,
    pub(super) spilled: Option<SpilledWeights>,
    vram: Vram,
    reserved: Option<Commitment>,
    // Last: freed after all that lies on it.
    gpu: Gpu,
}

impl GpuWeights {
    /// Loads the weights of a part of a model but for spilled ones, on a GPU that is opened when
    /// the part is known to run there. `progress` is called with the bytes that are done.
    ///
    /// # Errors
    /// As [`GpuWeights::load`].
    pub(super) fn load_resident(
        (request, plan): (&WeightsRequest, Option<VramPlan>),
        pool: Option<&mut CpuPool>,
        progress: &mut dyn FnMut(usize),
        open: impl FnOnce() -> Result<Gpu, GpuError>,
    ) -> Result<Self, ExecutorError> {
        let program = Program::lower(&request.spec, &request.part)?;
        check(&program)?;
        let gpu = open()?;
        let source = request.source.clone();
        let (vram, reserved) = Vram::reserve(&gpu, plan, bytes_of(&source, &program)?)?;
        let read_ahead = program.matrices.iter().map(|entry| &entry.tensor);
        source.will_read(read_ahead.chain(&program.vectors))?;
        let rotations = load_rotations(&source, &program)?;
        let vectors = program.vectors.iter().map(|vector| {
            let values = source.vector(vector)?;
            let memory = gpu.alloc(size_of_val(&values[..]))?;
            gpu.upload(&values, memory.span())?;
            Ok::<_, ExecutorError>(memory)
        });
        let vectors = vectors.collect::<Result<_, _>>()?;
        let mut weights = Self {
            source,
            program,
            matrices: Vec::new(),
            lookup: None,
            vectors,
            rotations,
            vocab_size: request.spec.vocab_size,
            spilled: None,
            vram,
            reserved: None,
            gpu,
        };
        weights.load_matrices(pool, progress)?;
        weights.gpu.synchronize()?;
        weights.reserved = Some(reserved.commit());
        Ok(weights)
    }

    /// Why a model cannot run on a GPU, if it can't: without loading anything.
    ///
    /// # Errors
    /// [`ExecutorError::Unsupported`].
    pub fn supports(spec: &ModelSpec) -> Result<(), ExecutorError> {
        check(&Program::lower(spec, &StagePart::whole(spec.layers.len()))?)
    }

    /// How long a step may wait for the GPU before that counts as hung; 30 s without this.
    pub fn limit_waits(&self, most: Duration) {
        self.gpu.limit_waits(most);
    }

    /// Has the CPU compute all that is spilled, as where the driver refuses to register its memory.
    pub fn forgo_streams(&mut self) {
        self.spilled.iter_mut().for_each(SpilledWeights::forgo_streams);
    }

    fn load_matrices(
        &mut self,
        mut pool: Option<&mut CpuPool>,
        progress: &mut dyn FnMut(usize),
    ) -> Result<(), ExecutorError> {
        let staging = Staging::new(&self.gpu)?;
        let mut done_bytes = 0;
        for entry in &self.program.matrices {
            if entry.spilled.is_some() {
                self.matrices.push(None);
                continue;
            }
            let tensor = stored(&self.source, &entry.tensor)?;
            let TensorRef { dtype, rows, cols, .. } = tensor;
            let is_multiplied = entry.used_for != MatrixUse::Lookup;
            let is_looked_up = self.embedding_table() == Some(entry.tensor.name.as_str());
            let matrix = match &self.source {
                WeightSource::Checkpoint(checkpoint) => {
                    let place = checkpoint.place(&tensor.name)?;
                    let made = match place {
                        Some(_) => Vec::new(),
                        None => {
                            let pool = pool.as_deref_mut().expect("workers for made weights");
                            make_whole(pool, checkpoint, &tensor)?
                        }
                    };
                    let bytes = match &place {
                        Some((file, bytes)) => file_bytes(checkpoint, *file, bytes),
                        None => &made,
                    };
                    let matrix = is_multiplied.then(|| {
                        DeviceMatrix::upload(&self.gpu, &staging, dtype, (rows, cols), bytes)
                    });
                    if is_looked_up {
                        let bytes = match place {
                            Some((file, bytes)) => LookupBytes::File { file, bytes },
                            None if is_multiplied => LookupBytes::OnGpu,
                            None => LookupBytes::Memory(made),
                        };
                        self.lookup = Some(Lookup { dtype, cols, bytes });
                    }
                    matrix
                }
                WeightSource::Random { seed } => {
                    let row_bytes = dtype.row_bytes(cols).ok_or_else(|| {
                        ExecutorError::Misshapen { tensor: tensor.name.clone(), dtype, cols }
                    })?;
                    let mut bytes = vec![0; rows * row_bytes];
                    let pool = pool.as_deref_mut().expect("workers for random weights");
                    let rows_of = [PartGroups::whole(Layout::RowMajor, rows, row_bytes)];
                    fill_random(pool, *seed, &tensor, (&rows_of, vec![&mut bytes]))?;
                    let matrix = is_multiplied.then(|| {
                        DeviceMatrix::upload(&self.gpu, &staging, dtype, (rows, cols), &bytes)
                    });
                    if is_looked_up {
                        let bytes = match is_multiplied {
                            true => LookupBytes::OnGpu,
                            false => LookupBytes::Memory(bytes),
                        };
                        self.lookup = Some(Lookup { dtype, cols, bytes });
                    }
                    matrix
                }
            };
            self.matrices.push(matrix.transpose()?);
            done_bytes += tensor.bytes() as usize;
            progress(done_bytes);
        }
        Ok(())
    }

    /// The tensor whose rows are looked up.
    fn embedding_table(&self) -> Option<&str> {
        self.program.ops.iter().find_map(|op| match op {
            Op::Embed { table, .. } => Some(self.program.matrix(*table).tensor.name.as_str()),
            _ => None,
        })
    }

    /// The GPU.
    pub(super) fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// The books of its memory.
    pub(super) fn vram(&self) -> &Vram {
        &self.vram
    }

    /// The program that these weights serve.
    pub fn program(&self) -> &Program {
        &self.program
    }

    /// Tokens of the model's vocabulary.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// What lies in host memory.
    pub(super) fn spilled(&self) -> Option<&SpilledWeights> {
        self.spilled.as_ref()
    }

    /// Bytes that spilled weights hold in host memory: those of all parts of a model, which the
    /// first part with any has.
    pub fn spilled_bytes(&self) -> usize {
        let first = self.spilled.as_ref().filter(|spilled| spilled.first().index == 0);
        first.map_or(0, |spilled| spilled.weights().bytes())
    }

    /// Bytes held on the GPU.
    pub fn bytes(&self) -> usize {
        let matrices: usize = self.matrices.iter().flatten().map(DeviceMatrix::bytes).sum();
        matrices + self.vectors.iter().map(DeviceMemory::bytes).sum::<usize>()
    }

    /// Bytes that a step of one token reads of the weights: of experts those in use.
    pub fn bytes_per_token(&self) -> usize {
        let bytes = |(matrix, used_for)| match (DeviceMatrix::bytes(matrix), used_for) {
            (bytes, MatrixUse::Experts(shape)) => bytes / shape.n_experts * shape.n_used,
            (bytes, _) => bytes,
        };
        self.multiplied().map(bytes).sum()
    }

    /// What is multiplied with, and how.
    fn multiplied(&self) -> impl Iterator<Item = (&DeviceMatrix, MatrixUse)> {
        let entries = self.matrices.iter().zip(&self.program.matrices);
        entries.filter_map(|(matrix, entry)| Some((matrix.as_ref()?, entry.used_for)))
    }

    /// Whether some products are of float weights, which read activations in f32.
    pub(super) fn has_floats(&self) -> bool {
        self.dtypes().any(|(dtype, _)| !dtype.is_quantized())
    }

    /// The same of the products of experts alone.
    pub(super) fn has_float_experts(&self) -> bool {
        self.dtypes().any(|(dtype, used_for)| {
            matches!(used_for, MatrixUse::Experts(_)) && !dtype.is_quantized()
        })
    }

    /// Types of what is multiplied with, also of what is spilled.
    fn dtypes(&self) -> impl Iterator<Item = (DType, MatrixUse)> {
        let entries = self.program.matrices.iter().zip(&self.matrices);
        entries.filter_map(|(entry, matrix)| match (matrix, entry.spilled) {
            (Some(matrix), _) => Some((matrix.dtype(), entry.used_for)),
            (None, Some(_)) => Some((entry.tensor.dtype, entry.used_for)),
            (None, None) => None,
        })
    }

    pub(super) fn rotations(&self) -> &Rotations {
        &self.rotations
    }

    pub(super) fn matrix(&self, id: MatrixId) -> &DeviceMatrix {
        self.matrices[id.0 as usize].as_ref().expect("what is multiplied with was uploaded")
    }

    pub(super) fn vector(&self, id: VectorId) -> Span<'_> {
        self.vectors[id.0 as usize].span()
    }

    /// The embedding where it lies on the GPU, because the model multiplies with it as well.
    pub(super) fn embedding(&self) -> Option<&DeviceMatrix> {
        let name = self.embedding_table()?;
        let entries = self.program.matrices.iter().zip(&self.matrices);
        entries
            .filter(|(entry, _)| entry.tensor.name == name)
            .find_map(|(_, matrix)| matrix.as_ref())
    }

    /// Row `row` of the embedding as it lies in the file.
    pub(super) fn file_row(&self, row: usize) -> &[u8] {
        let lookup = self.lookup();
        let bytes = match (&lookup.bytes, &self.source) {
            (LookupBytes::Memory(bytes), _) => bytes.as_slice(),
            (LookupBytes::File { file, bytes }, WeightSource::Checkpoint(checkpoint)) => {
                file_bytes(checkpoint, *file, bytes)
            }
            (LookupBytes::File { .. }, _) => unreachable!("random weights lie in memory"),
            (LookupBytes::OnGpu, _) => unreachable!("the GPU looks rows up itself"),
        };
        let row_bytes = lookup.dtype.row_bytes(lookup.cols).expect("whole blocks");
        &bytes[row * row_bytes..][..row_bytes]
    }

    fn lookup(&self) -> &Lookup {
        self.lookup.as_ref().expect("a program that embeds has a table")
    }
}

fn file_bytes<'a>(checkpoint: &'a Checkpoint, file: usize, bytes: &Range<usize>) -> &'a [u8] {
    let file = checkpoint.file(file);
    &file.bytes()[bytes.clone()]
}

/// Bytes that the weights of a program take.
fn bytes_of(source: &WeightSource, program: &Program) -> Result<usize, ExecutorError> {
    let resident =
        |entry: &&MatrixEntry| entry.spilled.is_none() && entry.used_for != MatrixUse::Lookup;
    let matrices = program.matrices.iter().filter(resident).map(|entry| {
        let TensorRef { dtype, rows, cols, .. } = stored(source, &entry.tensor)?;
        Ok::<_, ExecutorError>(DeviceMatrix::bytes_of(dtype, rows, cols))
    });
    let matrices = matrices.sum::<Result<usize, _>>()?;
    let vectors = program.vectors.iter().map(|vector| vector.rows * vector.cols);
    Ok(matrices + vectors.sum::<usize>() * size_of::<f32>())
}

/// All rows of a matrix that is made from other tensors, by all workers.
fn make_whole(
    pool: &mut CpuPool,
    checkpoint: &Checkpoint,
    matrix: &TensorRef,
) -> Result<Vec<u8>, ExecutorError> {
    let TensorRef { name, dtype, rows, cols } = matrix;
    let mut bytes = vec![0; matrix.bytes() as usize];
    let parts = [PartGroups::whole(Layout::RowMajor, *rows, bytes.len() / rows.max(&1))];
    let made = MadeMatrix { checkpoint, name, dtype: *dtype, cols: *cols };
    make(pool, &made, (&parts, vec![&mut bytes]), &mut |_| {})?;
    Ok(bytes)
}

/// Elements of a row of a buffer.
pub(super) fn width_of(program: &Program, buffer: Buffer) -> usize {
    let dims = program.dims;
    match buffer {
        Buffer::Residual | Buffer::Normed | Buffer::Projected | Buffer::Selected => dims.embedding,
        Buffer::Heads => dims.heads,
        Buffer::Attended => dims.attended,
        Buffer::Hidden => dims.hidden,
        Buffer::Up => dims.up(),
        Buffer::Routes => 0,
    }
}
