//! A whole decoder-only transformer as data: what it computes, in which order, from which tensors.

use super::{ExpertsSpec, FfnSpec, RopeSpec};
use crate::tensor::{DType, KvDType};

/// A stored tensor that a model uses: `rows x cols`, row-major; a vector has one row.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TensorRef {
    /// The tensor's name in the checkpoint.
    pub name: String,
    /// How its elements are stored.
    pub dtype: DType,
    /// Rows: outputs of a linear map, tokens of an embedding, 1 for a vector.
    pub rows: usize,
    /// Elements of a row: inputs of a linear map, the length of a vector.
    pub cols: usize,
}

impl TensorRef {
    /// Bytes of the tensor as stored.
    pub fn bytes(&self) -> u64 {
        let row_bytes = self.cols / self.dtype.block_elements() * self.dtype.block_bytes();
        row_bytes as u64 * self.rows as u64
    }

    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.rows as u64 * self.cols as u64
    }
}

/// `y = W x + b`.
#[derive(Clone, Debug, PartialEq)]
pub struct LinearSpec {
    /// W: `[outputs, inputs]`.
    pub weight: TensorRef,
    /// b: `[outputs]`.
    pub bias: Option<TensorRef>,
}

/// Root-mean-square norm (arXiv 1910.07467): `y = x / sqrt(mean(x^2) + eps) * weight`. Gemma's
/// `1 + weight` is already added in GGUF files.
#[derive(Clone, Debug, PartialEq)]
pub struct NormSpec {
    /// `[n]`, where n is the length that is normalised.
    pub weight: TensorRef,
    /// Added to the mean square.
    pub eps: f32,
}

/// Grouped-query attention (arXiv 2305.13245) with rotary positions.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionSpec {
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; divides `n_heads`. Query head h reads key head `h / (n_heads /
    /// n_kv_heads)`.
    pub n_kv_heads: usize,
    /// Elements of a head; even.
    pub head_dim: usize,
    /// `[n_heads * head_dim, embedding_dim]`.
    pub query: LinearSpec,
    /// `[n_kv_heads * head_dim, embedding_dim]`.
    pub key: LinearSpec,
    /// `[n_kv_heads * head_dim, embedding_dim]`.
    pub value: LinearSpec,
    /// `[embedding_dim, n_heads * head_dim]`.
    pub output: LinearSpec,
    /// Over each query head's `head_dim`, before the rotation.
    pub query_norm: Option<NormSpec>,
    /// Over each key head's `head_dim`, before the rotation.
    pub key_norm: Option<NormSpec>,
    /// Rotary position embedding of queries and keys.
    pub rope: RopeSpec,
    /// Sliding window: position p sees positions q with `p - q < window`, itself included.
    pub window: Option<usize>,
    /// Multiplies query times key.
    pub scale: f32,
    /// Scores become `softcap * tanh(score / softcap)` before the softmax.
    pub softcap: Option<f32>,
}

/// One layer: `x += post(attention(norm(x)))`, then `x += post(ffn(norm(x)))`.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerSpec {
    /// Before attention.
    pub attention_norm: NormSpec,
    /// Attention.
    pub attention: AttentionSpec,
    /// After attention, before the residual is added.
    pub attention_post_norm: Option<NormSpec>,
    /// Before the feed-forward network.
    pub ffn_norm: NormSpec,
    /// The feed-forward network.
    pub ffn: FfnSpec,
    /// After the feed-forward network, before the residual is added.
    pub ffn_post_norm: Option<NormSpec>,
}

/// A whole model. Every tensor that it names exists in the checkpoint with that shape and type.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// What the file calls the model.
    pub name: String,
    /// GGUF's word for the family, such as `llama`.
    pub architecture: &'static str,
    /// Number of tokens: rows of the embedding and of the output.
    pub vocab_size: usize,
    /// Length of the residual stream.
    pub embedding_dim: usize,
    /// Longest sequence that the model was trained for.
    pub context_tokens_max: usize,
    /// `[vocab_size, embedding_dim]`.
    pub embedding: TensorRef,
    /// Multiplies the embedding's row.
    pub embedding_scale: Option<f32>,
    /// The layers, first to last.
    pub layers: Vec<LayerSpec>,
    /// Before the output.
    pub output_norm: NormSpec,
    /// `[vocab_size, embedding_dim]`; the embedding itself when tied.
    pub output: TensorRef,
    /// `[vocab_size]`, added to the logits.
    pub output_bias: Option<TensorRef>,
    /// Logits become `softcap * tanh(logit / softcap)`.
    pub logit_softcap: Option<f32>,
    /// Tensors of the checkpoint outside its layers that the model does not read.
    pub unused_tensors: Vec<String>,
}

impl ModelSpec {
    /// Whether the output is the embedding.
    pub fn is_output_tied(&self) -> bool {
        self.output == self.embedding
    }

    /// Bytes of keys and values that one token leaves behind in all layers.
    pub fn kv_bytes_per_token(&self, dtype: KvDType) -> u64 {
        self.layers.iter().map(|layer| layer.kv_bytes_per_token(dtype)).sum()
    }

    /// Bytes of all weights as stored, each tensor counted once.
    pub fn weight_bytes(&self) -> u64 {
        let mut bytes = 0;
        let mut frequency_factors = None;
        self.for_each_tensor(&mut |tensor| bytes += tensor.bytes());
        for layer in &self.layers {
            frequency_factors =
                frequency_factors.or(layer.attention.rope.frequency_factors.as_ref());
        }
        bytes + frequency_factors.map_or(0, TensorRef::bytes)
    }

    /// Number of parameters, each counted once.
    pub fn parameters(&self) -> u64 {
        let mut parameters = 0;
        self.for_each_tensor(&mut |tensor| parameters += tensor.elements());
        parameters
    }

    /// Parameters that one token goes through: all but those of the experts that it does not use.
    pub fn active_parameters(&self) -> u64 {
        let experts = self.experts().map(ExpertsSpec::parameters);
        let idle = self.experts().zip(experts).map(|(spec, all)| all - spec.used_of(all));
        self.parameters() - idle.sum::<u64>()
    }

    /// Bytes of all experts of all layers as stored; 0 in a dense model.
    pub fn expert_bytes(&self) -> u64 {
        self.experts().map(ExpertsSpec::bytes).sum()
    }

    /// Bytes of the experts that one token goes through.
    pub fn active_expert_bytes(&self) -> u64 {
        self.experts().map(|experts| experts.used_of(experts.bytes())).sum()
    }

    /// The mixtures of those layers that have one.
    pub fn experts(&self) -> impl Iterator<Item = &ExpertsSpec> {
        self.layers.iter().filter_map(|layer| layer.ffn.experts())
    }

    /// Visits every tensor once, in the order of use, except rope's shared frequency factors.
    pub fn for_each_tensor<'a>(&'a self, visit: &mut dyn FnMut(&'a TensorRef)) {
        visit(&self.embedding);
        for layer in &self.layers {
            layer.for_each_tensor(visit);
        }
        visit(&self.output_norm.weight);
        if !self.is_output_tied() {
            visit(&self.output);
        }
        self.output_bias.iter().for_each(visit);
    }
}

/// Widest residual stream whose queries, keys and values are computed from 16 bits.
const SIXTEEN_BITS_DIM_MAX: usize = 1024;

impl AttentionSpec {
    /// Whether queries, keys and values are computed from activations in 16 bits where other
    /// products have 8: in a narrow model their errors are much of all (`executor/program`), and
    /// their time is little.
    pub fn wants_sixteen_bits(&self) -> bool {
        self.query.weight.cols <= SIXTEEN_BITS_DIM_MAX
    }
}

impl LayerSpec {
    /// Bytes of keys and values that one token leaves behind in it.
    pub fn kv_bytes_per_token(&self, dtype: KvDType) -> u64 {
        (2 * self.attention.n_kv_heads * dtype.head_bytes(self.attention.head_dim)) as u64
    }

    /// Visits every tensor once, in the order of use, except rope's shared frequency factors.
    pub fn for_each_tensor<'a>(&'a self, visit: &mut dyn FnMut(&'a TensorRef)) {
        let attention = &self.attention;
        let norm = |norm: Option<&'a NormSpec>| norm.map(|norm| &norm.weight);
        let linear = |linear: &'a LinearSpec| [Some(&linear.weight), linear.bias.as_ref()];
        let mut tensors = vec![norm(Some(&self.attention_norm))];
        for projection in [&attention.query, &attention.key, &attention.value] {
            tensors.extend(linear(projection));
        }
        tensors.push(norm(attention.query_norm.as_ref()));
        tensors.push(norm(attention.key_norm.as_ref()));
        tensors.extend(linear(&attention.output));
        tensors.push(norm(self.attention_post_norm.as_ref()));
        tensors.push(norm(Some(&self.ffn_norm)));
        tensors.extend(self.ffn.tensors().into_iter().map(Some));
        tensors.push(norm(self.ffn_post_norm.as_ref()));
        tensors.into_iter().flatten().for_each(visit);
    }
}
