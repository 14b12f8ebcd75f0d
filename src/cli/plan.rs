//! `tandem plan FILE`: what would lie where, before anything is loaded.

use super::output::Output;
use anyhow::Result;
use serde_json::json;
use std::path::Path;
use tandem::config::Config;
use tandem::formats::Checkpoint;
use tandem::hardware::HardwareProfile;
use tandem::model::ModelSpec;
use tandem::placement::{Device, Placement, Workers};
use tandem::request::RequestError;
use tandem::units::ByteSize;

/// Prints the placement of a model on this machine.
///
/// # Errors
/// The file is bad, or the model does not fit: then need, free and what to change.
pub fn run(file: &Path, config: &Config, output: Output) -> Result<()> {
    let checkpoint = Checkpoint::open(file).map_err(RequestError::from)?;
    let spec = ModelSpec::from_checkpoint(&checkpoint).map_err(RequestError::from)?;
    let hardware = HardwareProfile::detect();
    Workers::choose(&hardware.topology, &config.cpu)?;
    let placement = Placement::plan(&spec, &hardware, config)?;
    if output.json {
        output.object(&json!({ "placement": placement, "explain": placement.explain() }))?;
        return Ok(());
    }
    let title = format!(
        "{} ({}): context {} of {} tokens",
        placement.model,
        spec.architecture,
        placement.context_tokens,
        placement.context_tokens_trained
    );
    output.line(&output.heading(&title))?;
    let rows: Vec<Vec<String>> = placement
        .explain()
        .into_iter()
        .map(|row| vec![row.what, row.device, ByteSize(row.bytes).to_string(), row.why])
        .collect();
    output.table(&["what", "where", "bytes", "why"], &rows)?;
    if *placement.device() == Device::Cpu || placement.spill.is_some() {
        output.line(&placement.workers.to_string())?;
    }
    if config.gpu.device == "off" {
        output.line(&match (&hardware.gpus.absence, hardware.gpus.devices.len()) {
            (Some(absence), _) => format!("no GPU is used: {absence}"),
            (None, 1) => "there is a GPU; gpu.device = \"auto\" uses it".to_owned(),
            (None, gpus) => format!("there are {gpus} GPUs; gpu.device = \"auto\" uses one"),
        })?;
    }
    for note in &placement.notes {
        output.line(&format!("note: {note}"))?;
    }
    Ok(())
}
