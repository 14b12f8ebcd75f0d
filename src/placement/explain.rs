//! A placement in rows that a person can read.

use super::{Device, Placement};
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

impl Placement {
    /// What lies where, how many bytes, and why.
    pub fn explain(&self) -> Vec<ExplainRow> {
        let mut rows = Vec::new();
        for stage in &self.stages {
            let device = stage.device.to_string();
            let mut row = |what: &str, bytes: u64, why: String| {
                rows.push(ExplainRow { what: what.into(), device: device.clone(), bytes, why });
            };
            let layers = format!("layers {}–{}", stage.layers.start, stage.layers.end - 1);
            row("weights", stage.weight_bytes, format!("{layers}, in the kernels' layout"));
            if stage.expert_bytes > 0 {
                let active = ByteSize(stage.active_expert_bytes);
                let why = format!("of the weights; a token goes through {active}");
                row("experts", stage.expert_bytes, why);
            }
            let tokens = self.device_blocks * self.block_tokens;
            let why = format!(
                "{} blocks of {}: {tokens} tokens, {}",
                self.device_blocks, self.block_tokens, self.kv_dtype
            );
            row("KV cache", stage.kv_bytes, why);
            row("activations", stage.activation_bytes, "of the widest step".into());
        }
        let (device, is_cpu) = (self.device().to_string(), *self.device() == Device::Cpu);
        let swap = ExplainRow {
            what: "KV swap".into(),
            device: "host".into(),
            bytes: self.host_kv_bytes,
            why: format!("{} blocks for preempted sequences", self.host_blocks),
        };
        // The rows above the total add up to it; on a GPU, the host's memory is not among them.
        let (above, below) = if is_cpu { (Some(swap), None) } else { (None, Some(swap)) };
        rows.extend(above);
        rows.push(ExplainRow {
            what: "margin".into(),
            device: if is_cpu { "host".into() } else { device.clone() },
            bytes: self.margin_bytes,
            why: "left to others".into(),
        });
        rows.push(ExplainRow {
            what: "total".into(),
            device: if is_cpu { "host".into() } else { device },
            bytes: self.device_bytes() + self.margin_bytes,
            why: self.memory(),
        });
        rows.extend(below);
        rows
    }

    /// What the total is a part of.
    fn memory(&self) -> String {
        let (free, available) =
            (ByteSize(self.memory_free_bytes), ByteSize(self.memory_available_bytes));
        if available < free {
            format!("of {available} that gpu.vram_limit allows; {free} are free")
        } else {
            format!("of {free} free")
        }
    }
}
