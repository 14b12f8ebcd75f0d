//! Checked access to a checkpoint for the families: keys under the family's prefix, and tensors
//! that must have a given shape.

use super::{DenseFfnSpec, FfnSpec, LinearSpec, NormSpec, TensorRef};
use crate::formats::{Checkpoint, FormatError, Metadata, TensorInfo, Value};
use std::ops::RangeInclusive;

/// Deepest models have fewer than 150 layers.
const LAYERS_MAX: usize = 1024;
const HEADS_MAX: usize = 4096;
const HEAD_DIM_MAX: usize = 4096;
const WIDTH_MAX: usize = 1 << 22;
const CONTEXT_TOKENS_MAX: usize = 1 << 27;

/// Whether a linear map has a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bias {
    /// If the checkpoint has one.
    Optional,
    /// Always, in this family.
    Required,
}

/// A checkpoint read as a model of one family.
pub(super) struct Source<'a> {
    checkpoint: &'a Checkpoint,
    /// GGUF's word for the family, the prefix of its keys.
    pub architecture: &'static str,
}

/// The numbers that all families have.
#[derive(Debug)]
pub(super) struct Dimensions {
    pub vocab_size: usize,
    pub embedding_dim: usize,
    pub context_tokens_max: usize,
    pub head_dim: usize,
    pub eps: f32,
    /// Of each layer.
    pub layers: Vec<LayerDimensions>,
}

/// What may differ from layer to layer.
#[derive(Clone, Copy, Debug)]
pub(super) struct LayerDimensions {
    pub n_heads: usize,
    pub n_kv_heads: usize,
    pub n_ff: usize,
}

impl<'a> Source<'a> {
    pub fn new(checkpoint: &'a Checkpoint, architecture: &'static str) -> Self {
        Self { checkpoint, architecture }
    }

    pub fn metadata(&self) -> &'a Metadata {
        self.checkpoint.metadata()
    }

    pub fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    /// An error about a key of the family.
    pub fn refuse(&self, key: &str, message: impl Into<String>) -> FormatError {
        self.metadata().refuse(&self.key(key), message)
    }

    fn within(
        &self,
        key: &str,
        got: u32,
        allowed: RangeInclusive<usize>,
    ) -> Result<usize, FormatError> {
        if allowed.contains(&(got as usize)) {
            return Ok(got as usize);
        }
        let (low, high) = allowed.into_inner();
        Err(self.refuse(key, format!("{got}; allowed: {low} to {high}")))
    }

    /// A count within bounds.
    pub fn count(&self, key: &str, allowed: RangeInclusive<usize>) -> Result<usize, FormatError> {
        let got = self.metadata().u32(&self.key(key))?;
        self.within(key, got, allowed)
    }

    /// A count within bounds, if present.
    pub fn count_opt(
        &self,
        key: &str,
        allowed: RangeInclusive<usize>,
    ) -> Result<Option<usize>, FormatError> {
        let got = self.metadata().u32_opt(&self.key(key))?;
        got.map(|got| self.within(key, got, allowed)).transpose()
    }

    /// The width of something, or 0, if present.
    pub fn width_opt(&self, key: &str) -> Result<Option<usize>, FormatError> {
        self.count_opt(key, 0..=WIDTH_MAX)
    }

    /// A count that is one number for all layers or an array of one per layer.
    fn count_per_layer(
        &self,
        key: &str,
        layers: usize,
        count_max: usize,
    ) -> Result<Option<Vec<usize>>, FormatError> {
        let Some(Value::Array(array)) = self.metadata().get(&self.key(key)) else {
            return Ok(self.count_opt(key, 1..=count_max)?.map(|count| vec![count; layers]));
        };
        if array.len() != layers {
            let message =
                format!("{} entries, wanted: one for each of {layers} layers", array.len());
            return Err(self.refuse(key, message));
        }
        let check = |got: i64| {
            let got = u32::try_from(got).unwrap_or(u32::MAX);
            self.within(key, got, 1..=count_max)
        };
        array.integers()?.map(check).collect::<Result<_, _>>().map(Some)
    }

    fn missing(&self, key: &str) -> FormatError {
        self.refuse(key, "the key is missing")
    }

    /// A finite number above 0, if present.
    pub fn positive_opt(&self, key: &str) -> Result<Option<f32>, FormatError> {
        let Some(got) = self.metadata().f32_opt(&self.key(key))? else { return Ok(None) };
        if got.is_finite() && got > 0.0 {
            return Ok(Some(got));
        }
        Err(self.refuse(key, format!("{got}; allowed: a finite number above 0")))
    }

    /// A cap that 0 switches off.
    pub fn softcap(&self, key: &str) -> Result<Option<f32>, FormatError> {
        match self.metadata().f32_opt(&self.key(key))? {
            Some(0.0) => Ok(None),
            _ => self.positive_opt(key),
        }
    }

    pub fn dimensions(&self) -> Result<Dimensions, FormatError> {
        let layers = self.count("block_count", 1..=LAYERS_MAX)?;
        let embedding_dim = self.count("embedding_length", 1..=WIDTH_MAX)?;
        let heads = self.count_per_layer("attention.head_count", layers, HEADS_MAX)?;
        let heads = heads.ok_or_else(|| self.missing("attention.head_count"))?;
        let kv_heads = self.count_per_layer("attention.head_count_kv", layers, HEADS_MAX)?;
        let kv_heads = kv_heads.unwrap_or_else(|| heads.clone());
        let n_ff = self.count_per_layer("feed_forward_length", layers, WIDTH_MAX)?;
        let n_ff = n_ff.ok_or_else(|| self.missing("feed_forward_length"))?;
        if let Some((q, k)) = heads.iter().zip(&kv_heads).find(|(q, k)| !q.is_multiple_of(**k)) {
            let message = format!("{k} key heads do not divide {q} query heads");
            return Err(self.refuse("attention.head_count_kv", message));
        }
        let layer = |((n_heads, n_kv_heads), n_ff)| LayerDimensions { n_heads, n_kv_heads, n_ff };
        Ok(Dimensions {
            vocab_size: self.vocab_size()?,
            embedding_dim,
            context_tokens_max: self.count("context_length", 1..=CONTEXT_TOKENS_MAX)?,
            head_dim: self.head_dim(embedding_dim, heads[0])?,
            eps: self.eps()?,
            layers: heads.into_iter().zip(kv_heads).zip(n_ff).map(layer).collect(),
        })
    }

    fn eps(&self) -> Result<f32, FormatError> {
        let key = "attention.layer_norm_rms_epsilon";
        match self.positive_opt(key)? {
            Some(eps) if eps < 1.0 => Ok(eps),
            Some(eps) => Err(self.refuse(key, format!("{eps}; allowed: below 1"))),
            None => Err(self.missing(key)),
        }
    }

    /// `attention.key_length`, or the embedding shared out to the heads.
    fn head_dim(&self, embedding_dim: usize, n_heads: usize) -> Result<usize, FormatError> {
        let key = "attention.key_length";
        let given = self.count_opt(key, 1..=HEAD_DIM_MAX)?;
        if given.is_none() && !embedding_dim.is_multiple_of(n_heads) {
            let message = format!("{n_heads} heads do not divide the embedding's {embedding_dim}");
            return Err(self.refuse("attention.head_count", message));
        }
        let head_dim = given.unwrap_or(embedding_dim / n_heads);
        let named = if given.is_some() { key } else { "attention.head_count" };
        if !head_dim.is_multiple_of(2) {
            let message = format!("heads of {head_dim} elements; rotation takes an even number");
            return Err(self.refuse(named, message));
        }
        if head_dim > HEAD_DIM_MAX {
            let message = format!("heads of {head_dim} elements; allowed: at most {HEAD_DIM_MAX}");
            return Err(self.refuse(named, message));
        }
        match self.count_opt("attention.value_length", 1..=HEAD_DIM_MAX)? {
            Some(value) if value != head_dim => {
                let message = format!("{value}; only the keys' length, {head_dim}, is supported");
                Err(self.refuse("attention.value_length", message))
            }
            _ => Ok(head_dim),
        }
    }

    /// The tokenizer's number of tokens; without a tokenizer the key or the embedding says it.
    fn vocab_size(&self) -> Result<usize, FormatError> {
        let name = "token_embd.weight";
        let info = self.info(name)?;
        let rows = info.shape.rows();
        let (key, tokens) = match self.metadata().array_opt("tokenizer.ggml.tokens")? {
            Some(tokens) => ("tokenizer.ggml.tokens".to_owned(), tokens.len()),
            None => {
                let count = self.count_opt("vocab_size", 1..=WIDTH_MAX)?;
                (self.key("vocab_size"), count.unwrap_or(rows))
            }
        };
        if rows == tokens && tokens > 0 && tokens <= u32::MAX as usize {
            return Ok(tokens);
        }
        let message = format!("is {}, so has {rows} rows; {key} says {tokens}", info.shape);
        Err(self.checkpoint.refuse_tensor(&info, message))
    }

    fn info(&self, name: &str) -> Result<TensorInfo<'a>, FormatError> {
        self.checkpoint.tensor_info(name).ok_or_else(|| self.checkpoint.refuse_missing(name))
    }

    pub fn has(&self, name: &str) -> bool {
        self.checkpoint.tensor_info(name).is_some()
    }

    /// A tensor that must be `rows x cols`.
    pub fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<TensorRef, FormatError> {
        let rank = if rows == 1 { 1 } else { 2 };
        self.shaped(name, &[cols, rows][..rank])
    }

    /// A tensor of `count` matrices that must each be `rows x cols`, as one with all their rows.
    pub fn matrices(
        &self,
        name: &str,
        count: usize,
        [rows, cols]: [usize; 2],
    ) -> Result<TensorRef, FormatError> {
        self.shaped(name, &[cols, rows, count])
    }

    /// A tensor that must have these extents, fastest first; further ones must be 1.
    fn shaped(&self, name: &str, wanted: &[usize]) -> Result<TensorRef, FormatError> {
        let info = self.info(name)?;
        // Writers drop trailing extents of 1, or keep them.
        let extent = |dims: &[usize], index: usize| dims.get(index).copied().unwrap_or(1);
        let got = info.shape.dims();
        let ranks = 0..got.len().max(wanted.len());
        if ranks.into_iter().any(|index| extent(got, index) != extent(wanted, index)) {
            let message = format!("is {}, wanted: {wanted:?}", info.shape);
            return Err(self.checkpoint.refuse_tensor(&info, message));
        }
        let dtype = self.checkpoint.dtype(name)?;
        let (rows, cols) = (info.shape.rows(), info.shape.cols());
        Ok(TensorRef { name: name.to_owned(), dtype, rows, cols })
    }

    /// A vector that must have `len` elements.
    pub fn vector(&self, name: &str, len: usize) -> Result<TensorRef, FormatError> {
        self.matrix(name, 1, len)
    }

    /// A vector, if the checkpoint has it.
    pub fn vector_opt(&self, name: &str, len: usize) -> Result<Option<TensorRef>, FormatError> {
        if self.has(name) { self.vector(name, len).map(Some) } else { Ok(None) }
    }

    /// `PREFIX.weight` and perhaps `PREFIX.bias`; `[outputs, inputs]`.
    pub fn linear(
        &self,
        prefix: &str,
        [outputs, inputs]: [usize; 2],
        bias: Bias,
    ) -> Result<LinearSpec, FormatError> {
        let weight = self.matrix(&format!("{prefix}.weight"), outputs, inputs)?;
        let name = format!("{prefix}.bias");
        let bias = match bias {
            Bias::Optional => self.vector_opt(&name, outputs)?,
            Bias::Required => Some(self.vector(&name, outputs)?),
        };
        Ok(LinearSpec { weight, bias })
    }

    /// `PREFIX.weight` of a norm over `len` elements.
    pub fn norm(&self, prefix: &str, len: usize, eps: f32) -> Result<NormSpec, FormatError> {
        Ok(NormSpec { weight: self.vector(&format!("{prefix}.weight"), len)?, eps })
    }

    /// The gated feed-forward network of a layer.
    pub fn ffn(
        &self,
        layer: usize,
        dimensions: &Dimensions,
        activation: super::Activation,
    ) -> Result<FfnSpec, FormatError> {
        let (width, n_ff) = (dimensions.embedding_dim, dimensions.layers[layer].n_ff);
        let linear =
            |name: &str, shape| self.linear(&format!("blk.{layer}.{name}"), shape, Bias::Optional);
        Ok(FfnSpec::Dense(DenseFfnSpec {
            gate: linear("ffn_gate", [n_ff, width])?,
            up: linear("ffn_up", [n_ff, width])?,
            down: linear("ffn_down", [width, n_ff])?,
            activation,
        }))
    }

    /// All tensors of the checkpoint.
    pub fn tensors(&self) -> impl Iterator<Item = TensorInfo<'a>> {
        self.checkpoint.tensors()
    }

    /// An error about a tensor's description.
    pub fn refuse_tensor(&self, info: &TensorInfo<'_>, message: impl Into<String>) -> FormatError {
        self.checkpoint.refuse_tensor(info, message)
    }
}
