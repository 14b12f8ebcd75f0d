//! Models that exist only as a shape: the published dimensions of well-known models with element
//! types of choice and no file. Speed depends on nothing else, so benchmarks run on them.

mod shapes;

use super::file_type::{FileType, Role, Site};
use super::{
    Activation, AttentionSpec, DenseFfnSpec, ExpertsSpec, FfnSpec, LayerSpec, LinearSpec,
    ModelSpec, NormSpec, RopeScaling, RopeSpec, TensorRef,
};
use crate::tensor::DType;
use shapes::{Family, Output, SHAPES, Shape};

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
        let shape = SHAPES.iter().find(|shape| shape.name == lower);
        let shape = shape.ok_or(SyntheticError::UnknownShape { got, available })?;
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
            architecture: shape.family.architecture(),
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
        let Shape { layers, n_heads, n_kv_heads, n_experts: experts, .. } = *self.shape;
        let site = Site { layer, layers, heads_per_kv_head: n_heads / n_kv_heads, experts };
        TensorRef {
            name: format!("{name}.weight"),
            dtype: self.types.dtype(role, site),
            rows,
            cols,
        }
    }

    fn norm(&self, name: &str) -> NormSpec {
        self.norm_of(name, self.shape.embedding_dim)
    }

    fn norm_of(&self, name: &str, length: usize) -> NormSpec {
        NormSpec { weight: vector(format!("{name}.weight"), length), eps: self.shape.family.eps() }
    }

    fn layer(&self, layer: usize) -> LayerSpec {
        let name = |part: &str| format!("blk.{layer}.{part}");
        let linear = |part: &str, role, rows_cols| LinearSpec {
            weight: self.matrix(&name(part), role, layer, rows_cols),
            bias: None,
        };
        LayerSpec {
            attention_norm: self.norm(&name("attn_norm")),
            attention: self.attention(&linear),
            attention_post_norm: None,
            ffn_norm: self.norm(&name("ffn_norm")),
            ffn: self.ffn(&linear),
            ffn_post_norm: None,
        }
    }

    fn ffn(&self, linear: &dyn Fn(&str, Role, [usize; 2]) -> LinearSpec) -> FfnSpec {
        let Shape { embedding_dim: width, n_ff, n_experts, n_used, .. } = *self.shape;
        let activation = Activation::Silu;
        if n_experts == 0 {
            return FfnSpec::Dense(DenseFfnSpec {
                gate: linear("ffn_gate", Role::Other, [n_ff, width]),
                up: linear("ffn_up", Role::Other, [n_ff, width]),
                down: linear("ffn_down", Role::Down, [width, n_ff]),
                activation,
            });
        }
        let experts = |part: &str, role, [rows, cols]: [usize; 2]| {
            linear(part, role, [n_experts * rows, cols]).weight
        };
        let router = linear("ffn_gate_inp", Role::Other, [n_experts, width]).weight;
        FfnSpec::Experts(ExpertsSpec {
            n_experts,
            n_used,
            // Routers are never quantised.
            router: TensorRef { dtype: DType::F32, ..router },
            gate: experts("ffn_gate_exps", Role::Other, [n_ff, width]),
            up: experts("ffn_up_exps", Role::Other, [n_ff, width]),
            down: experts("ffn_down_exps", Role::Down, [width, n_ff]),
            activation,
            weight_scale: 1.0,
        })
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
        let normed_heads = self.shape.family.has_head_norms();
        let head_norm = |part: &str| {
            let name = linear(part, Role::Other, [1, head_dim]).weight.name;
            normed_heads.then(|| self.norm_of(name.trim_end_matches(".weight"), head_dim))
        };
        AttentionSpec {
            n_heads,
            n_kv_heads,
            head_dim,
            query: projection("attn_q", Role::Other, query),
            key: projection("attn_k", Role::Key, key),
            value: projection("attn_v", Role::Value, key),
            output: linear("attn_output", Role::AttentionOutput, [width, query]),
            query_norm: head_norm("attn_q_norm"),
            key_norm: head_norm("attn_k_norm"),
            rope: self.rope(),
            window: None,
            scale: 1.0 / (head_dim as f32).sqrt(),
            softcap: None,
        }
    }

    fn rope(&self) -> RopeSpec {
        RopeSpec {
            style: self.shape.family.rope_style(),
            dims: self.shape.head_dim,
            base: self.shape.family.rope_base(),
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
            ("mixtral-8x7b:q4_0", 46_702_792_704),
            ("qwen3-30b-a3b:q4_0", 30_532_122_624),
        ] {
            assert_eq!(spec(text).parameters(), parameters, "{text}");
        }
        let gib = |text: &str| spec(text).weight_bytes() as f64 / f64::from(1 << 30);
        for (text, wanted) in [
            ("llama-8b:q4_0", 4.33),
            ("llama-8b:q4_k_m", 4.58),
            ("llama-8b:q8_0", 7.95),
            ("qwen3-30b-a3b:q4_k_m", 17.28),
            ("mixtral-8x7b:q4_k_m", 26.49),
        ] {
            assert!((gib(text) - wanted).abs() < 0.01, "{text}: {} GiB", gib(text));
        }
    }

    /// By the models' cards: 12.9 and 3.3 billion.
    #[test]
    fn a_token_goes_through_few_of_the_experts() {
        for (text, billions) in [("mixtral-8x7b:q4_0", 12.9), ("qwen3-30b-a3b:q4_0", 3.35)] {
            let active = spec(text).active_parameters() as f64 / 1e9;
            assert!((active - billions).abs() < 0.05, "{text}: {active} billion");
        }
        let dense = spec("llama-8b:q4_0");
        assert_eq!(dense.active_parameters(), dense.parameters());
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
        assert!(matches!(refused("llama-8b:q4"), SyntheticError::UnknownType { .. }));
        assert!(matches!(refused("llama-8b:pure-q4_k_m"), SyntheticError::UnknownType { .. }));
        assert!(refused("qwen3-30b:q4_0").to_string().contains("qwen3-30b-a3b"));
    }
}
