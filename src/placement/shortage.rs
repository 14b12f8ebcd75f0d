//! Memory that was free when a model was placed and is not there when the model comes.

use super::{Device, Placement, StagePlacement, gpu_absence};
use crate::config::{Config, GpuChoice};
use crate::hardware::{Gpus, HardwareProfile, MemoryHolder};
use crate::request::RequestError;
use std::fmt;
use std::path::Path;

/// What could not be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shortage {
    /// Index of the GPU whose memory it was to be; `None` for the host's.
    pub gpu: Option<usize>,
    /// Bytes asked for, if it was not the driver that needs them itself.
    pub need_bytes: Option<u64>,
    /// Bytes that were free then, if that is known.
    pub free_bytes: Option<u64>,
}

/// What of a model was in its place when memory ran short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Nothing is: what was loaded is gone again.
    Loading,
    /// The weights are.
    Starting,
}

impl Shortage {
    /// The GPU to look at for who has its memory.
    pub fn choice(&self) -> GpuChoice {
        self.gpu.map_or(GpuChoice::Off, |ordinal| GpuChoice::These(vec![ordinal]))
    }
}

impl fmt::Display for Shortage {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.gpu {
            Some(ordinal) => write!(formatter, "GPU {ordinal} has too little memory"),
            None => formatter.write_str("the host has too little memory"),
        }
    }
}

impl Placement {
    /// What a model is refused with that was placed like this and whose memory is not there any
    /// more: all that was still to come to that device, beside what is free on it now.
    pub fn refusal(
        &self,
        shortage: &Shortage,
        phase: Phase,
        (gpus, config): (&Gpus, &Config),
    ) -> RequestError {
        let Some(ordinal) = shortage.gpu else {
            return RequestError::InsufficientMemory {
                device: "host memory".into(),
                need: shortage.need_bytes.unwrap_or(0),
                free: HardwareProfile::read_memory(Path::new("/")).1,
                suggest: "end other programs, or use a smaller model, a shorter context or a \
                          smaller kv.swap_bytes"
                    .into(),
            };
        };
        let stage = self.stages.iter().find(|stage| stage.device == Device::Gpu(ordinal));
        let open = gpus.devices.iter().find(|gpu| gpu.ordinal == ordinal);
        let closed = gpus.closed.iter().find(|gpu| gpu.ordinal == ordinal);
        let in_place = |stage: &StagePlacement| match phase {
            Phase::Loading => 0,
            Phase::Starting => stage.weight_bytes,
        };
        let missing =
            stage.map(|stage| self.bytes_of(stage) - in_place(stage) + stage.margin_bytes);
        let (need, free) = match (missing, open.map(|gpu| gpu.memory_free_bytes)) {
            (Some(need), Some(free)) if need > free => (need, free),
            // Whoever had the rest has given it back meanwhile, or nobody tells.
            _ => {
                let of_driver = stage.map_or(0, |stage| stage.margin_bytes);
                (shortage.need_bytes.unwrap_or(of_driver), shortage.free_bytes.unwrap_or(0))
            }
        };
        let named = open.map(|gpu| (&gpu.name, &gpu.holders));
        let (name, holders) = match named.or(closed.map(|gpu| (&gpu.name, &gpu.holders))) {
            Some((name, holders)) => (format!(" ({name})"), holders.as_slice()),
            None => (String::new(), [].as_slice()),
        };
        RequestError::InsufficientMemory {
            device: format!("GPU {ordinal}{name}"),
            need,
            free,
            suggest: suggestion(holders, config),
        }
    }
}

fn suggestion(holders: &[MemoryHolder], config: &Config) -> String {
    let limit = match config.gpu.vram_limit.0 {
        0 => "a gpu.vram_limit",
        _ => "a smaller gpu.vram_limit",
    };
    format!(
        "there was room when the model was placed, so another process may have taken it: start \
         again, use {limit}, or the CPU (gpu.device = \"off\"){}",
        gpu_absence::held(holders)
    )
}
