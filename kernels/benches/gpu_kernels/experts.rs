//! Products of experts, of a layer of a real model.

use super::{F32, Matrices, Outcome, noise, time, type_of};
use tandem_cpu_kernels::DType;
use tandem_kernels::{
    Columns, DeviceMatrix, EightBits, ExpertProduct, ExpertRoutes, Gpu, Route, Routed, half_bytes,
};

/// Prints a row for each layer, type and number of tokens.
pub fn measure(gpu: &Gpu, types: &[String], tokens: Vec<usize>) -> Outcome<()> {
    println!("| experts | type | tokens | us, gate and up | GB/s | us, down | GB/s |");
    println!("|---|---|---|---|---|---|---|");
    for (counts, widths) in [((128, 8), (2048, 768)), ((8, 2), (4096, 14336))] {
        for dtype in types.iter().map(type_of) {
            let layer = ExpertLayer::new(gpu, dtype, counts, widths)?;
            tokens.iter().try_for_each(|tokens| layer.measure(gpu, *tokens))?;
        }
    }
    Ok(())
}

/// Steps whose tokens go through experts that are drawn anew.
const DRAWS: usize = 8;

/// The experts of a layer.
struct ExpertLayer {
    counts: (usize, usize),
    /// `[n_experts · hidden, embedding]`: two or more.
    gates: Matrices,
    /// `[n_experts · embedding, hidden]`
    downs: Matrices,
}

impl ExpertLayer {
    fn new(
        gpu: &Gpu,
        dtype: DType,
        counts: (usize, usize),
        (embedding, hidden): (usize, usize),
    ) -> Outcome<Self> {
        let gates = Matrices::new(gpu, dtype, (counts.0 * hidden, embedding))?;
        let downs = Matrices::new(gpu, dtype, (counts.0 * embedding, hidden))?;
        Ok(Self { counts, gates, downs })
    }

    fn routes(&self, gpu: &Gpu, tokens: usize, seed: usize) -> Outcome<ExpertRoutes> {
        let routes = ExpertRoutes::new(gpu, self.counts, tokens)?;
        let logits = gpu.alloc(tokens * self.counts.0 * F32)?;
        gpu.upload(&noise(tokens * self.counts.0, seed as u32), logits.span())?;
        let route = Route { logits: logits.span(), weight_scale: 1.0 };
        gpu.route(&route, Routed { routes: &routes, tokens })?;
        gpu.synchronize()?;
        Ok(routes)
    }

    /// Prints the row of a step of some tokens.
    fn measure(&self, gpu: &Gpu, tokens: usize) -> Outcome<()> {
        let ((n_experts, n_used), widest) =
            (self.counts, self.gates.shape.1.max(self.downs.shape.1));
        let pairs = tokens * n_used;
        let draws = (0..DRAWS).map(|seed| self.routes(gpu, tokens, seed));
        let draws = draws.collect::<Outcome<Vec<_>>>()?;
        let outs = [gpu.alloc(pairs * widest * F32)?, gpu.alloc(pairs * widest * F32)?];
        let quants = gpu.alloc(EightBits::quant_bytes(pairs, widest, 1))?;
        let scales = gpu.alloc(EightBits::scale_bytes(pairs, widest, 1))?;
        let halves = gpu.alloc(half_bytes(pairs, widest))?;
        let values = gpu.alloc(pairs * widest * F32)?;
        let is_wide = tokens > gpu.narrow_max();
        let eight_bits = EightBits { quants: quants.span(), scales: scales.span(), passes: 1 };
        let outs = [outs[0].span(), outs[1].span()];
        let measure = |matrices: &[DeviceMatrix], columns: usize| -> Outcome<(f64, f64)> {
            let x = Columns {
                columns,
                cols: matrices[0].cols(),
                values: Some(values.span()),
                eight_bits: (!is_wide).then_some(eight_bits),
                halves: is_wide.then_some(halves.span()),
            };
            let products = matrices.iter().zip(outs);
            let products = products.map(|(matrix, out)| ExpertProduct { matrix, out });
            let products: Vec<_> = products.collect();
            let us = time(gpu, DRAWS, || {
                draws.iter().try_for_each(|routes| {
                    gpu.multiply_experts(&products, &x, Routed { routes, tokens })
                })
            })?;
            // Of experts that have tokens, where all are as likely.
            let idle = (1.0 - n_used as f64 / n_experts as f64).powi(tokens as i32);
            let bytes = matrices.iter().map(DeviceMatrix::bytes).sum::<usize>() as f64;
            Ok((us, bytes * (1.0 - idle) / us / 1e3))
        };
        let (gate, gate_rate) = measure(&self.gates.all[..2], tokens)?;
        let (down, down_rate) = measure(&self.downs.all[..1], pairs)?;
        println!(
            "| {n_used} of {n_experts} | {} | {tokens} | {gate:.1} | {gate_rate:.0} | {down:.1} | \
             {down_rate:.0} |",
            self.gates.dtype
        );
        Ok(())
    }
}
