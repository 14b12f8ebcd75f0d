//! What the section `[cpu]` asks for.

use super::{ConfigError, CpuConfig, refuse};

impl CpuConfig {
    /// What is asked for where the machine has several NUMA nodes.
    ///
    /// # Errors
    /// Another word than `auto`, `off` and `isolate`.
    pub fn numa_choice(&self) -> Result<NumaChoice, ConfigError> {
        match self.numa.as_str() {
            "auto" => Ok(NumaChoice::Auto),
            "off" => Ok(NumaChoice::Off),
            "isolate" => Ok(NumaChoice::Isolate),
            other => Err(refuse("cpu.numa", other, "auto, off, isolate".into())),
        }
    }
}

/// What several NUMA nodes are used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NumaChoice {
    /// Workers and memory of all of them, each worker with weights that are near.
    Auto,
    /// As if there was one: memory is left to the system.
    Off,
    /// Workers of one of them alone.
    Isolate,
}
