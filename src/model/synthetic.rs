//! Models that exist only as a shape: the published dimensions of well-known models with element
//! types of choice and no file. Speed depends on nothing else, so benchmarks run on them.

use super::file_type::{FileType, Role, Site};
use super::{
    Activation, AttentionSpec, DenseFfnSpec, FfnSpec, LayerSpec, LinearSpec, ModelSpec, NormSpec,
    RopeScaling, RopeSpec, RopeStyle, TensorRef,
};
use crate::tensor::DType;

/// The dimensions of a dense decoder.
#[derive(Debug)]
struct Shape {
    name: &'static str,
    family: Family,
    layers: usize,
    embedding_dim: usize,
    n_heads: usize,
    n_kv_heads: usize,
    head_dim: usize,
    n_ff: usize,
    vocab_size: usize,
    context_tokens: usize,
    output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    /// Llama 3: no biases.
    Llama,
    /// Qwen 2 and 2.5: biases on query, key and value.
    Qwen2,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Output {
    /// The embedding.
    Tied,
    /// A matrix of its own.
    Own,
}

/// `[layers, embedding, heads, KV heads, head, feed-forward, vocabulary, context]` in a row.
const fn shape(name: &'static str, family: Family, output: Output, sizes: [usize; 8]) -> Shape {
    let [layers, embedding_dim, n_heads, n_kv_heads, head_dim, n_ff, vocab_size, context_tokens] =
        sizes;
    Shape {
        name,
        family,
        layers,
        embedding_dim,
        n_heads,
        n_kv_heads,
        head_dim,
        n_ff,
        vocab_size,
        context_tokens,
        output,
    }
}

/// Llama 3.1 and 3.2, Qwen 2.5, by their `config.json`; two tiny ones to try things with.
#[rustfmt::skip]
const SHAPES: [Shape; 7] = [
    shape("llama-1b", Family::Llama, Output::Tied, [16, 2048, 32, 8, 64, 8192, 128_256, 131_072]),
    shape("llama-3b", Family::Llama, Output::Tied, [28, 3072, 24, 8, 128, 8192, 128_256, 131_072]),
    shape("llama-8b", Family::Llama, Output::Own, [32, 4096, 32, 8, 128, 14336, 128_256, 131_072]),
    shape("llama-70b", Family::Llama, Output::Own, [80, 8192, 64, 8, 128, 28672, 128_256, 131_072]),
    shape("qwen2.5-7b", Family::Qwen2, Output::Own, [28, 3584, 28, 4, 128, 18944, 152_064, 32_768]),
    shape("tiny", Family::Llama, Output::Tied, [2, 256, 4, 2, 64, 512, 512, 2048]),
    shape("tiny-qwen2", Family::Qwen2, Output::Own, [2, 256, 4, 2, 64, 512, 512, 2048]),
];

/// Shapes whose layers choose among experts, an operation that the executor does not have.
const SHAPES_WITH_EXPERTS: [&str; 2] = ["mixtral-8x7b", "qwen3-30b-a3b"];

/// Which type each matrix is stored as.
#[derive(Clone, Copy, Debug)]
pub enum WeightTypes {
    /// As in a file that llama.cpp makes.
    File(FileType),
    /// All alike, the output too.
    Pure(DType),
}

/// Marks a type that all matrices are to have.
const PURE: &str = "pure-";

impl WeightTypes {
    /// `q4_k_m` or `pure-q4_k`.
    fn parse(text: &str) -> Option<Self> {
        let lower = text.to_ascii_lowercase();
        match lower.strip_prefix(PURE) {
            Some(dtype) => dtype.parse().ok().map(Self::Pure),
            None => FileType::from_name(&lower).map(Self::File),
        }
    }

    /// What llama.cpp calls it, such as `Q4_K - Medium`.
    pub fn title(self) -> String {
        match self {
            Self::File(file_type) => file_type.title().to_owned(),
            Self::Pure(dtype) => format!("{dtype} - Pure"),
        }
    }

    fn dtype(self, role: Role, site: Site) -> DType {
        match self {
            Self::File(file_type) => file_type.dtype(role, site),
            Self::Pure(dtype) => dtype,
        }
    }
}

/// Why there is no such model.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SyntheticError {
    /// The text is not `SHAPE:TYPE`.
    #[error("{got:?} is no synthetic model; write SHAPE:TYPE, such as llama-8b:q4_0")]
    Form {
        /// The text.
        got: String,
    },
    /// No shape of that name.
    #[error("no shape {got:?}; available: {available}")]
    UnknownShape {
        /// The name.
        got: String,
        /// All names that there are.
        available: String,
    },
    /// A mixture of experts.
    #[error(
        "the shape {got} is a mixture of experts, which can't be run yet; available: {available}"
    )]
    NeedsExperts {
        /// The name.
        got: String,
        /// Names of shapes that can be run.
        available: String,
    },
    /// No such type of weights.
    #[error("no weight type {got:?}; available: {available}, and pure-TYPE for one type alone")]
    UnknownType {
        /// The name.
        got: String,
        /// All names that there are.
        available: String,
    },
}

/// A named shape with a type for its weights, such as `llama-8b:q4_0`.
#[derive(Clone, Copy, Debug)]
pub struct SyntheticModel {
    shape: &'static Shape,
    types: WeightTypes,
}

impl std::str::FromStr for SyntheticModel {
    type Err = SyntheticError;

    fn from_str(text: &str) -> Result<Self, SyntheticError> {
        let form = || SyntheticError::Form { got: text.to_owned() };
        let (name, types) = text.split_once(':').ok_or_else(form)?;
        let (got, available) = (name.to_owned(), Self::shapes().collect::<Vec<_>>().join(", "));
        let lower = name.to_ascii_lowercase();
        let Some(shape) = SHAPES.iter().find(|shape| shape.name == lower) else {
            return Err(match SHAPES_WITH_EXPERTS.contains(&lower.as_str()) {
                true => SyntheticError::NeedsExperts { got, available },
                false => SyntheticError::UnknownShape { got, available },
            });
        };
        let types = WeightTypes::parse(types).ok_or_else(|| {
            let available = FileType::names().collect::<Vec<_>>().join(", ");
            SyntheticError::UnknownType { got: types.to_owned(), available }
        })?;
        Ok(Self { shape, types })
    }
}

impl SyntheticModel {
    /// The names of all shapes that can be run.
    pub fn shapes() -> impl Iterator<Item = &'static str> {
        SHAPES.iter().map(|shape| shape.name)
    }

    /// Which types its matrices have.
    pub fn types(&self) -> WeightTypes {
        self.types
    }

    /// The model as data. Its tensors have the names that a GGUF file would give them.
    pub fn spec(&self) -> ModelSpec {
        let shape = self.shape;
        let embedding_role = match shape.output {
            Output::Tied => Role::Output,
            Output::Own => Role::Embedding,
        };
        let (rows, cols) = (shape.vocab_size, shape.embedding_dim);
        let embedding = self.matrix("token_embd", embedding_role, 0, [rows, cols]);
        let output = match shape.output {
            Output::Tied => embedding.clone(),
            Output::Own => self.matrix("output", Role::Output, 0, [rows, cols]),
        };
        ModelSpec {
            name: shape.name.to_owned(),
            architecture: match shape.family {
                Family::Llama => "llama",
                Family::Qwen2 => "qwen2",
            },
            vocab_size: shape.vocab_size,
            embedding_dim: shape.embedding_dim,
            context_tokens_max: shape.context_tokens,
            embedding,
            embedding_scale: None,
            layers: (0..shape.layers).map(|layer| self.layer(layer)).collect(),
            output_norm: self.norm("output_norm"),
            output,
            output_bias: None,
            logit_softcap: None,
            unused_tensors: Vec::new(),
        }
    }

    fn matrix(&self, name: &str, role: Role, layer: usize, [rows, cols]: [usize; 2]) -> TensorRef {
        let Shape { layers, n_heads, n_kv_heads, .. } = *self.shape;
        let site = Site { layer, layers, heads_per_kv_head: n_heads / n_kv_heads };
        TensorRef {
            name: format!("{name}.weight"),
            dtype: self.types.dtype(role, site),
            rows,
            cols,
        }
    }

    fn norm(&self, name: &str) -> NormSpec {
        let weight = vector(format!("{name}.weight"), self.shape.embedding_dim);
        let eps = match self.shape.family {
            Family::Llama => 1e-5,
            Family::Qwen2 => 1e-6,
        };
        NormSpec { weight, eps }
    }

    fn layer(&self, layer: usize) -> LayerSpec {
        let name = |part: &str| format!("blk.{layer}.{part}");
        let linear = |part: &str, role, rows_cols| LinearSpec {
            weight: self.matrix(&name(part), role, layer, rows_cols),
            bias: None,
        };
        let (width, n_ff) = (self.shape.embedding_dim, self.shape.n_ff);
        LayerSpec {
            attention_norm: self.norm(&name("attn_norm")),
            attention: self.attention(&linear),
            attention_post_norm: None,
            ffn_norm: self.norm(&name("ffn_norm")),
            ffn: FfnSpec::Dense(DenseFfnSpec {
                gate: linear("ffn_gate", Role::Other, [n_ff, width]),
                up: linear("ffn_up", Role::Other, [n_ff, width]),
                down: linear("ffn_down", Role::Down, [width, n_ff]),
                activation: Activation::Silu,
            }),
            ffn_post_norm: None,
        }
    }

    fn attention(&self, linear: &dyn Fn(&str, Role, [usize; 2]) -> LinearSpec) -> AttentionSpec {
        let Shape { embedding_dim: width, n_heads, n_kv_heads, head_dim, .. } = *self.shape;
        let (query, key) = (n_heads * head_dim, n_kv_heads * head_dim);
        let projection = |part: &str, role, rows| {
            let mut linear = linear(part, role, [rows, width]);
            if self.shape.family == Family::Qwen2 {
                let name = linear.weight.name.replace(".weight", ".bias");
                linear.bias = Some(vector(name, rows));
            }
            linear
        };
        AttentionSpec {
            n_heads,
            n_kv_heads,
            head_dim,
            query: projection("attn_q", Role::Other, query),
            key: projection("attn_k", Role::Other, key),
            value: projection("attn_v", Role::Value, key),
            output: linear("attn_output", Role::AttentionOutput, [width, query]),
            query_norm: None,
            key_norm: None,
            rope: self.rope(),
            window: None,
            scale: 1.0 / (head_dim as f32).sqrt(),
            softcap: None,
        }
    }

    fn rope(&self) -> RopeSpec {
        let (style, base) = match self.shape.family {
            Family::Llama => (RopeStyle::Interleaved, 500_000.0),
            Family::Qwen2 => (RopeStyle::HalfSplit, 1_000_000.0),
        };
        RopeSpec {
            style,
            dims: self.shape.head_dim,
            base,
            scaling: RopeScaling::None,
            frequency_factors: None,
            attention_factor: 1.0,
        }
    }
}

fn vector(name: String, cols: usize) -> TensorRef {
    TensorRef { name, dtype: DType::F32, rows: 1, cols }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(text: &str) -> ModelSpec {
        text.parse::<SyntheticModel>().unwrap().spec()
    }

    /// Parameters by the models' cards, bytes by llama.cpp's files (8B Q4_0: 4.33 GiB).
    #[test]
    fn shapes_weigh_what_the_models_do() {
        for (text, parameters) in [
            ("llama-1b:q4_0", 1_235_814_400),
            ("llama-3b:q4_0", 3_212_749_824),
            ("llama-8b:q4_0", 8_030_261_248),
            ("llama-70b:q4_0", 70_553_706_496),
            ("qwen2.5-7b:q4_0", 7_615_616_512),
        ] {
            assert_eq!(spec(text).parameters(), parameters, "{text}");
        }
        let gib = |text: &str| spec(text).weight_bytes() as f64 / f64::from(1 << 30);
        for (text, wanted) in
            [("llama-8b:q4_0", 4.33), ("llama-8b:q4_k_m", 4.58), ("llama-8b:q8_0", 7.95)]
        {
            assert!((gib(text) - wanted).abs() < 0.01, "{text}: {} GiB", gib(text));
        }
    }

    #[test]
    fn every_type_fits_every_shape() {
        let pure = DType::ALL.map(|dtype| format!("{PURE}{dtype}"));
        let types = FileType::names().map(str::to_owned).chain(pure);
        for (shape, types) in
            types.flat_map(|t| SyntheticModel::shapes().map(move |s| (s, t.clone())))
        {
            spec(&format!("{shape}:{types}")).for_each_tensor(&mut |tensor| {
                assert!(tensor.dtype.row_bytes(tensor.cols).is_some(), "{shape} {tensor:?}");
            });
        }
    }

    #[test]
    fn what_is_not_there_is_refused_with_what_is() {
        let refused = |text: &str| text.parse::<SyntheticModel>().unwrap_err();
        assert!(matches!(refused("llama-8b"), SyntheticError::Form { .. }));
        assert!(matches!(refused("llama-9b:q4_0"), SyntheticError::UnknownShape { .. }));
        assert!(matches!(refused("mixtral-8x7b:q4_0"), SyntheticError::NeedsExperts { .. }));
        assert!(matches!(refused("llama-8b:q4"), SyntheticError::UnknownType { .. }));
        assert!(matches!(refused("llama-8b:pure-q4_k_m"), SyntheticError::UnknownType { .. }));
        assert!(refused("qwen3-30b-a3b:q4_0").to_string().contains("llama-70b"));
    }
}
