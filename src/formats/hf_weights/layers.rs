//! What the tensors of one module make together: a weight, from one tensor or from several.

use super::int4::{Int4, Packing};
use super::recipe::Part;
use super::{float_type, fp8, int4, piece};
use crate::formats::hf_config::{HfConfig, Quantization};
use crate::formats::safetensors::{Dtype, Stored};
use crate::formats::{FormatError, MappedFile};
use crate::tensor::DType;
use std::collections::BTreeMap;
use std::sync::Arc;

/// The tensors of a module by the last part of their names, with the index of the file.
pub(super) struct Module<'a> {
    files: &'a [Arc<MappedFile>],
    tensors: BTreeMap<&'a str, (usize, &'a Stored)>,
}

/// A weight, and what errors about it name.
pub(super) struct Made<'a> {
    pub file: usize,
    pub stored: &'a Stored,
    pub dtype: DType,
    pub rows: usize,
    pub cols: usize,
    pub part: Part,
}

type Found<'a> = (usize, &'a Stored);

/// Endings that make a weight.
const PARTS_OF_WEIGHTS: [&str; 11] = [
    "weight",
    "weight_scale",
    "weight_scale_inv",
    "weight_packed",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
];

impl<'a> Module<'a> {
    pub fn new(files: &'a [Arc<MappedFile>]) -> Self {
        Self { files, tensors: BTreeMap::new() }
    }

    pub fn add(&mut self, suffix: &'a str, file: usize, stored: &'a Stored) {
        self.tensors.insert(suffix, (file, stored));
    }

    /// The file that has a tensor of this module.
    pub fn file(&self, stored: &Stored) -> &'a MappedFile {
        let found = self.tensors.values().find(|(_, own)| own.name == stored.name);
        &self.files[found.map_or(0, |(file, _)| *file)]
    }

    /// Tensors that no weight is made from: biases, and what nobody knows.
    pub fn others(&self) -> impl Iterator<Item = (&'a str, usize, &'a Stored)> {
        let others = self.tensors.iter().filter(|(suffix, _)| !PARTS_OF_WEIGHTS.contains(suffix));
        others.map(|(suffix, (file, stored))| (*suffix, *file, *stored))
    }

    fn find(&self, suffix: &str) -> Option<Found<'a>> {
        self.tensors.get(suffix).copied()
    }

    fn refuse(&self, (file, stored): Found<'a>, property: &str, message: String) -> FormatError {
        stored.refuse(&self.files[file], property, message)
    }

    /// A tensor that must be there, beside `beside`.
    fn beside(&self, beside: Found<'a>, suffix: &str) -> Result<Found<'a>, FormatError> {
        self.find(suffix).ok_or_else(|| {
            self.refuse(beside, "quantization", format!("the tensor {suffix} beside it is missing"))
        })
    }

    /// Refuses a tensor that is not of this type and shape.
    fn check(
        &self,
        found: Found<'a>,
        dtypes: &[Dtype],
        shape: &[usize],
    ) -> Result<(), FormatError> {
        if !dtypes.contains(&found.1.dtype) {
            let allowed = dtypes.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            let message = format!("{}; allowed: {allowed}", found.1.dtype);
            return Err(self.refuse(found, "dtype", message));
        }
        if found.1.shape != shape {
            let message = format!("{:?}, wanted: {shape:?}", found.1.shape);
            return Err(self.refuse(found, "shape", message));
        }
        Ok(())
    }

    /// The extents of a matrix.
    fn matrix(&self, found: Found<'a>) -> Result<[usize; 2], FormatError> {
        match found.1.shape[..] {
            [rows, cols] if rows > 0 && cols > 0 => Ok([rows, cols]),
            _ => {
                let message = format!("{:?}, wanted: a matrix", found.1.shape);
                Err(self.refuse(found, "shape", message))
            }
        }
    }

    /// The module's weight, if it has one.
    pub fn weight(&self, config: &HfConfig) -> Result<Option<Made<'a>>, FormatError> {
        if let Some(qweight) = self.find("qweight") {
            return self.int4(qweight, config).map(Some);
        }
        if let Some(packed) = self.find("weight_packed") {
            return self.packed(packed, config).map(Some);
        }
        let Some(weight) = self.find("weight") else { return Ok(None) };
        let (file, stored) = weight;
        if stored.dtype == Dtype::F8_E4M3 {
            return self.fp8(weight, config).map(Some);
        }
        let Some(dtype) = float_type(stored.dtype) else {
            let message = format!("{}; allowed: F32, F16, BF16, F8_E4M3", stored.dtype);
            return Err(self.refuse(weight, "dtype", message));
        };
        if let Some(scale) = self.find("weight_scale").or(self.find("weight_scale_inv")) {
            let message = format!("stands beside a weight of {}, wanted: F8_E4M3", stored.dtype);
            return Err(self.refuse(scale, "quantization", message));
        }
        let (rows, cols) = match stored.shape[..] {
            [rows, cols] => (rows, cols),
            [cols] => (1, cols),
            _ => {
                let message = format!("{:?}, wanted: a vector or a matrix", stored.shape);
                return Err(self.refuse(weight, "shape", message));
            }
        };
        Ok(Some(Made { file, stored, dtype, rows, cols, part: Part::Plain(piece(file, stored)) }))
    }

    fn int4(&self, qweight: Found<'a>, config: &HfConfig) -> Result<Made<'a>, FormatError> {
        let (layout, packing) = match config.quantization {
            Quantization::Awq(layout) => (layout, Packing::Awq),
            Quantization::Gptq(layout) => {
                (layout, Packing::Gptq { zeros_less_one: layout.zeros_less_one })
            }
            _ => {
                let message = "config.json has no quantization_config of the method awq or gptq";
                return Err(self.refuse(qweight, "quantization", message.to_owned()));
            }
        };
        let [words, others] = self.matrix(qweight)?;
        let (inputs, outputs) = match packing {
            Packing::Awq => (words, others.saturating_mul(8)),
            _ => (words.saturating_mul(8), others),
        };
        let group = layout.group.unwrap_or(inputs);
        if !outputs.is_multiple_of(8) || !inputs.is_multiple_of(group) {
            let message = format!(
                "{:?}: {outputs} outputs, wanted: a multiple of 8; {inputs} inputs, wanted: a \
                 multiple of the group_size, {group}",
                qweight.1.shape
            );
            return Err(self.refuse(qweight, "shape", message));
        }
        let dtype = self.int4_type(qweight, inputs, group)?;
        let (qzeros, scales) = (self.beside(qweight, "qzeros")?, self.beside(qweight, "scales")?);
        self.check(qweight, &[Dtype::I32], &qweight.1.shape)?;
        self.check(qzeros, &[Dtype::I32], &[inputs / group, outputs / 8])?;
        let floats = [Dtype::F16, Dtype::BF16, Dtype::F32];
        self.check(scales, &floats, &[inputs / group, outputs])?;
        if let Some(order) = self.find("g_idx") {
            self.check_order(order, inputs, group)?;
        }
        let [of_qweight, of_qzeros, of_scales] =
            [qweight, qzeros, scales].map(|(file, stored)| piece(file, stored));
        let part = Part::Int4(Int4 {
            packing,
            qweight: of_qweight,
            qzeros: Some(of_qzeros),
            scales: of_scales,
            scales_dtype: float_type(scales.1.dtype).unwrap_or(DType::F16),
            outputs,
            inputs,
            group,
            dtype,
        });
        let (file, stored) = qweight;
        Ok(Made { file, stored, dtype, rows: outputs, cols: inputs, part })
    }

    /// The type of blocks that a layer becomes.
    fn int4_type(
        &self,
        found: Found<'a>,
        inputs: usize,
        group: usize,
    ) -> Result<DType, FormatError> {
        int4::dtype_of(inputs, group).ok_or_else(|| {
            let message = format!(
                "{inputs} inputs in groups of {group}; supported: multiples of 64 in groups of \
                 multiples of 32"
            );
            self.refuse(found, "group_size", message)
        })
    }

    /// A layer of compressed-tensors, `pack-quantized`.
    fn packed(&self, packed: Found<'a>, config: &HfConfig) -> Result<Made<'a>, FormatError> {
        let Quantization::Packed(layout) = config.quantization else {
            let message = "config.json has no quantization_config of the format pack-quantized";
            return Err(self.refuse(packed, "quantization", message.to_owned()));
        };
        let [outputs, words] = self.matrix(packed)?;
        let inputs = words.saturating_mul(8);
        let group = layout.group.unwrap_or(inputs);
        if !inputs.is_multiple_of(group) {
            let message = format!(
                "{:?}: {inputs} inputs, wanted: a multiple of the group_size, {group}",
                packed.1.shape
            );
            return Err(self.refuse(packed, "shape", message));
        }
        let dtype = self.int4_type(packed, inputs, group)?;
        let scales = self.beside(packed, "weight_scale")?;
        let floats = [Dtype::F16, Dtype::BF16, Dtype::F32];
        self.check(packed, &[Dtype::I32], &packed.1.shape)?;
        self.check(scales, &floats, &[outputs, inputs / group])?;
        let zeros = match layout.is_symmetric {
            true => None,
            false => Some(self.beside(packed, "weight_zero_point")?),
        };
        if let Some(zeros) = zeros {
            self.check(zeros, &[Dtype::I32], &[outputs.div_ceil(8), inputs / group])?;
        }
        if let Some(shape) = self.find("weight_shape") {
            self.check(shape, &[Dtype::I64], &[2])?;
            let bytes = &self.files[shape.0].bytes()[shape.1.bytes.clone()];
            let got: Vec<_> = bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect();
            if got != [outputs as i64, inputs as i64] {
                let message = format!("{got:?}, wanted: [{outputs}, {inputs}]");
                return Err(self.refuse(shape, "value", message));
            }
        }
        if let Some(order) = self.find("weight_g_idx") {
            self.check_order(order, inputs, group)?;
        }
        let (file, stored) = packed;
        let part = Part::Int4(Int4 {
            packing: Packing::CompressedTensors,
            qweight: piece(file, stored),
            qzeros: zeros.map(|(file, stored)| piece(file, stored)),
            scales: piece(scales.0, scales.1),
            scales_dtype: float_type(scales.1.dtype).unwrap_or(DType::F16),
            outputs,
            inputs,
            group,
            dtype,
        });
        Ok(Made { file, stored, dtype, rows: outputs, cols: inputs, part })
    }

    /// Refuses groups that are not runs of inputs: GPTQ's `desc_act` sorts inputs by their weight.
    fn check_order(
        &self,
        order: Found<'a>,
        inputs: usize,
        group: usize,
    ) -> Result<(), FormatError> {
        self.check(order, &[Dtype::I32], &[inputs])?;
        let bytes = &self.files[order.0].bytes()[order.1.bytes.clone()];
        let groups = bytes.as_chunks::<4>().0.iter().map(|bytes| i32::from_le_bytes(*bytes));
        for (input, got) in groups.enumerate() {
            let wanted = (input / group) as i32;
            if got != wanted {
                let message = format!(
                    "input {input} is in group {got}, wanted: {wanted}; inputs in the order of \
                     their activations (desc_act, \"act-order\") are not supported"
                );
                return Err(self.refuse(order, "value", message));
            }
        }
        Ok(())
    }

    fn fp8(&self, weight: Found<'a>, config: &HfConfig) -> Result<Made<'a>, FormatError> {
        let [rows, cols] = self.matrix(weight)?;
        let scales = match self.find("weight_scale") {
            Some(scales) => scales,
            None => self.beside(weight, "weight_scale_inv")?,
        };
        let floats = [Dtype::F32, Dtype::BF16, Dtype::F16];
        let configured = match config.quantization {
            Quantization::Fp8 { block } => block,
            _ => None,
        };
        let shape = &scales.1.shape[..];
        let block = match (shape, configured) {
            ([] | [1] | [1, 1], _) => [rows, cols],
            ([count] | [count, 1], None) if *count == rows => [1, cols],
            (_, Some([block_rows, block_cols])) => {
                let wanted = [rows.div_ceil(block_rows), cols.div_ceil(block_cols)];
                self.check(scales, &floats, &wanted)?;
                [block_rows, block_cols]
            }
            _ => {
                let message = format!(
                    "{shape:?}; allowed: [], [1], [{rows}, 1], or what weight_block_size in \
                     config.json says"
                );
                return Err(self.refuse(scales, "shape", message));
            }
        };
        self.check(scales, &floats, shape)?;
        let Some(dtype) = fp8::dtype_of(cols, block[1]) else {
            let message = format!(
                "rows of {cols} elements with a scale for every {}; supported: multiples of 32",
                block[1]
            );
            return Err(self.refuse(weight, "shape", message));
        };
        let (file, stored) = weight;
        let part = Part::Fp8(fp8::Fp8 {
            weight: piece(file, stored),
            scales: piece(scales.0, scales.1),
            scales_dtype: float_type(scales.1.dtype).unwrap_or(DType::F32),
            cols,
            block,
            dtype,
        });
        Ok(Made { file, stored, dtype, rows, cols, part })
    }
}
