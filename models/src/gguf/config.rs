//! The config of a GGUF file.

use super::metadata::Metadata;
use super::stored;
use crate::config::{Architecture, Config, RopeScaling};
use crate::error::{Error, Result};
use crate::positions::LayerPositions;
use crate::weights::Encoding;
use repo_pos::Yarn;

pub(super) fn read(metadata: Metadata<'_>) -> Result<Config> {
    let prefix = metadata.required("general.architecture", Metadata::text)?;
    let architecture = match prefix {
        "llama" => Architecture::Llama,
        "qwen3" => Architecture::Qwen3,
        "olmo2" => Architecture::Olmo2,
        found => {
            let found = found.to_owned();
            return Err(Error::UnknownArchitecture { path: metadata.path.to_owned(), found });
        }
    };
    let key = |name: &str| format!("{prefix}.{name}");
    let count = |name: &str| metadata.required(&key(name), Metadata::count);
    let tensors = &metadata.header.tensors;
    let hidden_size = count("embedding_length")?;
    let query_heads = count("attention.head_count")?;
    let head_dim = match metadata.count(&key("attention.key_length"))? {
        Some(head_dim) => head_dim,
        None => hidden_size.checked_div(query_heads).unwrap_or(0),
    };
    refuse_unsupported(metadata, key, head_dim)?;
    let embedding = stored(metadata, "token_embd.weight")?;
    let ends =
        ["eos", "eot", "eom"].map(|end| metadata.token(&format!("tokenizer.ggml.{end}_token_id")));
    let mut eos_tokens = Vec::new();
    for end in ends {
        eos_tokens.extend(end?.filter(|token| !eos_tokens.contains(token)));
    }
    let rope_scaling = scaling(metadata, key)?;
    let config = Config {
        architecture,
        // The embedding's own rows: files differ on whether `llama.vocab_size` counts padding.
        vocab_size: embedding.shape[0],
        hidden_size,
        layers: count("block_count")?,
        query_heads,
        kv_heads: metadata.count(&key("attention.head_count_kv"))?.unwrap_or(query_heads),
        head_dim,
        intermediate_size: count("feed_forward_length")?,
        norm_epsilon: metadata
            .required(&key("attention.layer_norm_rms_epsilon"), Metadata::number)?,
        rope_theta: metadata.number(&key("rope.freq_base"))?.unwrap_or(10_000.0),
        positions: Vec::new(),
        max_positions: rope_scaling.reach(count("context_length")?),
        rope_scaling,
        tied_embeddings: !tensors.contains_key("output.weight"),
        attention_bias: tensors.contains_key("blk.0.attn_q.bias"),
        output_bias: tensors.contains_key("blk.0.attn_output.bias"),
        mlp_bias: tensors.contains_key("blk.0.ffn_up.bias"),
        eos_tokens,
        bos_token: metadata.token("tokenizer.ggml.bos_token_id")?,
    }
    .checked(metadata.path)?;
    Ok(Config { positions: vec![LayerPositions::Rope; config.layers], ..config })
}

/// Settings that change what the model computes, and that would be passed over in silence
/// otherwise.
fn refuse_unsupported(
    metadata: Metadata<'_>,
    key: impl Fn(&str) -> String,
    head_dim: usize,
) -> Result<()> {
    let refuse = |key: &str, found: usize, supported, advice| {
        Err(Error::Unsupported {
            path: metadata.path.to_owned(),
            field: key.to_owned(),
            found: found.to_string(),
            supported,
            advice,
        })
    };
    for key in ["rope.dimension_count", "attention.value_length"].map(&key) {
        if let Some(found) = metadata.count(&key)?.filter(|&n| n != head_dim) {
            return refuse(
                &key,
                found,
                "the head dim",
                "choose a model that rotates whole heads of one width",
            );
        }
    }
    for (name, advice) in [
        ("expert_count", "choose a dense model"),
        ("attention.sliding_window", "choose a model whose layers all attend to the whole text"),
    ] {
        let name = key(name);
        if let Some(found) = metadata.count(&name)?.filter(|&n| n > 0) {
            return refuse(&name, found, "0", advice);
        }
    }
    if let Some(parts) = metadata.count("split.count")?.filter(|&n| n > 1) {
        return refuse(
            "split.count",
            parts,
            "1",
            "merge the parts with llama.cpp's gguf-split --merge",
        );
    }
    Ok(())
}

/// `rope_freqs.weight`, which is how Llama 3.1's scaling is carried; else what the metadata say.
fn scaling(metadata: Metadata<'_>, key: impl Fn(&str) -> String) -> Result<RopeScaling> {
    const DIVISORS: &str = "rope_freqs.weight";
    let kind = key("rope.scaling.type");
    if metadata.header.tensors.contains_key(DIVISORS) {
        let tensor = stored(metadata, DIVISORS)?;
        let mut divisors = vec![0.0; tensor.shape.iter().product()];
        if tensor.encoding != Encoding::F32 {
            return Err(Error::WrongDtype {
                path: metadata.path.to_owned(),
                tensor: DIVISORS.to_owned(),
                found: format!("{:?}", tensor.encoding),
            });
        }
        tensor.encoding.decode(tensor.bytes, &mut divisors);
        return Ok(RopeScaling::Divisors(divisors));
    }
    match metadata.text(&kind)? {
        None | Some("none") => Ok(RopeScaling::None),
        Some("linear") => {
            let factor = metadata.required(&key("rope.scaling.factor"), Metadata::number)?;
            Ok(RopeScaling::Linear { factor })
        }
        Some("yarn") => {
            let factor = metadata.required(&key("rope.scaling.factor"), Metadata::number)?;
            let original =
                metadata.required(&key("rope.scaling.original_context_length"), Metadata::count)?;
            let paper = Yarn::new(factor, original);
            // As llama.cpp has it: on top of what the paper says.
            let more = metadata.number(&key("rope.scaling.attn_factor"))?.unwrap_or(1.0);
            let attention_factor = more * paper.attention_factor;
            Ok(RopeScaling::Yarn(Yarn { attention_factor, ..paper }))
        }
        Some(found) => Err(Error::Unsupported {
            path: metadata.path.to_owned(),
            field: kind,
            found: format!("{found:?}"),
            supported: "\"none\", \"linear\", \"yarn\" and rope_freqs.weight",
            advice: "choose a model without it; ignoring it would give wrong answers",
        }),
    }
}
