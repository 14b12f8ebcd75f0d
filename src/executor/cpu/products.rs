//! The ops that multiply matrices with activations: shares of rows, products, and what is done to
//! them while they are in cache.

use super::{Step, whole_row_mut};
use crate::executor::buffers::{LOGITS_TILE_ROWS, QuantizedRows, Rows};
use crate::executor::cpu_pool::Worker;
use crate::executor::program::{Buffer, Linear, Precision};
use crate::model::Activation;
use std::ops::Range;
use tandem_cpu_kernels::blocks::GROUP;

/// Rows of a matmul are dealt out in groups that the interleaved layout keeps together.
const MATMUL_ROWS: usize = 16;
/// Hidden rows whose gate and up are computed before the activation runs over them: the products
/// of a wide step are then still in the second-level cache.
const GATE_ROWS: usize = 128;

impl Step<'_> {
    pub(super) fn project(
        &self,
        worker: &Worker<'_>,
        (input, output): (Buffer, Buffer),
        parts: &[Linear],
        precision: Precision,
    ) {
        let output = match output {
            Buffer::Heads => self.buffers.heads,
            _ => self.buffers.projected,
        };
        let input = match input {
            Buffer::Attended => self.buffers.attended,
            Buffer::Hidden => self.buffers.hidden,
            _ => self.buffers.normed,
        };
        let mine = self.weighted_share(worker, parts);
        let mut first = 0;
        for part in parts {
            let rows = self.weights.matrix(part.matrix).rows();
            let own = mine.start.clamp(first, first + rows) - first
                ..mine.end.clamp(first, first + rows) - first;
            self.multiply(part, (input, precision), (output, first), own);
            first += rows;
        }
    }

    /// This worker's rows of all parts, one after the other: equal shares of bytes, cut at
    /// multiples of [`MATMUL_ROWS`].
    fn weighted_share(&self, worker: &Worker<'_>, parts: &[Linear]) -> Range<usize> {
        let cost = |part: &Linear| self.weights.matrix(part.matrix).bytes().len();
        let total: usize = parts.iter().map(cost).sum();
        let cut = |index: usize| {
            let mut target = total * index / worker.count();
            let mut first = 0;
            for part in parts {
                let (rows, bytes) = (self.weights.matrix(part.matrix).rows(), cost(part));
                if target < bytes {
                    let row = target * rows / bytes;
                    return first + (row.next_multiple_of(MATMUL_ROWS)).min(rows);
                }
                target -= bytes;
                first += rows;
            }
            first
        };
        cut(worker.index)..cut(worker.index + 1)
    }

    /// Rows `own` of `part · input (+ bias)` into the output's columns from `first` on.
    fn multiply(
        &self,
        part: &Linear,
        (input, precision): (QuantizedRows<'_>, Precision),
        (output, first): (Rows<'_>, usize),
        own: Range<usize>,
    ) {
        if own.is_empty() {
            return;
        }
        let n_tokens = self.plan.tokens.len();
        let matrix = self.weights.matrix(part.matrix);
        let paired = precision == Precision::Sixteen && matrix.dtype().is_quantized();
        let rows = 0..if paired { 2 * n_tokens } else { n_tokens };
        // SAFETY: the input was finished before the last barrier, or by this worker for itself;
        // workers' `own` are disjoint.
        let (activations, columns) =
            unsafe { (input.activations(rows.clone()), output.cut(rows).output()) };
        self.kernels.matmul(&matrix, &activations, own.clone(), columns.skip_rows(first));
        let bias = part.bias.map(|bias| &self.weights.vector(bias)[own.clone()]);
        let own = first + own.start..first + own.end;
        for token in 0..n_tokens {
            let rest = paired.then_some(token + n_tokens);
            self.finish(output, (token, rest), own.clone(), bias);
        }
    }

    /// Adds what the products of a row of this worker still miss: those of its second row, and the
    /// bias.
    fn finish(
        &self,
        output: Rows<'_>,
        (row, rest): (usize, Option<usize>),
        own: Range<usize>,
        bias: Option<&[f32]>,
    ) {
        if rest.is_none() && bias.is_none() {
            return;
        }
        // SAFETY: these are elements that this worker has just written; the rows are different.
        let (out, rest) =
            unsafe { (output.part_mut(row, own.clone()), rest.map(|rest| output.part(rest, own))) };
        for addend in rest.into_iter().chain(bias) {
            self.kernels.add(out, addend);
        }
    }

    pub(super) fn gate(
        &self,
        worker: &Worker<'_>,
        [gate, up]: [Linear; 2],
        activation: Activation,
    ) {
        let (normed, hidden) = ((self.buffers.normed, Precision::Eight), self.buffers.hidden);
        let mine = worker.share(hidden.values.width, GROUP);
        let mut start = mine.start;
        while start < mine.end {
            let rows = start..mine.end.min(start + GATE_ROWS);
            self.multiply(&gate, normed, (hidden.values, 0), rows.clone());
            self.multiply(&up, normed, (self.buffers.up, 0), rows.clone());
            for token in 0..hidden.values.rows {
                // SAFETY: these are the elements that this worker has just written.
                let (gate, up) = unsafe {
                    (
                        hidden.values.part_mut(token, rows.clone()),
                        self.buffers.up.part(token, rows.clone()),
                    )
                };
                match activation {
                    Activation::Silu => self.kernels.swiglu(gate, up),
                    Activation::GeluTanh => self.kernels.geglu(gate, up),
                }
                self.quantize(hidden, token, rows.clone());
            }
            start = rows.end;
        }
    }

    pub(super) fn logits(&self, worker: &Worker<'_>, output: Linear, softcap: Option<f32>) {
        let wanted = self.plan.logits.len();
        let mut first = 0;
        while first < wanted {
            let rows = LOGITS_TILE_ROWS.min(wanted - first);
            self.logits_tile(worker, output, (first, rows), softcap);
            self.meet(worker);
            for index in worker.share(rows, 1) {
                // SAFETY: workers' rows are disjoint; the products are behind the barrier.
                let row = unsafe { whole_row_mut(self.buffers.logits, index) };
                self.samplers.take(worker.index, self.plan, first + index, row);
            }
            first += rows;
            if first < wanted {
                self.meet(worker);
            }
        }
    }

    fn logits_tile(
        &self,
        worker: &Worker<'_>,
        output: Linear,
        (first, rows): (usize, usize),
        softcap: Option<f32>,
    ) {
        let matrix = self.weights.matrix(output.matrix);
        let own = worker.share(matrix.rows(), MATMUL_ROWS);
        let logits = self.buffers.logits;
        // SAFETY: `selected` was finished before the last barrier, or by this worker for itself;
        // workers' `own` are disjoint.
        let (selected, out) = unsafe {
            let selected = self.buffers.selected.activations(first..first + rows);
            (selected, logits.cut(0..rows).output())
        };
        self.kernels.matmul(&matrix, &selected, own.clone(), out);
        let bias = output.bias.map(|bias| &self.weights.vector(bias)[own.clone()]);
        for row in 0..rows {
            self.finish(logits, (row, None), own.clone(), bias);
            if let Some(cap) = softcap {
                // SAFETY: these are the elements that this worker has just written.
                self.kernels.softcap(unsafe { logits.part_mut(row, own.clone()) }, cap);
            }
        }
    }
}
