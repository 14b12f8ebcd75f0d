//! The ops that multiply matrices with activations: shares of rows, products, and what is done to
//! them while they are in cache.

use super::{Step, whole_row_mut};
use crate::executor::buffers::{LOGITS_TILE_ROWS, QuantizedRows, Rows};
use crate::executor::cpu_pool::Worker;
use crate::executor::expert_groups::tiles;
use crate::executor::own_buffers::GATED_ROWS;
use crate::executor::program::{Buffer, Linear, Precision};
use crate::executor::weights::Weights;
use crate::model::Activation;
use crate::placement::{NodeTeams, claimed_units, dealt_rows, tiled_units};
use std::ops::Range;
use tandem_cpu_kernels::ActivationForm;
use tandem_cpu_kernels::blocks::GROUP;

/// Beyond so many tokens, kernels on tiles read all activations once for some rows, from a cache
/// that is shared, and few rows would wait for it.
const TILED_TOKENS: usize = 32;
/// From so many tokens on, products on tiles are dealt out by halves of them.
const HALVED_TOKENS: usize = 256;
/// Rows that such a half is multiplied with: of fewer, a claim with all tokens would read twice as
/// many activations for as many products.
const HALVED_ROWS: usize = 128;
/// Hidden rows whose gate and up are computed before the activation runs over them: the products
/// of a wide step are then still in the second-level cache. Fewer tokens take more rows, since each
/// change from one matrix to the other waits for memory once.
const GATE_ROWS: usize = 128;
/// Tokens times such rows, at least.
const GATE_PRODUCTS: usize = 4096;

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
        let input = self.input(input);
        let n_tokens = self.plan.tokens.len();
        let halves = if self.is_tiled(n_tokens) { token_halves(n_tokens) } else { None };
        let unit = if halves.is_some() { HALVED_ROWS } else { dealt_rows(n_tokens) };
        let layout = PartUnits { weights: self.weights, nodes: worker.nodes(), parts, unit };
        let first_part = parts.first().map_or(0, |part| self.row_bytes(part));
        let (grain, each) = match halves {
            Some(_) => (1, 2),
            None => (self.grain(first_part * unit, n_tokens), 1),
        };
        let cut = |index| layout.unit_at(index, worker.count()) * each;
        let pieces = worker.deal_from(grain, cut);
        for (piece, tokens) in pieces.flat_map(|piece| rectangles(piece, halves, n_tokens)) {
            let mut first_unit = 0;
            for team in 0..layout.nodes.count() {
                let mut first_row = 0;
                for part in parts {
                    let (all, near) = (self.weights.rows(part.matrix), layout.rows(part, team));
                    let row = |index: usize| (index.max(first_unit) - first_unit) * unit;
                    let at = |index: usize| near.end.min(near.start + row(index));
                    let own = at(piece.start)..at(piece.end);
                    let output = (output, first_row);
                    self.multiply(part, (input, precision), output, (own, tokens.clone()));
                    first_row += all;
                    first_unit += near.len().div_ceil(unit);
                }
            }
        }
    }

    /// What products read.
    pub(super) fn input(&self, input: Buffer) -> QuantizedRows<'_> {
        match input {
            Buffer::Attended => self.buffers.attended,
            Buffer::Hidden => self.buffers.hidden,
            _ => self.buffers.normed,
        }
    }

    fn row_bytes(&self, part: &Linear) -> usize {
        self.weights.matrix_bytes(part.matrix) / self.weights.rows(part.matrix).max(1)
    }

    /// How many units of `bytes` bytes of weights are worth a claim.
    fn grain(&self, bytes: usize, n_tokens: usize) -> usize {
        let least = if self.is_tiled(n_tokens) { tiled_units(n_tokens) } else { 0 };
        least.max(claimed_units(bytes, n_tokens))
    }

    /// Whether kernels decode weights once for all tokens.
    fn is_tiled(&self, n_tokens: usize) -> bool {
        self.kernels.activation_form() == ActivationForm::Bf16 && n_tokens > TILED_TOKENS
    }

    /// Rows `own` of `part · input (+ bias)` into the output's columns from `first` on, of some
    /// tokens or, where inputs have second rows, of all.
    fn multiply(
        &self,
        part: &Linear,
        (input, precision): (QuantizedRows<'_>, Precision),
        (output, first): (Rows<'_>, usize),
        (own, tokens): (Range<usize>, Range<usize>),
    ) {
        if own.is_empty() {
            return;
        }
        let n_tokens = self.plan.tokens.len();
        let is_quantized = self.weights.dtype(part.matrix).is_quantized();
        let paired = self.has_second_rows(precision) && is_quantized;
        debug_assert!(!paired || tokens.len() == n_tokens, "{tokens:?} of {n_tokens}, paired");
        let rows = if paired { 0..2 * n_tokens } else { tokens.clone() };
        // SAFETY: the input was finished before the last barrier, or by this worker for itself;
        // workers' `own` are disjoint.
        let (activations, columns) =
            unsafe { (input.activations(rows.clone()), output.cut(rows).output()) };
        for near in self.weights.stored(part.matrix, own.clone()) {
            let columns = columns.skip_rows(first + near.first);
            self.kernels.matmul(&near.view, &activations, near.rows, columns);
        }
        let bias = part.bias.map(|bias| &self.weights.vector(bias)[own.clone()]);
        let own = first + own.start..first + own.end;
        for token in tokens {
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
        let n_tokens = hidden.values.rows;
        let bytes = [&gate, &up].map(|part| self.row_bytes(part)).iter().sum::<usize>() * GROUP;
        let grain = self.grain(bytes, n_tokens);
        let pieces = worker.deal_rows(hidden.values.width, GROUP, grain);
        let is_tiled = self.is_tiled(n_tokens);
        let least = if is_tiled { GATED_ROWS } else { GATE_ROWS };
        let at_once = least.max(GATE_PRODUCTS / n_tokens.max(1) / GROUP * GROUP);
        let keeps = is_tiled && at_once == GATED_ROWS && self.buffers.gated.rows >= 2 * n_tokens;
        for rows in pieces.flat_map(|piece| tiles(piece, at_once)) {
            if keeps {
                self.gate_kept([&gate, &up], activation, rows);
                continue;
            }
            let these = (rows.clone(), 0..n_tokens);
            self.multiply(&gate, normed, (hidden.values, 0), these.clone());
            self.multiply(&up, normed, (self.buffers.up, 0), these);
            for token in 0..n_tokens {
                // SAFETY: these are the elements that this worker has just written.
                let (gate, up) = unsafe {
                    (
                        hidden.values.part_mut(token, rows.clone()),
                        self.buffers.up.part(token, rows.clone()),
                    )
                };
                self.apply_gate(activation, gate, up);
                self.quantize(hidden, token, rows.clone());
            }
        }
    }

    /// `gate = activation(gate) · up`.
    fn apply_gate(&self, activation: Activation, gate: &mut [f32], up: &[f32]) {
        match activation {
            Activation::Silu => self.kernels.swiglu(gate, up),
            Activation::GeluTanh => self.kernels.geglu(gate, up),
        }
    }

    /// Some hidden rows, of which nobody else reads more than the rounded form: products stay in
    /// memory of this worker's own, and so in its second-level cache. In the rows that all share,
    /// their lines were another core's or in no cache: gate and up took a tenth longer.
    fn gate_kept(&self, parts: [&Linear; 2], activation: Activation, rows: Range<usize>) {
        let n_tokens = self.plan.tokens.len();
        let (kept, own) = (self.buffers.gated, 0..rows.len());
        for (part, first) in parts.into_iter().zip([0, n_tokens]) {
            // SAFETY: the input was finished before the last barrier; the memory is this worker's.
            let (activations, out) = unsafe {
                let activations = self.buffers.normed.activations(0..n_tokens);
                (activations, kept.cut(first..first + n_tokens).output())
            };
            for near in self.weights.stored(part.matrix, rows.clone()) {
                let out = out.skip_rows(near.first + near.rows.start - rows.start);
                let view = near.view.cut(near.rows);
                self.kernels.matmul(&view, &activations, 0..view.rows(), out);
            }
            let bias = part.bias.map(|bias| &self.weights.vector(bias)[rows.clone()]);
            for token in first..first + n_tokens {
                self.finish(kept, (token, None), own.clone(), bias);
            }
        }
        let Some(rounded) = self.buffers.hidden.rounded else { return };
        for token in 0..n_tokens {
            // SAFETY: these are elements of this worker's own memory; the rows are different.
            let (gate, up) = unsafe {
                (kept.part_mut(token, own.clone()), kept.part(n_tokens + token, own.clone()))
            };
            self.apply_gate(activation, gate, up);
            self.kernels.quantize_activations(gate, rounded, token, rows.clone());
        }
    }

    pub(super) fn logits(&self, worker: &Worker<'_>, output: Linear, softcap: Option<f32>) {
        let wanted = self.plan.logits.len();
        let mut first = 0;
        while first < wanted {
            let rows = LOGITS_TILE_ROWS.min(wanted - first);
            let unit = dealt_rows(rows);
            let grain = self.grain(self.row_bytes(&output) * unit, rows);
            for own in worker.deal_rows(self.weights.rows(output.matrix), unit, grain) {
                self.logits_tile(output, (first, rows), own, softcap);
            }
            self.meet(worker);
            for index in worker.deal(rows, 1, 1).flatten() {
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
        output: Linear,
        (first, rows): (usize, usize),
        own: Range<usize>,
        softcap: Option<f32>,
    ) {
        let logits = self.buffers.logits;
        // SAFETY: `selected` was finished before the last barrier, or by this worker for itself;
        // workers' `own` are disjoint.
        let (selected, out) = unsafe {
            let selected = self.buffers.selected.activations(first..first + rows);
            (selected, logits.cut(0..rows).output())
        };
        for near in self.weights.stored(output.matrix, own.clone()) {
            self.kernels.matmul(&near.view, &selected, near.rows, out.skip_rows(near.first));
        }
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

/// Where the second half of the tokens begins, if halves are worth claims of their own.
fn token_halves(n_tokens: usize) -> Option<usize> {
    (n_tokens >= HALVED_TOKENS).then_some((n_tokens / 2).next_multiple_of(TILED_TOKENS))
}

/// The rows, in units, and the tokens of a piece. Where tokens are halved, it is counted in halves
/// of units, and what it has of a unit at its ends may be one of them.
fn rectangles(
    piece: Range<usize>,
    halves: Option<usize>,
    n_tokens: usize,
) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
    let Range { mut start, end } = piece;
    std::iter::from_fn(move || {
        let begin = start;
        if begin >= end {
            return None;
        }
        let Some(middle) = halves else {
            start = end;
            return Some((begin..end, 0..n_tokens));
        };
        let whole = if begin.is_multiple_of(2) { (end - begin) / 2 } else { 0 };
        start += (2 * whole).max(1);
        let unit = begin / 2;
        Some(match (whole, begin % 2) {
            (0, 0) => (unit..unit + 1, 0..middle),
            (0, _) => (unit..unit + 1, middle..n_tokens),
            _ => (unit..unit + whole, 0..n_tokens),
        })
    })
}

/// The rows of several matrices with one input, counted in units that never span two of them: all
/// those that lie on the first NUMA node, then the next one's.
struct PartUnits<'a> {
    weights: &'a Weights,
    nodes: &'a NodeTeams,
    parts: &'a [Linear],
    unit: usize,
}

impl PartUnits<'_> {
    /// Rows on the node of a team.
    fn rows(&self, part: &Linear, team: usize) -> Range<usize> {
        self.nodes.rows(team, self.weights.rows(part.matrix))
    }

    /// The unit at which the share of worker `index` of `count` begins: shares of workers of one
    /// node are of equal bytes.
    fn unit_at(&self, index: usize, count: usize) -> usize {
        let last = self.nodes.count() - 1;
        let own = self.nodes.team_of(index).min(last);
        let before = (0..own).map(|team| self.units(team)).sum::<usize>();
        let workers = self.nodes.workers(own, count);
        before + self.unit_in_team(own, (index - workers.start, workers.len()))
    }

    fn units(&self, team: usize) -> usize {
        let units = |part: &Linear| self.rows(part, team).len().div_ceil(self.unit);
        self.parts.iter().map(units).sum()
    }

    /// The same in the units of a team.
    fn unit_in_team(&self, team: usize, (index, count): (usize, usize)) -> usize {
        let bytes = |part: &Linear| {
            let all = self.weights.rows(part.matrix);
            self.weights.matrix_bytes(part.matrix) * self.rows(part, team).len() / all.max(1)
        };
        let total: usize = self.parts.iter().map(bytes).sum();
        let mut target = total * index / count;
        let mut first = 0;
        for part in self.parts {
            let units = self.rows(part, team).len().div_ceil(self.unit);
            if target < bytes(part) {
                return first + (target * units).div_ceil(bytes(part));
            }
            target -= bytes(part);
            first += units;
        }
        first
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_of_halves_cover_each_row_and_token_once() {
        assert_eq!(token_halves(HALVED_TOKENS - 1), None);
        for (n_tokens, units) in [(256, 1), (300, 5), (512, 32)] {
            let halves = token_halves(n_tokens);
            for cut in 0..=2 * units {
                let pieces = [0..cut, cut..2 * units];
                let mut seen = vec![0; units * n_tokens];
                for (rows, tokens) in
                    pieces.into_iter().flat_map(|piece| rectangles(piece, halves, n_tokens))
                {
                    for row in rows {
                        tokens.clone().for_each(|token| seen[row * n_tokens + token] += 1);
                    }
                }
                assert!(seen.iter().all(|count| *count == 1), "{n_tokens} tokens, cut at {cut}");
            }
        }
        assert_eq!(rectangles(3..7, None, 9).collect::<Vec<_>>(), [(3..7, 0..9)]);
    }
}
