//! GGUF's names for the modules of Hugging Face's models.

use crate::formats::hf_config::Family;

/// Where a module's tensors go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target {
    /// GGUF's name without `.weight`.
    pub name: String,
    /// Which of the experts that share the name.
    pub expert: Option<usize>,
}

/// Modules of a layer that all families call the same.
const LAYER: [(&str, &str); 11] = [
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("block_sparse_moe.gate", "ffn_gate_inp"),
];

const EXPERTS: [(&str, &str); 6] = [
    ("w1", "ffn_gate_exps"),
    ("w3", "ffn_up_exps"),
    ("w2", "ffn_down_exps"),
    ("gate_proj", "ffn_gate_exps"),
    ("up_proj", "ffn_up_exps"),
    ("down_proj", "ffn_down_exps"),
];

fn look_up(table: &[(&'static str, &'static str)], module: &str) -> Option<&'static str> {
    table.iter().find(|(name, _)| *name == module).map(|(_, target)| *target)
}

/// Modules of a layer that families call differently.
fn of_family(family: Family) -> &'static [(&'static str, &'static str)] {
    match family {
        Family::Gemma3 => &[
            ("post_attention_layernorm", "post_attention_norm"),
            ("pre_feedforward_layernorm", "ffn_norm"),
            ("post_feedforward_layernorm", "post_ffw_norm"),
        ],
        Family::Qwen3Moe => {
            &[("post_attention_layernorm", "ffn_norm"), ("mlp.gate", "ffn_gate_inp")]
        }
        _ => &[("post_attention_layernorm", "ffn_norm")],
    }
}

/// `PREFIX.experts.N.MODULE`.
fn expert(module: &str) -> Option<(&'static str, usize)> {
    let rest = ["block_sparse_moe.experts.", "mlp.experts."]
        .iter()
        .find_map(|prefix| module.strip_prefix(prefix))?;
    let (number, part) = rest.split_once('.')?;
    Some((look_up(&EXPERTS, part)?, number.parse().ok()?))
}

/// Where a module goes. One of a layer that nobody knows keeps its name after the layer's, so that
/// the family refuses it.
pub(super) fn target(family: Family, module: &str) -> Target {
    let whole = |name: &str| Target { name: name.to_owned(), expert: None };
    match module {
        "model.embed_tokens" => return whole("token_embd"),
        "model.norm" => return whole("output_norm"),
        "lm_head" => return whole("output"),
        _ => {}
    }
    let layer = module.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'));
    let Some((layer, module)) = layer else { return whole(module) };
    if let Some((name, expert)) = expert(module) {
        return Target { name: format!("blk.{layer}.{name}"), expert: Some(expert) };
    }
    let name = look_up(of_family(family), module).or_else(|| look_up(&LAYER, module));
    whole(&format!("blk.{layer}.{}", name.unwrap_or(module)))
}

/// What a file of the family would call a tensor that has this name in GGUF.
pub(in crate::formats) fn file_name(family: Family, name: &str) -> String {
    let Some((module, suffix)) = name.rsplit_once('.') else { return name.to_owned() };
    let layer = module.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
    let module = match (module, layer) {
        ("token_embd", _) => "model.embed_tokens".to_owned(),
        ("output_norm", _) => "model.norm".to_owned(),
        ("output", _) => "lm_head".to_owned(),
        (_, Some((layer, part))) => {
            let mut known = of_family(family).iter().chain(&LAYER);
            let found = known.find(|(_, target)| *target == part).map_or(part, |(name, _)| *name);
            format!("model.layers.{layer}.{found}")
        }
        _ => module.to_owned(),
    };
    format!("{module}.{suffix}")
}

/// Buffers that follow from the configuration, and scales of activations and of caches, which are
/// not rounded here the way that their makers measured.
pub(super) fn is_needless(name: &str) -> bool {
    ["rotary_emb.inv_freq", ".input_scale", ".k_scale", ".v_scale", ".output_scale"]
        .iter()
        .any(|ending| name.ends_with(ending))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_of_every_family_find_their_names() {
        for (family, module, name, expert) in [
            (Family::Llama, "model.embed_tokens", "token_embd", None),
            (Family::Llama, "model.layers.3.mlp.down_proj", "blk.3.ffn_down", None),
            (Family::Llama, "model.layers.3.post_attention_layernorm", "blk.3.ffn_norm", None),
            (
                Family::Gemma3,
                "model.layers.3.post_attention_layernorm",
                "blk.3.post_attention_norm",
                None,
            ),
            (
                Family::Mixtral,
                "model.layers.1.block_sparse_moe.experts.7.w2",
                "blk.1.ffn_down_exps",
                Some(7),
            ),
            (Family::Qwen3Moe, "model.layers.1.mlp.gate", "blk.1.ffn_gate_inp", None),
            (Family::Qwen2, "model.layers.1.mlp.gate", "blk.1.mlp.gate", None),
            (Family::Qwen2, "visual.merger", "visual.merger", None),
        ] {
            let wanted = Target { name: name.to_owned(), expert };
            assert_eq!(target(family, module), wanted, "{family:?} {module}");
            let back = file_name(family, &format!("{name}.weight"));
            let known =
                expert.is_none() && module.starts_with("model") && !module.ends_with("gate");
            assert!(!known || back == format!("{module}.weight"), "{back}");
        }
    }
}
