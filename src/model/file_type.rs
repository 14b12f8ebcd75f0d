//! The file types of llama.cpp: a name such as `Q4_K_M` for a whole file, in which some tensors are
//! stored more finely than the rest. Which ones is decided here as `llama-quantize` does it without
//! an importance matrix, so that a model made up in memory weighs what its file would.

use crate::tensor::DType;

/// A name, GGUF's `general.file_type`, what llama.cpp prints, and the type of most tensors.
#[derive(Debug)]
struct Facts {
    name: &'static str,
    gguf_id: u32,
    title: &'static str,
    base: DType,
}

const fn facts(name: &'static str, gguf_id: u32, title: &'static str, base: DType) -> Facts {
    Facts { name, gguf_id, title, base }
}

const FACTS: [Facts; 20] = [
    facts("F32", 0, "all F32", DType::F32),
    facts("F16", 1, "F16", DType::F16),
    facts("Q4_0", 2, "Q4_0", DType::Q4_0),
    facts("Q4_1", 3, "Q4_1", DType::Q4_1),
    facts("Q8_0", 7, "Q8_0", DType::Q8_0),
    facts("Q5_0", 8, "Q5_0", DType::Q5_0),
    facts("Q5_1", 9, "Q5_1", DType::Q5_1),
    facts("Q2_K", 10, "Q2_K - Medium", DType::Q2_K),
    facts("Q3_K_S", 11, "Q3_K - Small", DType::Q3_K),
    facts("Q3_K_M", 12, "Q3_K - Medium", DType::Q3_K),
    facts("Q3_K_L", 13, "Q3_K - Large", DType::Q3_K),
    facts("Q4_K_S", 14, "Q4_K - Small", DType::Q4_K),
    facts("Q4_K_M", 15, "Q4_K - Medium", DType::Q4_K),
    facts("Q5_K_S", 16, "Q5_K - Small", DType::Q5_K),
    facts("Q5_K_M", 17, "Q5_K - Medium", DType::Q5_K),
    facts("Q6_K", 18, "Q6_K", DType::Q6_K),
    facts("IQ4_NL", 25, "IQ4_NL - 4.5 bpw", DType::IQ4_NL),
    facts("IQ4_XS", 30, "IQ4_XS - 4.25 bpw", DType::IQ4_XS),
    facts("BF16", 32, "BF16", DType::BF16),
    facts("Q2_K_S", 21, "Q2_K - Small", DType::Q2_K),
];

/// `llama-quantize` takes these short names for the medium mixtures.
const ALIASES: [(&str, &str); 3] = [("Q3_K", "Q3_K_M"), ("Q4_K", "Q4_K_M"), ("Q5_K", "Q5_K_M")];

/// A file type of llama.cpp whose tensors can all be computed with.
#[derive(Clone, Copy, Debug)]
pub struct FileType(&'static Facts);

/// What a matrix is to its model, as far as file types tell matrices apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// Rows are looked up only.
    Embedding,
    /// The logits; also an embedding that is tied to them.
    Output,
    Key,
    Value,
    AttentionOutput,
    Down,
    /// Query, gate, up.
    Other,
}

/// Where a matrix is: its layer of how many, and the model's query heads per key head and experts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Site {
    pub layer: usize,
    pub layers: usize,
    pub heads_per_kv_head: usize,
    /// 0 in a dense model.
    pub experts: usize,
}

impl FileType {
    /// By its name, in any case.
    pub fn from_name(name: &str) -> Option<Self> {
        let named = |wanted: &str| FACTS.iter().find(|facts| facts.name == wanted).map(Self);
        let upper = name.to_ascii_uppercase();
        let full = ALIASES.iter().find(|(short, _)| *short == upper).map(|(_, full)| *full);
        named(full.unwrap_or(&upper))
    }

    /// By GGUF's `general.file_type`.
    pub fn from_gguf_id(id: u32) -> Option<Self> {
        FACTS.iter().find(|facts| facts.gguf_id == id).map(Self)
    }

    /// All names.
    pub fn names() -> impl Iterator<Item = &'static str> {
        FACTS.iter().map(|facts| facts.name)
    }

    /// The name, such as `Q4_K_M`.
    pub fn name(self) -> &'static str {
        self.0.name
    }

    /// What llama.cpp prints, such as `Q4_K - Medium`.
    pub fn title(self) -> &'static str {
        self.0.title
    }

    /// The type of a matrix. Rows must be whole numbers of 256 elements.
    pub(super) fn dtype(self, role: Role, site: Site) -> DType {
        let base = self.0.base;
        if !base.is_quantized() {
            return base;
        }
        // Beside eight experts the attention is small: it is cheap to keep fine.
        let eight_experts = site.experts == 8;
        match role {
            Role::Key | Role::Value if eight_experts => DType::Q8_0,
            Role::AttentionOutput if eight_experts && self.is_coarse() => DType::Q5_K,
            Role::Embedding | Role::Key | Role::Other => base,
            Role::Output if base == DType::Q8_0 => base,
            Role::Output => DType::Q6_K,
            Role::Value => self.value(site),
            Role::AttentionOutput if eight_experts => base,
            Role::AttentionOutput => self.attention_output(),
            Role::Down => self.down(site),
        }
    }

    fn value(self, site: Site) -> DType {
        let grouped = site.heads_per_kv_head >= 4;
        let dtype = match self.0.name {
            "Q2_K" if grouped => DType::Q4_K,
            "Q2_K" => DType::Q3_K,
            "Q2_K_S" if grouped => DType::Q4_K,
            "Q3_K_M" if site.layer < 2 => DType::Q5_K,
            "Q3_K_M" => DType::Q4_K,
            "Q3_K_L" => DType::Q5_K,
            "IQ4_NL" | "IQ4_XS" if grouped => DType::Q5_K,
            "Q4_K_M" | "Q5_K_M" if site.wants_more_bits() => DType::Q6_K,
            "Q4_K_S" if site.layer < 4 => DType::Q5_K,
            _ => self.0.base,
        };
        // The 70B models share a value head among eight query heads: it is cheap to keep fine.
        let shared = site.layers == 80 && site.heads_per_kv_head == 8;
        let coarse = matches!(dtype, DType::Q3_K | DType::Q4_K);
        if shared && coarse { DType::Q5_K } else { dtype }
    }

    fn is_coarse(self) -> bool {
        const COARSE: [&str; 7] =
            ["Q2_K", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ4_XS"];
        COARSE.contains(&self.0.name)
    }

    fn attention_output(self) -> DType {
        match self.0.name {
            "Q2_K" => DType::Q3_K,
            "Q3_K_M" => DType::Q4_K,
            "Q3_K_L" => DType::Q5_K,
            _ => self.0.base,
        }
    }

    fn down(self, site: Site) -> DType {
        let first_eighth = site.layer < site.layers / 8;
        match self.0.name {
            "Q2_K" => DType::Q3_K,
            "Q2_K_S" if first_eighth => DType::Q4_K,
            "Q3_K_M" if site.layer < site.layers / 16 => DType::Q5_K,
            "Q3_K_M" => DType::Q4_K,
            "Q3_K_L" => DType::Q5_K,
            "Q4_K_M" | "Q5_K_M" if site.wants_more_bits() => DType::Q6_K,
            "Q4_K_S" | "IQ4_NL" | "IQ4_XS" if first_eighth => DType::Q5_K,
            _ => self.0.base,
        }
    }
}

impl Site {
    /// The first eighth of the layers, the last eighth, and every third between.
    fn wants_more_bits(self) -> bool {
        let eighth = self.layers / 8;
        self.layer < eighth || self.layer >= 7 * self.layers / 8 || (self.layer - eighth) % 3 == 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_ids_lead_to_the_same_type() {
        for name in FileType::names() {
            let by_name = FileType::from_name(&name.to_lowercase()).unwrap();
            let by_id = FileType::from_gguf_id(by_name.0.gguf_id).unwrap();
            assert_eq!((by_name.name(), by_id.name()), (name, name));
        }
        assert_eq!(FileType::from_name("q4_k").unwrap().title(), "Q4_K - Medium");
        assert!(FileType::from_name("q4").is_none() && FileType::from_gguf_id(4).is_none());
    }

    /// Qwen2.5-Coder-1.5B Q4_K_M has 28 layers; its file holds Q6_K in these layers.
    #[test]
    fn medium_mixtures_refine_both_ends_and_every_third_layer() {
        let q4_k_m = FileType::from_name("q4_k_m").unwrap();
        let fine: Vec<usize> = (0..28)
            .filter(|layer| {
                let site = Site { layer: *layer, layers: 28, heads_per_kv_head: 6, experts: 0 };
                q4_k_m.dtype(Role::Down, site) == DType::Q6_K
            })
            .collect();
        assert_eq!(fine, [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27]);
    }
}
