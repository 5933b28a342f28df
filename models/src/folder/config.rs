//! config.json as transformers 4 and 5 write it, and the tokens of
//! generation_config.json.

use super::fields::Fields;
use crate::config::{Architecture, Config, RopeScaling};
use crate::error::{Error, Result};
use crate::positions;
use repo_pos::Yarn;
use std::path::Path;

pub(super) const FILE: &str = "config.json";
const GENERATION: &str = "generation_config.json";

pub(super) fn read(folder: &Path) -> Result<Config> {
    let fields = Fields::read(&folder.join(FILE))?;
    let generation = folder.join(GENERATION);
    let generation = if generation.exists() { Some(Fields::read(&generation)?) } else { None };
    let architecture = architecture(&fields)?;
    refuse_unsupported(&fields)?;

    // What is absent has the value of transformers' `LlamaConfig`, `Qwen3Config` or `Olmo2Config`.
    let (positions, epsilon) = match architecture {
        Architecture::Llama => (2048, 1e-6),
        Architecture::Qwen3 => (32_768, 1e-6),
        Architecture::Olmo2 => (2048, 1e-5),
    };
    let hidden_size = fields.required("hidden_size", Fields::count)?;
    let query_heads = fields.required("num_attention_heads", Fields::count)?;
    let max_positions = fields.count("max_position_embeddings")?.unwrap_or(positions);
    let attention_bias = fields.flag("attention_bias")?.unwrap_or(false);
    let (rope_theta, rope_scaling) = rope(&fields, max_positions)?;
    let max_positions = rope_scaling.reach(max_positions);
    let (mut eos_tokens, mut bos_token) =
        (fields.tokens("eos_token_id")?, fields.tokens("bos_token_id")?);
    if let Some(generation) = generation {
        eos_tokens = generation.tokens("eos_token_id")?.or(eos_tokens);
        bos_token = generation.tokens("bos_token_id")?.or(bos_token);
    }
    let config = Config {
        architecture,
        vocab_size: fields.required("vocab_size", Fields::count)?,
        hidden_size,
        layers: fields.required("num_hidden_layers", Fields::count)?,
        query_heads,
        kv_heads: fields.count("num_key_value_heads")?.unwrap_or(query_heads),
        head_dim: match fields.count("head_dim")? {
            Some(head_dim) => head_dim,
            None if architecture == Architecture::Qwen3 => 128,
            None => hidden_size.checked_div(query_heads).unwrap_or(0),
        },
        intermediate_size: fields.required("intermediate_size", Fields::count)?,
        norm_epsilon: fields.number("rms_norm_eps")?.unwrap_or(epsilon),
        rope_theta,
        rope_scaling,
        positions: Vec::new(),
        max_positions,
        tied_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(false),
        attention_bias,
        output_bias: attention_bias,
        mlp_bias: architecture == Architecture::Llama && fields.flag("mlp_bias")?.unwrap_or(false),
        eos_tokens: eos_tokens.unwrap_or_default(),
        bos_token: bos_token.and_then(|tokens| tokens.first().copied()),
    }
    .checked(fields.path())?;
    Ok(Config { positions: positions::planned(&fields, config.layers)?, ..config })
}

fn architecture(fields: &Fields) -> Result<Architecture> {
    let named = fields.value("architectures").or(fields.value("model_type"));
    match named.map(|name| (name, name.get(0).unwrap_or(name).as_str())) {
        Some((_, Some("LlamaForCausalLM" | "llama"))) => Ok(Architecture::Llama),
        Some((_, Some("Qwen3ForCausalLM" | "qwen3"))) => Ok(Architecture::Qwen3),
        Some((_, Some("Olmo2ForCausalLM" | "olmo2"))) => Ok(Architecture::Olmo2),
        Some((_, Some(found))) => Err(Error::UnknownArchitecture {
            path: fields.path().to_owned(),
            found: found.to_owned(),
        }),
        Some((found, None)) => Err(fields.wrong("architectures", "a list of names", found)),
        None => Err(fields.missing("architectures")),
    }
}

/// Settings that change what the model computes, and that would be passed over in silence
/// otherwise.
fn refuse_unsupported(fields: &Fields) -> Result<()> {
    let refuse = |key: &str, found: String, supported, advice| {
        Err(Error::Unsupported {
            path: fields.path().to_owned(),
            field: key.to_owned(),
            found,
            supported,
            advice,
        })
    };
    if let Some(activation) = fields.text("hidden_act")?
        && activation != "silu"
    {
        return refuse("hidden_act", format!("{activation:?}"), "\"silu\"", "choose another model");
    }
    if fields.number("partial_rotary_factor")?.is_some_and(|factor| factor != 1.0) {
        return refuse("partial_rotary_factor", "below 1".to_owned(), "1", "choose another model");
    }
    let windows = fields.value("layer_types").and_then(|types| {
        types.as_array()?.iter().find(|kind| kind.as_str() != Some("full_attention"))
    });
    if let Some(kind) = windows {
        let advice = "choose a model whose layers all attend to the whole text";
        return refuse("layer_types", kind.to_string(), "\"full_attention\"", advice);
    }
    if fields.flag("use_sliding_window")? == Some(true) {
        let advice = "choose a model whose layers all attend to the whole text";
        return refuse("use_sliding_window", "true".to_owned(), "false", advice);
    }
    if let Some(quantisation) = fields.within("quantization_config")? {
        let method = quantisation.text("quant_method")?.unwrap_or("unnamed").to_owned();
        return refuse(
            "quantization_config",
            format!("{method:?}"),
            "unquantised safetensors",
            "use the original weights or a GGUF file",
        );
    }
    Ok(())
}

/// Theta and scaling: `rope_theta` and `rope_scaling` up to transformers 4, `rope_parameters` with
/// both in it since.
fn rope(fields: &Fields, max_positions: usize) -> Result<(f64, RopeScaling)> {
    let theta = fields.number("rope_theta")?;
    let (key, rope) = match fields.within("rope_parameters")? {
        Some(rope) => ("rope_parameters", Some(rope)),
        None => ("rope_scaling", fields.within("rope_scaling")?),
    };
    let Some(rope) = rope else { return Ok((theta.unwrap_or(10_000.0), RopeScaling::None)) };
    let theta = rope.number("rope_theta")?.or(theta).unwrap_or(10_000.0);
    let named = rope.text("rope_type")?.or(rope.text("type")?);
    let scaling = match named {
        Some("default") => RopeScaling::None,
        // Without a name nothing but theta may be said, lest a scaling be passed over.
        None if rope.keys().all(|key| key == "rope_theta") => RopeScaling::None,
        None => return Err(fields.missing(&format!("{key}.rope_type"))),
        Some("linear") => RopeScaling::Linear { factor: rope.required("factor", Fields::number)? },
        Some("llama3") => RopeScaling::Llama3 {
            factor: rope.required("factor", Fields::number)?,
            low: rope.required("low_freq_factor", Fields::number)?,
            high: rope.required("high_freq_factor", Fields::number)?,
            original: rope.required("original_max_position_embeddings", Fields::count)?,
        },
        Some("yarn") => RopeScaling::Yarn(yarn(&rope, max_positions)?),
        Some(found) => {
            return Err(Error::Unsupported {
                path: fields.path().to_owned(),
                field: format!("{key}.rope_type"),
                found: format!("{found:?}"),
                supported: "\"default\", \"linear\", \"llama3\" and \"yarn\"",
                advice: "choose a model without it; ignoring it would give wrong answers",
            });
        }
    };
    Ok((theta, scaling))
}

fn yarn(rope: &Fields, max_positions: usize) -> Result<Yarn> {
    let factor = rope.required("factor", Fields::number)?;
    let original = rope.count("original_max_position_embeddings")?.unwrap_or(max_positions);
    let paper = Yarn::new(factor, original);
    let mscale = |key| rope.number(key).map(|value| value.filter(|&value| value != 0.0));
    let attention_factor =
        match (rope.number("attention_factor")?, mscale("mscale")?, mscale("mscale_all_dim")?) {
            (Some(factor), ..) => factor,
            (None, Some(mscale), Some(all)) => {
                Yarn::attention(factor, mscale) / Yarn::attention(factor, all)
            }
            _ => paper.attention_factor,
        };
    Ok(Yarn {
        beta_fast: rope.number("beta_fast")?.unwrap_or(paper.beta_fast),
        beta_slow: rope.number("beta_slow")?.unwrap_or(paper.beta_slow),
        truncate: rope.flag("truncate")?.unwrap_or(paper.truncate),
        attention_factor,
        ..paper
    })
}
