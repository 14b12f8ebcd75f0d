//! `tandem plan FILE`: what would lie where, before anything is loaded.

use super::output::Output;
use super::probe;
use anyhow::Result;
use serde_json::json;
use std::path::Path;
use tandem::config::Config;
use tandem::formats::Checkpoint;
use tandem::hardware::HardwareProfile;
use tandem::model::ModelSpec;
use tandem::placement::{Device, Placement, Prediction};
use tandem::request::RequestError;
use tandem::units::ByteSize;

/// Prints the placement of a model on this machine, and how fast it will be where `folder` holds
/// what was measured of the machine.
///
/// # Errors
/// The file is bad, or the model does not fit: then need, free and what to change.
pub fn run(file: &Path, config: &Config, folder: Option<&Path>, output: Output) -> Result<()> {
    let checkpoint = Checkpoint::open(file).map_err(RequestError::from)?;
    let spec = ModelSpec::from_checkpoint(&checkpoint).map_err(RequestError::from)?;
    let mut hardware = HardwareProfile::detect();
    hardware.measured = probe::known(&hardware, config, folder)?;
    let placement = Placement::plan(&spec, &hardware, config)?;
    let prediction = Prediction::of(&spec, &placement, &hardware, config);
    if output.json {
        output.object(&json!({
            "placement": placement, "explain": placement.explain(), "prediction": prediction,
        }))?;
        return Ok(());
    }
    print_placement(&placement, spec.architecture, output)?;
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
    match prediction {
        Some(prediction) => {
            output.line("")?;
            output.table(&["predicted", "tokens/s", "how"], &rows(&prediction))?;
        }
        None => output.line("`tandem probe` measures this machine; then plan predicts tokens/s")?,
    }
    Ok(())
}

fn print_placement(placement: &Placement, architecture: &str, output: Output) -> Result<()> {
    let title = format!(
        "{} ({architecture}): context {} of {} tokens",
        placement.model, placement.context_tokens, placement.context_tokens_trained
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
    Ok(())
}

/// How fast it will be, in rows of a table.
fn rows(prediction: &Prediction) -> Vec<Vec<String>> {
    let context = format!("each at {} tokens of context", prediction.context_tokens);
    let speed =
        |speed: f64| if speed < 100.0 { format!("{speed:.1}") } else { format!("{speed:.0}") };
    let row = |what: String, rate: f64, how: &str| vec![what, speed(rate), how.to_owned()];
    let mut rows = Vec::new();
    for decode in &prediction.decode {
        let plural = if decode.streams == 1 { "" } else { "s" };
        let what = format!("{} stream{plural}", decode.streams);
        rows.push(row(what, decode.tokens_per_second, &context));
    }
    for prompt in &prediction.prompt {
        let what = format!("a prompt of {}", prompt.tokens);
        rows.push(row(what, prompt.tokens_per_second, "alone"));
    }
    if let Some(rate) = prediction.gib_more {
        rows.push(row("1 stream".into(), rate, "with 1 GiB more of the GPU's memory"));
    }
    rows
}
