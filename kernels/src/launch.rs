//! How kernels are found and started.

use crate::gpu::{ANY_KERNEL, Gpu, GpuError};
use crate::pack::DeviceMatrix;
use cudarc::driver::{CudaFunction, DeviceRepr, sys};
use std::sync::PoisonError;
use sys::CUlaunchAttributeID as Id;

/// First `__CUDA_ARCH__`, over ten, whose kernels can wait for the one before them.
const OVERLAPS_SINCE: i32 = 90;
/// First that has clusters of blocks, most blocks of one, and fewest chunks of a row for each of
/// those that divide it.
const CLUSTERS_SINCE: usize = 90;
const CLUSTER_MAX: usize = 8;
const CLUSTER_CHUNKS_MIN: usize = 4;

/// What a launch has besides its shape.
#[derive(Clone, Copy)]
pub(crate) struct Manner {
    /// Blocks next to each other in x that read each other's shared memory.
    pub cluster: usize,
    /// Whether it must not start before all kernels ahead are done: it asks early for what they
    /// write.
    pub is_behind: bool,
}

impl Manner {
    /// Of a product with some matrices, which kernels ask for before those ahead are done.
    pub(crate) fn of_product<'a>(matrices: impl IntoIterator<Item = &'a DeviceMatrix>) -> Manner {
        let is_behind = matrices.into_iter().any(DeviceMatrix::is_changing);
        Manner { cluster: 1, is_behind }
    }

    /// The same with clusters of blocks.
    pub(crate) fn in_clusters(self, cluster: usize) -> Manner {
        Manner { cluster, ..self }
    }
}

impl Gpu {
    /// Most blocks of a cluster; 1 where there are none.
    pub(crate) fn cluster_max(&self) -> usize {
        if self.compiled_for() >= CLUSTERS_SINCE { CLUSTER_MAX } else { 1 }
    }

    /// Blocks of a cluster that divide rows of so many chunks: as many as are wanted, while each
    /// has enough. `may_double` says whether twice as many as so many are.
    pub(crate) fn row_cluster(&self, chunks: usize, may_double: impl Fn(usize) -> bool) -> usize {
        let mut cluster = 1;
        while 2 * cluster <= self.cluster_max()
            && chunks >= 2 * cluster * CLUSTER_CHUNKS_MIN
            && may_double(cluster)
        {
            cluster *= 2;
        }
        cluster
    }

    /// Starts a kernel with one struct as its argument.
    ///
    /// # Safety
    /// `A` is what the kernel takes, and what it points to is large enough for the grid.
    pub(crate) unsafe fn launch<A: DeviceRepr>(
        &self,
        kernel: &str,
        shape: ([usize; 3], usize, usize),
        arguments: &A,
    ) -> Result<(), GpuError> {
        let manner = Manner { cluster: 1, is_behind: false };
        // SAFETY: as the caller promises.
        unsafe { self.launch_as(kernel, shape, manner, arguments) }
    }

    /// The same in some manner.
    ///
    /// # Safety
    /// As of [`Gpu::launch`].
    pub(crate) unsafe fn launch_as<A: DeviceRepr>(
        &self,
        kernel: &str,
        (grid, threads, shared_bytes): ([usize; 3], usize, usize),
        Manner { cluster, is_behind }: Manner,
        arguments: &A,
    ) -> Result<(), GpuError> {
        if grid.contains(&0) {
            return Ok(());
        }
        let (function, can_overlap) = self.function(kernel)?;
        let overlaps = can_overlap && !is_behind;
        let [x, y, z] = grid.map(|size| u32::try_from(size).unwrap_or(u32::MAX));
        let mut attributes = [
            sys::CUlaunchAttribute {
                id: Id::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
                pad: [0; 4],
                value: sys::CUlaunchAttributeValue {
                    programmaticStreamSerializationAllowed: i32::from(overlaps),
                },
            },
            sys::CUlaunchAttribute {
                id: Id::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
                pad: [0; 4],
                value: sys::CUlaunchAttributeValue {
                    clusterDim: sys::CUlaunchAttributeValue_union__bindgen_ty_1 {
                        x: cluster as u32,
                        y: 1,
                        z: 1,
                    },
                },
            },
        ];
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: threads as u32,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared_bytes as u32,
            hStream: self.stream().cu_stream(),
            attrs: attributes.as_mut_ptr(),
            // Older GPUs know neither.
            numAttrs: if cluster > 1 { 2 } else { u32::from(overlaps) },
        };
        self.bound()?;
        let mut pointers = [std::ptr::from_ref(arguments).cast_mut().cast::<std::ffi::c_void>()];
        // SAFETY: the kernel takes one argument, which the driver copies; the rest is passed on.
        let started = unsafe {
            let (function, none) = (function.cu_function(), std::ptr::null_mut());
            sys::cuLaunchKernelEx(&raw const config, function, pointers.as_mut_ptr(), none)
        };
        started.result().map_err(|error| self.failed("starting a kernel", error))
    }

    /// Loads all kernels now. Otherwise each is loaded where it is first started, for which the
    /// driver may wait for all that runs: where something that runs waits for what is started after
    /// it, this comes first.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn load_kernels(&self) -> Result<(), GpuError> {
        // What was freed may be theirs. It comes first: a kernel that could not be loaded once
        // fails when it is started, even where the driver has loaded it later.
        self.give_back_freed()?;
        let _turn = self.turn();
        let (any, _) = self.function(ANY_KERNEL)?;
        let (mut module, mut count) = (std::ptr::null_mut(), 0);
        // SAFETY: the function is loaded, so its module is; both results are written.
        unsafe {
            sys::cuFuncGetModule(&raw mut module, any.cu_function())
                .result()
                .and_then(|()| sys::cuModuleGetFunctionCount(&raw mut count, module).result())
        }
        .map_err(|error| self.failed("counting its kernels", error))?;
        let mut functions = vec![std::ptr::null_mut(); count as usize];
        // SAFETY: there is room for as many functions as the module has.
        unsafe { sys::cuModuleEnumerateFunctions(functions.as_mut_ptr(), count, module) }
            .result()
            .map_err(|error| self.failed("finding its kernels", error))?;
        functions.into_iter().try_for_each(|function| {
            // SAFETY: the function is one of the module.
            unsafe { sys::cuFuncLoad(function) }
                .result()
                .map_err(|error| self.failed("loading its kernels", error))
        })
    }

    /// A kernel, and whether it may start while the one before it works: whether what the driver
    /// runs was compiled for a GPU that can wait for that (`launch.cuh`).
    fn function(&self, kernel: &str) -> Result<(CudaFunction, bool), GpuError> {
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = functions.get(kernel) {
            return Ok(function.clone());
        }
        let _turn = self.turn();
        let function = self.module.load_function(kernel);
        let function = function.map_err(|error| self.failed("finding a kernel", error))?;
        let wanted =
            sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let attribute = |which| {
            function.get_attribute(which).map_err(|error| self.failed("what a kernel has", error))
        };
        use sys::CUfunction_attribute_enum as Attribute;
        let fixed = attribute(Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?;
        let overlaps = attribute(Attribute::CU_FUNC_ATTRIBUTE_PTX_VERSION)? >= OVERLAPS_SINCE;
        function
            .set_attribute(wanted, self.shared_bytes() as i32 - fixed)
            .map_err(|error| self.failed("giving a kernel shared memory", error))?;
        // Now, and not when it is first started, which is nobody's turn.
        // SAFETY: the function is one of the module's.
        unsafe { sys::cuFuncLoad(function.cu_function()) }
            .result()
            .map_err(|error| self.failed("loading a kernel", error))?;
        functions.insert(kernel.to_owned(), (function.clone(), overlaps));
        Ok((function, overlaps))
    }
}
