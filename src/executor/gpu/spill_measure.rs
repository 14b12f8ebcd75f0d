//! What spilled layers cost on this machine, measured once when the first stage starts.

use super::spill::GpuSpill;
use super::spill_schedule::WidthCosts;
use super::spill_thread::{SpillOrder, crossing_widths};
use super::weights::width_of;
use crate::executor::ExecutorError;
use crate::executor::program::Op;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tandem_kernels::DeviceMemory;

/// Tokens of the steps that are measured.
const MEASURED_TOKENS: [usize; 8] = [1, 2, 4, 8, 16, 32, 64, 128];
/// Layers of such a step, and how often it is repeated.
const MEASURED_LAYERS: usize = 4;
const MEASURED_TIMES: usize = 2;

impl GpuSpill {
    /// Measures how long a layer with spilled weights takes either way, alone and beside the other.
    ///
    /// # Errors
    /// What the driver refuses, or a failure of the CPU's side.
    pub(super) fn measure(&mut self) -> Result<(), ExecutorError> {
        let gpu_weights = Arc::clone(&self.weights);
        let gpu = gpu_weights.gpu();
        let widths = crossing_widths(gpu_weights.program());
        let [to_cpu, to_gpu] = widths.map(|width| self.tokens_max * width);
        // Of equal rows all tokens would go to the same experts.
        let values = varied(to_cpu);
        let memory = CrossedMemory {
            rows: gpu.alloc(size_of_val(&values[..]))?,
            back: gpu.alloc(to_gpu * size_of::<f32>())?,
            base: gpu.alloc(size_of::<u32>())?,
        };
        gpu.upload(&values, memory.rows.span())?;
        for _ in 0..MEASURED_TIMES {
            let known = self.costs.stream.unwrap_or(f64::INFINITY);
            self.costs.stream = self.stream_seconds(None)?.map(|seconds| seconds.min(known));
        }
        let pieces_of_layer = self.from().pieces().count() as f64 / self.from().layers() as f64;
        self.costs.ring_layers = self.from().ring_slots() as f64 / pieces_of_layer;
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

    /// Seconds of a layer on the CPU, alone and beside a stream of weights, and of its weights.
    fn measure_width(
        &mut self,
        tokens: usize,
        memory: &CrossedMemory,
    ) -> Result<[f64; 3], ExecutorError> {
        let layers = MEASURED_LAYERS.min(self.from().layers()) as f64;
        let order = self.measured_order(tokens);
        self.cross(&order, memory)?;
        let alone = self.thread.orders().finish()?;
        let order = self.measured_order(tokens);
        self.cross(&order, memory)?;
        let stream = self.stream_seconds(Some(alone))?.unwrap_or(f64::INFINITY);
        let beside = self.thread.orders().finish()?;
        Ok([alone.as_secs_f64() / layers, beside.as_secs_f64() / layers, stream])
    }

    /// An order for the first layers.
    fn measured_order(&mut self, tokens: usize) -> SpillOrder {
        let is_here = (0..self.from().layers()).map(|layer| layer < MEASURED_LAYERS).collect();
        SpillOrder { lane: self.lane, base: self.next_bases(tokens, 0).crossing, tokens, is_here }
    }

    /// Gives an order and starts the GPU's side of it.
    fn cross(&self, order: &SpillOrder, memory: &CrossedMemory) -> Result<(), ExecutorError> {
        let CrossedMemory { rows, back, base } = memory;
        let (gpu, crossing) = (self.weights.gpu(), self.thread.crossing(self.lane));
        gpu.upload(&[order.base], base.span())?;
        let (tokens, is_here) = (order.tokens, Arc::clone(&order.is_here));
        self.thread.orders().begin(SpillOrder { is_here, ..*order })?;
        let program = self.weights.program();
        for op in &program.ops {
            match op {
                Op::SpillStart { unit, input, .. } if order.is_here[unit.layer] => {
                    let elements = tokens * width_of(program, *input);
                    gpu.hand_over(crossing, rows.span(), elements, (base.span(), unit.index))?;
                }
                Op::SpillEnd { unit, output } if order.is_here[unit.layer] => {
                    let elements = tokens * width_of(program, *output);
                    gpu.take_back(crossing, back.span(), elements, (base.span(), unit.index))?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Seconds that the weights of a layer take, by those that arrive in `least` or in one
    /// filling of the ring.
    fn stream_seconds(&mut self, least: Option<Duration>) -> Result<Option<f64>, ExecutorError> {
        // Nobody takes these pieces, so that all fillings may have one number.
        let base = self.next_bases(0, self.from().layers()).ring;
        let Some(stream) = &self.stream else { return Ok(None) };
        let (gpu, from) = (self.weights.gpu(), self.from());
        let (started, mut sent) = (Instant::now(), 0);
        loop {
            let pieces = from.pieces().take(from.ring_slots());
            let pieces = pieces.map(|piece| from.bytes(piece)).inspect(|piece| sent += piece.len());
            // SAFETY: weights never change, and outlive the ring.
            unsafe { stream.ring().send(gpu, base, pieces, || false)? };
            stream.ring().synchronize(gpu)?;
            if least.is_none_or(|least| started.elapsed() >= least) {
                let of_layer = from.stored_bytes() as f64 / from.layers() as f64;
                return Ok(Some(started.elapsed().as_secs_f64() / sent as f64 * of_layer));
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
