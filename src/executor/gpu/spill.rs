//! Units whose weights lie in host memory though the GPU runs the model. In each step those of a
//! layer are the CPU's, which the GPU hands its rows to and waits for, or the GPU's, to which the
//! weights stream through a ring of slots. Both are parts of the recorded step.

use super::GpuStage;
use super::inputs::Part;
use super::spill_schedule::{Shares, SpillCosts};
use super::spill_sender::SendOrder;
use super::spill_stream::SpillStream;
use super::spill_thread::{SpillOrder, SpillThread};
use super::spill_weights::SpilledWeights;
use super::weights::GpuWeights;
use crate::executor::program::{Buffer, MatrixId, SpilledUnit};
use crate::executor::spill::CrossedPieces;
use crate::executor::{ExecutorError, StageOptions};
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tandem_kernels::{DeviceMatrix, Span};

/// Steps' numbers lie so far apart: more than a step has events, if its rows cross at once. A step
/// of a terabyte has as many pieces of weights.
const STEP_EVENTS: u32 = 1 << 16;
/// Between two looks at a GPU that the CPU waits for.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// What the events of a step are counted from: the crossings and the pieces that stream. Each grows
/// in steps that use it, so that no flag is ever taken for one of long ago.
#[derive(Clone, Copy, Default)]
pub(super) struct Bases {
    pub crossing: u32,
    pub ring: u32,
}

/// What of the host's side of a step has begun and is not finished.
#[derive(Clone, Copy, Default)]
struct UnderWay {
    is_computing: bool,
    is_sending: bool,
}

/// What a stage has spilled.
pub(super) struct GpuSpill {
    /// Shared by the stages of a model.
    pub(super) thread: Arc<SpillThread>,
    /// The stage's place among those of the thread.
    pub(super) lane: usize,
    pub(super) stream: Option<SpillStream>,
    shares: Shares,
    pub(super) costs: SpillCosts,
    under_way: Cell<UnderWay>,
    /// Percent that were asked for.
    asked: Option<u8>,
    /// Tokens whose rows cross at once, and of the widest step that is shared with the CPU where
    /// weights can stream.
    pub(super) tokens_max: usize,
    bases: Bases,
    pub(super) weights: Arc<GpuWeights>,
}

impl GpuSpill {
    /// Joins a stage to the CPU's side in one of its lanes, and measures how long both ways take.
    ///
    /// # Errors
    /// Memory or threads refused, here or there.
    pub fn start(
        weights: &Arc<GpuWeights>,
        options: &StageOptions,
        (thread, lane): (Arc<SpillThread>, usize),
    ) -> Result<Self, ExecutorError> {
        let from = weights.spilled().expect("a lane is for a stage with spilled weights");
        let stream = || SpillStream::start(weights, from, Arc::clone(thread.is_abandoned()));
        let mut spill = Self {
            stream: from.can_stream().then(stream).transpose()?,
            shares: Shares::new(from.layers()),
            costs: SpillCosts::default(),
            under_way: Cell::default(),
            asked: options.spill_streamed,
            tokens_max: thread.tokens_max(lane),
            thread,
            lane,
            bases: Bases::default(),
            weights: Arc::clone(weights),
        };
        // Measured once: a stage that follows one that crashed shares as that did.
        match from.costs().get() {
            Some(costs) => spill.costs = costs.clone(),
            None => {
                spill.measure()?;
                tracing::info!(costs = ?spill.costs, "spilled layers were measured");
                let _ = from.costs().set(spill.costs.clone());
            }
        }
        Ok(spill)
    }

    pub(super) fn from(&self) -> &SpilledWeights {
        self.weights.spilled().expect("a spill has spilled weights")
    }

    /// How the rows of a step of some tokens cross.
    fn pieces(&self, tokens: usize) -> CrossedPieces {
        CrossedPieces::of(tokens, self.tokens_max)
    }

    /// The numbers of a step of some tokens in which some layers are streamed, for its inputs.
    pub fn next_bases(&mut self, tokens: usize, streamed: usize) -> Bases {
        if streamed > 0 {
            self.bases.ring = self.bases.ring.wrapping_add(STEP_EVENTS);
        }
        if streamed < self.from().layers() {
            let events = STEP_EVENTS * self.pieces(tokens).count() as u32;
            self.bases.crossing = self.bases.crossing.wrapping_add(events);
        }
        self.bases
    }

    /// Layers whose units are streamed in a step of some tokens.
    pub fn streamed(&self, tokens: usize) -> usize {
        let layers = self.from().layers();
        match (self.asked, &self.stream) {
            (Some(percent), Some(_)) if tokens <= self.tokens_max => {
                layers * usize::from(percent.min(100)) / 100
            }
            _ => self.costs.streamed(layers, tokens, self.tokens_max),
        }
    }

    /// Whether the CPU computes a unit in a step in which `streamed` layers are streamed.
    pub fn is_of_cpu(&self, unit: SpilledUnit, streamed: usize) -> bool {
        self.shares.of(streamed)[unit.layer]
    }

    /// Has the CPU begin, and the weights of the other layers start, when no other model of this
    /// process is in the way. The inputs of the step are on their way, and the step before [is
    /// finished](Self::finish).
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn begin(&self, tokens: usize, streamed: usize) -> Result<(), ExecutorError> {
        let is_here = self.shares.of(streamed);
        let stream = self.stream.as_ref().filter(|_| streamed > 0);
        let turn = stream.map(|_| self.weights.gpu().stream_turn()).transpose()?;
        let mut under_way = UnderWay::default();
        if is_here.contains(&true) {
            let (base, is_here) = (self.bases.crossing, Arc::clone(is_here));
            let order = SpillOrder { lane: self.lane, base, tokens, is_here };
            self.thread.orders().begin(order)?;
            under_way.is_computing = true;
            self.under_way.set(under_way);
        }
        if let (Some(stream), Some(turn)) = (stream, turn) {
            let is_here = Arc::clone(is_here);
            stream.orders().begin(SendOrder { base: self.bases.ring, is_here, turn })?;
            under_way.is_sending = true;
            self.under_way.set(under_way);
        }
        Ok(())
    }

    /// Whether the CPU computes a part of the step that has begun.
    pub fn is_computing(&self) -> bool {
        self.under_way.get().is_computing
    }

    /// Waits for the host's side of the step that has begun, if one has. Stages that share a CPU
    /// finish in their order.
    ///
    /// # Errors
    /// What it failed with.
    pub fn finish(&self) -> Result<(), ExecutorError> {
        let UnderWay { is_computing, is_sending } = self.under_way.take();
        let computed = if is_computing { self.finish_computing() } else { Ok(()) };
        let sent = match &self.stream {
            Some(stream) if is_sending => stream.orders().finish(),
            _ => Ok(()),
        };
        computed.and(sent)
    }

    /// Whether another model of this process waits for this one's weights.
    pub fn is_in_the_way(&self) -> bool {
        self.weights.gpu().is_in_the_way()
    }

    /// Waits for the CPU, which waits for the GPU: one that was lost will not come.
    fn finish_computing(&self) -> Result<(), ExecutorError> {
        loop {
            if let Some(done) = self.thread.orders().finish_within(LOOK_EVERY) {
                return done.map(drop);
            }
            if self.weights.gpu().is_done().is_err() {
                self.abandon();
            }
        }
    }

    /// The GPU will not come to the CPU, nor to weights, any more.
    pub fn abandon(&self) {
        self.thread.is_abandoned().store(true, Ordering::Release);
        self.stream.iter().for_each(|stream| stream.abandon());
    }

    /// Where the matrix of a streamed unit is while it is computed.
    pub fn matrix(&self, id: MatrixId) -> Option<&DeviceMatrix> {
        self.stream.as_ref()?.matrix(id)
    }

    /// Bytes held on the GPU.
    pub fn bytes(&self) -> usize {
        self.stream.as_ref().map_or(0, SpillStream::bytes)
    }
}

impl GpuStage {
    fn base(&self, part: Part) -> Span<'_> {
        self.buffers.inputs.span(part)
    }

    /// Whether the CPU computes a unit in a step in which `streamed` layers are streamed.
    pub(super) fn is_of_cpu(&self, unit: SpilledUnit, streamed: usize) -> bool {
        self.spill().is_of_cpu(unit, streamed)
    }

    /// Starts what a spilled unit begins with; whether its ops are the CPU's.
    pub(super) fn start_spilled(
        &self,
        (tokens, streamed): (usize, usize),
        (unit, input): (SpilledUnit, Buffer),
    ) -> Result<bool, ExecutorError> {
        let (gpu, spill) = (self.weights.gpu(), self.spill());
        if spill.is_of_cpu(unit, streamed) {
            self.hand_over(spill.pieces(tokens), 0, (unit, input))?;
            return Ok(true);
        }
        let stream = spill.stream.as_ref().expect("units stream where they can");
        let pieces = &spill.from().units()[unit.index].pieces;
        let first = spill.from().streamed(spill.shares.of(streamed), unit.index).count();
        for (piece, at) in pieces.iter().zip(first..) {
            let matrix = stream.matrix(piece.matrix).expect("room for what streams");
            let event = (self.base(Part::Pieces), at);
            let rows = (matrix, piece.layout, piece.rows.clone());
            stream.ring().take(gpu, rows, event)?;
        }
        Ok(false)
    }

    /// Has the CPU get one piece of the rows of a unit.
    fn hand_over(
        &self,
        pieces: CrossedPieces,
        piece: usize,
        (unit, input): (SpilledUnit, Buffer),
    ) -> Result<(), ExecutorError> {
        let (gpu, spill, rows) = (self.weights.gpu(), self.spill(), self.buffers.rows(input));
        let event = (self.base(Part::Crossings), pieces.event(unit.index, piece));
        let part = rows.values_of(pieces.tokens(piece));
        let crossing = spill.thread.crossing(spill.lane);
        Ok(gpu.hand_over(crossing, part, part.bytes() / size_of::<f32>(), event)?)
    }

    /// Starts what a unit of the CPU ends with. Its first piece was handed over, each other one is
    /// when the one before is back.
    pub(super) fn end_spilled(
        &self,
        tokens: usize,
        unit: SpilledUnit,
        [input, output]: [Buffer; 2],
    ) -> Result<(), ExecutorError> {
        let (gpu, spill, rows) = (self.weights.gpu(), self.spill(), self.buffers.rows(output));
        let pieces = spill.pieces(tokens);
        for piece in 0..pieces.count() {
            if piece > 0 {
                self.hand_over(pieces, piece, (unit, input))?;
            }
            let event = (self.base(Part::Crossings), pieces.event(unit.index, piece));
            let part = rows.values_of(pieces.tokens(piece));
            let crossing = spill.thread.crossing(spill.lane);
            gpu.take_back(crossing, part, part.bytes() / size_of::<f32>(), event)?;
        }
        Ok(())
    }

    fn spill(&self) -> &GpuSpill {
        self.spill.as_ref().expect("a program with spilled units has what they need")
    }

    /// A matrix, where it lies on the GPU or while it does.
    pub(super) fn matrix(&self, id: MatrixId) -> &DeviceMatrix {
        let streamed = self.spill.as_ref().and_then(|spill| spill.matrix(id));
        streamed.unwrap_or_else(|| self.weights.matrix(id))
    }
}
