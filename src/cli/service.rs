//! `tandem ps` and `tandem stop`: what runs, and its end. Both need a running service.

use super::connection::{Connection, Place};
use super::output::Output;
use anyhow::Result;
use serde_json::{Value, json};

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
    output.line(&output.heading(&format!("socket {}", place.socket.display())))?;
    let mut rows = Vec::new();
    for (section, value) in [("status", &status), ("models", &models), ("stats", &stats)] {
        flatten(section, value, &mut rows);
    }
    output.table(&["what", "value"], &rows)?;
    Ok(())
}

/// Stops the running service; running streams get their end first.
///
/// # Errors
/// No service answers, or it refuses.
pub async fn stop(place: Place, output: Output) -> Result<()> {
    let mut connection = Connection::to_service(&place).await?;
    let result = connection.call("shutdown", json!({})).await?;
    if output.json {
        output.object(&result)?;
    } else {
        output.notice("the service drains and stops")?;
    }
    Ok(())
}

/// Nested JSON as rows of dotted names and plain values.
fn flatten(prefix: &str, value: &Value, rows: &mut Vec<Vec<String>>) {
    let nested: Vec<(String, &Value)> = match value {
        Value::Object(map) => map.iter().map(|(key, inner)| (key.clone(), inner)).collect(),
        Value::Array(list) => {
            list.iter().enumerate().map(|(index, inner)| (index.to_string(), inner)).collect()
        }
        Value::String(text) => return rows.push(vec![prefix.to_owned(), text.clone()]),
        plain => return rows.push(vec![prefix.to_owned(), plain.to_string()]),
    };
    for (key, inner) in nested {
        flatten(&format!("{prefix}.{key}"), inner, rows);
    }
}
