//! `tandem ps` and `tandem stop`: what runs, and its end. Both need a running service.

use super::connection::{Connection, Place};
use super::output::Output;
use anyhow::Result;
use serde_json::{Value, json};
use std::time::Duration;
use tandem::units::ByteSize;

/// How much longer than its drain time a service may take to be gone.
const ENDING_GRACE: Duration = Duration::from_secs(10);

/// Shows the running service.
///
/// # Errors
/// No service answers.
pub async fn ps(place: Place, output: Output) -> Result<()> {
    let connection = Connection::to_service(&place).await?;
    let status = connection.call("status", json!({})).await?;
    let stats = connection.call("stats.get", json!({})).await?;
    let models = connection.call("models.list", json!({})).await?;
    if output.json {
        output.object(&json!({ "status": status, "stats": stats, "models": models }))?;
        return connection.close().await;
    }
    // A model that is still being loaded has no plan yet.
    let plan = connection.call("models.plan", json!({})).await.unwrap_or_default();
    connection.close().await?;
    output.line(&output.heading(&format!("socket {}", place.socket()?.display())))?;
    let mut rows: Vec<Vec<String>> =
        models["models"].as_array().into_iter().flatten().map(model_row).collect();
    rows.extend(summary(&status, &stats, &plan));
    output.table(&["what", "value"], &rows)?;
    Ok(())
}

/// Stops the running service and waits until it is gone; running streams get their end first.
///
/// # Errors
/// No service answers, or it refuses, or it does not end.
pub async fn stop(place: Place, output: Output) -> Result<()> {
    let connection = Connection::to_service(&place).await?;
    let result = connection.call("shutdown", json!({})).await?;
    let drain = Duration::from_millis(result["drain_ms"].as_u64().unwrap_or(0));
    output.notice("the service lets running streams end, then stops")?;
    connection.ended(place.socket()?, drain + ENDING_GRACE).await?;
    if output.json {
        output.object(&result)?;
    }
    Ok(())
}

/// What a person asks first; all figures come with `--json`.
fn summary(status: &Value, stats: &Value, plan: &Value) -> Vec<Vec<String>> {
    let engine = &stats["engine"];
    let (metrics, sequences) = (&engine["metrics"], &engine["sequences"]);
    let blocks = &engine["blocks"];
    let ms = |time: &Value| {
        let at = |name: &str| time[name].as_f64().unwrap_or(0.0) / 1e3;
        format!("{:.1} ms median, {:.1} ms 99th percentile", at("p50_us"), at("p99_us"))
    };
    let restarts = engine["status"]["restarts"].as_object();
    let restarts: u64 = restarts.into_iter().flatten().filter_map(|(_, n)| n.as_u64()).sum();
    let seconds = status["uptime_ms"].as_u64().unwrap_or(0) / 1000;
    let runs_on = status["engine"]["runs_on"].as_str();
    let mut rows: Vec<_> =
        runs_on.map(|device| ("runs on", device.to_owned())).into_iter().collect();
    rows.extend([
        ("state", format!("{}, for {seconds} s", plain(&status["state"]))),
        ("process", format!("{}, {}", status["pid"], plain(&status["server"]))),
        (
            "requests",
            format!(
                "{} running, {} waiting, {} paused; {} done, {} failed",
                sequences["running"],
                sequences["waiting"],
                sequences["paused"],
                metrics["requests_done"],
                metrics["requests_failed"]
            ),
        ),
        (
            "tokens",
            format!(
                "{} of prompts ({} cached), {} of answers",
                metrics["prompt_tokens"], metrics["cached_tokens"], metrics["completion_tokens"]
            ),
        ),
        (
            "drafted tokens",
            format!("{} of {} accepted", metrics["draft_tokens_accepted"], metrics["draft_tokens"]),
        ),
        ("first token", ms(&metrics["first_token_time"])),
        ("next token", ms(&metrics["inter_token_time"])),
        (
            "KV blocks",
            format!(
                "{} of {} in use, {} more kept for their prefix",
                blocks["used"], blocks["total"], blocks["cached"]
            ),
        ),
        ("restarts", restarts.to_string()),
    ]);
    for (what, tier) in [("KV in host memory", "host"), ("KV on disk", "disk")] {
        let count = |state: &str| blocks[format!("{tier}_{state}")].as_u64().unwrap_or(0);
        if count("total") > 0 {
            let is_stopped = tier == "disk" && blocks["disk_stopped"] == true;
            let bytes = ByteSize(count("total") * blocks["block_bytes"].as_u64().unwrap_or(0));
            let (used, total, cached) = (count("used"), count("total"), count("cached"));
            let stopped = if is_stopped { "; nothing more goes there" } else { "" };
            let said = format!("{used} of {total} ({bytes}) in use, {cached} more kept{stopped}");
            rows.push((what, said));
        }
    }
    for row in plan["plan"]["explain"].as_array().into_iter().flatten() {
        if row["what"] == "total" {
            let bytes = ByteSize(row["bytes"].as_u64().unwrap_or(0));
            rows.push(("memory", format!("{bytes} {}", plain(&row["why"]))));
        }
    }
    rows.into_iter().map(|(what, value)| vec![what.to_owned(), value]).collect()
}

fn model_row(model: &Value) -> Vec<String> {
    let value = format!(
        "{} ({}, {} of weights, context {} tokens)",
        plain(&model["name"]),
        plain(&model["architecture"]),
        ByteSize(model["weight_bytes"].as_u64().unwrap_or(0)),
        model["context_tokens"]
    );
    vec!["model".to_owned(), value]
}

/// A text without its quotes, anything else as JSON.
fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}
