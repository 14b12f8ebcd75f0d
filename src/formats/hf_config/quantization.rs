//! `quantization_config`: how the weights of linear layers are stored.

use super::Fields;
use crate::formats::FormatError;

/// How weights are stored, as far as their tensors don't say it themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::formats) enum Quantization {
    /// As floats.
    None,
    /// AutoAWQ's `gemm` layout: 4 bits, eight neighbouring outputs in a word.
    Awq(Int4Layout),
    /// AutoGPTQ's layout: 4 bits, eight neighbouring inputs in a word.
    Gptq(Int4Layout),
    /// `pack-quantized` of compressed-tensors: 4 bits, eight neighbouring inputs in a word.
    Packed(PackedLayout),
    /// e4m3 with a scale per tensor, per row, or per block of `[rows, columns]`.
    Fp8 { block: Option<[usize; 2]> },
}

/// What both 4-bit layouts have to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::formats) struct Int4Layout {
    /// Inputs that share a scale and a zero point; `None` is all of a row.
    pub group: Option<usize>,
    /// Zero points are stored less one.
    pub zeros_less_one: bool,
}

/// What `pack-quantized` has to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::formats) struct PackedLayout {
    /// Inputs that share a scale and a zero point; `None` is all of a row.
    pub group: Option<usize>,
    /// There are no zero points.
    pub is_symmetric: bool,
}

const METHODS: [&str; 4] = ["awq", "gptq", "fp8", "compressed-tensors"];

impl Quantization {
    pub fn read(config: &Fields) -> Result<Self, FormatError> {
        let Some(fields) = config.object_opt("quantization_config")? else { return Ok(Self::None) };
        let got = fields.text("quant_method")?;
        match got {
            "awq" => {
                check_bits(&fields, &["bits", "w_bit"])?;
                fields.one_of("version", &["gemm"])?;
                if fields.bool_opt("zero_point")? == Some(false) {
                    return Err(fields.refuse("zero_point", "false; supported: true"));
                }
                let group = group(&fields, &["group_size", "q_group_size"])?;
                Ok(Self::Awq(Int4Layout { group, zeros_less_one: false }))
            }
            "gptq" => {
                check_bits(&fields, &["bits"])?;
                let format = fields.one_of("checkpoint_format", &["gptq", "gptq_v2"])?;
                let group = group(&fields, &["group_size"])?;
                Ok(Self::Gptq(Int4Layout { group, zeros_less_one: format == "gptq" }))
            }
            "fp8" => {
                fields.one_of("fmt", &["e4m3", "float8_e4m3fn"])?;
                Ok(Self::Fp8 { block: block(&fields, "weight_block_size")? })
            }
            "compressed-tensors" => compressed_tensors(&fields),
            _ => {
                let known = METHODS.join(", ");
                let message = format!("{got:?} is not supported; supported: {known}");
                Err(fields.refuse("quant_method", message))
            }
        }
    }
}

/// The first of the names that is there must be 4.
fn check_bits(fields: &Fields, names: &[&str]) -> Result<(), FormatError> {
    let name = names.iter().find(|name| fields.get(name).is_some()).unwrap_or(&names[0]);
    match fields.count(name, 1..=64)? {
        4 => Ok(()),
        bits => Err(fields.refuse(name, format!("{bits}; supported: 4"))),
    }
}

fn group(fields: &Fields, names: &[&str]) -> Result<Option<usize>, FormatError> {
    let name = names.iter().find(|name| fields.get(name).is_some()).unwrap_or(&names[0]);
    match fields.get(name).and_then(serde_json::Value::as_i64) {
        Some(-1) => Ok(None),
        _ => Ok(Some(fields.count(name, 1..=1 << 24)? as usize)),
    }
}

/// `[rows, columns]` that share a scale.
fn block(fields: &Fields, name: &str) -> Result<Option<[usize; 2]>, FormatError> {
    let Some(list) = fields.list_opt(name)? else { return Ok(None) };
    let extent = |value: &serde_json::Value| {
        value.as_u64().filter(|extent| (1..=1 << 24).contains(extent)).map(|extent| extent as usize)
    };
    match list {
        [rows, cols] => match (extent(rows), extent(cols)) {
            (Some(rows), Some(cols)) => Ok(Some([rows, cols])),
            _ => Err(fields.refuse(name, "wanted: two whole numbers from 1")),
        },
        _ => Err(fields.refuse(name, format!("a list of {}, wanted: two numbers", list.len()))),
    }
}

/// `config_groups` of vLLM's compressor: all must be floats of 8 bits, or integers of 4 that are
/// laid out alike.
fn compressed_tensors(fields: &Fields) -> Result<Quantization, FormatError> {
    let format = fields.one_of("format", &["float-quantized", "naive-quantized", PACKED])?;
    let groups = fields.object_opt("config_groups")?;
    let groups = groups.ok_or_else(|| fields.refuse("config_groups", "the field is missing"))?;
    let (mut blocks, mut layout) = (None, None);
    for (name, _) in groups.iter() {
        let Some(group) = groups.object_opt(name)? else { continue };
        let Some(weights) = group.object_opt("weights")? else { continue };
        if format == PACKED {
            let own = packed_layout(&weights)?;
            if layout.replace(own).is_some_and(|other| other != own) {
                return Err(weights.refuse("group_size", "unlike another group's"));
            }
            continue;
        }
        weights.one_of("type", &["float"])?;
        let bits = weights.count("num_bits", 1..=64)?;
        if bits != 8 {
            return Err(weights.refuse("num_bits", format!("{bits}; supported: 8")));
        }
        let strategy = weights.one_of("strategy", &["tensor", "channel", "block"])?;
        if strategy == "block" {
            blocks = block(&weights, "block_structure")?;
            if blocks.is_none() {
                return Err(weights.refuse("block_structure", "the field is missing"));
            }
        }
    }
    match (format, layout) {
        (PACKED, Some(layout)) => Ok(Quantization::Packed(layout)),
        (PACKED, None) => Err(fields.refuse("config_groups", "no group has weights")),
        _ => Ok(Quantization::Fp8 { block: blocks }),
    }
}

/// The format of integers of 4 bits.
const PACKED: &str = "pack-quantized";

/// What a group's weights of that format are.
fn packed_layout(weights: &Fields) -> Result<PackedLayout, FormatError> {
    weights.one_of("type", &["int"])?;
    check_bits(weights, &["num_bits"])?;
    let strategy = weights.one_of("strategy", &["group", "channel"])?;
    let group = if strategy == "group" { group(weights, &["group_size"])? } else { None };
    Ok(PackedLayout { group, is_symmetric: weights.bool_opt("symmetric")?.unwrap_or(true) })
}
