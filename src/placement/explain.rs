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
        rows.push(ExplainRow {
            what: "KV swap".into(),
            device: "host".into(),
            bytes: self.host_kv_bytes,
            why: format!("{} blocks for preempted sequences", self.host_blocks),
        });
        rows.push(ExplainRow {
            what: "total".into(),
            device: if *self.device() == Device::Cpu { "host".into() } else { "both".into() },
            bytes: self.total_bytes(),
            why: match self.device() {
                Device::Cpu => format!("of {} available", ByteSize(self.memory_available_bytes)),
                gpu => {
                    format!("{gpu} has {} available", ByteSize(self.memory_available_bytes))
                }
            },
        });
        rows
    }
}
