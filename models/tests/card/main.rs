//! The card, held to the CPU and to itself.
#![cfg(feature = "cuda")]

#[path = "../common/mod.rs"]
mod common;

/// What wants a card says so in its path.
mod cuda {
    mod branches;
    mod engine;
    mod kvpress;
    mod oracle;
    mod ranks;
    mod scores;
    mod soak;
    mod step;
    mod text;
}

use anyhow::Result;
use kvzap::{Affine, Surrogate, Threshold, TorchSurrogate};
use models::{Config, Decoder, Hooks, Pruning, Source, Weights};
use serde_json::{Value, json};
use std::path::Path;
use tch::{Device, Kind, Tensor};

fn load(source: Source, kind: Kind, device: Device) -> Result<Decoder> {
    Ok(Decoder::load(&Weights::new(source, kind, device)?)?)
}

/// A model whose heads the fast kernels take.
fn wide(folder: &Path) -> Result<()> {
    wide_with(folder, json!({}))
}

/// The same with fields of its config changed.
fn wide_with(folder: &Path, changes: Value) -> Result<()> {
    let mut config = json!({
        "architectures": ["Qwen3ForCausalLM"], "hidden_size": 256, "intermediate_size": 328,
        "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128,
        "vocab_size": 500, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "tie_word_embeddings": false, "attention_bias": false,
    });
    for (key, value) in changes.as_object().into_iter().flatten() {
        config[key] = value.clone();
    }
    Ok(std::fs::write(folder.join("config.json"), config.to_string())?)
}

/// An OLMo 2 whose later layers read positions off their hidden states, from 0 to some 20.
fn learned(folder: &Path, beside: Option<(&str, u32)>) -> Result<()> {
    let mut pe = json!({"dynamic_pe_mode": "swigluex_multihead", "dynamic_pe_start_layer": 1});
    if let Some((key, number)) = beside {
        pe[key] = number.into();
    }
    let changes = json!({"architectures": ["Olmo2ForCausalLM"], "head_dim": 32, "pe_config": pe});
    wide_with(folder, changes)?;
    let mut noise = noise();
    // Uniform, of the deviation `scale`. Not libtorch's: its random state is that of all tests.
    let mut random = |shape: &[i64], scale: f64| {
        let numbers: Vec<f32> = (0..shape.iter().product()).map(|_| noise()).collect();
        let numbers = Tensor::from_slice(&numbers).view(shape) * (scale * 3f64.sqrt());
        numbers.to_kind(Kind::BFloat16)
    };
    let mut tensors = vec![
        ("model.embed_tokens.weight".to_owned(), random(&[500, 256], 1.0)),
        ("model.norm.weight".to_owned(), random(&[256], 0.1) + 1.0),
        ("lm_head.weight".to_owned(), random(&[500, 256], 0.05)),
    ];
    for layer in 0..3 {
        let mut add = |name: &str, tensor: Tensor| {
            tensors.push((format!("model.layers.{layer}.{name}.weight"), tensor));
        };
        for (name, width) in [("q_norm", 256), ("k_norm", 64)] {
            add(&format!("self_attn.{name}"), random(&[width], 0.1) + 1.0);
        }
        add("post_attention_layernorm", random(&[256], 0.1) + 1.0);
        add("post_feedforward_layernorm", random(&[256], 0.1) + 1.0);
        let attention = [("q", 256, 256), ("k", 64, 256), ("v", 64, 256), ("o", 256, 256)];
        for (name, rows, columns) in attention {
            add(&format!("self_attn.{name}_proj"), random(&[rows, columns], 0.05));
        }
        for (name, rows, columns) in [("gate", 328, 256), ("up", 328, 256), ("down", 256, 328)] {
            add(&format!("mlp.{name}_proj"), random(&[rows, columns], 0.05));
        }
        if layer > 0 {
            add("self_attn.gate_map", random(&[32, 256], 0.06));
            add("self_attn.content_map", random(&[32, 256], 0.06));
            add("self_attn.final_map", random(&[2, 32], 1.0));
        }
    }
    Ok(Tensor::write_safetensors(&tensors, folder.join("model.safetensors"))?)
}

/// Numbers from -1 to 1.
fn noise() -> impl FnMut() -> f32 {
    let mut state = 5u32;
    move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    }
}

fn ids(count: usize, vocabulary: usize, seed: usize) -> Vec<u32> {
    (0..count).map(|i| ((i + seed) * 7919 % 10_007 % vocabulary) as u32).collect()
}

fn pruning(surrogate: &Surrogate, threshold: f32, kind: Kind, device: Device) -> Result<Hooks> {
    Ok(Hooks::pruning(Pruning {
        scorer: Box::new(TorchSurrogate::new(surrogate, kind, device)?),
        policy: Box::new(Threshold::new(threshold)?),
        while_decoding: true,
    }))
}

/// A surrogate whose scores spread: an MLP of so many units, or linear for none.
fn random_surrogate(config: &Config, width: usize) -> Result<Surrogate> {
    let mut next = noise();
    let mut noise =
        |count: usize, scale: f32| -> Vec<f32> { (0..count).map(|_| next() * scale).collect() };
    if width == 0 {
        let mut map = || {
            Affine::new(
                noise(config.kv_heads * config.hidden_size, 0.1),
                noise(config.kv_heads, 0.1),
            )
        };
        let maps = (0..config.layers).map(|_| map()).collect::<kvzap::Result<_>>()?;
        return Ok(Surrogate::linear(maps)?);
    }
    let mut layers = Vec::new();
    for _ in 0..config.layers {
        let first = Affine::new(noise(width * config.hidden_size, 0.1), noise(width, 0.1))?;
        let second = Affine::new(noise(config.kv_heads * width, 0.5), noise(config.kv_heads, 0.1))?;
        layers.push([first, second]);
    }
    Ok(Surrogate::mlp(layers)?)
}
