//! A placement in rows that a person can read.

use super::{Device, Placement, Spill, StagePlacement};
use crate::units::ByteSize;
use serde::Serialize;

/// One line of an explanation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ExplainRow {
    /// What lies there.
    pub what: String,
    /// On which device.
    pub device: String,
    /// How many bytes.
    pub bytes: u64,
    /// Why, or of what.
    pub why: String,
}

/// What the host's memory is called where it is not the device that computes.
const HOST: &str = "host";

impl Placement {
    /// What lies where, how many bytes, and why. The rows above the total of a device add up to it;
    /// a file, and on GPUs the host's memory, is not among them, but below.
    pub fn explain(&self) -> Vec<ExplainRow> {
        let is_cpu = *self.device() == Device::Cpu;
        let why = format!("{} blocks of preempted sequences and prefixes", self.host_blocks);
        let swap = row("KV swap", HOST, self.host_kv_bytes, why);
        let mut rows = Vec::new();
        for stage in &self.stages {
            rows.extend(self.of_stage(stage));
            let device = if is_cpu { HOST.into() } else { stage.device.to_string() };
            if let Some(spill) = &stage.spill {
                let why = "slots and scratch through which spilled weights stream";
                rows.push(row("ring", &device, spill.ring_bytes, why));
            }
            if is_cpu {
                rows.push(swap.clone());
            }
            rows.push(row("margin", &device, stage.margin_bytes, "left to others"));
            let total = self.bytes_of(stage) + stage.margin_bytes;
            rows.push(row("total", &device, total, memory(stage)));
        }
        for stage in &self.stages {
            rows.extend(stage.spill.iter().flat_map(|spill| self.of_spill(stage, spill)));
        }
        if !is_cpu {
            rows.push(swap);
        }
        if self.disk_blocks > 0 {
            let why = format!("{} blocks that the host has no room for", self.disk_blocks);
            rows.push(row("KV swap", "disk", self.disk_kv_bytes, why));
        }
        rows
    }

    /// What runs the model, in words: `GPU 0`, or `the CPU` and why.
    pub fn runs_on(&self) -> String {
        let gpus = self.stages.iter().filter_map(|stage| match stage.device {
            Device::Gpu(ordinal) => Some(ordinal.to_string()),
            Device::Cpu => None,
        });
        match (&gpus.collect::<Vec<_>>()[..], &self.why_cpu) {
            ([], Some(why)) => format!("the CPU: {why}"),
            ([], None) => "the CPU".to_owned(),
            ([gpu], _) => format!("GPU {gpu}"),
            (gpus, _) => format!("GPUs {}", gpus.join(", ")),
        }
    }

    fn of_stage(&self, stage: &StagePlacement) -> Vec<ExplainRow> {
        let device = stage.device.to_string();
        let layers = format!("layers {}–{}", stage.layers.start, stage.layers.end - 1);
        let but = if stage.spill.is_some() { ", but for what is spilled" } else { "" };
        let mut why = format!("{layers}{but}, in the kernels' layout");
        if stage.device == Device::Cpu {
            why += &self.of_nodes();
        }
        let mut rows = vec![row("weights", &device, stage.weight_bytes, why)];
        if stage.expert_bytes > 0 {
            let active = ByteSize(stage.active_expert_bytes);
            let why = format!("of the weights; a token goes through {active}");
            rows.push(row("experts", &device, stage.expert_bytes, why));
        }
        let tokens = self.device_blocks * self.block_tokens;
        let why = format!(
            "{} blocks of {}: {tokens} tokens, {}",
            self.device_blocks, self.block_tokens, self.kv_dtype
        );
        rows.push(row("KV cache", &device, stage.kv_bytes, why));
        let why = format!("of steps of up to {} tokens", self.step_tokens_max);
        rows.push(row("activations", &device, stage.activation_bytes, why));
        if stage.graph_bytes > 0 {
            let why = "what the driver takes for the kernels' code and for recorded steps, at most";
            rows.push(row("graphs, kernels", &device, stage.graph_bytes, why));
        }
        rows
    }

    /// How the rows of weights in host memory are divided over NUMA nodes, if they are.
    fn of_nodes(&self) -> String {
        let teams = &self.workers.nodes;
        let percent = |index: usize| (teams.portion(index, 1000) + 5) / 10;
        let nodes = teams.nodes().iter().enumerate();
        let shares = nodes.map(|(index, node)| format!("{} % on {node}", percent(index)));
        let shares: Vec<_> = shares.collect();
        match (shares.is_empty(), teams.are_divided()) {
            (true, _) => String::new(),
            (_, true) => format!("; rows by NUMA node: {}", shares.join(", ")),
            (_, false) => format!("; pages by NUMA node: {}", shares.join(", ")),
        }
    }

    fn of_spill(&self, stage: &StagePlacement, spill: &Spill) -> [ExplainRow; 2] {
        let all = stage.layers.len();
        let whose = match self.stages.len() {
            1 => String::new(),
            _ => format!(" of {}", stage.device),
        };
        let (count, which) = (spill.layers.len(), ranges(&spill.layers));
        let mut why = format!("FFN of {count} of {all} layers{whose}: {which}");
        if !spill.attention_layers.is_empty() {
            let (count, which) = (spill.attention_layers.len(), ranges(&spill.attention_layers));
            why += &format!("; attention of {count}: {which}");
        }
        why += &self.of_nodes();
        [
            row("spilled weights", HOST, spill.weight_bytes, why),
            row(
                "crossing",
                HOST,
                spill.crossing_bytes,
                "rows to the CPU and back, and what it makes of them",
            ),
        ]
    }
}

/// What the total is a part of.
fn memory(stage: &StagePlacement) -> String {
    let (free, available) =
        (ByteSize(stage.memory_free_bytes), ByteSize(stage.memory_available_bytes));
    if available < free {
        format!("of {available} that gpu.vram_limit allows; {free} are free")
    } else {
        format!("of {free} free")
    }
}

fn row(what: &str, device: &str, bytes: u64, why: impl Into<String>) -> ExplainRow {
    ExplainRow { what: what.into(), device: device.into(), bytes, why: why.into() }
}

/// Ascending numbers in words: `1, 3–5, 8`.
fn ranges(numbers: &[usize]) -> String {
    let runs = numbers.chunk_by(|a, b| a + 1 == *b).map(|run| match run {
        [first, .., last] => format!("{first}–{last}"),
        one => one.iter().map(ToString::to_string).collect(),
    });
    runs.collect::<Vec<_>>().join(", ")
}
