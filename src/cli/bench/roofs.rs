//! The roofs of a benchmark, measured before it on the device that it runs on.

use super::Bench;
use super::record::Roofs;
use anyhow::Result;
use tandem::hardware::{CpuId, roofs};
use tandem::memory::AlignedBytes;
use tandem::placement::Device;
use tandem_cpu_kernels::{Isa, Kernels};

/// Host memory that is read to measure its roof, if so much is free; at least so many times what
/// the caches of the third level hold.
const ROOF_BYTES: u64 = 1 << 30;
const ROOF_CACHES: u64 = 16;
const ROOF_MEMORY_DIVISOR: u64 = 4;

impl Bench<'_> {
    /// Both roofs for each number of threads; a GPU's are those of all. Of several GPUs it is the
    /// first one's: of a step one computes after the other.
    ///
    /// # Errors
    /// Memory, or a GPU, is not there.
    pub(super) fn roofs(&self) -> Result<Vec<Option<Roofs>>> {
        let counts = self.thread_counts.iter();
        if self.arguments.no_roof {
            return Ok(counts.map(|_| None).collect());
        }
        match self.placement.device() {
            Device::Gpu(index) => {
                let roofs = self.gpu_roofs(*index)?;
                Ok(counts.map(|_| Some(roofs.clone())).collect())
            }
            _ => counts.map(|threads| Ok(Some(self.cpu_roofs(*threads)?))).collect(),
        }
    }

    /// On the threads and processors of a stage and memory like that of its weights.
    fn cpu_roofs(&self, threads: usize) -> Result<Roofs> {
        let options = self.options(threads)?;
        let kernels = Kernels::for_isa(options.isa.unwrap_or_else(Isa::detect))?;
        let cpus = options.pool.cores.iter().map(|core| CpuId(*core as u32)).collect();
        let team = roofs::Team { threads, cpus };
        let free = self.hardware.memory_available_bytes / ROOF_MEMORY_DIVISOR;
        let caches = ROOF_CACHES * self.hardware.topology.cache_bytes(3);
        let bytes = ROOF_BYTES.max(caches).min(free).next_multiple_of(8) as usize;
        let mut memory = AlignedBytes::zeroed(bytes, options.huge_pages())?;
        let words = bytemuck::cast_slice_mut(&mut memory[..]);
        let plural = if threads == 1 { "" } else { "s" };
        self.told(Roofs {
            device: format!("{threads} thread{plural}"),
            read_bytes_per_second: roofs::read_bytes_per_second(&team, kernels, words),
            macs_per_second: roofs::macs_per_second(&team, kernels),
            numbers: kernels.mac_numbers(),
        })
    }

    fn gpu_roofs(&self, index: usize) -> Result<Roofs> {
        let measured = roofs::of_gpu(index)?;
        let mut gpus = self.hardware.gpus.devices.iter();
        let name = gpus.find(|gpu| gpu.ordinal == index).map_or("", |gpu| gpu.name.as_str());
        self.told(Roofs {
            device: format!("GPU {index} ({name})"),
            read_bytes_per_second: measured.read_bytes_per_second,
            macs_per_second: measured.macs_per_second,
            numbers: measured.numbers,
        })
    }

    fn told(&self, roofs: Roofs) -> Result<Roofs> {
        let (read, ops) = (roofs.read_bytes_per_second / 1e9, 2.0 * roofs.macs_per_second / 1e12);
        let Roofs { device, numbers, .. } = &roofs;
        self.output.notice(&format!(
            "roofs of {device}: memory {read:.1} GB/s, {numbers} {ops:.2} Top/s"
        ))?;
        Ok(roofs)
    }
}
