//! One result with everything that it depends on, under llama-bench's field names and ours.

use super::arguments::Test;
use super::work::Work;
use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::{Value, json};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tandem::executor::OpTime;
use tandem::placement::Spill;
use tandem::tensor::KvDType;

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// What is the same for all tests of one run.
#[derive(Clone, Debug)]
pub struct Setting {
    pub cpu: String,
    pub gpu: String,
    /// `CPU` or `CUDA`.
    pub backend: &'static str,
    /// How the time of ops is measured.
    pub op_clock: &'static str,
    pub gpu_layers: usize,
    pub file: String,
    /// Such as `llama 8B Q4_0`.
    pub model: String,
    pub weight_bytes: u64,
    pub parameters: u64,
    pub step_tokens_max: usize,
    pub threads: usize,
    pub pinned: usize,
    pub isa: &'static str,
    pub block_tokens: usize,
    pub kv_dtype: KvDType,
    /// Weights in host memory, where a GPU runs a model that it does not hold.
    pub spill: Option<Spill>,
    /// Bytes of weights on the device that computes.
    pub device_weight_bytes: u64,
    pub load: Duration,
    pub roofs: Option<Roofs>,
}

/// What a device can do at most.
#[derive(Clone, Debug)]
pub struct Roofs {
    /// Such as `16 threads` or `GPU 0 (NVIDIA H200)`.
    pub device: String,
    /// Bytes per second read from memory.
    pub read_bytes_per_second: f64,
    /// Multiply-accumulates per second.
    pub macs_per_second: f64,
    /// Of which numbers, and on a GPU with which instructions.
    pub numbers: &'static str,
}

/// A measured test.
#[derive(Clone, Debug)]
pub struct Record {
    pub setting: Setting,
    pub test: Test,
    pub ended: SystemTime,
    pub samples: Vec<Duration>,
    pub work: Work,
    /// How long it should have taken, by what was measured of the machine.
    pub predicted: Option<Duration>,
    pub ops: OpSplit,
}

/// Where the time of one further run went.
#[derive(Clone, Debug, Default)]
pub struct OpSplit {
    /// Steps of that run; 0 if there was none.
    pub steps: u64,
    /// Sums over the steps.
    pub times: Vec<OpTime>,
}

/// Mean and standard deviation of a sample (over n − 1).
fn mean_and_deviation(samples: &[f64]) -> (f64, f64) {
    let count = samples.len() as f64;
    let mean = samples.iter().sum::<f64>() / count;
    let squares: f64 = samples.iter().map(|sample| (sample - mean).powi(2)).sum();
    (mean, if samples.len() > 1 { (squares / (count - 1.0)).sqrt() } else { 0.0 })
}

impl Record {
    fn samples_ns(&self) -> Vec<f64> {
        self.samples.iter().map(|sample| sample.as_nanos() as f64).collect()
    }

    fn samples_ts(&self) -> Vec<f64> {
        let tokens = self.test.tokens() as f64;
        self.samples.iter().map(|sample| tokens / sample.as_secs_f64()).collect()
    }

    /// Tokens per second of all streams together: mean and standard deviation.
    pub fn tokens_per_second(&self) -> (f64, f64) {
        mean_and_deviation(&self.samples_ts())
    }

    /// Percent of the memory roof and of the arithmetic roof.
    pub fn roof_percents(&self) -> Option<[f64; 2]> {
        let roofs = self.setting.roofs.as_ref()?;
        let seconds = mean_and_deviation(&self.samples_ns()).0 / 1e9;
        let percent = |work: f64, roof: f64| 100.0 * work / seconds / roof;
        Some([
            percent(self.work.read_bytes, roofs.read_bytes_per_second),
            percent(self.work.macs, roofs.macs_per_second),
        ])
    }

    /// All fields, llama-bench's first and in its order.
    pub fn fields(&self) -> Vec<(&'static str, Value)> {
        let mut fields = self.setting.fields();
        let Test { prompt, generated, depth, streams } = self.test;
        let (avg_ns, stddev_ns) = mean_and_deviation(&self.samples_ns());
        let (avg_ts, stddev_ts) = self.tokens_per_second();
        fields.extend([
            ("n_prompt", json!(prompt)),
            ("n_gen", json!(generated)),
            ("n_depth", json!(depth)),
            ("test_time", json!(iso_8601(self.ended))),
            ("avg_ns", json!(avg_ns.round() as u64)),
            ("stddev_ns", json!(stddev_ns.round() as u64)),
            ("avg_ts", json!(avg_ts)),
            ("stddev_ts", json!(stddev_ts)),
            ("n_parallel", json!(streams)),
            ("n_tokens", json!(self.test.tokens())),
        ]);
        let roofs = self.setting.roofs.as_ref();
        let percents = self.roof_percents();
        fields.extend([
            ("read_bytes", json!(self.work.read_bytes)),
            ("roof_read_bytes_per_s", json!(roofs.map(|roofs| roofs.read_bytes_per_second))),
            ("roof_read_percent", json!(percents.map(|[read, _]| read))),
            ("matmul_ops", json!(2.0 * self.work.macs)),
            ("roof_matmul_ops_per_s", json!(roofs.map(|roofs| 2.0 * roofs.macs_per_second))),
            ("roof_matmul_percent", json!(percents.map(|[_, matmul]| matmul))),
            ("roof_matmul_numbers", json!(roofs.map(|roofs| roofs.numbers))),
            ("roof_device", json!(roofs.map(|roofs| roofs.device.as_str()))),
        ]);
        let tokens = self.test.tokens() as f64;
        let predicted_ts = self.predicted.map(|predicted| tokens / predicted.as_secs_f64());
        fields.push(("predicted_ts", json!(predicted_ts)));
        fields
    }

    /// The repetitions and the time of each op, which have no place in a table.
    fn lists(&self) -> [(&'static str, Value); 5] {
        let op = |time: &OpTime| {
            let OpTime { op, work_ns, wait_ns } = time;
            json!({ "op": op, "work_ns": work_ns, "wait_ns": wait_ns })
        };
        let samples_ns = self.samples.iter().map(|sample| sample.as_nanos() as u64);
        [
            ("samples_ns", samples_ns.collect()),
            ("samples_ts", json!(self.samples_ts())),
            ("ops_steps", json!(self.ops.steps)),
            ("ops_clock", json!(self.setting.op_clock)),
            ("ops", self.ops.times.iter().map(op).collect()),
        ]
    }
}

impl Setting {
    fn fields(&self) -> Vec<(&'static str, Value)> {
        let spill = self.spill.as_ref();
        let attention = spill.map_or(0, |spill| spill.attention_layers.len());
        vec![
            // A release build names its commit.
            ("build_commit", json!(option_env!("TANDEM_BUILD_COMMIT").unwrap_or(VERSION))),
            ("build_number", json!(0)),
            ("cpu_info", json!(self.cpu)),
            ("gpu_info", json!(self.gpu)),
            ("backends", json!(self.backend)),
            ("model_filename", json!(self.file)),
            ("model_type", json!(self.model)),
            ("model_size", json!(self.weight_bytes)),
            ("model_n_params", json!(self.parameters)),
            ("n_batch", json!(self.step_tokens_max)),
            ("n_ubatch", json!(self.step_tokens_max)),
            ("n_threads", json!(self.threads)),
            ("n_threads_pinned", json!(self.pinned)),
            ("isa", json!(self.isa)),
            ("type_k", json!(self.kv_dtype.name())),
            ("type_v", json!(self.kv_dtype.name())),
            ("kv_block_tokens", json!(self.block_tokens)),
            ("n_gpu_layers", json!(self.gpu_layers)),
            ("device_weight_bytes", json!(self.device_weight_bytes)),
            ("spilled_bytes", json!(spill.map_or(0, |spill| spill.weight_bytes))),
            ("n_layers_ffn_spilled", json!(spill.map_or(0, |spill| spill.layers.len()))),
            ("n_layers_attention_spilled", json!(attention)),
            ("load_ns", json!(self.load.as_nanos() as u64)),
        ]
    }
}

impl Serialize for Record {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for (name, value) in self.fields().iter().chain(&self.lists()) {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

/// `2026-01-31T23:59:59Z`, by Howard Hinnant's civil-from-days.
fn iso_8601(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Years start in March here, so that the leap day is their last.
    let shifted = days + 719_468;
    let (era, day) = (shifted / 146_097, shifted % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_utc() {
        for (seconds, wanted) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_827_696, "2000-02-29T12:34:56Z"),
            (1_709_251_199, "2024-02-29T23:59:59Z"),
            (1_709_251_200, "2024-03-01T00:00:00Z"),
            (4_107_542_399, "2100-02-28T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(iso_8601(UNIX_EPOCH + Duration::from_secs(seconds)), wanted);
        }
    }

    #[test]
    fn deviation_is_that_of_a_sample() {
        assert_eq!(mean_and_deviation(&[2.0, 4.0, 6.0]), (4.0, 2.0));
        assert_eq!(mean_and_deviation(&[3.0]), (3.0, 0.0));
    }
}
