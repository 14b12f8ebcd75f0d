//! `tandem config show`: every setting, its value and where it came from.

use super::output::Output;
use super::settings::Settings;
use anyhow::{Context, Result};
use serde_json::{Value, json};

/// Prints all settings in the order of their names.
///
/// # Errors
/// Standard output is closed.
pub fn run(settings: &Settings, output: Output) -> Result<()> {
    let tree = serde_json::to_value(&settings.config).context("the configuration as JSON")?;
    if output.json {
        let entries: serde_json::Map<String, Value> = settings
            .origins
            .iter()
            .map(|(key, origin)| {
                (key.clone(), json!({ "value": value_at(&tree, key), "origin": origin }))
            })
            .collect();
        output.object(&entries)?;
        return Ok(());
    }
    let rows: Vec<Vec<String>> = settings
        .origins
        .iter()
        .map(|(key, origin)| {
            vec![key.clone(), value_at(&tree, key).to_string(), origin.to_string()]
        })
        .collect();
    output.table(&["setting", "value", "origin"], &rows)?;
    Ok(())
}

fn value_at<'a>(tree: &'a Value, dotted: &str) -> &'a Value {
    dotted.split('.').fold(tree, |value, part| &value[part])
}
