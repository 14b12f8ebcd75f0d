//! The ops of a mixture of experts: who goes where, the experts' gated products, and their
//! weighted sum.
//!
//! All tokens of an expert are columns of one product, so a prompt reads each expert once. A
//! column's bits do not depend on those beside it, and a token adds up its experts by ascending
//! index: its result does not depend on the batch.

use super::{Step, whole_row_mut};
use crate::executor::buffers::{QuantizedMemory, Rows};
use crate::executor::cpu_pool::Worker;
use crate::executor::expert_groups::{
    ExpertGroups, ExpertScratch, ExpertShare, TILE_TOKENS, tile_rows, tiles,
};
use crate::executor::program::{ExpertShape, MatrixId};
use crate::model::Activation;
use std::ops::Range;
use std::sync::PoisonError;
use tandem_cpu_kernels::blocks::GROUP;
use tandem_cpu_kernels::{Activations, Kernels, MatrixView};

/// Rows of the router are dealt out in small groups: there are few, and they are short.
const ROUTER_ROWS: usize = 4;
/// Rows of a matmul are dealt out in groups that the interleaved layout keeps together.
const MATMUL_ROWS: usize = 16;

impl Step<'_> {
    pub(super) fn route(
        &self,
        worker: &Worker<'_>,
        shape: ExpertShape,
        (router, weight_scale): (MatrixId, f32),
    ) {
        let (logits, routes) = (self.buffers.router_logits, self.buffers.routes);
        let own = worker.share(shape.n_experts, ROUTER_ROWS);
        // SAFETY: `normed` was finished before the last barrier, or by this worker for itself;
        // workers' `own` are disjoint.
        let (normed, out) = unsafe {
            (self.buffers.normed.activations(0..self.plan.tokens.len()), logits.output())
        };
        for part in self.weights.stored(router, own) {
            self.kernels.matmul(&part.view, &normed, part.rows, out.skip_rows(part.first));
        }
        self.meet(worker);
        for token in self.rows(worker, self.plan.tokens.len()) {
            // SAFETY: the logits are behind the barrier; the row of routes is of this worker's own
            // memory or fell to it, and the copy of the logits is its own.
            let (logits, scratch, routes) = unsafe {
                (
                    logits.part(token, 0..logits.width),
                    whole_row_mut(self.buffers.expert_logits, 0),
                    whole_row_mut(routes, token),
                )
            };
            scratch.copy_from_slice(logits);
            choose(self.kernels, scratch, routes, weight_scale);
        }
    }

    pub(super) fn gate_experts(
        &self,
        worker: &Worker<'_>,
        shape: ExpertShape,
        matrices: [MatrixId; 2],
        activation: Activation,
    ) {
        let mut scratch = self.experts[worker.index].lock().unwrap_or_else(PoisonError::into_inner);
        let ExpertScratch { groups, gathered, products } = &mut *scratch;
        self.group(groups, shape);
        let width = self.buffers.hidden.values.width;
        // Each node has its rows of every expert.
        let nodes = worker.nodes();
        let team = nodes.team_of(worker.index);
        let (team, near) = (nodes.workers(team, worker.count()), nodes.rows(team, width));
        let units = near.len().div_ceil(GROUP);
        for share in groups.share((worker.index - team.start, team.len()), units) {
            let ExpertShare { expert, rows: pairs, units } = share;
            let rows =
                near.start + units.start * GROUP..near.end.min(near.start + units.end * GROUP);
            for pairs in tiles(pairs, TILE_TOKENS) {
                let tokens = pairs.clone().map(|row| groups.pair(row) / shape.n_used);
                let input = self.gather(tokens, gathered);
                let rows = tiles(rows.clone(), tile_rows(pairs.len()));
                for rows in rows.flat_map(|rows| self.weights.uncut(matrices[0], rows)) {
                    let [gate, up] =
                        matrices.map(|id| self.weights.expert(id, expert, rows.clone()));
                    let up_products = products.rows(pairs.len(), rows.len());
                    self.product(&up, &input, up_products);
                    self.gate_product(&gate, &input, (pairs.clone(), rows.clone()));
                    self.activate((pairs.clone(), rows), up_products, activation);
                }
            }
        }
    }

    pub(super) fn down_experts(&self, worker: &Worker<'_>, shape: ExpertShape, down: MatrixId) {
        let mut scratch = self.experts[worker.index].lock().unwrap_or_else(PoisonError::into_inner);
        let ExpertScratch { groups, products, .. } = &mut *scratch;
        self.group(groups, shape);
        let projected = self.buffers.projected;
        let most = groups.active().map(|(_, pairs)| pairs.len()).max().unwrap_or(0);
        let pieces = worker.deal_rows(projected.width, MATMUL_ROWS, 2);
        let pieces = pieces.flat_map(|piece| tiles(piece, tile_rows(most)));
        for rows in pieces.flat_map(|rows| self.weights.uncut(down, rows)) {
            for token in 0..projected.rows {
                // SAFETY: workers' rows of the stream are disjoint.
                unsafe { projected.part_mut(token, rows.clone()) }.fill(0.0);
            }
            for (expert, pairs) in groups.active() {
                let matrix = self.weights.expert(down, expert, rows.clone());
                for pairs in tiles(pairs, TILE_TOKENS) {
                    // SAFETY: `hidden` was finished before the last barrier.
                    let hidden = unsafe { self.buffers.hidden.activations(pairs.clone()) };
                    let products = products.rows(pairs.len(), rows.len());
                    self.product(&matrix, &hidden, products);
                    for (index, row) in pairs.enumerate() {
                        self.add_weighted(groups.pair(row), shape, (products, index), rows.clone());
                    }
                }
            }
        }
    }

    /// Sorts the pairs of token and expert that `routes` has. Every worker does it for itself:
    /// that is cheaper than a barrier.
    fn group(&self, groups: &mut ExpertGroups, shape: ExpertShape) {
        let routes = self.buffers.routes;
        groups.sort(routes.rows * shape.n_used, |pair| {
            let (token, slot) = (pair / shape.n_used, pair % shape.n_used);
            // SAFETY: routes are only read after the op that wrote them.
            let expert = unsafe { routes.part(token, slot..slot + 1) };
            expert[0] as usize
        });
    }

    /// The normalised rows of some tokens, side by side: those of one token where they are, others
    /// copied.
    fn gather<'a>(
        &'a self,
        tokens: impl ExactSizeIterator<Item = usize>,
        memory: &'a mut QuantizedMemory,
    ) -> Activations<'a> {
        let (normed, count) = (self.buffers.normed, tokens.len());
        // SAFETY: `normed` was finished before the last barrier, or by this worker for itself.
        let all = unsafe { normed.activations(0..self.plan.tokens.len()) };
        let gathered = memory.rows(count, normed.values.width);
        for (row, token) in tokens.enumerate() {
            if count == 1 {
                return all.slice(token..token + 1);
            }
            // SAFETY: `normed` as above; the copy is this worker's alone.
            let (from, to) = unsafe {
                let from = normed.values.part(token, 0..normed.values.width);
                (from, whole_row_mut(gathered.values, row))
            };
            to.copy_from_slice(from);
            if let Some(rounded) = gathered.rounded {
                rounded.copy_column(&all, token, row);
            }
        }
        // SAFETY: filled, and not written again while the result is borrowed.
        unsafe { gathered.activations(0..count) }
    }

    /// All rows of `matrix` times `input` into memory of this worker.
    fn product(&self, matrix: &MatrixView<'_>, input: &Activations<'_>, out: Rows<'_>) {
        // SAFETY: the memory is this worker's alone.
        let out = unsafe { out.output() };
        self.kernels.matmul(matrix, input, 0..matrix.rows(), out);
    }

    /// `gate`, which is `rows` of an expert, times `input` into its part of `hidden`.
    fn gate_product(
        &self,
        gate: &MatrixView<'_>,
        input: &Activations<'_>,
        (pairs, rows): (Range<usize>, Range<usize>),
    ) {
        // SAFETY: workers' shares are disjoint, and these elements belong to this worker's.
        let out = unsafe { self.buffers.hidden.values.cut(pairs).output() };
        self.kernels.matmul(gate, input, 0..gate.rows(), out.skip_rows(rows.start));
    }

    /// `hidden = activation(hidden) · up`, and its rounded form.
    fn activate(
        &self,
        (pairs, rows): (Range<usize>, Range<usize>),
        up: Rows<'_>,
        activation: Activation,
    ) {
        let hidden = self.buffers.hidden;
        for (index, pair) in pairs.enumerate() {
            // SAFETY: these are the elements that this worker has just written.
            let (gate, up) = unsafe {
                (hidden.values.part_mut(pair, rows.clone()), up.part(index, 0..rows.len()))
            };
            match activation {
                Activation::Silu => self.kernels.swiglu(gate, up),
                Activation::GeluTanh => self.kernels.geglu(gate, up),
            }
            self.quantize(hidden, pair, rows.clone());
        }
    }

    /// Adds a pair's product, times its weight, to columns `rows` of its token's projected row.
    fn add_weighted(
        &self,
        pair: usize,
        shape: ExpertShape,
        (products, index): (Rows<'_>, usize),
        rows: Range<usize>,
    ) {
        let (token, slot) = (pair / shape.n_used, pair % shape.n_used);
        let weight = shape.n_used + slot;
        // SAFETY: routes are only read here; the products are this worker's, and so are its
        // columns of the stream.
        let (weight, product, sum) = unsafe {
            (
                self.buffers.routes.part(token, weight..weight + 1)[0],
                whole_row_mut(products, index),
                self.buffers.projected.part_mut(token, rows),
            )
        };
        self.kernels.scale(product, weight);
        self.kernels.add(sum, product);
    }
}

/// The largest logits of a token, of equals those of lower index: `routes` becomes their indices,
/// ascending, and then their softmax times `weight_scale`. A softmax over all experts that is
/// normalised again over these is the same.
///
/// Logits that are not finite choose the first experts with weights that are no numbers, so that
/// they fail their sequence and no other. The logits are used up.
fn choose(kernels: &Kernels, logits: &mut [f32], routes: &mut [f32], weight_scale: f32) {
    let n_used = routes.len() / 2;
    let (experts, weights) = routes.split_at_mut(n_used);
    let finite = logits.iter().all(|logit| logit.is_finite());
    for slot in 0..n_used {
        let found = if finite { kernels.argmax(logits) } else { None };
        let expert = found.unwrap_or(slot);
        let logit = std::mem::replace(&mut logits[expert], f32::NEG_INFINITY);
        // An index below 1024 is exact as f32.
        let place = experts[..slot].partition_point(|known| *known < expert as f32);
        experts.copy_within(place..slot, place + 1);
        weights.copy_within(place..slot, place + 1);
        (experts[place], weights[place]) = (expert as f32, logit);
    }
    if !finite || kernels.softmax_in_place(weights).is_err() {
        weights.fill(f32::NAN);
    }
    if weight_scale != 1.0 {
        kernels.scale(weights, weight_scale);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(logits: &[f32], n_used: usize) -> Vec<f32> {
        let mut routes = vec![7.0; 2 * n_used];
        choose(Kernels::best(), &mut logits.to_vec(), &mut routes, 1.0);
        routes
    }

    #[test]
    fn the_largest_logits_are_chosen_and_listed_by_index() {
        let routes = chosen(&[0.0, 3.0, -1.0, 9.0, 3.0 + 2.0_f32.ln(), 9.0], 3);
        assert_eq!(routes[..3], [3.0, 4.0, 5.0]);
        assert_eq!(routes[3], routes[5]);
        assert!((routes[4] / routes[3] - 2.0 * (-6.0_f32).exp()).abs() < 1e-6, "{routes:?}");
        assert!((routes[3..].iter().sum::<f32>() - 1.0).abs() < 1e-6);
    }

    #[test]
    fn of_equal_logits_the_lower_index_wins() {
        assert_eq!(chosen(&[1.0; 40], 3), [0.0, 1.0, 2.0, 1.0 / 3.0, 1.0 / 3.0, 1.0 / 3.0]);
        assert_eq!(chosen(&[0.0, 2.0, 1.0, 1.0, 1.0], 2)[..2], [1.0, 2.0]);
        assert_eq!(chosen(&[-0.0, 0.0], 1), [0.0, 1.0]);
    }

    #[test]
    fn all_experts_may_be_in_use() {
        let routes = chosen(&[1.0, 1.0, 1.0, 1.0], 4);
        assert_eq!(routes, [0.0, 1.0, 2.0, 3.0, 0.25, 0.25, 0.25, 0.25]);
    }

    #[test]
    fn logits_that_are_not_finite_give_weights_that_are_none() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let routes = chosen(&[0.0, bad, 1.0], 2);
            assert_eq!(routes[..2], [0.0, 1.0]);
            assert!(routes[2..].iter().all(|weight| weight.is_nan()), "{routes:?}");
        }
    }

    #[test]
    fn the_scale_multiplies_the_weights() {
        let mut routes = [0.0; 4];
        choose(Kernels::best(), &mut [1.0, 1.0], &mut routes, 2.5);
        assert_eq!(routes, [0.0, 1.0, 1.25, 1.25]);
    }
}
