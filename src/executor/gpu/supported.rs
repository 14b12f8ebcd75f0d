//! Which programs there are kernels for.

use super::ops::counts;
use crate::executor::ExecutorError;
use crate::executor::program::{ExpertShape, MatrixEntry, MatrixUse, Op, Program};
use crate::model::TensorRef;
use tandem_cpu_kernels::blocks::GROUP;
use tandem_kernels::{DeviceMatrix, ExpertRoutes, Gpu};

/// Refuses programs that have no kernels here.
///
/// # Errors
/// What there is none for.
pub(super) fn check(program: &Program) -> Result<(), ExecutorError> {
    let refuse = |what: String| Err(ExecutorError::Unsupported { what });
    for op in &program.ops {
        match op {
            Op::Route { shape: ExpertShape { n_experts, n_used }, .. } => {
                let (most, most_used) = (ExpertRoutes::EXPERTS_MAX, ExpertRoutes::USED_MAX);
                if *n_experts > most || *n_used > most_used {
                    return refuse(format!("{n_used} of {n_experts} experts on a GPU"));
                }
            }
            Op::Attend { shape, .. } if !counts(*shape).is_supported() => {
                return refuse(format!("heads of {} elements on a GPU", shape.head_dim));
            }
            _ => {}
        }
    }
    for MatrixEntry { tensor, used_for, .. } in &program.matrices {
        let TensorRef { name, dtype, rows, cols } = tensor;
        let unit = if dtype.is_quantized() { GROUP } else { 8 };
        if !cols.is_multiple_of(unit) {
            return refuse(format!("{name} with rows of {cols} elements on a GPU"));
        }
        if let MatrixUse::Experts(shape) = used_for
            && !DeviceMatrix::supports_experts(*dtype, rows / shape.n_experts)
        {
            let rows = rows / shape.n_experts;
            return refuse(format!("{name} of {dtype} with experts of {rows} rows on a GPU"));
        }
    }
    if program.dims.embedding > Gpu::NORM_COLS_MAX {
        return refuse(format!("a residual stream of {} on a GPU", program.dims.embedding));
    }
    Ok(())
}
