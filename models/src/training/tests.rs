//! On the tiny golden models, in f32.

use super::*;
use crate::cache::Dense;
use crate::causal_lm::CausalLm;
use crate::hooks::Hooks;
use crate::overlay::Overlay;
use crate::positions::LayerPositions;
use crate::weights::open;
use serde_json::{Value, json};
use std::path::PathBuf;

const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);

fn golden(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(path)
}

fn weights(name: &str) -> Weights {
    Weights::new(open(&golden(name)).unwrap(), Kind::Float, Device::Cpu).unwrap()
}

fn repo(start: usize) -> Value {
    json!({"dynamic_pe_mode": "swigluex_multihead", "dynmaic_pe_start_layer": start})
}

/// A tiny model of `name` with maps from layer 1 on, whose positions spread.
fn with_maps(name: &str, trained: Trained) -> Trainable {
    let weights = weights(name);
    let config = weights.config().clone().with_positions(&repo(1)).unwrap();
    let extent = Extent::whole(trained);
    let model =
        Trainable::continued(&weights, config, extent, Kind::Float, Device::Cpu, 3).unwrap();
    let maps = model.span(Role::Map);
    let _ = model.master.narrow(0, maps.start, maps.end - maps.start).g_mul_scalar_(12.0);
    model
}

/// Rows of ids, and weights of which some are nothing.
fn batch(rows: i64, tokens: i64, seed: i64) -> (Tensor, Tensor) {
    let count = Tensor::arange(rows * (tokens + 1), (Kind::Int64, Device::Cpu));
    let ids =
        ((&count * &count * 7 + count * 31 + seed * 13).remainder(61)).view([rows, tokens + 1]);
    let weights =
        (ids.narrow(1, 1, tokens).remainder(3)).to_kind(Kind::Float) / (rows * tokens) as f64;
    (ids, weights)
}

fn learn(model: &mut Trainable, ids: &Tensor, weights: &Tensor, recompute: bool) -> Tensor {
    let rows = model.rows(ids).unwrap();
    model.learn(&rows, weights, Way { recompute, ..Way::default() }).unwrap()
}

fn loss(model: &mut Trainable, (ids, weights): &(Tensor, Tensor)) -> f64 {
    let nll = learn(model, ids, weights, false);
    let _ = model.gradient.zero_();
    (nll * weights).sum(Kind::Double).double_value(&[])
}

fn largest(difference: &Tensor) -> f64 {
    difference.abs().max().to_kind(Kind::Double).double_value(&[])
}

#[test]
fn the_forward_pass_is_the_decoders() {
    let ids = batch(2, 23, 1).0;
    for name in ["llama/gqa2_llama31", "llama/gqa4_biases", "families/qwen3", "families/olmo2"] {
        let weights = weights(name);
        let wanted = Decoder::load(&weights).unwrap();
        let model = Trainable::continued(
            &weights,
            weights.config().clone(),
            Extent::whole(Trained::Everything),
            Kind::Float,
            Device::Cpu,
            0,
        );
        let found = model.unwrap().decoder().unwrap();
        let hidden = |lm: &Decoder| {
            lm.forward(&ids, &mut Dense::new(lm.config().layers, 128), &Hooks::default()).unwrap()
        };
        let (found, wanted) = (hidden(&found), hidden(&wanted));
        assert!(found.requires_grad() && !wanted.requires_grad());
        let apart = largest(&(found - &wanted)) / largest(&wanted);
        assert!(apart <= 1e-5, "{name}: {apart:e}");
    }
}

/// Along a direction, the gradient says how fast the loss rises; of all numbers, and of the maps alone, which turn queries
/// and keys.
#[test]
fn gradients_are_finite_differences() {
    for (name, trained) in [
        ("kvzap/model", Trained::Everything),
        ("families/qwen3", Trained::Everything),
        ("families/olmo2", Trained::QueriesAndKeys),
        ("kvzap/model", Trained::LowRank(2)),
        ("kvzap/model", Trained::Maps),
    ] {
        let mut model = with_maps(name, trained);
        let batch = batch(2, 19, 2);
        let _ = learn(&mut model, &batch.0, &batch.1, false);
        let gradient = model.gradient.copy();
        for role in [Role::Matrix, Role::Vector, Role::Factor, Role::Map] {
            let span = model.span(role);
            if span.is_empty() {
                continue;
            }
            let (start, length) = (span.start, span.end - span.start);
            let direction = gradient.narrow(0, start, length).sign();
            let slope = (gradient.narrow(0, start, length) * &direction)
                .sum(Kind::Double)
                .double_value(&[]);
            let step = 3e-3 / slope.max(1e-3); // enough to see in f32
            let mut at = |by: f64| {
                let _ = tch::no_grad(|| {
                    model.master.narrow(0, start, length).g_add_(&(&direction * by))
                });
                loss(&mut model, &batch)
            };
            let (up, down) = (at(step), at(-2.0 * step));
            at(step);
            let measured = (up - down) / (2.0 * step);
            assert!(slope > 1e-4, "{name} {trained:?} {role:?}: {slope}");
            assert!((measured / slope - 1.0).abs() < 0.02, "{name} {role:?}: {measured} {slope}");
        }
    }
}

#[test]
fn computing_a_layer_again_gives_the_same_gradient() {
    for name in ["kvzap/model", "families/olmo2"] {
        let mut model = with_maps(name, Trained::Everything);
        let (ids, weights) = batch(2, 19, 2);
        let kept = learn(&mut model, &ids, &weights, false);
        let wanted = model.gradient.copy();
        let _ = model.gradient.zero_();
        let again = learn(&mut model, &ids, &weights, true);
        assert!(largest(&(again - kept)) < 1e-5);
        assert!(largest(&(&model.gradient - &wanted)) < 1e-5 * largest(&wanted).max(1.0));
    }
}

/// What lies below the first trained layer gets no gradient and needs none; the rest gets the same.
#[test]
fn layers_below_the_first_are_left_alone() {
    let (ids, weights) = batch(2, 19, 2);
    let name = "kvzap/model";
    let read = self::weights(name);
    let above = |trained, from, plan: &Value| {
        let config = read.config().clone().with_positions(plan).unwrap();
        let extent = Extent { trained, from };
        Trainable::continued(&read, config, extent, Kind::Float, Device::Cpu, 3).unwrap()
    };
    let mut whole = above(Trained::Everything, 0, &repo(1));
    let wanted = learn(&mut whole, &ids, &weights, false);
    for recompute in [false, true] {
        let mut upper = above(Trained::Everything, 1, &repo(1));
        let below = upper.parts.iter().any(|part| layer_of(&part.name, 3) == Some(0));
        assert!(!below && upper.first == 1 && upper.numbers() < whole.numbers());
        let found = learn(&mut upper, &ids, &weights, recompute);
        assert!(largest(&(found - &wanted)) < 1e-5);
        for part in &upper.parts {
            let of = |model: &Trainable, part: &Part| {
                model.gradient.narrow(0, part.range.start, part.range.end - part.range.start)
            };
            let same = of(&whole, &whole.parts[whole.index[&part.name]]);
            let apart = largest(&(of(&upper, part) - &same));
            assert!(apart < 1e-5 * largest(&same).max(1.0), "{}: {apart:e}", part.name);
        }
    }
    let mut maps = above(Trained::Maps, 0, &repo(2));
    assert_eq!(maps.first, 2, "the first layer with maps");
    let control = above(Trained::QueriesAndKeys, 2, &json!({"dynamic_pe_mode": "none"}));
    assert!(maps.shares_rows(&control) && !maps.shares_rows(&whole));
    let rows = control.rows(&ids).unwrap();
    let apart = learn(&mut maps, &ids, &weights, false)
        - maps.learn(&rows, &weights, Way::default()).unwrap();
    assert!(largest(&apart) < 1e-6, "twins learn from the same rows");
}

#[test]
fn positions_that_are_moved_to_the_index_lose_what_the_control_loses() {
    let (ids, weights) = batch(2, 19, 2);
    let mut plain = with_maps("kvzap/model", Trained::Everything);
    plain.config.positions.fill(LayerPositions::Rope);
    let wanted = learn(&mut plain, &ids, &weights, false);
    let mut model = with_maps("kvzap/model", Trained::Everything);
    for (toward_index, alike) in [(1.0, true), (0.5, false)] {
        let rows = model.rows(&ids).unwrap();
        let way = Way { toward_index, ..Way::default() };
        let nll = model.learn(&rows, &weights, way).unwrap();
        assert_eq!(largest(&(nll - &wanted)) < 1e-5, alike, "{toward_index}");
    }
}

const RATES: Rates = Rates { weights: 2e-3, maps: 1e-2, decay: 0.1, clip: 1.0 };

fn steps(model: &mut Trainable, optimizer: &mut AdamW, from: i64, to: i64) -> f64 {
    let mut last = 0.0;
    for step in from..to {
        let (ids, weights) = batch(2, 19, step % 3);
        let nll = learn(model, &ids, &weights, false);
        last = (nll * weights).sum(Kind::Double).double_value(&[]);
        let _ = optimizer.step(model, RATES).unwrap();
    }
    last
}

#[test]
fn a_training_that_was_interrupted_ends_with_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.safetensors");
    let fresh = || {
        let model = with_maps("kvzap/model", Trained::Everything);
        let optimizer = AdamW::new(&model).unwrap();
        (model, optimizer)
    };
    let (mut model, mut optimizer) = fresh();
    let before = steps(&mut model, &mut optimizer, 0, 1);
    let _ = steps(&mut model, &mut optimizer, 1, 20);
    model.save(&path, &optimizer, "these", "step 20").unwrap();
    let after = steps(&mut model, &mut optimizer, 20, 41);
    assert!(after < 0.7 * before, "{before} {after}");

    let (mut again, mut other) = fresh();
    assert_eq!(again.restore(&path, &mut other, "these").unwrap(), "step 20");
    assert_eq!(other.steps(), 20);
    let _ = steps(&mut again, &mut other, 20, 41);
    assert!(again.master.equal(&model.master) && other.second.equal(&optimizer.second));

    let error = again.restore(&path, &mut other, "others").unwrap_err();
    assert!(matches!(error, Error::OtherTraining { .. }), "{error}");
    let stranger = golden("families/qwen3/model.safetensors");
    let error = again.restore(&stranger, &mut other, "these").unwrap_err();
    assert!(error.to_string().contains("begin anew"), "{error}");
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    assert!(matches!(again.restore(&path, &mut other, "these"), Err(Error::Format { .. })));
}

#[test]
fn what_was_trained_is_read_back_over_its_base() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trained.safetensors");
    let name = "kvzap/model";
    for (trained, changed) in [(Trained::Maps, 6), (Trained::LowRank(2), 6 + 3 * 7)] {
        let mut model = with_maps(name, trained);
        let mut optimizer = AdamW::new(&model).unwrap();
        let _ = steps(&mut model, &mut optimizer, 0, 5);
        model.write_overlay(&path, &open(&golden(name)).unwrap(), &repo(1)).unwrap();
        let read = weights(name).overlaid(Overlay::open(&path).unwrap()).unwrap();
        assert_eq!(read.config().positions[..2], [LayerPositions::Rope, LayerPositions::Repo]);
        let tensors = model.tensors().unwrap();
        assert_eq!(tensors.len(), changed, "only what changed");
        for (name, tensor) in tensors {
            let found = Tensors::tensor(&read, &name, &tensor.size()).unwrap();
            assert!(found.equal(&tensor.to_kind(Kind::Float)), "{name}");
        }
        Decoder::load(&read).unwrap();
    }
}

#[test]
fn a_model_from_scratch_is_a_folder_that_loads_and_twins_begin_alike() {
    let folder = tempfile::tempdir().unwrap();
    let config = |pe: Value| {
        let mut json: Value =
            serde_json::from_slice(&std::fs::read(golden("kvzap/model/config.json")).unwrap())
                .unwrap();
        json["pe_config"] = pe;
        std::fs::write(folder.path().join("config.json"), json.to_string()).unwrap();
        Config::of_folder(folder.path()).unwrap()
    };
    let fresh = |config| Trainable::from_scratch(config, Kind::Float, Device::Cpu, 7).unwrap();
    let plain = fresh(config(json!({"dynamic_pe_mode": "none"})));
    let model = fresh(config(repo(1)));
    for part in &plain.parts {
        let twin = &model.parts[model.index[&part.name]];
        assert!(twin.leaf.equal(&part.leaf), "{}", part.name);
    }
    assert_eq!(model.numbers() - plain.numbers(), 2 * (2 * 8 * 64 + 2 * 8));
    let matrix = &model.parts[model.index["model.layers.0.mlp.up_proj.weight"]].leaf;
    assert!((matrix.std(true).double_value(&[]) - 0.02).abs() < 1e-3, "{matrix:?}");
    assert!(largest(matrix) <= 0.06001);

    model.write_folder(folder.path()).unwrap();
    let read = Weights::new(open(folder.path()).unwrap(), Kind::Float, Device::Cpu).unwrap();
    assert_eq!(read.config(), model.config());
    let found = Tensors::tensor(&read, "model.norm.weight", &[64]).unwrap();
    assert!(found.equal(&Tensor::ones([64], CPU)));
    Decoder::load(&read).unwrap();
}

#[test]
fn a_training_of_nothing_is_refused() {
    let weights = weights("kvzap/model");
    let config = weights.config().clone();
    let extent = Extent::whole(Trained::Maps);
    let model = Trainable::continued(&weights, config, extent, Kind::Float, Device::Cpu, 0);
    assert!(matches!(model, Err(Error::NothingToTrain)));
}
