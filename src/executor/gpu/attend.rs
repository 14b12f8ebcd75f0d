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
const RUN_BYTES: usize = size_of::<[u32; 2]>();
/// Most tokens of a step that is narrow: most of its tokens attend for themselves.
const NARROW_TOKENS_MAX: usize = 128;
/// Fewest tokens of a sequence that fill enough of a tile; in a narrow step whose tiles one block
/// has, and fewest positions there.
const RUN_TOKENS_MIN: usize = 16;
const LONE_RUN_TOKENS_MIN: usize = 64;
const NARROW_POSITIONS_MIN: usize = 512;
/// Most tokens of a sequence whose tiles leave room for clusters of the most blocks, and the blocks
/// for more.
const SHORT_RUN_TOKENS_MAX: usize = 64;
const LONG_RUN_BLOCKS: usize = 4;

/// One attention.
pub(super) struct Attention {
    pub shape: HeadShape,
    pub layer: KvLayerId,
    pub window: Option<usize>,
    pub scale: f32,
    pub softcap: Option<f32>,
}

/// Most blocks that can divide the positions of a tile on tensor cores; none where not all
/// attentions of a program can run there.
pub(super) fn run_blocks(gpu: &Gpu, program: &Program) -> Option<usize> {
    let has_flash = program.ops.iter().all(|op| match op {
        Op::Attend { shape, .. } => gpu.has_flash(counts(*shape)),
        _ => true,
    });
    has_flash.then(|| gpu.run_blocks_max())
}

impl HostBuffers {
    /// Divides a step into sequences with many tokens, in a narrow one those that see many
    /// positions, and single tokens. Where there is a kernel for the former, some `blocks` can
    /// divide a tile's positions.
    pub(super) fn find_runs(&mut self, plan: &StepPlan, blocks: Option<usize>) {
        self.runs.clear();
        self.single.clear();
        self.is_each_alone = plan.sequences.iter().all(|sequence| sequence.tokens.len() == 1);
        let is_narrow = plan.tokens.len() <= NARROW_TOKENS_MAX;
        self.run_blocks = blocks.filter(|_| is_narrow).unwrap_or(1);
        let (tokens_min, positions_min) = match (is_narrow, self.run_blocks) {
            (false, _) => (RUN_TOKENS_MIN, 0),
            (true, 1) => (LONE_RUN_TOKENS_MIN, NARROW_POSITIONS_MIN),
            (true, _) => (RUN_TOKENS_MIN, NARROW_POSITIONS_MIN),
        };
        for sequence in &plan.sequences {
            let tokens = sequence.tokens.clone();
            let positions = sequence.position_start + tokens.len();
            if blocks.is_some() && tokens.len() >= tokens_min && positions >= positions_min {
                self.runs.push([tokens.start as u32, tokens.len() as u32]);
            } else {
                self.single.extend(tokens.map(|token| token as u32));
            }
        }
    }

    /// Blocks that divide the positions of a sequence's tiles: by its own tokens alone, so that a
    /// token's bits do not depend on other sequences.
    fn blocks_of(&self, [_, tokens]: &[u32; 2]) -> usize {
        match *tokens as usize {
            ..=SHORT_RUN_TOKENS_MAX => self.run_blocks,
            _ => self.run_blocks.min(LONG_RUN_BLOCKS),
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
            let on_gpu = self.buffers.inputs.span(Part::Runs);
            let mut first = 0;
            for lengths in host.runs.chunk_by(|a, b| host.blocks_of(a) == host.blocks_of(b)) {
                let on_gpu = on_gpu.part(first * RUN_BYTES, lengths.len() * RUN_BYTES);
                let runs = Runs { lengths, on_gpu, blocks: host.blocks_of(&lengths[0]) };
                gpu.attend_runs(&pass, heads, (&tokens, &store), &runs)?;
                first += lengths.len();
            }
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
