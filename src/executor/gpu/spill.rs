//! Feed-forward networks whose weights lie in host memory though the GPU runs the model. In each
//! step each of them is the CPU's, which the GPU hands its rows to and waits for, or the GPU's, to
//! which the weights stream through a ring of slots. Both are parts of the recorded step.

use super::GpuStage;
use super::inputs::Part;
use super::spill_schedule::{Shares, SpillCosts, WidthCosts};
use super::spill_sender::{SendOrder, SpillSender};
use super::spill_thread::{SpillOrder, SpillThread};
use super::spill_weights::SpilledWeights;
use super::weights::GpuWeights;
use crate::executor::program::MatrixId;
use crate::executor::{ExecutorError, StageOptions};
use crate::placement::{CROSSING_TOKENS_MAX, RING_SLOTS};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tandem_kernels::{DeviceMatrix, DeviceMemory, Span};

/// Steps' numbers lie so far apart: more than a step has events.
const STEP_EVENTS: u32 = 1 << 12;
/// Between two looks at a GPU that the CPU waits for.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Tokens of the steps that are measured at the start.
const MEASURED_TOKENS: [usize; 8] = [1, 2, 4, 8, 16, 32, 64, 128];
/// Networks of such a step, and how often it is repeated.
const MEASURED_NETWORKS: usize = 4;
const MEASURED_TIMES: usize = 2;

/// What the events of a step are counted from: the crossings and the pieces that stream. Each grows
/// in steps that use it, so that no flag is ever taken for one of long ago.
#[derive(Clone, Copy, Default)]
pub(super) struct Bases {
    pub crossing: u32,
    pub ring: u32,
}

/// Weights on their way, and where they come to.
struct Stream {
    sender: SpillSender,
    /// What a network's matrices are taken apart into. Networks with matrices of one shape share
    /// them, since they are computed one after the other.
    scratch: Vec<DeviceMatrix>,
    /// By matrix of the program: which of them.
    places: HashMap<MatrixId, usize>,
}

/// The spilled networks of a stage.
pub(super) struct GpuSpill {
    thread: SpillThread,
    stream: Option<Stream>,
    shares: Shares,
    costs: SpillCosts,
    /// Set when a step can't come to its end.
    is_abandoned: Arc<AtomicBool>,
    /// Percent that were asked for.
    asked: Option<u8>,
    tokens_max: usize,
    bases: Bases,
    weights: Arc<GpuWeights>,
}

impl Stream {
    fn new(
        weights: &Arc<GpuWeights>,
        from: &SpilledWeights,
        is_abandoned: Arc<AtomicBool>,
    ) -> Result<Self, ExecutorError> {
        let gpu = weights.gpu();
        let (mut scratch, mut places) = (Vec::<DeviceMatrix>::new(), HashMap::new());
        for network in from.networks() {
            let mut used = Vec::new();
            for piece in network {
                let tensor = &weights.program().matrix(piece.matrix).tensor;
                let shape = (piece.dtype, tensor.rows, tensor.cols);
                let fits = |at: &usize| {
                    let matrix: &DeviceMatrix = &scratch[*at];
                    (matrix.dtype(), matrix.rows(), matrix.cols()) == shape && !used.contains(at)
                };
                let place = (0..scratch.len()).find(fits);
                let place = match place {
                    Some(place) => place,
                    None => {
                        let size = (tensor.rows, tensor.cols);
                        scratch.push(DeviceMatrix::changing(gpu, piece.dtype, size)?);
                        scratch.len() - 1
                    }
                };
                used.push(place);
                places.insert(piece.matrix, place);
            }
        }
        let ring = gpu.weight_ring(RING_SLOTS, from.largest_piece())?;
        let sender = SpillSender::start(ring, Arc::clone(weights), is_abandoned)?;
        Ok(Self { sender, scratch, places })
    }

    fn bytes(&self) -> usize {
        self.sender.ring().bytes() + self.scratch.iter().map(DeviceMatrix::bytes).sum::<usize>()
    }
}

impl GpuSpill {
    /// Starts the CPU's side, and measures how long both ways take.
    ///
    /// # Errors
    /// Memory or threads refused, here or there.
    pub fn start(
        weights: &Arc<GpuWeights>,
        options: &StageOptions,
    ) -> Result<Option<Self>, ExecutorError> {
        let (gpu, Some(from)) = (weights.gpu(), weights.spilled()) else { return Ok(None) };
        // In a step the GPU waits for the host, so nothing in it may wait for the GPU.
        gpu.load_kernels()?;
        let is_abandoned = Arc::<AtomicBool>::default();
        let stream = || Stream::new(weights, from, Arc::clone(&is_abandoned));
        let stream = from.can_stream().then(stream).transpose()?;
        let tokens = options.step_tokens_max;
        let tokens_max = if stream.is_some() { tokens.min(CROSSING_TOKENS_MAX) } else { tokens };
        let embedding = weights.program().dims.embedding;
        let crossing = gpu.crossing(tokens_max, embedding)?;
        let options = StageOptions { step_tokens_max: tokens_max, ..from.stage_options(options) };
        let cpu = Arc::clone(from.weights());
        let waits = (Arc::clone(&is_abandoned), gpu.wait_max());
        let thread = SpillThread::start(crossing, (cpu, &options), waits)?;
        let mut spill = Self {
            thread,
            stream,
            shares: Shares::new(from.networks().len()),
            costs: SpillCosts { widths: Vec::new(), stream: None },
            is_abandoned,
            asked: options.spill_streamed,
            tokens_max,
            bases: Bases::default(),
            weights: Arc::clone(weights),
        };
        // Measured once: a stage that follows one that crashed shares as that did.
        match from.costs().get() {
            Some(costs) => spill.costs = costs.clone(),
            None => {
                spill.measure()?;
                tracing::info!(costs = ?spill.costs, "spilled networks were measured");
                let _ = from.costs().set(spill.costs.clone());
            }
        }
        Ok(Some(spill))
    }

    fn from(&self) -> &SpilledWeights {
        self.weights.spilled().expect("a spill has spilled weights")
    }

    /// The numbers of a step in which some networks are streamed, for its inputs.
    pub fn next_bases(&mut self, streamed: usize) -> Bases {
        if streamed > 0 {
            self.bases.ring = self.bases.ring.wrapping_add(STEP_EVENTS);
        }
        if streamed < self.from().networks().len() {
            self.bases.crossing = self.bases.crossing.wrapping_add(STEP_EVENTS);
        }
        self.bases
    }

    /// Networks that are streamed in a step of some tokens.
    pub fn streamed(&self, tokens: usize) -> usize {
        let networks = self.from().networks().len();
        match (self.asked, &self.stream) {
            (Some(percent), Some(_)) if tokens <= self.tokens_max => {
                networks * usize::from(percent.min(100)) / 100
            }
            _ => self.costs.streamed(networks, tokens, self.tokens_max),
        }
    }

    /// By index: whether the CPU computes a network where `streamed` of them are streamed.
    pub fn is_here(&self, streamed: usize) -> &Arc<[bool]> {
        self.shares.of(streamed)
    }

    /// Has the CPU begin, and the weights of the other networks start. The inputs of the step are
    /// on their way.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn begin(&self, tokens: usize, streamed: usize) -> Result<(), ExecutorError> {
        let is_here = self.shares.of(streamed);
        if is_here.contains(&true) {
            let is_here = Arc::clone(is_here);
            self.thread.orders().begin(SpillOrder {
                base: self.bases.crossing,
                tokens,
                is_here,
            })?;
        }
        match &self.stream {
            Some(stream) if streamed > 0 => {
                let is_here = Arc::clone(is_here);
                stream.sender.orders().begin(SendOrder { base: self.bases.ring, is_here })
            }
            _ => Ok(()),
        }
    }

    /// Waits for the CPU's side of a step.
    ///
    /// # Errors
    /// What it failed with.
    pub fn finish(&self, streamed: usize) -> Result<(), ExecutorError> {
        let has_begun = self.shares.of(streamed).contains(&true);
        let computed = if has_begun { self.finish_computing() } else { Ok(()) };
        let sent = match &self.stream {
            Some(stream) if streamed > 0 => stream.sender.orders().finish(),
            _ => Ok(()),
        };
        computed.and(sent)
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
        self.is_abandoned.store(true, Ordering::Release);
        self.stream.iter().for_each(|stream| stream.sender.abandon());
    }

    /// Where the matrix of a streamed network is while it is computed.
    pub fn matrix(&self, id: MatrixId) -> Option<&DeviceMatrix> {
        let stream = self.stream.as_ref()?;
        Some(&stream.scratch[*stream.places.get(&id)?])
    }

    /// Bytes held on the GPU.
    pub fn bytes(&self) -> usize {
        self.stream.as_ref().map_or(0, Stream::bytes)
    }

    fn measure(&mut self) -> Result<(), ExecutorError> {
        let gpu_weights = Arc::clone(&self.weights);
        let gpu = gpu_weights.gpu();
        let embedding = gpu_weights.program().dims.embedding;
        // Of equal rows all tokens would go to the same experts.
        let values = varied(self.tokens_max * embedding);
        let memory = CrossedMemory {
            rows: gpu.alloc(size_of_val(&values[..]))?,
            back: gpu.alloc(size_of_val(&values[..]))?,
            base: gpu.alloc(size_of::<u32>())?,
        };
        gpu.upload(&values, memory.rows.span())?;
        for _ in 0..MEASURED_TIMES {
            let known = self.costs.stream.unwrap_or(f64::INFINITY);
            self.costs.stream = self.stream_seconds(None)?.map(|seconds| seconds.min(known));
        }
        let tokens_max = self.tokens_max;
        for tokens in MEASURED_TOKENS.into_iter().filter(|tokens| *tokens <= tokens_max) {
            let mut least = [f64::INFINITY; 3];
            for _ in 0..MEASURED_TIMES {
                let seconds = self.measure_width(tokens, &memory)?;
                least.iter_mut().zip(seconds).for_each(|(least, seconds)| {
                    *least = least.min(seconds);
                });
            }
            let [cpu, cpu_beside, stream_beside] = least;
            self.costs.widths.push(WidthCosts { tokens, cpu, cpu_beside, stream_beside });
        }
        Ok(gpu.synchronize()?)
    }

    /// Seconds of a network on the CPU, alone and beside a stream of weights, and of its weights.
    fn measure_width(
        &mut self,
        tokens: usize,
        memory: &CrossedMemory,
    ) -> Result<[f64; 3], ExecutorError> {
        let networks = MEASURED_NETWORKS.min(self.from().networks().len()) as f64;
        let order = self.measured_order(tokens);
        self.cross(&order, memory)?;
        let alone = self.thread.orders().finish()?;
        let order = self.measured_order(tokens);
        self.cross(&order, memory)?;
        let stream = self.stream_seconds(Some(alone))?.unwrap_or(f64::INFINITY);
        let beside = self.thread.orders().finish()?;
        Ok([alone.as_secs_f64() / networks, beside.as_secs_f64() / networks, stream])
    }

    /// An order for the first networks.
    fn measured_order(&mut self, tokens: usize) -> SpillOrder {
        let networks = self.from().networks().len();
        let is_here = (0..networks).map(|index| index < MEASURED_NETWORKS).collect();
        SpillOrder { base: self.next_bases(0).crossing, tokens, is_here }
    }

    /// Gives an order and starts the GPU's side of it.
    fn cross(&self, order: &SpillOrder, memory: &CrossedMemory) -> Result<(), ExecutorError> {
        let CrossedMemory { rows, back, base } = memory;
        let (gpu, crossing) = (self.weights.gpu(), self.thread.crossing());
        gpu.upload(&[order.base], base.span())?;
        let (tokens, is_here) = (order.tokens, Arc::clone(&order.is_here));
        self.thread.orders().begin(SpillOrder { is_here, ..*order })?;
        for index in (0..order.is_here.len()).filter(|index| order.is_here[*index]) {
            gpu.hand_over(crossing, rows.span(), tokens, (base.span(), index))?;
            gpu.take_back(crossing, back.span(), tokens, (base.span(), index))?;
        }
        Ok(())
    }

    /// Seconds that the weights of a network take, by those that arrive in `least` or in one
    /// filling of the ring.
    fn stream_seconds(&mut self, least: Option<Duration>) -> Result<Option<f64>, ExecutorError> {
        let (started, mut sent) = (Instant::now(), 0);
        loop {
            let base = self.next_bases(self.from().networks().len()).ring;
            let Some(stream) = &self.stream else { return Ok(None) };
            let (gpu, from) = (self.weights.gpu(), self.from());
            let pieces = from.networks().iter().flatten().take(RING_SLOTS);
            let pieces = pieces.map(|piece| from.bytes(piece)).inspect(|piece| sent += piece.len());
            // SAFETY: weights never change, and outlive the ring.
            unsafe { stream.sender.ring().send(gpu, base, pieces, || false)? };
            stream.sender.ring().synchronize(gpu)?;
            if least.is_none_or(|least| started.elapsed() >= least) {
                let of_network = from.stored_bytes() as f64 / from.networks().len() as f64;
                return Ok(Some(started.elapsed().as_secs_f64() / sent as f64 * of_network));
            }
        }
    }
}

/// What crosses while costs are measured.
struct CrossedMemory {
    rows: DeviceMemory,
    back: DeviceMemory,
    base: DeviceMemory,
}

/// Numbers between -1 and 1 that repeat after long (Knuth's multiplicative hash).
fn varied(count: usize) -> Vec<f32> {
    let number = |index: u32| index.wrapping_mul(2_654_435_761) as i32 as f32 / 2f32.powi(31);
    (0..count as u32).map(number).collect()
}

impl GpuStage {
    fn base(&self, part: Part) -> Span<'_> {
        self.buffers.inputs.span(part)
    }

    /// Starts what a spilled network begins with; whether its ops are the CPU's.
    pub(super) fn start_spilled(
        &self,
        (tokens, streamed): (usize, usize),
        index: usize,
    ) -> Result<bool, ExecutorError> {
        let (gpu, spill) = (self.weights.gpu(), self.spill());
        let is_here = spill.is_here(streamed);
        if is_here[index] {
            let normed = self.buffers.normed.values();
            let event = (self.base(Part::Crossings), index);
            gpu.hand_over(spill.thread.crossing(), normed, tokens, event)?;
            return Ok(true);
        }
        let stream = spill.stream.as_ref().expect("networks stream where they can");
        let networks = spill.from().networks();
        let first = spill.from().streamed(is_here, index).count();
        for (piece, at) in networks[index].iter().zip(first..) {
            let matrix = &stream.scratch[stream.places[&piece.matrix]];
            stream.sender.ring().take(gpu, matrix, (self.base(Part::Pieces), at))?;
        }
        Ok(false)
    }

    /// Starts what a network of the CPU ends with.
    pub(super) fn end_spilled(&self, tokens: usize, index: usize) -> Result<(), ExecutorError> {
        let (gpu, spill) = (self.weights.gpu(), self.spill());
        let (projected, event) =
            (self.buffers.projected.values(), (self.base(Part::Crossings), index));
        Ok(gpu.take_back(spill.thread.crossing(), projected, tokens, event)?)
    }

    fn spill(&self) -> &GpuSpill {
        self.spill.as_ref().expect("a program with spilled networks has what they need")
    }

    /// A matrix, where it lies on the GPU or while it does.
    pub(super) fn matrix(&self, id: MatrixId) -> &DeviceMatrix {
        let streamed = self.spill.as_ref().and_then(|spill| spill.matrix(id));
        streamed.unwrap_or_else(|| self.weights.matrix(id))
    }
}
