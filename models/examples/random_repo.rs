//! Writes an overlay of random position maps for a model: what RePo costs and where untrained maps put tokens can be seen
//! before any training. `cargo run -p models --example random_repo -- MODEL FILE [FIRST_LAYER]`

use anyhow::{Context, Result};
use models::{Overlay, open};
use std::path::PathBuf;
use tch::{Device, Kind, Tensor};

fn main() -> Result<()> {
    let mut args = std::env::args_os().skip(1);
    let usage = "give a model and the file to write";
    let model = PathBuf::from(args.next().context(usage)?);
    let file = PathBuf::from(args.next().context(usage)?);
    let base = open(&model)?;
    let config = base.config();
    let first = match args.next().and_then(|layer| layer.into_string().ok()) {
        Some(layer) => layer.parse().context("the first layer is a whole number")?,
        None => config.layers / 3,
    };
    let (hidden, heads, width) =
        (config.hidden_size as i64, config.kv_heads as i64, (config.hidden_size / 8) as i64);
    tch::manual_seed(1);
    let mut tensors = Vec::new();
    for layer in first..config.layers {
        // Scales that spread positions by tens, as trained ones are.
        for (map, shape, scale) in [
            ("gate_map", [width, hidden], (hidden as f64).powf(-0.5)),
            ("content_map", [width, hidden], (hidden as f64).powf(-0.5)),
            ("final_map", [heads, width], 20.0 * (width as f64).powf(-0.5)),
        ] {
            let name = format!("model.layers.{layer}.self_attn.{map}.weight");
            let map = Tensor::f_randn(shape, (Kind::Float, Device::Cpu))?.f_mul_scalar(scale)?;
            tensors.push((name, map.f_to_kind(Kind::BFloat16)?));
        }
    }
    let pe_config = serde_json::json!({
        "dynamic_pe_mode": "swigluex_multihead",
        "dynmaic_pe_start_layer": first,
        "dynamic_pe_start_layer": first,
    });
    Overlay::write(&file, &base, &pe_config, &tensors)?;
    println!("{}: layers {first} to {}", file.display(), config.layers - 1);
    Ok(())
}
