//! Attention of a step: sequences with many tokens on tensor cores, the rest token by token.

use super::GpuStage;
use super::buffers::HostBuffers;
use super::graphs::StepShape;
use super::inputs::Part;
use super::ops::counts;
use crate::executor::ExecutorError;
use crate::executor::program::{HeadShape, KvLayerId, Op, Precision, Program};
use crate::step::StepPlan;
use tandem_kernels::{Attend, Gpu, RotateHeads, RoundRows, Runs};

const U32: usize = size_of::<u32>();
/// Most tokens of a step of which each attends for itself.
const SINGLE_TOKENS_MAX: usize = 128;
/// Fewest tokens of a sequence that fill enough of a tile.
const RUN_TOKENS_MIN: usize = 16;

/// One attention.
pub(super) struct Attention {
    pub shape: HeadShape,
    pub layer: KvLayerId,
    pub window: Option<usize>,
    pub scale: f32,
    pub softcap: Option<f32>,
}

/// Whether all attentions of a program can run on tensor cores.
pub(super) fn has_flash(gpu: &Gpu, program: &Program) -> bool {
    program.ops.iter().all(|op| match op {
        Op::Attend { shape, .. } => gpu.has_flash(counts(*shape)),
        _ => true,
    })
}

impl HostBuffers {
    /// Divides a wide step into sequences with many tokens and single tokens; a narrow one has
    /// single tokens alone.
    pub(super) fn find_runs(&mut self, plan: &StepPlan, has_flash: bool) {
        self.runs.clear();
        self.single.clear();
        self.is_each_alone = plan.sequences.iter().all(|sequence| sequence.tokens.len() == 1);
        let is_wide = plan.tokens.len() > SINGLE_TOKENS_MAX;
        for tokens in plan.sequences.iter().map(|sequence| sequence.tokens.clone()) {
            if is_wide && has_flash && tokens.len() >= RUN_TOKENS_MIN {
                self.runs.push([tokens.start as u32, tokens.len() as u32]);
            } else {
                self.single.extend(tokens.map(|token| token as u32));
            }
        }
    }
}

impl GpuStage {
    pub(super) fn attend(
        &self,
        shape: &StepShape,
        attention: &Attention,
        rotation: Option<&RotateHeads<'_>>,
    ) -> Result<(), ExecutorError> {
        let (gpu, heads) = (self.weights.gpu(), counts(attention.shape));
        let (host, attended) = (&self.buffers.host, &self.buffers.attended);
        let (tokens, store) = (self.tokens(shape.tokens), self.kv.layer(attention.layer));
        let eight_bits = attended.eight_bits(shape.tokens, Precision::Eight);
        let halves = attended.halves(shape.tokens);
        let rounds = host.runs.is_empty() && heads.are_whole_chunks();
        let pass = Attend {
            heads: self.buffers.heads.values(),
            chosen: None,
            out: attended.values(),
            eight_bits: eight_bits.filter(|_| rounds),
            halves: halves.filter(|_| rounds),
            partials: self.buffers.partials.span(),
            scale: attention.scale,
            softcap: attention.softcap,
            window: attention.window,
            positions_max: shape.positions_max,
        };
        if !host.runs.is_empty() {
            let runs = Runs { lengths: &host.runs, on_gpu: self.buffers.inputs.span(Part::Runs) };
            gpu.attend_runs(&pass, heads, (&tokens, &store), &runs)?;
        }
        let count = host.single.len();
        let at_once = self.buffers.attended_at_once(heads, shape.positions_max).min(count);
        assert!(at_once > 0 || count == 0, "room for the segments of one token");
        for first in (0..count).step_by(at_once.max(1)) {
            let n = at_once.min(count - first);
            let part = self.buffers.inputs.span(Part::Single).part(first * U32, n * U32);
            let chosen = (n < shape.tokens).then_some((part, n));
            gpu.attend(&Attend { chosen, ..pass }, heads, (&tokens, &store), rotation)?;
        }
        if rounds {
            return Ok(());
        }
        let pass = RoundRows {
            values: attended.values(),
            up: None,
            out: None,
            eight_bits,
            halves,
            rows: shape.tokens,
            cols: attended.cols,
        };
        Ok(gpu.round_rows(&pass)?)
    }
}
