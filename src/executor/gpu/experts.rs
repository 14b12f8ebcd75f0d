//! The ops of a mixture of experts: who goes where, the experts' gated products, and their
//! weighted sum. Routes are made and stay on the GPU.
//!
//! A pair of token and expert has the row `token · n_used + place` of `hidden`, where a token's
//! experts are ascending. Which form rows of pairs have the tokens of the step say, as everywhere.

use super::GpuStage;
use super::ops::gate_of;
use crate::executor::ExecutorError;
use crate::executor::program::{MatrixId, Precision};
use crate::model::Activation;
use crate::placement::{BufferDims, ExpertBytes};
use tandem_kernels::{
    DeviceMemory, ExpertProduct, ExpertRoutes, ExpertSums, Gpu, Product, RoundRows, Route, Routed,
};

/// What only layers with experts need.
pub(super) struct ExpertBuffers {
    /// `[tokens, n_experts]` f32
    logits: DeviceMemory,
    routes: ExpertRoutes,
    /// f32: up projections `[pairs, hidden_dim]`, then down projections `[pairs, embedding_dim]`.
    products: DeviceMemory,
}

impl ExpertBuffers {
    /// Buffers for steps of up to `tokens` tokens; none where layers are dense.
    pub fn new(
        gpu: &Gpu,
        dims: &BufferDims,
        (tokens, bytes): (usize, Option<ExpertBytes>),
    ) -> Result<Option<Self>, ExecutorError> {
        let Some(ExpertBytes { logits, products, .. }) = bytes else { return Ok(None) };
        Ok(Some(Self {
            logits: gpu.alloc(logits)?,
            routes: ExpertRoutes::new(gpu, (dims.experts, dims.hidden_rows), tokens)?,
            products: gpu.alloc(products)?,
        }))
    }

    /// Bytes held on the GPU.
    pub fn bytes(&self) -> usize {
        self.logits.bytes() + self.routes.bytes() + self.products.bytes()
    }
}

impl GpuStage {
    fn experts(&self, tokens: usize) -> (&ExpertBuffers, Routed<'_>) {
        let experts = self.buffers.experts.as_ref().expect("buffers of a program with experts");
        (experts, Routed { routes: &experts.routes, tokens })
    }

    pub(super) fn route(
        &self,
        tokens: usize,
        router: MatrixId,
        weight_scale: f32,
    ) -> Result<(), ExecutorError> {
        let (gpu, (experts, routed)) = (self.weights.gpu(), self.experts(tokens));
        let (matrix, logits) = (self.matrix(router), experts.logits.span());
        let product = Product { matrix, bias: None, out: logits, stride: matrix.rows() };
        let x = self.buffers.normed.columns(tokens, Precision::Eight);
        gpu.multiply(&[product], &x)?;
        Ok(gpu.route(&Route { logits, weight_scale }, routed)?)
    }

    pub(super) fn gate_experts(
        &self,
        tokens: usize,
        matrices: [MatrixId; 2],
        activation: Activation,
    ) -> Result<(), ExecutorError> {
        let (gpu, (experts, routed)) = (self.weights.gpu(), self.experts(tokens));
        let (hidden, up) = (&self.buffers.hidden, experts.products.span());
        let [gate, up_matrix] = matrices.map(|id| self.matrix(id));
        let products = [
            ExpertProduct { matrix: gate, out: hidden.values() },
            ExpertProduct { matrix: up_matrix, out: up },
        ];
        let x = self.buffers.normed.columns(tokens, Precision::Eight);
        gpu.multiply_experts(&products, &x, routed)?;
        let pass = RoundRows {
            values: hidden.values(),
            up: Some((up, gate_of(activation))),
            out: self.weights.has_float_experts().then(|| hidden.values()),
            eight_bits: hidden.eight_bits(routed.pairs(), Precision::Eight),
            halves: hidden.halves(routed.pairs()),
            rows: routed.pairs(),
            cols: hidden.cols,
        };
        Ok(gpu.round_rows(&pass)?)
    }

    pub(super) fn down_experts(&self, tokens: usize, down: MatrixId) -> Result<(), ExecutorError> {
        let (gpu, (experts, routed)) = (self.weights.gpu(), self.experts(tokens));
        let (projected, products) = (&self.buffers.projected, experts.products.span());
        let product = ExpertProduct { matrix: self.matrix(down), out: products };
        let x = self.buffers.hidden.columns(routed.pairs(), Precision::Eight);
        gpu.multiply_experts(&[product], &x, routed)?;
        let sums = ExpertSums { products, out: projected.values(), cols: projected.cols };
        Ok(gpu.sum_experts(&sums, routed)?)
    }
}
