//! What sampling needs of rows of logits beside their best token: a token drawn from all of them,
//! the logit of a token, a list of the most likely tokens.

use crate::gpu::{DeviceMemory, Gpu, GpuError, Span};
use crate::pinned::PinnedMemory;
use crate::sample::{PARTS, RowMeasures};
use cudarc::driver::DeviceRepr;

const THREADS: usize = 256;
/// Logits of a block of the grid, and those whose weights are summed first.
const PART: usize = 4096;
const SUM_BLOCK: usize = 1024;
/// Tokens are counted by how far they lie below the largest logit.
const BINS: usize = 2048;
const BINS_PER_NAT: f32 = 32.0;
/// Bytes of a list's bins and of a row's answer.
const BINS_BYTES: usize = 4 * (2 * BINS + 4);
const ANSWER_BYTES: usize = 32;
const LISTED_BYTES: usize = 8;
/// No list, or no token.
const NONE: u32 = u32::MAX;

/// What is asked about one token of a row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Asked {
    /// Nothing.
    Nothing,
    /// The logit of a given token.
    Logit(u32),
    /// The first token t with Σ w(0 ..= t) > `draw` · Σ w, of weights
    /// w = exp((logit − largest) / `temperature`), and its logit. Sums are rounded as the CPU's
    /// sampler rounds them.
    Draw {
        /// More than 0.
        temperature: f32,
        /// In `[0, 1)`.
        draw: f64,
    },
}

/// Which of the most likely tokens a list has: at least `count`, and of those within `below` of the
/// largest logit all, or as many as reach a share of the mass.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ListBounds {
    /// At least 1.
    pub count: usize,
    /// In nats.
    pub below: f32,
    /// Share of Σ exp(logit). What is asked beside is then [`Asked::Nothing`].
    pub mass: Option<f32>,
}

/// What is asked about a row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowQuestion {
    /// Which row of the logits.
    pub row: usize,
    /// About one token.
    pub asked: Asked,
    /// About the most likely ones.
    pub list: Option<ListBounds>,
}

impl RowQuestion {
    /// Bytes of a question on its way.
    pub const BYTES: usize = 40;

    /// Writes questions one after the other, as [`RowDraws::ask`] takes them.
    ///
    /// # Panics
    /// When the bytes are fewer.
    pub fn write_all<'a>(questions: impl Iterator<Item = &'a RowQuestion>, to: &mut [u8]) {
        let mut lists = 0;
        for (at, question) in questions.enumerate() {
            let list = question.list.map_or(NONE, |_| lists);
            lists += u32::from(question.list.is_some());
            question.write(list, &mut to[at * Self::BYTES..][..Self::BYTES]);
        }
    }

    fn write(&self, list: u32, to: &mut [u8]) {
        let bounds = self.list.unwrap_or(ListBounds { count: 1, below: 0.0, mass: None });
        let depth = (bounds.below * BINS_PER_NAT + 1.0).min((BINS - 1) as f32) as u32;
        let (temperature, token, draw) = match self.asked {
            // The list's mass is measured against the sum of weights.
            Asked::Nothing => (if bounds.mass.is_some() { 1.0 } else { 0.0 }, 0, 0.0),
            Asked::Logit(token) => (0.0, token, 0.0),
            Asked::Draw { temperature, draw } => (temperature, NONE, draw),
        };
        let mass = bounds.mass.unwrap_or(0.0);
        let words = [
            self.row as u32,
            list,
            bounds.count.max(1) as u32,
            depth,
            mass.to_bits(),
            temperature.to_bits(),
            token,
            0,
        ];
        let (first, last) = to.split_at_mut(size_of_val(&words));
        for (bytes, word) in first.as_chunks_mut().0.iter_mut().zip(words) {
            *bytes = word.to_le_bytes();
        }
        last.copy_from_slice(&draw.to_le_bytes());
    }
}

/// What was asked about a row that is finite.
#[derive(Clone, Copy, Debug)]
pub struct RowAnswer<'a> {
    /// The token drawn, or the given one; meaningless where none was asked for.
    pub token: u32,
    /// Its logit; NaN if there is no such token.
    pub logit: f32,
    /// Σ exp(logit − largest), if a list by mass was asked for.
    pub total: f64,
    /// The list, if one was asked for and is not longer than [`RowDraws::LIST_MAX`].
    pub list: Option<RowList<'a>>,
}

/// Some tokens of a row: every one that is not listed has a smaller logit than every one that is.
#[derive(Clone, Copy, Debug)]
pub struct RowList<'a> {
    tokens: &'a [u8],
    /// How far below the largest logit those lie at least that are not listed, in nats.
    pub others_below: f32,
}

impl<'a> RowList<'a> {
    /// Tokens with their logits, in any order.
    pub fn tokens(&self) -> impl Iterator<Item = (u32, f32)> + use<'a> {
        let tokens = self.tokens.chunks_exact(LISTED_BYTES);
        tokens.map(|token| (word(token, 0), f32::from_bits(word(token, 1))))
    }
}

/// The `at`-th word of some bytes.
fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes.as_chunks().0[at])
}

/// Room for the answers about some rows.
pub struct RowDraws {
    /// `[lists]`, all 0 but for the first `lists_used`.
    bins: DeviceMemory,
    lists_used: usize,
    /// f64 `[rows, blocks]`
    sums: DeviceMemory,
    /// `[rows]` answers, then `[rows]` lists.
    memory: DeviceMemory,
    /// The same here.
    found: PinnedMemory,
    rows: usize,
    vocab: usize,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct DrawArgs {
    logits: u64,
    parts: u64,
    questions: u64,
    bins: u64,
    sums: u64,
    answers: u64,
    lists: u64,
    vocab: u32,
    parts_per_row: u32,
}

// SAFETY: plain numbers in the order of `draw::Args` in draw.cu.
unsafe impl DeviceRepr for DrawArgs {}

impl RowDraws {
    /// Most tokens of a list.
    pub const LIST_MAX: usize = 1024;

    /// Room for up to `rows` rows of `vocab` logits.
    ///
    /// # Errors
    /// No memory, here or there.
    pub fn new(gpu: &Gpu, (rows, vocab): (usize, usize)) -> Result<Self, GpuError> {
        let [bins, sums, found] = Self::parts((rows, vocab));
        Ok(Self {
            bins: gpu.alloc(bins)?,
            lists_used: 0,
            sums: gpu.alloc(sums)?,
            memory: gpu.alloc(found)?,
            found: gpu.alloc_pinned(found)?,
            rows,
            vocab,
        })
    }

    /// Bytes of bins, of sums, and of answers with lists.
    fn parts((rows, vocab): (usize, usize)) -> [usize; 3] {
        [
            rows * BINS_BYTES,
            rows * vocab.div_ceil(SUM_BLOCK) * size_of::<f64>(),
            rows * (ANSWER_BYTES + Self::LIST_MAX * LISTED_BYTES),
        ]
    }

    /// Bytes that some rows of `vocab` logits take on a GPU.
    pub fn bytes_of(shape: (usize, usize)) -> usize {
        Self::parts(shape).iter().sum()
    }

    /// Bytes held on the GPU.
    pub fn bytes(&self) -> usize {
        self.bins.bytes() + self.sums.bytes() + self.memory.bytes()
    }

    fn clear(&mut self, gpu: &Gpu) -> Result<(), GpuError> {
        gpu.clear(self.bins.span().part(0, self.lists_used * BINS_BYTES))?;
        self.lists_used = 0;
        Ok(())
    }

    /// Starts to answer `count` questions about rows that were measured, of which `lists` ask for a
    /// list. [`RowDraws::answers`] waits for them.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// When there is no room for so many.
    pub fn ask(
        &mut self,
        gpu: &Gpu,
        (logits, measures): (Span<'_>, &RowMeasures),
        questions: Span<'_>,
        (count, lists): (usize, usize),
    ) -> Result<(), GpuError> {
        assert!(lists <= count && count <= self.rows, "{count} rows, room for {}", self.rows);
        if count == 0 {
            return Ok(());
        }
        self.clear(gpu)?;
        self.lists_used = lists;
        let (rows, blocks) = (measures.rows(), self.vocab.div_ceil(SUM_BLOCK));
        let answer_bytes = self.rows * ANSWER_BYTES;
        let list_bytes = lists * Self::LIST_MAX * LISTED_BYTES;
        let memory = self.memory.span();
        let arguments = DrawArgs {
            logits: logits.of(rows * self.vocab, size_of::<f32>()),
            parts: measures.parts(),
            questions: questions.unaligned(count, RowQuestion::BYTES),
            bins: self.bins.span().of(lists, BINS_BYTES),
            sums: self.sums.span().of(count * blocks, size_of::<f64>()),
            answers: memory.of(count, ANSWER_BYTES),
            lists: memory.part(answer_bytes, list_bytes).of(1, list_bytes),
            vocab: self.vocab as u32,
            parts_per_row: PARTS as u32,
        };
        let parts = self.vocab.div_ceil(PART);
        // SAFETY: all spans were checked against the shapes; rows and lists of the questions are
        // those that `RowQuestion::write_all` numbers.
        unsafe {
            gpu.launch("weigh_rows", ([parts, count, 1], THREADS, 0), &arguments)?;
            let shared_bytes = blocks * size_of::<f64>();
            let shape = ([parts + 1, count, 1], THREADS, shared_bytes);
            gpu.launch("answer_rows", shape, &arguments)?;
        }
        // SAFETY: `answers` waits before the memory is read, and the memory's drop waits too.
        unsafe { gpu.fetch(memory, &mut self.found, answer_bytes + list_bytes) }
    }

    /// Waits for the answers to the first `count` questions that were asked last.
    ///
    /// # Errors
    /// What any kernel before has failed with.
    pub fn answers(
        &mut self,
        gpu: &Gpu,
        count: usize,
    ) -> Result<impl Iterator<Item = RowAnswer<'_>>, GpuError> {
        gpu.synchronize()?;
        // While nobody waits for it.
        self.clear(gpu)?;
        let (answers, lists) = self.found.split_at(self.rows * ANSWER_BYTES);
        let answers = answers.chunks_exact(ANSWER_BYTES).take(count);
        Ok(answers.map(|answer| parsed(answer, lists)))
    }
}

/// One answer from its bytes.
fn parsed<'a>(answer: &[u8], lists: &'a [u8]) -> RowAnswer<'a> {
    let [list, count, bin] = [2, 3, 4].map(|at| word(answer, at));
    let is_whole = list != NONE && count as usize <= RowDraws::LIST_MAX;
    let list = is_whole.then(|| {
        let start = list as usize * RowDraws::LIST_MAX * LISTED_BYTES;
        let tokens = &lists[start..][..count as usize * LISTED_BYTES];
        RowList { tokens, others_below: (bin + 1) as f32 / BINS_PER_NAT }
    });
    RowAnswer {
        token: word(answer, 0),
        logit: f32::from_bits(word(answer, 1)),
        total: f64::from_bits(u64::from(word(answer, 7)) << 32 | u64::from(word(answer, 6))),
        list,
    }
}
