//! Position maps laid over a model: tests/golden/repo/make.py made the golden ones and the numbers.

mod common;

use anyhow::Result;
use common::{assert_close, difference, get, golden, logits, tensors};
use kvzap::{Random, Threshold};
use models::{
    CausalLm, Cpu, Decoder, Dense, Error, Hooks, KvCache, LayerPositions, Overlay, Paged, Pruning,
    Source, WINDOW, Weights, cache_shape, open,
};
use serde_json::{Value, json};
use std::path::Path;
use tch::{Device, Kind, Tensor};

fn overlaid(base: Source, overlay: &Path) -> models::Result<Decoder> {
    let weights = Weights::new(base, Kind::Float, Device::Cpu)?;
    Decoder::load(&weights.overlaid(Overlay::open(overlay)?)?)
}

fn paged(lm: &Decoder, window: usize) -> Result<Paged<Cpu>> {
    Ok(Paged::new(Cpu::new(cache_shape(lm.config(), 128, window, Kind::Float)?)?)?)
}

#[test]
fn one_position_a_kv_head_turns_its_queries_too() -> Result<()> {
    let wanted = tensors("repo/expected.safetensors")?;
    let [ids, next] = [get(&wanted, "ids")?, get(&wanted, "next")?].map(|ids| ids.remainder(96));
    for (name, base) in [("gqa2_llama31", "llama/gqa2_llama31"), ("qwen3", "families/qwen3")] {
        let lm = overlaid(open(&golden(base))?, &golden(&format!("repo/{name}.repo.safetensors")))?;
        assert_eq!(lm.config().positions, [LayerPositions::Rope, LayerPositions::Repo]);
        assert_eq!(lm.config().group(), 2);
        let (mut dense, mut paged) = (Dense::new(2, WINDOW), paged(&lm, WINDOW)?);
        for cache in [&mut dense as &mut dyn KvCache, &mut paged] {
            let prompt = logits(&lm, &ids, cache, &Hooks::default())?;
            assert_close(&prompt, get(&wanted, &format!("{name}.logits"))?, 1e-4, name);
            let steps =
                (0..8).map(|i| logits(&lm, &next.narrow(0, i, 1), cache, &Hooks::default()));
            let steps = Tensor::cat(&steps.collect::<Result<Vec<_>>>()?, 0);
            assert_close(&steps, get(&wanted, &format!("{name}.decode"))?, 1e-4, name);
        }
    }
    Ok(())
}

fn pe_config(start: usize) -> Value {
    json!({"dynamic_pe_mode": "swigluex_multihead", "dynmaic_pe_start_layer": start})
}

/// Random maps for some layers of the tiny model of tests/golden/kvzap: 3 layers, hidden 64, 2 kv heads.
fn maps(layers: &[usize], kind: Kind) -> Vec<(String, Tensor)> {
    let shapes = [("gate_map", [6, 64]), ("content_map", [6, 64]), ("final_map", [2, 6])];
    let mut seed = 0.0;
    let mut wave = |shape: [i64; 2]| {
        seed += 1.0;
        let numbers = Tensor::arange(shape[0] * shape[1], (Kind::Float, Device::Cpu));
        ((numbers * 0.731 + seed * 1.7).sin() * 0.6).reshape(shape).to_kind(kind)
    };
    let mut tensors = Vec::new();
    for layer in layers {
        for (map, shape) in shapes {
            let name = format!("model.layers.{layer}.self_attn.{map}.weight");
            tensors.push((name, wave(shape)));
        }
    }
    tensors
}

fn base() -> Result<Source> {
    Ok(open(&golden("kvzap/model"))?)
}

#[test]
fn what_is_written_is_read_back_from_folders_and_gguf_files() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("maps.safetensors");
    for kind in [Kind::Float, Kind::BFloat16] {
        Overlay::write(&path, &base()?, &pe_config(1), &maps(&[1, 2], kind))?;
        assert_eq!(std::fs::read_dir(folder.path())?.count(), 1, "nothing is left beside");
        let weights = Weights::new(base()?, Kind::Float, Device::Cpu)?;
        let weights = weights.overlaid(Overlay::open(&path)?)?;
        for (name, written) in maps(&[1, 2], kind) {
            let read = weights.tensor(&name, &written.size())?;
            assert_eq!(read, written.to_kind(Kind::Float), "{name}");
        }
    }
    let norm = "model.layers.0.input_layernorm.weight";
    let gguf = || open(&golden("gguf/gqa2_llama31.gguf"));
    let changed = Tensor::full([32], 2.0, (Kind::Float, Device::Cpu));
    let only = [(norm.to_owned(), changed.shallow_clone())];
    Overlay::write(&path, &gguf()?, &json!({}), &only)?;
    let weights =
        Weights::new(gguf()?, Kind::Float, Device::Cpu)?.overlaid(Overlay::open(&path)?)?;
    assert_eq!(weights.tensor(norm, &[32])?, changed);
    assert!(Decoder::load(&weights).is_ok(), "all else is the base's");
    Ok(())
}

/// Layers with and without learned positions in one pruned cache: pages give what masks give, while the text grows.
#[test]
fn learned_positions_and_pruning_go_together() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("maps.safetensors");
    Overlay::write(&path, &base()?, &pe_config(1), &maps(&[1, 2], Kind::Float))?;
    let lm = overlaid(base()?, &path)?;
    let plain = Decoder::load(&Weights::new(base()?, Kind::Float, Device::Cpu)?)?;
    let ids = (Tensor::arange(110, (Kind::Int64, Device::Cpu)) * 37 + 11).remainder(128);
    let run = |lm: &Decoder, cache: &mut dyn KvCache| -> Result<Tensor> {
        let (scorer, policy) = (Box::new(Random::new(5)), Box::new(Threshold::new(0.5)?));
        let hooks = Hooks::pruning(Pruning { scorer, policy, while_decoding: true });
        let mut all = Vec::new();
        let mut at = 0;
        for length in [80, 9, 1, 1, 1, 12, 1, 1, 1, 1, 1, 1] {
            all.push(logits(lm, &ids.narrow(0, at, length), cache, &hooks)?);
            at += length;
        }
        Ok(Tensor::cat(&all, 0))
    };
    let (mut dense, mut paged) = (Dense::new(3, 32), paged(&lm, 32)?);
    let wanted = run(&lm, &mut dense)?;
    assert_close(&run(&lm, &mut paged)?, &wanted, 2e-5, "pages and masks");
    assert!(dense.usage().removed() > 0.3, "{:?}", dense.usage());
    assert!(difference(&run(&plain, &mut Dense::new(3, 32))?, &wanted) > 0.01, "positions matter");
    Ok(())
}

/// As an offset, what maps read is added to the index so many times; maps of nothing leave a model as it was. Or it is
/// added to the index, divided.
#[test]
fn what_is_read_is_added_to_the_index() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("maps.safetensors");
    let ids = (Tensor::arange(40, (Kind::Int64, Device::Cpu)) * 37 + 11).remainder(128);
    let run = |pe_config: &Value, maps: &[(String, Tensor)]| -> Result<(Tensor, Tensor)> {
        Overlay::write(&path, &base()?, pe_config, maps)?;
        let (send, positions) = std::sync::mpsc::channel();
        let on_positions = move |layer, positions: &Tensor| {
            if layer == 1 {
                let _ = send.send(positions.copy());
            }
        };
        let hooks = Hooks { on_positions: Some(Box::new(on_positions)), ..Hooks::default() };
        let lm = overlaid(base()?, &path)?;
        let logits = logits(&lm, &ids, &mut Dense::new(3, WINDOW), &hooks)?;
        Ok((logits, positions.recv()?))
    };
    let mut offset = pe_config(1);
    offset["dynamic_pe_offset_tokens"] = json!(16);
    let (_, read) = run(&pe_config(1), &maps(&[1, 2], Kind::Float))?;
    let (_, moved) = run(&offset, &maps(&[1, 2], Kind::Float))?;
    let index = Tensor::arange(40, (Kind::Float, Device::Cpu));
    assert_eq!(moved, &read * 16.0 + &index);
    assert!(difference(&read, &Tensor::zeros_like(&read)) > 0.01);

    let mut slowed = pe_config(1);
    slowed["dynamic_pe_slowed_index"] = json!(8);
    let (_, moved) = run(&slowed, &maps(&[1, 2], Kind::Float))?;
    assert_eq!(moved, &read + &index / 8.0);
    slowed["dynamic_pe_offset_tokens"] = json!(16);
    let error = run(&slowed, &maps(&[1, 2], Kind::Float)).unwrap_err().to_string();
    assert!(error.contains("dynamic_pe_slowed_index") && error.contains("none beside"), "{error}");

    let nothing: Vec<_> =
        maps(&[1, 2], Kind::Float).iter().map(|(name, map)| (name.clone(), map * 0.0)).collect();
    let (unmoved, _) = run(&offset, &nothing)?;
    let plain = Decoder::load(&Weights::new(base()?, Kind::Float, Device::Cpu)?)?;
    let wanted = logits(&plain, &ids, &mut Dense::new(3, WINDOW), &Hooks::default())?;
    assert_eq!(unmoved, wanted, "bit for bit");
    Ok(())
}

#[track_caller]
fn says(error: &Error, parts: &[&str]) {
    let text = error.to_string();
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
    assert!(text.contains("; ") && !text.contains('\n'), "{text}");
}

#[test]
fn an_overlay_for_another_model_is_refused() -> Result<()> {
    let overlay = golden("repo/qwen3.repo.safetensors");
    let error = overlaid(open(&golden("llama/gqa2_llama31"))?, &overlay).unwrap_err();
    assert!(matches!(error, Error::OtherBase { .. }), "{error}");
    says(&error, &["qwen3.repo.safetensors", "gqa2_llama31", "it was made for"]);
    // The same weights in other files are another base, and one changed weight is too.
    let gguf = open(&golden("gguf/qwen3.gguf"))?;
    assert!(matches!(overlaid(gguf, &overlay), Err(Error::OtherBase { .. })));
    let changed = tempfile::tempdir()?;
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(golden("families/qwen3").join(file), changed.path().join(file))?;
    }
    assert!(overlaid(open(changed.path())?, &overlay).is_ok(), "a copy is the same base");
    let mut bytes = std::fs::read(changed.path().join("model.safetensors"))?;
    *bytes.last_mut().expect("not empty") ^= 1;
    std::fs::write(changed.path().join("model.safetensors"), bytes)?;
    assert!(matches!(overlaid(open(changed.path())?, &overlay), Err(Error::OtherBase { .. })));
    Ok(())
}

#[test]
fn overlays_that_do_not_fit_are_refused_by_name() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("maps.safetensors");
    let refused = |start, tensors: &[(String, Tensor)]| -> Result<Error> {
        Overlay::write(&path, &base()?, &pe_config(start), tensors)?;
        Ok(overlaid(base()?, &path).unwrap_err())
    };
    let error = refused(0, &maps(&[1, 2], Kind::Float))?;
    assert!(matches!(error, Error::MissingTensor { .. }), "{error}");
    says(&error, &["maps.safetensors", "model.layers.0.self_attn.gate_map.weight"]);
    let error = refused(2, &maps(&[1, 2], Kind::Float))?;
    assert!(matches!(error, Error::StrayMap { .. }), "{error}");
    says(&error, &["maps.safetensors", "model.layers.1.self_attn.gate_map.weight", "[2]"]);
    let mut stray = maps(&[2], Kind::Float);
    stray.push(("model.layers.0.self_attn.qnorm.weight".to_owned(), Tensor::from(1f32)));
    let error = refused(2, &stray)?;
    assert!(matches!(error, Error::StrayTensor { .. }), "{error}");
    says(&error, &["maps.safetensors", "model.layers.0.self_attn.qnorm.weight"]);
    let mut wide = maps(&[2], Kind::Float);
    wide[2].1 = Tensor::zeros([4, 6], (Kind::Float, Device::Cpu)); // a row for each query head
    let error = refused(2, &wide)?;
    assert!(matches!(error, Error::WrongShape { .. }), "{error}");
    says(&error, &["maps.safetensors", "final_map", "[4, 6]", "[2, 6]"]);
    let mut nan = maps(&[2], Kind::Float);
    nan[0].1 = Tensor::full([6, 64], f64::NAN, (Kind::Float, Device::Cpu));
    assert!(matches!(refused(2, &nan)?, Error::NotFinite { .. }));
    Ok(())
}

#[test]
fn files_that_are_no_overlays_and_places_that_cannot_be_written_are_named() -> Result<()> {
    let error = Overlay::open(&golden("families/qwen3/model.safetensors")).unwrap_err();
    says(&error, &["model.safetensors", "metadata format", "longctx-repo"]);
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("cut.safetensors");
    let whole = std::fs::read(golden("repo/qwen3.repo.safetensors"))?;
    for length in [0, 7, 100, whole.len() - 1] {
        std::fs::write(&path, &whole[..length])?;
        let error = Overlay::open(&path).unwrap_err();
        assert!(matches!(error, Error::Format { .. } | Error::Io { .. }), "{length}: {error}");
    }
    let nowhere = folder.path().join("nowhere/maps.safetensors");
    let error = Overlay::write(&nowhere, &base()?, &json!({}), &[]).unwrap_err();
    assert!(matches!(error, Error::Write { .. }), "{error}");
    says(&error, &["nowhere/maps.safetensors", "may you write there?"]);
    let int = [("x".to_owned(), Tensor::from(1i64))];
    let error = Overlay::write(&path, &base()?, &json!({}), &int).unwrap_err();
    assert!(matches!(error, Error::WeightKind(_)), "{error}");
    Ok(())
}

/// Positions that are NaN for one token.
struct Broken;

impl repo_pos::Repositioner<Tensor> for Broken {
    fn positions(&self, layer: usize, hidden: &Tensor) -> repo_pos::Result<Option<Tensor>> {
        let positions = Tensor::zeros([1, 1, hidden.size()[1]], (Kind::Float, Device::Cpu));
        let _ = positions.narrow(2, 3, 1).fill_(if layer == 1 { f64::NAN } else { 1.0 });
        Ok(Some(positions))
    }
}

#[test]
fn positions_that_are_not_finite_are_refused_with_their_layer() -> Result<()> {
    let lm = Decoder::load(&Weights::new(base()?, Kind::Float, Device::Cpu)?)?;
    let hooks = Hooks { repositioner: Some(Box::new(Broken)), ..Hooks::default() };
    let ids = Tensor::arange(8, (Kind::Int64, Device::Cpu)).unsqueeze(0);
    let error = lm.forward(&ids, &mut Dense::new(3, 32), &hooks).unwrap_err();
    assert!(matches!(error, Error::PositionNotFinite { layer: 1 }), "{error}");
    Ok(())
}
