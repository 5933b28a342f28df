//! RePo on whole models against a network written independently: tests/golden/repo/make.py made the numbers.

mod common;

use anyhow::Result;
use common::{assert_close, get, golden, logits, tensors};
use kvzap::{LayerInput, Scorer, Threshold};
use models::{
    CausalLm, Cpu, Decoder, Dense, Hooks, KvCache, LayerPositions, Paged, Precision, Pruning,
    RoundZ, WINDOW, Weights, cache_shape, open,
};
use serde_json::Value;
use std::path::Path;
use std::sync::{Arc, Mutex};
use tch::{Device, Kind, Tensor};

const BOUND: f64 = 1e-4;
/// Of the pruned run.
const SMALL_WINDOW: usize = 8;

fn load(folder: &Path, kind: Kind) -> Result<Decoder> {
    Ok(Decoder::load(&Weights::new(open(folder)?, kind, Device::Cpu)?)?)
}

/// The golden OLMo 2 with some fields of its config changed, and without position maps where no layer has them.
fn variant(changes: &Value) -> Result<Decoder> {
    let (from, to) = (golden("repo/olmo2"), tempfile::tempdir()?);
    let json = |name: &str| -> Result<Value> {
        Ok(serde_json::from_slice(&std::fs::read(from.join(name))?)?)
    };
    let mut config = json("config.json")?;
    for (key, value) in changes.as_object().into_iter().flatten() {
        config[key] = value.clone();
    }
    let mut index = json("model.safetensors.index.json")?;
    if config["pe_config"]["dynamic_pe_mode"] != "swigluex_multihead"
        && let Some(map) = index["weight_map"].as_object_mut()
    {
        map.retain(|name, _| !name.contains("_map."));
    }
    for shard in ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"] {
        std::fs::copy(from.join(shard), to.path().join(shard))?;
    }
    std::fs::write(to.path().join("config.json"), config.to_string())?;
    std::fs::write(to.path().join("model.safetensors.index.json"), index.to_string())?;
    load(to.path(), Kind::Float)
}

fn paged(lm: &Decoder, window: usize) -> Result<Paged<Cpu>> {
    Ok(Paged::new(Cpu::new(cache_shape(lm.config(), 64, window, Kind::Float)?)?)?)
}

/// Logits of the prompt in one pass, and of the tokens after it one by one.
fn run(
    lm: &Decoder,
    [ids, next]: [&Tensor; 2],
    cache: &mut dyn KvCache,
    hooks: &Hooks,
) -> Result<[Tensor; 2]> {
    let prompt = logits(lm, ids, cache, hooks)?;
    let steps = (0..next.size()[0]).map(|i| logits(lm, &next.narrow(0, i, 1), cache, hooks));
    Ok([prompt, Tensor::cat(&steps.collect::<Result<Vec<_>>>()?, 0)])
}

#[test]
fn every_variant_has_the_logits_of_the_paper_on_both_caches() -> Result<()> {
    let wanted = tensors("repo/expected.safetensors")?;
    let text = [get(&wanted, "ids")?, get(&wanted, "next")?];
    let variants: Value = serde_json::from_slice(&std::fs::read(golden("repo/variants.json"))?)?;
    for (name, variant_of) in variants.as_object().expect("an object") {
        let lm = variant(&variant_of["config"])?;
        let toward_index = variant_of["toward_index"].as_f64().expect("a number");
        let hooks = Hooks { toward_index, ..Hooks::default() };
        let (mut dense, mut paged) = (Dense::new(4, WINDOW), paged(&lm, WINDOW)?);
        for cache in [&mut dense as &mut dyn KvCache, &mut paged] {
            let [prompt, steps] = run(&lm, text, cache, &hooks)?;
            assert_close(&prompt, get(&wanted, &format!("{name}.logits"))?, BOUND, name);
            assert_close(&steps, get(&wanted, &format!("{name}.decode"))?, BOUND, name);
        }
    }
    Ok(())
}

type Seen = Arc<Mutex<Vec<(usize, Tensor)>>>;

/// Hooks that collect the positions of each layer, `[kv_heads, tokens]` a pass.
fn watching() -> (Hooks, Seen) {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&seen);
    let on_positions = move |layer, positions: &Tensor| {
        sink.lock().expect("no panic").push((layer, positions.squeeze_dim(0)));
    };
    (Hooks { on_positions: Some(Box::new(on_positions)), ..Hooks::default() }, seen)
}

fn positions(lm: &Decoder, text: [&Tensor; 2]) -> Result<Tensor> {
    let (hooks, seen) = watching();
    let _ = run(lm, text, &mut Dense::new(4, WINDOW), &hooks)?;
    let seen = seen.lock().expect("no panic");
    let layer = |layer| {
        let parts: Vec<_> = seen.iter().filter(|(l, _)| *l == layer).map(|(_, z)| z).collect();
        Tensor::cat(&parts, 1)
    };
    assert!(seen.iter().all(|(layer, _)| *layer >= 2), "layers below the start have the index");
    Ok(Tensor::stack(&[layer(2), layer(3)], 0)) // [2, kv_heads, tokens]
}

#[test]
fn the_positions_themselves_are_those_of_the_paper() -> Result<()> {
    let wanted = tensors("repo/expected.safetensors")?;
    let text = [get(&wanted, "ids")?, get(&wanted, "next")?];
    let lm = load(&golden("repo/olmo2"), Kind::Float)?;
    let plan =
        [LayerPositions::Rope, LayerPositions::Rope, LayerPositions::Repo, LayerPositions::Repo];
    assert_eq!(lm.config().positions, plan);
    assert_close(&positions(&lm, text)?, get(&wanted, "repo.positions")?, 1e-5, "positions");
    Ok(())
}

#[test]
fn moved_to_the_index_they_are_plain_rotary_embedding_to_the_last_bit() -> Result<()> {
    let wanted = tensors("repo/expected.safetensors")?;
    let text = [get(&wanted, "ids")?, get(&wanted, "next")?];
    let repo = load(&golden("repo/olmo2"), Kind::Float)?;
    let plain = variant(&serde_json::json!({"pe_config": null}))?;
    let hooks = Hooks { toward_index: 1.0, ..Hooks::default() };
    let moved = run(&repo, text, &mut Dense::new(4, WINDOW), &hooks)?;
    let plain = run(&plain, text, &mut Dense::new(4, WINDOW), &Hooks::default())?;
    assert_eq!(moved, plain);
    let beside = run(&repo.by_index()?, text, &mut Dense::new(4, WINDOW), &Hooks::default())?;
    assert_eq!(beside, plain);
    assert_eq!(repo.by_index()?.position_numbers()[0], 0);
    Ok(())
}

#[test]
fn a_bf16_model_rounds_positions_only_where_it_is_told_to() -> Result<()> {
    let wanted = tensors("repo/expected.safetensors")?;
    let text = [get(&wanted, "ids")?, get(&wanted, "next")?];
    let with = |round| -> Result<Tensor> {
        let weights = Weights::new(open(&golden("repo/olmo2"))?, Kind::BFloat16, Device::Cpu)?;
        let lm = Decoder::load_with(&weights, round, Precision::Parity)?;
        positions(&lm, text)
    };
    let (exact, rounded) = (with(RoundZ::None)?, with(RoundZ::ModelDtype)?);
    let on_grid = |z: &Tensor| z == &z.to_kind(Kind::BFloat16).to_kind(Kind::Float);
    assert!(on_grid(&rounded) && !on_grid(&exact));
    // Layer 2 reads nearly the same hidden states in both; what differs is the rounding of maps and positions.
    assert_close(&rounded.get(0), &exact.get(0), 0.05, "rounded");
    Ok(())
}

#[test]
fn wide_angles_change_nothing_near_zero() -> Result<()> {
    let wanted = tensors("repo/expected.safetensors")?;
    let text = [get(&wanted, "ids")?, get(&wanted, "next")?];
    let weights = Weights::new(open(&golden("repo/olmo2"))?, Kind::Float, Device::Cpu)?;
    let lm = Decoder::load_with(&weights, RoundZ::None, Precision::Wide)?;
    let [prompt, steps] = run(&lm, text, &mut Dense::new(4, WINDOW), &Hooks::default())?;
    assert_close(&prompt, get(&wanted, "repo.logits")?, BOUND, "prompt");
    assert_close(&steps, get(&wanted, "repo.decode")?, BOUND, "decode");
    Ok(())
}

/// Drops the tokens that make.py drops.
struct Rule;

impl Scorer<Tensor> for Rule {
    fn score(&self, input: LayerInput<'_, Tensor>) -> kvzap::Result<Tensor> {
        let (heads, tokens) = (input.keys.size()[1], input.keys.size()[2]);
        let (options, layer) = ((Kind::Int64, Device::Cpu), input.layer as i64);
        let head = Tensor::arange(heads, options).unsqueeze(1) * 5;
        let token = Tensor::arange(tokens, options) * 3;
        let kept = (head + token + 7 * layer).remainder(4).ne(0);
        Ok(kept.to_kind(Kind::Float).unsqueeze(0))
    }
}

fn rule() -> Result<Hooks> {
    let policy = Box::new(Threshold::new(0.5)?);
    Ok(Hooks::pruning(Pruning { scorer: Box::new(Rule), policy, while_decoding: false }))
}

/// Learned positions and a pruned cache: layers without maps go on with the token's own index, and no kept key moves.
#[test]
fn pruned_it_is_the_network_that_masks_what_was_dropped() -> Result<()> {
    let wanted = tensors("repo/expected.safetensors")?;
    let text = [get(&wanted, "ids")?, get(&wanted, "next")?];
    let (lm, hooks) = (load(&golden("repo/olmo2"), Kind::Float)?, rule()?);
    let (mut dense, mut paged) = (Dense::new(4, SMALL_WINDOW), paged(&lm, SMALL_WINDOW)?);
    for cache in [&mut dense as &mut dyn KvCache, &mut paged] {
        let [prompt, steps] = run(&lm, text, cache, &hooks)?;
        assert_close(&prompt, get(&wanted, "repo.logits")?, BOUND, "prompt");
        assert_close(&steps, get(&wanted, "dropped.decode")?, BOUND, "decode");
    }
    assert!((paged.usage().removed() - 0.16).abs() < 0.02, "{}", paged.usage().removed());
    Ok(())
}
