//! What a step's rows of logits become. Mostly a few bytes of a row leave the GPU: its best token,
//! a token drawn from all, a given token's logit, a list of the most likely ones. A row travels as
//! a whole where bias and penalties change it, or where its list does not settle the choice.

use super::inputs::Part;
use super::{GpuStage, LOGITS_TILE_ROWS};
use crate::executor::ExecutorError;
use crate::executor::sample::FoundRow;
use crate::request::SamplingParams;
use crate::sampling::{Shortlist, draw};
use crate::step::{LogitsRow, LogitsTask, StepPlan};
use crate::units::TokenId;
use std::ops::Range;
use tandem_kernels::{Asked, Gpu, ListBounds, PinnedMemory, RowAnswer, RowDraws, RowQuestion};

const F32: usize = size_of::<f32>();
/// Rows that travel at once.
const TRAVELLING_ROWS: usize = 16;

/// What is wanted of a row of logits.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Wanted {
    /// What is measured of every row.
    Measure,
    Answer(RowQuestion),
    WholeRow,
}

/// What the host knows of a step's rows of logits.
pub(super) struct HostSampling {
    /// One per row of the plan.
    wanted: Vec<Wanted>,
    /// A row's list, ascending by id.
    list: Vec<(TokenId, f32)>,
    /// Rows of the plan that have to travel.
    whole: Vec<usize>,
    /// f32 `[TRAVELLING_ROWS, vocab]`
    rows: PinnedMemory,
}

impl HostSampling {
    /// Room for rows of `vocab` logits that travel.
    ///
    /// # Errors
    /// No memory.
    pub fn new(gpu: &Gpu, vocab: usize) -> Result<Self, ExecutorError> {
        let rows = gpu.alloc_pinned(TRAVELLING_ROWS * vocab * F32)?;
        Ok(Self { wanted: Vec::new(), list: Vec::new(), whole: Vec::new(), rows })
    }

    /// Decides what is wanted of each row. How many questions there are.
    pub fn plan(&mut self, plan: &StepPlan, vocab: usize) -> usize {
        self.wanted.clear();
        let rows = plan.logits.iter().enumerate();
        self.wanted.extend(rows.map(|(at, row)| wanted(row, at % LOGITS_TILE_ROWS, vocab)));
        self.questions(0..self.wanted.len()).count()
    }

    /// The questions about some rows.
    fn questions(&self, rows: Range<usize>) -> impl Iterator<Item = &RowQuestion> {
        self.wanted[rows].iter().filter_map(|wanted| match wanted {
            Wanted::Answer(question) => Some(question),
            Wanted::Measure | Wanted::WholeRow => None,
        })
    }

    /// Writes all questions, tile after tile.
    pub fn write_questions(&self, mut to: &mut [u8]) {
        for first in (0..self.wanted.len()).step_by(LOGITS_TILE_ROWS) {
            let tile = first..self.wanted.len().min(first + LOGITS_TILE_ROWS);
            let bytes = self.questions(tile.clone()).count() * RowQuestion::BYTES;
            let (questions, others) = to.split_at_mut(bytes);
            RowQuestion::write_all(self.questions(tile), questions);
            to = others;
        }
    }
}

/// What is wanted of a plan's row, the `row`-th of its tile.
fn wanted(planned: &LogitsRow, row: usize, vocab: usize) -> Wanted {
    let (asked, bounds, top) = match &planned.task {
        LogitsTask::Score { target, top_logprobs } => (Asked::Logit(target.0), None, *top_logprobs),
        LogitsTask::Sample { params, .. } if params.change_logits() => return Wanted::WholeRow,
        LogitsTask::Sample { params, .. } if params.takes_best() => {
            (Asked::Nothing, None, params.top_logprobs)
        }
        LogitsTask::Sample { params, .. } => {
            let bounds = bounds(params, vocab);
            if bounds.is_none() && params.truncates() {
                return Wanted::WholeRow;
            }
            let draw = draw(params, planned.position);
            let asked = match bounds {
                None => Asked::Draw { temperature: params.temperature, draw },
                Some(_) => Asked::Nothing,
            };
            (asked, bounds, params.top_logprobs)
        }
    };
    let count = top.max(bounds.map_or(0, |bounds| bounds.count)).min(vocab);
    let (below, mass) = bounds.map_or((0.0, None), |bounds| (bounds.below, bounds.mass));
    let list = (count > 0).then_some(ListBounds { count, below, mass });
    match (asked, list) {
        (_, Some(list)) if list.count > RowDraws::LIST_MAX => Wanted::WholeRow,
        (Asked::Nothing, None) => Wanted::Measure,
        _ => Wanted::Answer(RowQuestion { row, asked, list }),
    }
}

/// The tokens that stay after truncation are among these; none where that can't be said.
fn bounds(params: &SamplingParams, vocab: usize) -> Option<ListBounds> {
    if params.top_k > 0 && params.top_k < vocab {
        return Some(ListBounds { count: params.top_k, below: 0.0, mass: None });
    }
    if params.typical_p < 1.0 || !params.truncates() {
        return None;
    }
    let below = if params.min_p > 0.0 { -params.min_p.ln() } else { f32::INFINITY };
    let mass = (params.top_p < 1.0).then_some(params.top_p);
    Some(ListBounds { count: 1, below, mass })
}

/// A row's list, brought in order.
fn shortlist<'a>(answer: &RowAnswer<'_>, to: &'a mut Vec<(TokenId, f32)>) -> Option<Shortlist<'a>> {
    let list = answer.list?;
    to.clear();
    to.extend(list.tokens().map(|(id, logit)| (TokenId(id), logit)));
    to.sort_unstable_by_key(|(id, _)| *id);
    Some(Shortlist { tokens: to, others_below: list.others_below, total: answer.total })
}

impl GpuStage {
    /// Samples the wanted rows, a tile at a time; the first one's logits are there.
    pub(super) fn sample(&mut self, plan: &StepPlan) -> Result<(), ExecutorError> {
        let mut asked = 0;
        for first in (0..plan.logits.len()).step_by(LOGITS_TILE_ROWS) {
            let tile = first..plan.logits.len().min(first + LOGITS_TILE_ROWS);
            if first > 0 {
                self.logits_tile((first, tile.len()), plan.tokens.len())?;
            }
            let count = self.ask(tile.clone(), asked)?;
            self.take_answers(plan, tile.clone(), count)?;
            self.take_whole_rows(plan, first)?;
            asked += count;
        }
        Ok(())
    }

    /// Asks about the rows of a tile, before which there were `asked` questions. How many it asks.
    fn ask(&mut self, tile: Range<usize>, asked: usize) -> Result<usize, ExecutorError> {
        let buffers = &mut self.buffers;
        let sampling = &buffers.host.sampling;
        let count = sampling.questions(tile.clone()).count();
        let lists = sampling.questions(tile).filter(|question| question.list.is_some()).count();
        let rows = (buffers.logits.values(), &buffers.measures);
        let questions = buffers.inputs.span(Part::Questions);
        let bytes = RowQuestion::BYTES;
        let questions = questions.part(asked * bytes, count * bytes);
        buffers.draws.ask(self.weights.gpu(), rows, questions, (count, lists))?;
        Ok(count)
    }

    /// Waits for what is known of a tile's rows and does with it what it suffices for.
    fn take_answers(
        &mut self,
        plan: &StepPlan,
        tile: Range<usize>,
        count: usize,
    ) -> Result<(), ExecutorError> {
        let (gpu, buffers, samplers) = (self.weights.gpu(), &mut self.buffers, &mut self.samplers);
        let sampling = &mut buffers.host.sampling;
        let measures = buffers.measures.wait(gpu, tile.len())?;
        buffers.inputs.arrived();
        let mut answers = buffers.draws.answers(gpu, count)?;
        sampling.whole.clear();
        for (index, measure) in tile.zip(measures) {
            let wanted = sampling.wanted[index];
            let answer = match wanted {
                Wanted::Answer(_) => answers.next(),
                Wanted::Measure | Wanted::WholeRow => None,
            };
            let Some(measure) = measure else {
                samplers.fail(plan, index);
                continue;
            };
            let token = match (wanted, answer) {
                (Wanted::Answer(RowQuestion { asked: Asked::Nothing, .. }), _) => None,
                (_, answer) => answer.map(|answer| (TokenId(answer.token), answer.logit)),
            };
            let list = answer.and_then(|answer| shortlist(&answer, &mut sampling.list));
            let found = FoundRow { measure, token, list };
            if wanted == Wanted::WholeRow || !samplers.take_found(plan, index, &found) {
                sampling.whole.push(index);
            }
        }
        Ok(())
    }

    /// Samples rows from their logits, some at a time; those of the tile begin with the plan's
    /// `first`.
    fn take_whole_rows(&mut self, plan: &StepPlan, first: usize) -> Result<(), ExecutorError> {
        let (gpu, vocab) = (self.weights.gpu(), self.buffers.logits.cols);
        let (logits, bytes) = (self.buffers.logits.values(), vocab * F32);
        let sampling = &mut self.buffers.host.sampling;
        for rows in sampling.whole.chunks(TRAVELLING_ROWS) {
            // Neighbours travel in one copy.
            let spans = rows.chunk_by(|a, b| a + 1 == *b);
            let spans =
                spans.map(|rows| logits.part((rows[0] - first) * bytes, rows.len() * bytes));
            gpu.download_pinned(&spans.collect::<Vec<_>>(), &mut sampling.rows)?;
            let logits = bytemuck::cast_slice_mut(&mut sampling.rows[..rows.len() * bytes]);
            self.samplers.take_all(plan, rows, logits);
        }
        Ok(())
    }
}
