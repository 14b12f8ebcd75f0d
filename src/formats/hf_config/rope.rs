//! Rotary positions: `rope_theta` and `rope_scaling`, or since 2025 `rope_parameters`.

use super::{Family, Fields};
use crate::formats::FormatError;
use crate::formats::metadata_writer::MetadataWriter;
use std::f64::consts::TAU;

const KINDS: &str = "default, linear, yarn, llama3";

/// Writes the rotation's keys; returns the divisors of the frequencies that Llama 3 asks for.
pub(super) fn write(
    config: &Fields,
    family: Family,
    writer: &mut MetadataWriter,
) -> Result<Option<Vec<f32>>, FormatError> {
    let architecture = family.architecture();
    if let Some(factor) = config.number_opt("partial_rotary_factor")?.filter(|f| *f != 1.0) {
        return Err(config.refuse("partial_rotary_factor", format!("{factor}; supported: 1")));
    }
    let parameters = config.object_opt("rope_parameters")?;
    // Gemma has them by kind of layer.
    let of_kind = |kind: &str| match &parameters {
        Some(parameters) => parameters.object_opt(kind),
        None => Ok(None),
    };
    let (global, local) = (of_kind("full_attention")?, of_kind("sliding_attention")?);
    let global = global.or_else(|| parameters.clone());
    write_base(
        writer,
        &format!("{architecture}.rope.freq_base"),
        [(Some(config), "rope_theta"), (global.as_ref(), "rope_theta")],
    )?;
    if family == Family::Gemma3 {
        write_base(
            writer,
            "gemma3.rope.freq_base_swa",
            [(Some(config), "rope_local_base_freq"), (local.as_ref(), "rope_theta")],
        )?;
    }
    match config.object_opt("rope_scaling")?.or(global) {
        Some(scaling) => write_scaling(config, &scaling, architecture, writer),
        None => Ok(None),
    }
}

/// The first that is there.
fn write_base(
    writer: &mut MetadataWriter,
    key: &str,
    places: [(Option<&Fields>, &str); 2],
) -> Result<(), FormatError> {
    for (fields, field) in places {
        let Some(fields) = fields else { continue };
        if let Some(base) = fields.number_opt(field)? {
            writer.f32(key, base, (fields, field));
            return Ok(());
        }
    }
    Ok(())
}

fn write_scaling(
    config: &Fields,
    scaling: &Fields,
    architecture: &str,
    writer: &mut MetadataWriter,
) -> Result<Option<Vec<f32>>, FormatError> {
    let field = if scaling.get("rope_type").is_some() { "rope_type" } else { "type" };
    let kind = scaling.text_opt(field)?.unwrap_or("default");
    let key = |name: &str| format!("{architecture}.rope.scaling.{name}");
    match kind {
        "default" => return Ok(None),
        "llama3" => return llama3(config, scaling).map(Some),
        "linear" | "yarn" => {}
        other => {
            let message = format!("{other:?} is not supported; supported: {KINDS}");
            return Err(scaling.refuse(field, message));
        }
    }
    let factor = at_least_one(scaling, "factor")?;
    writer.text(&key("type"), kind, (scaling, field));
    writer.f32(&key("factor"), factor, (scaling, "factor"));
    if kind == "yarn" {
        write_yarn(scaling, &key, factor, writer)?;
    }
    Ok(None)
}

fn write_yarn(
    scaling: &Fields,
    key: &dyn Fn(&str) -> String,
    factor: f32,
    writer: &mut MetadataWriter,
) -> Result<(), FormatError> {
    for field in ["mscale", "mscale_all_dim"] {
        if let Some(got) = scaling.number_opt(field)? {
            let message = format!("{got}; another magnitude than YaRN's own is not supported");
            return Err(scaling.refuse(field, message));
        }
    }
    if scaling.bool_opt("truncate")? == Some(false) {
        return Err(scaling.refuse("truncate", "false; supported: true"));
    }
    let field = "original_max_position_embeddings";
    if let Some(tokens) = scaling.count_opt(field, 1..=1 << 27)? {
        writer.u32(&key("original_context_length"), tokens, (scaling, field));
    }
    for (field, name) in [("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")] {
        if let Some(beta) = scaling.number_opt(field)? {
            writer.f32(&key(name), beta, (scaling, field));
        }
    }
    let field = "attention_factor";
    if let Some(whole) = scaling.number_opt(field)? {
        // GGUF's multiplies YaRN's own, this one replaces it.
        let own = 0.1 * factor.ln() + 1.0;
        writer.f32(&key("attn_factor"), whole / own, (scaling, field));
    }
    Ok(())
}

fn at_least_one(scaling: &Fields, field: &str) -> Result<f32, FormatError> {
    let got = scaling.number(field)?;
    if got >= 1.0 {
        return Ok(got);
    }
    Err(scaling.refuse(field, format!("{got}; allowed: a number from 1")))
}

/// Llama 3.1's scaling as divisors: 1 for frequencies that turn more than `high` times within the
/// original context, `factor` for those below `low` turns, between them
/// `1 / ((1 − s) / factor + s)` with `s = (turns − low) / (high − low)`.
fn llama3(config: &Fields, scaling: &Fields) -> Result<Vec<f32>, FormatError> {
    let factor = f64::from(at_least_one(scaling, "factor")?);
    let low = f64::from(scaling.number("low_freq_factor")?);
    let high = f64::from(scaling.number("high_freq_factor")?);
    if high <= low {
        let message = format!("{high}; allowed: above low_freq_factor, {low}");
        return Err(scaling.refuse("high_freq_factor", message));
    }
    let context = f64::from(scaling.count("original_max_position_embeddings", 1..=1 << 27)?);
    let heads = config.count("num_attention_heads", 1..=1 << 16)?;
    let head_dim = match config.count_opt("head_dim", 2..=1 << 16)? {
        Some(head_dim) => head_dim,
        None => config.count("hidden_size", 1..=1 << 24)? / heads,
    };
    let base = match config.number_opt("rope_theta")? {
        Some(base) => base,
        None => scaling.number_opt("rope_theta")?.unwrap_or(10_000.0),
    };
    let divisor = |pair: u32| {
        let frequency = f64::from(base).powf(-2.0 * f64::from(pair) / f64::from(head_dim));
        let turns = context * frequency / TAU;
        let share = ((turns - low) / (high - low)).clamp(0.0, 1.0);
        (1.0 / ((1.0 - share) / factor + share)) as f32
    };
    Ok((0..head_dim / 2).map(divisor).collect())
}
