//! Hugging Face names of tensors, and llama.cpp's.

use crate::config::Architecture;

/// The name in a GGUF file of a tensor that Hugging Face's model of this architecture names so.
pub(super) fn in_gguf(name: &str, architecture: Architecture) -> Option<String> {
    if let Some(outer) = match name {
        "model.embed_tokens.weight" => Some("token_embd.weight"),
        "model.norm.weight" => Some("output_norm.weight"),
        "lm_head.weight" => Some("output.weight"),
        _ => None,
    } {
        return Some(outer.to_owned());
    }
    let (layer, part, field) = in_layer(name)?;
    let part = match part {
        "post_attention_layernorm" if architecture.norms_outputs() => "post_attention_norm",
        "post_feedforward_layernorm" => "post_ffw_norm",
        "self_attn.q_norm" => "attn_q_norm",
        "self_attn.k_norm" => "attn_k_norm",
        "input_layernorm" => "attn_norm",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "post_attention_layernorm" => "ffn_norm",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        _ => return None,
    };
    Some(format!("blk.{layer}.{part}.{field}"))
}

/// Whether llama.cpp's converter interleaves the rows of this tensor, biases too: it does so for arch `llama` alone.
pub(super) fn interleaved(name: &str, architecture: Architecture) -> bool {
    architecture == Architecture::Llama
        && in_layer(name)
            .is_some_and(|(_, part, _)| matches!(part, "self_attn.q_proj" | "self_attn.k_proj"))
}

/// `model.layers.{layer}.{part}.{weight or bias}`.
fn in_layer(name: &str) -> Option<(usize, &str, &str)> {
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (part, field) = rest.rsplit_once('.')?;
    Some((layer.parse().ok()?, part, field))
}
