//! The card, held to the CPU and to itself.
#![cfg(feature = "cuda")]

#[path = "../common/mod.rs"]
mod common;

/// What wants a card says so in its path.
mod cuda {
    mod engine;
    mod ranks;
    mod step;
}

use anyhow::Result;
use kvzap::{Affine, Surrogate, Threshold, TorchSurrogate};
use models::{Config, Decoder, Hooks, Pruning, Source, Weights};
use std::path::Path;
use tch::{Device, Kind};

fn load(source: Source, kind: Kind, device: Device) -> Result<Decoder> {
    Ok(Decoder::load(&Weights::new(source, kind, device)?)?)
}

/// A model whose heads the fast kernels take.
fn wide(folder: &Path) -> Result<()> {
    let config = serde_json::json!({
        "architectures": ["Qwen3ForCausalLM"], "hidden_size": 256, "intermediate_size": 328,
        "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128,
        "vocab_size": 500, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "tie_word_embeddings": false, "attention_bias": false,
    });
    Ok(std::fs::write(folder.join("config.json"), config.to_string())?)
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

/// A surrogate whose scores spread.
fn random_surrogate(config: &Config, width: usize) -> Result<Surrogate> {
    let mut state = 5u32;
    let mut noise = |count: usize, scale: f32| -> Vec<f32> {
        (0..count)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                ((state >> 8) as f32 / (1 << 23) as f32 - 1.0) * scale
            })
            .collect()
    };
    let mut layers = Vec::new();
    for _ in 0..config.layers {
        let first = Affine::new(noise(width * config.hidden_size, 0.1), noise(width, 0.1))?;
        let second = Affine::new(noise(config.kv_heads * width, 0.5), noise(config.kv_heads, 0.1))?;
        layers.push([first, second]);
    }
    Ok(Surrogate::mlp(layers)?)
}
