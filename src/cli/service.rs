//! `tandem ps` and `tandem stop`: what runs, and its end. Both need a running service.

use super::connection::{Connection, Place};
use super::output::Output;
use anyhow::Result;
use serde_json::{Value, json};
use tandem::units::ByteSize;

/// Shows the running service.
///
/// # Errors
/// No service answers.
pub async fn ps(place: Place, output: Output) -> Result<()> {
    let mut connection = Connection::to_service(&place).await?;
    let status = connection.call("status", json!({})).await?;
    let stats = connection.call("stats.get", json!({})).await?;
    let models = connection.call("models.list", json!({})).await?;
    connection.close().await?;
    if output.json {
        output.object(&json!({ "status": status, "stats": stats, "models": models }))?;
        return Ok(());
    }
    output.table(&["what", "value"], &summary(&place, [&status, &stats, &models]))?;
    Ok(())
}

/// Stops the running service; running streams get their end first.
///
/// # Errors
/// No service answers, or it refuses.
pub async fn stop(place: Place, output: Output) -> Result<()> {
    let mut connection = Connection::to_service(&place).await?;
    let result = connection.call("shutdown", json!({})).await?;
    output.notice("the service drains: running requests may end first")?;
    connection.ended(&place).await;
    if output.json {
        output.object(&result)?;
    }
    Ok(())
}

/// What a person asks of a running service; `--json` has everything.
fn summary(place: &Place, [status, stats, models]: [&Value; 3]) -> Vec<Vec<String>> {
    let (engine, server) = (&stats["engine"], &stats["server"]);
    let mut rows: Vec<(&str, String)> = Vec::new();
    for model in models["models"].as_array().into_iter().flatten() {
        let bytes = ByteSize(model["weight_bytes"].as_u64().unwrap_or(0));
        rows.push(("model", plain(&model["name"])));
        rows.push(("file", plain(&model["path"])));
        rows.push(("weights", format!("{bytes}, {} layers", model["layers"])));
        rows.push(("context", format!("{} tokens", model["context_tokens"])));
    }
    let uptime_s = status["uptime_ms"].as_u64().unwrap_or(0) / 1000;
    let (live, done) = (&server["requests_live"], &server["requests_total"]);
    let (sequences, blocks) = (&engine["sequences"], &engine["blocks"]);
    let (running, waiting) = (&sequences["running"], &sequences["waiting"]);
    let metrics = &engine["metrics"];
    let step = &metrics["inter_token_time"];
    rows.extend([
        ("state", plain(&status["state"])),
        ("uptime", format!("{}:{:02}:{:02}", uptime_s / 3600, uptime_s / 60 % 60, uptime_s % 60)),
        ("process", plain(&status["pid"])),
        ("socket", place.socket.display().to_string()),
        ("connections", plain(&status["connections"])),
        ("requests", format!("{live} live, {done} since the start")),
        (
            "sequences",
            format!("{running} running, {waiting} waiting, {} paused", sequences["paused"]),
        ),
        (
            "KV blocks",
            format!("{} of {} used, {} cached", blocks["used"], blocks["total"], blocks["cached"]),
        ),
        (
            "tokens",
            format!("{} read, {} written", metrics["prompt_tokens"], metrics["completion_tokens"]),
        ),
        (
            "next token",
            format!("{} µs median, {} µs at the 99th percentile", step["p50_us"], step["p99_us"]),
        ),
    ]);
    let restarts = engine["status"]["restarts"].as_object().into_iter().flatten();
    for (actor, times) in restarts.filter(|(_, times)| times.as_u64() != Some(0)) {
        rows.push(("restarted", format!("{actor}, {times} times")));
    }
    rows.into_iter().map(|(what, value)| vec![what.to_owned(), value]).collect()
}

/// Text without its quotes.
fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}
