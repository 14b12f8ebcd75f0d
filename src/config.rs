//! Every knob as a typed value. The defaults are `config/default.toml`, which is compiled in and is
//! the only place where a default stands. Reads no file and no environment: the command line does.

mod cpu;
mod gpu;
mod speculative;

use crate::tensor::KvDType;
use crate::units::ByteSize;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

pub use cpu::NumaChoice;
pub use gpu::GpuChoice;
pub use speculative::{DRAFT_MAX, SpeculativeConfig, SpeculativeMethod};

/// The compiled-in defaults, with a comment per knob.
pub const DEFAULT_TOML: &str = include_str!("../config/default.toml");

/// The whole configuration. Field by field documented in `config/default.toml`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "config/default.toml documents every field")]
pub struct Config {
    pub model: ModelConfig,
    pub cpu: CpuConfig,
    pub gpu: GpuConfig,
    pub placement: PlacementConfig,
    pub kv: KvConfig,
    pub scheduler: SchedulerConfig,
    pub speculative: SpeculativeConfig,
    pub stream: StreamConfig,
    pub tokenizer: TokenizerConfig,
    pub template: TemplateConfig,
    pub supervision: SupervisionConfig,
    pub server: ServerConfig,
    pub log: LogConfig,
}

/// Section `[model]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "config/default.toml documents every field")]
pub struct ModelConfig {
    pub path: PathBuf,
    pub context_tokens: usize,
    pub alias: String,
}

impl ModelConfig {
    /// The name that clients use: the alias, else the file's name without its ending. A Hugging
    /// Face folder is its model's name: files of weights are all called alike.
    pub fn name(&self) -> String {
        if !self.alias.is_empty() {
            return self.alias.clone();
        }
        let is_weights = self.path.extension().is_some_and(|ending| ending == "safetensors");
        // Of `.` and the like only the whole path has a name.
        let whole = self.path.canonicalize().ok();
        let folder = match &whole {
            Some(path) if path.is_dir() => Some(path.as_path()),
            Some(path) if is_weights => path.parent(),
            _ => None,
        };
        let name = match folder {
            Some(folder) => folder.file_name(),
            None => self.path.file_stem(),
        };
        name.unwrap_or_default().to_string_lossy().into_owned()
    }
}

/// Section `[cpu]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "config/default.toml documents every field")]
pub struct CpuConfig {
    pub threads: usize,
    pub pin: bool,
    pub numa: String,
    pub isa: String,
    pub spin_us: u64,
    pub huge_pages: bool,
}

/// Section `[gpu]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "config/default.toml documents every field")]
pub struct GpuConfig {
    pub device: String,
    pub vram_limit: ByteSize,
    pub peer_copies: bool,
    pub spill: bool,
    pub spill_streamed: String,
    pub step_timeout_ms: u64,
}

/// Section `[placement]`: the requests that a placement is made for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "config/default.toml documents every field")]
pub struct PlacementConfig {
    pub streams: usize,
    pub prompt_tokens: usize,
    pub generated_tokens: usize,
}

/// Section `[kv]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "config/default.toml documents every field")]
pub struct KvConfig {
    pub block_tokens: usize,
    #[serde(with = "kv_dtype")]
    pub dtype: KvDType,
    pub cache_bytes: ByteSize,
    pub swap_bytes: ByteSize,
    pub disk_bytes: ByteSize,
    pub disk_folder: PathBuf,
    pub prefix_cache: bool,
}

/// Section `[scheduler]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "config/default.toml documents every field")]
pub struct SchedulerConfig {
    pub step_tokens_max: usize,
    pub sequences_max: usize,
    pub queue_max: usize,
    pub prefill_slowdown_max: f64,
    pub prefill_tokens_min: usize,
}

impl SchedulerConfig {
    /// The ranges of what steps may be.
    fn validate_steps(&self) -> Result<(), ConfigError> {
        let Self { step_tokens_max: tokens, prefill_slowdown_max: slowdown, .. } = *self;
        if !matches!(tokens, 0 | 8..=65_535) {
            return Err(refuse("scheduler.step_tokens_max", tokens, "0, or 8 to 65535".into()));
        }
        if !(1.0..=100.0).contains(&slowdown) {
            return Err(refuse("scheduler.prefill_slowdown_max", slowdown, "1 to 100".into()));
        }
        Ok(())
    }
}

/// Section `[stream]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "config/default.toml documents every field")]
pub struct StreamConfig {
    pub window_bytes: ByteSize,
    pub slow_consumer_ms: u64,
}

/// Section `[tokenizer]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "config/default.toml documents every field")]
pub struct TokenizerConfig {
    pub workers: usize,
    pub queue_max: usize,
}

/// Section `[template]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "config/default.toml documents every field")]
pub struct TemplateConfig {
    pub fuel: u64,
    pub output_bytes_max: ByteSize,
}

/// Section `[supervision]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "config/default.toml documents every field")]
pub struct SupervisionConfig {
    pub restarts_max: u32,
    pub restart_window_ms: u64,
    pub crashes_per_request_max: u32,
}

/// Section `[server]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "config/default.toml documents every field")]
pub struct ServerConfig {
    pub socket: PathBuf,
    pub frame_bytes_max: ByteSize,
    pub json_depth_max: usize,
    pub connections_max: usize,
    pub requests_per_connection_max: usize,
    pub drain_ms: u64,
}

/// Section `[log]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "config/default.toml documents every field")]
pub struct LogConfig {
    pub level: String,
    pub format: String,
}

impl Default for Config {
    fn default() -> Self {
        toml::from_str(DEFAULT_TOML).expect("config/default.toml is compiled in and tested")
    }
}

/// A knob outside its range.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("configuration: {field} is {got}; allowed: {allowed}")]
pub struct ConfigError {
    /// Dotted path of the knob.
    pub field: String,
    /// The value that came.
    pub got: String,
    /// What is allowed.
    pub allowed: String,
}

impl Config {
    /// Checks every range, once, before anything is built from it.
    ///
    /// # Errors
    /// The first knob that is out of range.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let counts: [(&str, usize, usize, usize); 15] = [
            ("cpu.threads", self.cpu.threads, 0, 1024),
            ("kv.block_tokens", self.kv.block_tokens, 16, 256),
            ("placement.streams", self.placement.streams, 1, 4096),
            ("placement.prompt_tokens", self.placement.prompt_tokens, 1, 10_000_000),
            ("placement.generated_tokens", self.placement.generated_tokens, 1, 10_000_000),
            ("scheduler.sequences_max", self.scheduler.sequences_max, 1, 4096),
            ("scheduler.queue_max", self.scheduler.queue_max, 1, 1_000_000),
            ("scheduler.prefill_tokens_min", self.scheduler.prefill_tokens_min, 1, 4096),
            ("tokenizer.workers", self.tokenizer.workers, 1, 64),
            ("tokenizer.queue_max", self.tokenizer.queue_max, 1, 65_536),
            ("stream.window_bytes", self.stream.window_bytes.0 as usize, 4096, 1 << 30),
            ("server.frame_bytes_max", self.server.frame_bytes_max.0 as usize, 4096, 1 << 30),
            ("server.json_depth_max", self.server.json_depth_max, 8, 127),
            ("server.connections_max", self.server.connections_max, 1, 65_536),
            (
                "server.requests_per_connection_max",
                self.server.requests_per_connection_max,
                1,
                65_536,
            ),
        ];
        for (field, got, low, high) in counts {
            if !(low..=high).contains(&got) {
                return Err(refuse(field, got, format!("{low} to {high}")));
            }
        }
        if !self.kv.block_tokens.is_power_of_two() {
            return Err(refuse("kv.block_tokens", self.kv.block_tokens, "a power of two".into()));
        }
        self.scheduler.validate_steps()?;
        self.speculative.method()?;
        self.validate_times()?;
        self.cpu.numa_choice()?;
        self.gpu.choice()?;
        self.gpu.streamed_percent()?;
        if self.kv.disk_bytes.0 > DISK_BYTES_MAX {
            return Err(refuse("kv.disk_bytes", self.kv.disk_bytes, "up to 1 PiB".into()));
        }
        let words: [(&str, &str, &[&str]); 2] = [
            (
                "cpu.isa",
                &self.cpu.isa,
                &["auto", "scalar", "avx2", "avxvnni", "avx512", "avx512vnni", "amx"],
            ),
            ("log.format", &self.log.format, &["text", "json"]),
        ];
        for (field, got, allowed) in words {
            if !allowed.contains(&got) {
                return Err(refuse(field, got, allowed.join(", ")));
            }
        }
        Ok(())
    }

    /// The ranges of times and of what templates and crashes may take.
    fn validate_times(&self) -> Result<(), ConfigError> {
        let (template, supervision) = (&self.template, &self.supervision);
        let counts: [(&str, u64, u64, u64); 9] = [
            ("cpu.spin_us", self.cpu.spin_us, 0, 1_000_000),
            ("gpu.step_timeout_ms", self.gpu.step_timeout_ms, 100, WEEK_MS),
            ("stream.slow_consumer_ms", self.stream.slow_consumer_ms, 1, WEEK_MS),
            ("template.fuel", template.fuel, 1, 1_000_000_000_000),
            ("template.output_bytes_max", template.output_bytes_max.0, 1, 1 << 30),
            ("supervision.restarts_max", supervision.restarts_max.into(), 0, 1000),
            ("supervision.restart_window_ms", supervision.restart_window_ms, 1, WEEK_MS),
            (
                "supervision.crashes_per_request_max",
                supervision.crashes_per_request_max.into(),
                1,
                1000,
            ),
            ("server.drain_ms", self.server.drain_ms, 0, WEEK_MS),
        ];
        for (field, got, low, high) in counts {
            if !(low..=high).contains(&got) {
                return Err(refuse(field, got, format!("{low} to {high}")));
            }
        }
        Ok(())
    }
}

/// [`KvDType`] by its name.
pub(crate) mod kv_dtype {
    use crate::tensor::KvDType;
    use serde::de::{Deserialize, Deserializer, Error};
    use serde::ser::Serializer;

    pub(crate) fn serialize<S: Serializer>(dtype: &KvDType, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(dtype.name())
    }

    pub(super) fn deserialize<'a, D: Deserializer<'a>>(from: D) -> Result<KvDType, D::Error> {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}
/// Largest disk tier: numbers of blocks stay far below what their ids hold.
const DISK_BYTES_MAX: u64 = 1 << 50;
/// Longest time that can be set.
const WEEK_MS: u64 = 7 * 24 * 3_600_000;

fn refuse(field: &str, got: impl ToString, allowed: String) -> ConfigError {
    ConfigError { field: field.to_owned(), got: got.to_string(), allowed }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compiled_in_defaults_parse_and_validate() {
        Config::default().validate().unwrap();
    }

    #[test]
    fn a_knob_out_of_range_is_named() {
        let mut config = Config::default();
        config.kv.block_tokens = 48;
        assert_eq!(config.validate().unwrap_err().field, "kv.block_tokens");
        let mut config = Config::default();
        config.cpu.isa = "bogus".into();
        assert_eq!(config.validate().unwrap_err().field, "cpu.isa");
        let mut config = Config::default();
        config.cpu.numa = "distribute".into();
        let refused = config.validate().unwrap_err().to_string();
        assert_eq!(refused, "configuration: cpu.numa is distribute; allowed: auto, off, isolate");
        let mut config = Config::default();
        config.gpu.device = "first".into();
        assert_eq!(config.validate().unwrap_err().field, "gpu.device");
        let mut config = Config::default();
        for percent in ["101", "-1", "most"] {
            config.gpu.spill_streamed = percent.into();
            assert_eq!(config.validate().unwrap_err().field, "gpu.spill_streamed");
        }
        config.gpu.spill_streamed = "50".into();
        assert_eq!(config.gpu.streamed_percent(), Ok(Some(50)));
        config.gpu.step_timeout_ms = 99;
        assert_eq!(config.validate().unwrap_err().field, "gpu.step_timeout_ms");
        let mut config = Config::default();
        config.kv.disk_bytes = ByteSize(u64::MAX);
        assert_eq!(config.validate().unwrap_err().field, "kv.disk_bytes");
        let mut config = Config::default();
        config.template.fuel = 0;
        assert_eq!(config.validate().unwrap_err().field, "template.fuel");
        let mut config = Config::default();
        config.server.drain_ms = u64::MAX;
        assert_eq!(config.validate().unwrap_err().field, "server.drain_ms");
    }
}
