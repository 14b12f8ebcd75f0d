//! What the section `[gpu]` asks for.

use super::{ConfigError, GpuConfig, refuse};
use tandem_kernels::PeerCopies;

impl GpuConfig {
    /// Which GPUs are asked for.
    ///
    /// # Errors
    /// Another word than `off`, `auto` and `all` that is no list of indices, or names one twice.
    pub fn choice(&self) -> Result<GpuChoice, ConfigError> {
        match self.device.as_str() {
            "off" => Ok(GpuChoice::Off),
            "auto" => Ok(GpuChoice::Auto),
            "all" => Ok(GpuChoice::All),
            list => {
                let indices = list.split(',').map(|index| index.trim().parse());
                let indices = indices.collect::<Result<Vec<usize>, _>>().unwrap_or_default();
                let is_named_twice =
                    |(at, index): (usize, &usize)| indices[..at].iter().any(|other| other == index);
                if indices.is_empty() || indices.iter().enumerate().any(is_named_twice) {
                    return Err(refuse("gpu.device", list, GpuChoice::ALLOWED.into()));
                }
                Ok(GpuChoice::These(indices))
            }
        }
    }

    /// What activations may take on their way from GPU to GPU.
    pub fn copies(&self) -> PeerCopies {
        if self.peer_copies { PeerCopies::Allowed } else { PeerCopies::Off }
    }

    /// Percent of the spilled networks whose weights stream to the GPU where the CPU could compute
    /// them; none where that is to be measured.
    ///
    /// # Errors
    /// Another word than `auto` that is no number up to 100.
    pub fn streamed_percent(&self) -> Result<Option<u8>, ConfigError> {
        let got = self.spill_streamed.as_str();
        match got.parse::<u8>() {
            _ if got == "auto" => Ok(None),
            Ok(percent) if percent <= 100 => Ok(Some(percent)),
            _ => Err(refuse("gpu.spill_streamed", got, "auto, or 0 to 100".into())),
        }
    }
}

/// Which GPUs are asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GpuChoice {
    /// None.
    Off,
    /// As few as hold the model, if there are some that can run it.
    Auto,
    /// All that there are.
    All,
    /// These, in the order of the layers that they get.
    These(Vec<usize>),
}

impl GpuChoice {
    const ALLOWED: &str = "off, auto, all, or indices of GPUs, each once, such as 0 or 0,1";
}
