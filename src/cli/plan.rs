//! `tandem plan FILE`: what would lie where, before anything is loaded; and, where it is asked for,
//! how fast it is beside how fast it was predicted to be.

use super::failure::{Exit, USAGE};
use super::output::Output;
use super::plan_measured::{self, Measured};
use super::plan_stages::StageTime;
use anyhow::Result;
use serde_json::json;
use std::path::Path;
use tandem::actors::known_rates;
use tandem::config::Config;
use tandem::formats::Checkpoint;
use tandem::hardware::HardwareProfile;
use tandem::model::ModelSpec;
use tandem::placement::{Device, Placement, Prediction};
use tandem::request::RequestError;
use tandem::units::ByteSize;

/// Which model, and what of it.
#[derive(Clone, Copy, Debug)]
pub struct PlanOptions<'a> {
    /// The model's file or folder.
    pub file: &'a Path,
    /// Whether it is loaded, and what was predicted is run.
    pub measured: bool,
}

/// Prints the placement of a model on this machine, and how fast it will be where `folder` holds
/// what was measured of the machine.
///
/// # Errors
/// The file is bad, or the model does not fit: then need, free and what to change. Nothing was
/// predicted that could be run, or it can't be.
pub async fn run(
    options: PlanOptions<'_>,
    config: &Config,
    folder: Option<&Path>,
    output: Output,
) -> Result<()> {
    let (spec, hardware) = {
        let checkpoint = Checkpoint::open(options.file).map_err(RequestError::from)?;
        let spec = ModelSpec::from_checkpoint(&checkpoint).map_err(RequestError::from)?;
        let mut hardware = HardwareProfile::detect_for(&config.gpu.choice()?);
        hardware.measured = known_rates(&hardware, config, folder)?;
        (spec, hardware)
    };
    let placement = Placement::plan(&spec, &hardware, config)?;
    let prediction = Prediction::of(&spec, &placement, &hardware, config);
    let measured = match (&prediction, options.measured) {
        (_, false) => None,
        (Some(prediction), true) => {
            let mut config = config.clone();
            config.model.path = options.file.to_owned();
            Some(plan_measured::run(prediction, &config, output).await?)
        }
        (None, true) => {
            let message = "nothing is predicted that could be measured: run `tandem probe` first";
            return Err(Exit { code: USAGE, message: message.to_owned() }.into());
        }
    };
    if output.json {
        output.object(&json!({
            "placement": placement, "explain": placement.explain(), "prediction": prediction,
            "measured": measured,
        }))?;
        return Ok(());
    }
    print_placement(&placement, spec.architecture, output)?;
    output.line(&format!("runs on {}", placement.runs_on()))?;
    let is_told =
        |note: &&String| placement.why_cpu.as_ref().is_some_and(|why| note.ends_with(why));
    for note in placement.notes.iter().filter(|note| !is_told(note)) {
        output.line(&format!("note: {note}"))?;
    }
    match prediction {
        Some(prediction) => {
            output.line("")?;
            let (mut head, mut rows) = (vec!["predicted", "tokens/s", "how"], rows(&prediction));
            if let Some(measured) = &measured {
                head.extend(["measured", "of predicted"]);
                add_measured(&mut rows, &prediction, measured);
            }
            output.table(&head, &rows)?;
            if let Some(measured) = measured {
                output.line("")?;
                let head = ["steps of", "stage", "predicted", "measured", "of predicted"];
                output.table(&head, &stage_rows(&measured))?;
            }
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

/// Adds what was measured, and its share of what was predicted, to the rows of predictions.
fn add_measured(rows: &mut [Vec<String>], prediction: &Prediction, measured: &Measured) {
    let predicted = prediction.decode.iter().map(|decode| decode.tokens_per_second);
    let predicted =
        predicted.chain(prediction.prompt.iter().map(|prompt| prompt.tokens_per_second));
    let measured = measured.decode.iter().chain(&measured.prompt);
    let cells = predicted.zip(measured).map(|(predicted, measured)| {
        [speed(*measured), format!("{:.0} %", 100.0 * measured / predicted)]
    });
    let unknown = std::iter::repeat_with(|| ["–", "–"].map(str::to_owned));
    rows.iter_mut().zip(cells.chain(unknown)).for_each(|(row, cells)| row.extend(cells));
}

/// Where the time of steps went, in rows of a table.
fn stage_rows(measured: &Measured) -> Vec<Vec<String>> {
    let row = |time: &StageTime| {
        let shown = |seconds: f64| format!("{:.3} ms", 1e3 * seconds);
        let predicted = time.predicted_seconds;
        let part = predicted.filter(|predicted| *predicted > 0.0);
        let part =
            part.map(|predicted| format!("{:.0} %", 100.0 * time.measured_seconds / predicted));
        vec![
            time.of.clone(),
            time.stage.clone(),
            predicted.map_or_else(|| "–".to_owned(), shown),
            shown(time.measured_seconds),
            part.unwrap_or_else(|| "–".to_owned()),
        ]
    };
    measured.stages.iter().map(row).collect()
}

fn speed(tokens_per_second: f64) -> String {
    if tokens_per_second < 100.0 {
        format!("{tokens_per_second:.1}")
    } else {
        format!("{tokens_per_second:.0}")
    }
}

/// How fast it will be, in rows of a table.
fn rows(prediction: &Prediction) -> Vec<Vec<String>> {
    let context = format!("each at {} tokens of context", prediction.context_tokens);
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
        rows.push(row("1 stream".into(), rate, "with 1 GiB more of each GPU's memory"));
    }
    rows
}
