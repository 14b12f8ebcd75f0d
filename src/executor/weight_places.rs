//! Where a stage's matrices lie: in the arena, or in a file of the checkpoint.
//!
//! With several NUMA nodes the arena has a region for each, and a matrix a part in each region: the
//! rows that this node's workers begin with. Of a matrix of experts a part has such rows of every
//! expert, since nobody knows which experts will be used. So a node's weights are one stretch of
//! memory, on huge pages throughout. A last region is of all nodes in turn: for what can't be
//! divided so. Without nodes it is the whole arena.

use super::ExecutorError;
use super::program::{MatrixEntry, MatrixUse, Op, Program};
use super::weight_source::WeightSource;
use crate::memory::{ALIGNMENT, nodes_of_pages, prefer_node, take_nodes_in_turn};
use crate::model::TensorRef;
use crate::placement::NodeTeams;
use crate::tensor::DType;
use std::ops::Range;
use tandem_cpu_kernels::repack::ROWS;
use tandem_cpu_kernels::{Isa, Layout, MatrixView, layout_for, packed_bytes};

/// Where a region begins, where there are several: a huge page has one node.
const REGION_ALIGNMENT: usize = 2 << 20;

/// Rows of a matrix, or of each of its experts, that lie side by side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// Of the matrix, or of each expert.
    pub rows: Range<usize>,
    /// In the arena.
    pub bytes: Range<usize>,
}

/// Where a matrix's bytes are.
#[derive(Clone, Debug)]
pub(super) enum Place {
    /// In the arena: one part for each NUMA node, or one.
    Arena(Box<[Part]>),
    /// In a file of the checkpoint.
    File { file: usize, bytes: Range<usize> },
}

#[derive(Clone, Debug)]
pub(super) struct Matrix {
    pub dtype: DType,
    pub layout: Layout,
    pub rows: usize,
    pub cols: usize,
    /// Experts that share the rows evenly; 1 where there are none.
    pub experts: usize,
    pub place: Place,
}

/// Rows of a matrix that lie side by side.
pub(super) struct StoredRows<'a> {
    pub view: MatrixView<'a>,
    /// The row of the matrix that the view begins with.
    pub first: usize,
    /// Those that are asked for, counted in the view.
    pub rows: Range<usize>,
}

impl Matrix {
    pub fn is_in_file(&self) -> bool {
        matches!(self.place, Place::File { .. })
    }

    /// Rows of an expert, or of the matrix.
    pub fn rows_each(&self) -> usize {
        self.rows / self.experts
    }

    /// Bytes of all rows, in the layout.
    pub fn bytes(&self) -> usize {
        match &self.place {
            Place::Arena(parts) => parts.iter().map(|part| part.bytes.len()).sum(),
            Place::File { bytes, .. } => bytes.len(),
        }
    }

    /// Rows between whose ends no part ends; all of them where there is one.
    pub fn parts(&self) -> impl Iterator<Item = Range<usize>> {
        let (parts, whole) = match &self.place {
            Place::Arena(parts) => (&parts[..], None),
            Place::File { .. } => (&[][..], Some(0..self.rows_each())),
        };
        parts.iter().map(|part| part.rows.clone()).chain(whole)
    }

    /// A view of rows that lie side by side.
    pub fn view<'a>(&self, rows: usize, bytes: &'a [u8]) -> MatrixView<'a> {
        MatrixView::new(self.dtype, self.layout, rows, self.cols, bytes)
            .expect("the shape was checked when the matrix was placed")
    }

    /// `rows` of a matrix without experts as they lie, cut where parts end. `bytes` gives the bytes
    /// of the part with an index.
    pub fn stored<'a>(
        &self,
        rows: Range<usize>,
        bytes: impl Fn(usize) -> &'a [u8],
    ) -> impl Iterator<Item = StoredRows<'a>> {
        self.parts().enumerate().filter_map(move |(index, part)| {
            let wanted = rows.start.max(part.start)..rows.end.min(part.end);
            if wanted.is_empty() {
                return None;
            }
            let view = self.view(part.len(), bytes(index));
            let rows = wanted.start - part.start..wanted.end - part.start;
            Some(StoredRows { view, first: part.start, rows })
        })
    }
}

/// The regions of an arena.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Regions {
    /// One for each NUMA node that has workers, and the last, of all nodes in turn.
    ends: Vec<usize>,
}

impl Regions {
    fn new(teams: usize) -> Self {
        Self { ends: vec![0; teams + 1] }
    }

    /// Room for so many bytes; where they begin, counted in the region.
    fn allot(&mut self, region: usize, bytes: usize) -> Range<usize> {
        let start = self.ends[region];
        self.ends[region] = (start + bytes).next_multiple_of(ALIGNMENT);
        start..start + bytes
    }

    /// Where a region lies in the arena.
    fn range(&self, region: usize) -> Range<usize> {
        let before = self.ends[..region].iter();
        let start = before.map(|bytes| bytes.next_multiple_of(REGION_ALIGNMENT)).sum();
        start..start + self.ends[region]
    }

    /// Bytes of the arena.
    pub fn bytes(&self) -> usize {
        self.range(self.ends.len() - 1).end
    }

    /// Asks for memory of its node for each region, before anybody touches it. Where that is
    /// refused, workers touch the parts of their own node first.
    pub fn ask_for_nodes(&self, arena: &[u8], teams: &NodeTeams) {
        let (nodes, shared) = (teams.nodes(), self.ends.len() - 1);
        if nodes.is_empty() {
            return;
        }
        let mut own = (0..shared).zip(nodes);
        let asked =
            own.try_for_each(|(region, node)| prefer_node(&arena[self.range(region)], *node));
        let in_turn = || take_nodes_in_turn(&arena[self.range(shared)], nodes);
        if let Err(error) = asked.and_then(|()| in_turn()) {
            tracing::warn!(%error, "weights lie on the NUMA nodes of those who load them");
        }
    }

    /// Says where a node had too little memory: one page of each 2 MiB is looked at.
    pub fn tell_nodes(&self, arena: &[u8], teams: &NodeTeams) {
        for (region, node) in teams.nodes().iter().enumerate().take(self.ends.len() - 1) {
            let Ok(pages) = nodes_of_pages(&arena[self.range(region)], REGION_ALIGNMENT) else {
                return;
            };
            let elsewhere = pages.iter().flatten().filter(|found| *found != node).count();
            let (percent, bytes) = (100 * elsewhere / pages.len().max(1), self.ends[region]);
            if elsewhere > 0 {
                tracing::warn!(node, bytes, percent, "weights of a NUMA node lie on others");
            } else {
                tracing::info!(node, bytes, "weights of a NUMA node lie there");
            }
        }
    }
}

/// Decides where each matrix lies.
///
/// # Errors
/// A tensor that is missing, or whose shape its file contradicts.
pub(super) fn place_matrices(
    source: &WeightSource,
    program: &Program,
    isa: Isa,
    teams: &NodeTeams,
) -> Result<(Vec<Matrix>, Regions), ExecutorError> {
    // Spilled experts stream to a GPU in the order of their rows.
    let streams = program.ops.iter().any(|op| matches!(op, Op::SpillStart { .. }));
    let mut regions = Regions::new(if teams.are_divided() { teams.count() } else { 0 });
    let mut matrices = Vec::with_capacity(program.matrices.len());
    for entry in &program.matrices {
        let TensorRef { dtype, rows, cols, .. } = stored(source, &entry.tensor)?;
        let (layout, experts) = layout_of(entry, (dtype, rows), isa);
        let in_file = match (source, entry.used_for) {
            (WeightSource::Checkpoint(checkpoint), MatrixUse::Lookup) => {
                checkpoint.place(&entry.tensor.name)?
            }
            // A file's pages are small, and nobody decides on which nodes they lie.
            _ => None,
        };
        let place = match in_file {
            Some((file, bytes)) => Place::File { file, bytes },
            None => {
                let each = rows / experts;
                let can_be_cut = experts == 1 || each.is_multiple_of(ROWS) && !streams;
                let is_cut = teams.are_divided() && can_be_cut;
                let all = regions.ends.len() - 1;
                let mut part = |region: usize, rows: Range<usize>| {
                    let bytes = packed_bytes(dtype, layout, rows.len() * experts, cols);
                    Some(Part { bytes: regions.allot(region, bytes?), rows })
                };
                let parts = match is_cut {
                    true => (0..all).map(|team| part(team, teams.rows(team, each))).collect(),
                    false => std::iter::once(part(all, 0..each)).collect(),
                };
                let parts: Option<Box<[Part]>> = parts;
                Place::Arena(parts.ok_or_else(|| ExecutorError::Misshapen {
                    tensor: entry.tensor.name.clone(),
                    dtype,
                    cols,
                })?)
            }
        };
        matrices.push(Matrix { dtype, layout, rows, cols, experts, place });
    }
    for matrix in &mut matrices {
        let Place::Arena(parts) = &mut matrix.place else { continue };
        let is_whole = parts.len() == 1;
        for (team, part) in parts.iter_mut().enumerate() {
            let region = if is_whole { regions.ends.len() - 1 } else { team };
            let start = regions.range(region).start;
            part.bytes = start + part.bytes.start..start + part.bytes.end;
        }
    }
    Ok((matrices, regions))
}

/// The layout of a matrix, and how many experts share its rows.
fn layout_of(entry: &MatrixEntry, (dtype, rows): (DType, usize), isa: Isa) -> (Layout, usize) {
    match entry.used_for {
        MatrixUse::Lookup => (Layout::RowMajor, 1),
        MatrixUse::Multiply => (layout_for(dtype, isa), 1),
        // Every expert must start with a group of rows of its own.
        MatrixUse::Experts(shape) if (rows / shape.n_experts).is_multiple_of(ROWS) => {
            (layout_for(dtype, isa), shape.n_experts)
        }
        MatrixUse::Experts(shape) => (Layout::RowMajor, shape.n_experts),
    }
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
