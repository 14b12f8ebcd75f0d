//! Launches that are recorded once and then started all at once.

use crate::fate::OnGpu;
use crate::gpu::{Gpu, GpuError};
use cudarc::driver::{CudaGraph, sys};
use std::ptr::null_mut;

/// Recorded launches. They read and write the memory that they were recorded with, which has to
/// live as long: whoever records keeps both.
pub struct LaunchGraph {
    graph: OnGpu<CudaGraph>,
    launches: usize,
}

impl LaunchGraph {
    /// How many launches and copies were recorded.
    pub fn launches(&self) -> usize {
        self.launches
    }
}

impl Gpu {
    /// Records what `launch` starts instead of doing it. Nothing in it may allocate, copy from or
    /// to the host, or wait. None where what another thread asked of the driver spoilt the record,
    /// or there is no memory for one.
    ///
    /// # Errors
    /// What the driver refuses, or `launch` fails with.
    pub fn record<E: From<GpuError>>(
        &self,
        launch: impl FnOnce() -> Result<(), E>,
    ) -> Result<Option<LaunchGraph>, E> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.bound()?;
        let (_turn, stream) = (self.turn(), self.stream());
        stream.begin_capture(mode).map_err(|error| self.failed("recording", error))?;
        let launched = launch();
        let ended = stream.end_capture(sys::CUgraphInstantiate_flags(0));
        use sys::CUresult as Code;
        let none = [Code::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, Code::CUDA_ERROR_OUT_OF_MEMORY];
        if ended.as_ref().is_err_and(|error| none.contains(&error.0)) {
            return Ok(None);
        }
        launched?;
        let graph = ended.map_err(|error| self.failed("recording", error))?;
        let graph = graph.ok_or_else(|| GpuError::Failed {
            ordinal: self.ordinal(),
            what: "recording",
            reason: "nothing was recorded".into(),
        })?;
        // Now, and not when it is first started, which is nobody's turn.
        match graph.upload().map_err(|error| self.failed("recording", error)) {
            Err(GpuError::OutOfMemory { .. }) => return Ok(None),
            uploaded => uploaded?,
        }
        let mut launches = 0;
        // SAFETY: the graph lives; without a list to fill the call counts its nodes.
        let counted =
            unsafe { sys::cuGraphGetNodes(graph.cu_graph(), null_mut(), &raw mut launches) };
        counted.result().map_err(|error| self.failed("recording", error))?;
        Ok(Some(LaunchGraph { graph: OnGpu::new(graph, self), launches }))
    }

    /// Starts recorded launches.
    ///
    /// # Safety
    /// All memory that was spanned when they were recorded is still there, and used for nothing
    /// else.
    ///
    /// # Errors
    /// What the driver refuses.
    pub unsafe fn replay(&self, graph: &LaunchGraph) -> Result<(), GpuError> {
        self.bound()?;
        graph.graph.launch().map_err(|error| self.failed("starting recorded launches", error))
    }
}
