//! Keeps what was measured of a machine in a file, and knows when it holds no longer.

use super::measured::Measured;
use super::{CpuId, HardwareProfile};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::Result;
use std::path::{Path, PathBuf};
use tandem_cpu_kernels::Isa;
use tandem_kernels::driver;

/// What the figures depend on: where any of it is another, they are measured again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// What the processor calls itself.
    pub cpu: String,
    /// Processors that this process may run on.
    pub processors: Vec<u32>,
    /// Thousandths of a processor's time that the control group grants: a whole number is the same
    /// after it was written and read.
    pub cpu_quota_thousandths: Option<u64>,
    /// Compute workers.
    pub workers: usize,
    /// Their processors, where there are several NUMA nodes to have them from.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub worker_processors: Vec<u32>,
    /// Whose kernels they run.
    pub isa: String,
    /// Host memory that this process may use.
    pub memory_total_bytes: u64,
    /// Names of the GPUs; none where nobody has asked for them.
    pub gpus: Option<Vec<String>>,
    /// The CUDA version of the driver, where somebody has asked.
    pub driver: Option<String>,
    /// Tandem's own.
    pub version: String,
    /// Which figures are measured.
    #[serde(default)]
    pub figures: u32,
}

/// Counts up with each change of what is measured, or how.
const FIGURES: u32 = 3;

impl Fingerprint {
    /// That of this machine with so many compute workers, on these processors if they are pinned,
    /// that run the kernels of `isa`.
    pub fn of(hardware: &HardwareProfile, (workers, cpus): (usize, &[CpuId]), isa: Isa) -> Self {
        let gpus = hardware.gpus.names();
        let quota = hardware.topology.cpu_quota;
        Self {
            cpu: HardwareProfile::cpu_name().unwrap_or_default(),
            processors: hardware.topology.usable_cpus().map(|cpu| cpu.id.0).collect(),
            cpu_quota_thousandths: quota.map(|quota| (quota * 1000.0).round() as u64),
            workers,
            worker_processors: if hardware.topology.numa_nodes.len() > 1 {
                cpus.iter().map(|cpu| cpu.0).collect()
            } else {
                Vec::new()
            },
            isa: isa.to_string(),
            memory_total_bytes: hardware.memory_total_bytes,
            driver: gpus.as_ref().and_then(|_| Some(driver().ok()?.version().to_string())),
            gpus,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            figures: FIGURES,
        }
    }

    /// Whether what was measured of `kept` is right here. Where no GPU is wanted, none counts.
    fn holds(&self, kept: &Fingerprint) -> bool {
        let mut kept = kept.clone();
        if self.gpus.is_none() {
            (kept.gpus, kept.driver) = (None, None);
        }
        *self == kept
    }
}

#[derive(Serialize, Deserialize)]
struct Kept {
    fingerprint: Fingerprint,
    measured: Measured,
}

/// The file of this machine in a folder: several machines may share that.
pub fn probe_file(folder: &Path) -> PathBuf {
    let name = rustix::system::uname();
    let name = name.nodename().to_string_lossy();
    let plain = |c: char| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' };
    folder.join(format!("probe-{}.json", name.chars().map(plain).collect::<String>()))
}

/// What was measured of the machine with this fingerprint; `None` where that is not kept, or holds
/// no longer.
pub fn load_measured(file: &Path, fingerprint: &Fingerprint) -> Option<Measured> {
    let kept: Kept = serde_json::from_slice(&fs::read(file).ok()?).ok()?;
    fingerprint.holds(&kept.fingerprint).then_some(kept.measured)
}

/// Keeps it, in one go: a reader sees the old file or the new one.
///
/// # Errors
/// The folder can't be made or written to.
pub fn store_measured(file: &Path, fingerprint: &Fingerprint, measured: &Measured) -> Result<()> {
    if let Some(folder) = file.parent() {
        fs::create_dir_all(folder)?;
    }
    let kept = Kept { fingerprint: fingerprint.clone(), measured: measured.clone() };
    let unfinished = file.with_extension(format!("{}.new", std::process::id()));
    fs::write(&unfinished, serde_json::to_vec_pretty(&kept)?)?;
    fs::rename(&unfinished, file)
}
