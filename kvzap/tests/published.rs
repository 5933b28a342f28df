//! The three models with published surrogates: what these cost, and that files of their sizes run.

use kvzap::{Affine, Dtype, Error, ModelShape, Surrogate};

#[test]
fn costs_are_those_of_the_paper() {
    // MLP and linear: parameters in millions, per cent of the model's operations; bytes a token.
    let paper = [
        ("Qwen3-8B", [(75.66, 1.09), (1.18, 0.02)], 147_456),
        ("Llama-3.1-8B-Instruct", [(67.26, 0.96), (1.05, 0.02)], 131_072),
        ("Qwen3-32B", [(210.1, 0.67), (2.62, 0.01)], 262_144),
    ];
    for ((name, costs, bytes), (found, model)) in paper.into_iter().zip(ModelShape::PUBLISHED) {
        assert_eq!((name, bytes), (found, model.cache_bytes(2)));
        for (width, (millions, per_cent)) in [Some(model.hidden / 8), None].into_iter().zip(costs) {
            let overhead = model.overhead(width);
            let parameters = overhead.parameters as f64 / 1e6;
            assert!((parameters - millions).abs() < 0.005 * millions, "{name}: {parameters}");
            assert!(
                (100.0 * overhead.share() - per_cent).abs() <= 0.005,
                "{name}: {}",
                overhead.share()
            );
        }
    }
}

/// Small numbers without a pattern.
fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        ((state >> 16) as f32 / 65536.0 - 0.5) * 0.1
    };
    std::iter::repeat_with(next).take(count).collect()
}

fn affine(inputs: usize, outputs: usize, seed: u32) -> Affine {
    Affine::new(numbers(inputs * outputs, seed), numbers(outputs, seed + 1)).unwrap()
}

/// A surrogate of the published sizes, but for the number of `layers`.
fn surrogate(model: &ModelShape, layers: usize, mlp: bool) -> Surrogate {
    let (hidden, width, heads) = (model.hidden, model.hidden / 8, model.kv_heads);
    let surrogate = if mlp {
        let layer = |layer| [affine(hidden, width, layer), affine(width, heads, layer + 1000)];
        Surrogate::mlp((0..layers as u32).map(layer).collect())
    } else {
        Surrogate::linear((0..layers as u32).map(|layer| affine(hidden, heads, layer)).collect())
    };
    surrogate.unwrap().rounded(Dtype::Bf16)
}

#[test]
fn folders_of_the_published_sizes_are_read_for_their_models_alone() {
    for (name, model) in ModelShape::PUBLISHED {
        // All layers where that is small; MLPs of 64 layers and 420 MB are for the ignored test.
        for (mlp, layers) in [(false, model.layers), (true, 2)] {
            let folder = tempfile::tempdir().unwrap();
            let made = surrogate(&model, layers, mlp);
            made.save(folder.path()).unwrap();
            let config = std::fs::read(folder.path().join("config.json")).unwrap();
            let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
            let width =
                if mlp { serde_json::json!(model.hidden / 8) } else { serde_json::Value::Null };
            let found =
                ["n_modules", "input_dim", "output_dim", "hidden_dim"].map(|key| &config[key]);
            assert_eq!(
                found,
                [&layers.into(), &model.hidden.into(), &model.kv_heads.into(), &width]
            );

            let read = Surrogate::load(folder.path()).unwrap();
            assert!(read == made, "{name}");
            read.check(layers, model.hidden, model.kv_heads).unwrap();
            let parameters: usize = (0..layers)
                .flat_map(|layer| read.maps(layer).unwrap())
                .map(|map| map.weight().len() + map.bias().len())
                .sum();
            let shape = ModelShape { layers, ..model };
            assert_eq!(parameters, shape.overhead(mlp.then_some(model.hidden / 8)).parameters);
            for (_, other) in ModelShape::PUBLISHED.into_iter().filter(|(other, _)| *other != name)
            {
                let error = read.check(other.layers, other.hidden, other.kv_heads).unwrap_err();
                assert!(matches!(error, Error::OtherModel { .. }), "{error}");
            }
        }
    }
}

#[cfg(feature = "tch")]
mod torch {
    use super::*;
    use kvzap::{Array, LayerInput, Scorer, TorchSurrogate};
    use tch::{Device, Kind, Tensor};

    fn runs_as_written(model: &ModelShape, layers: usize, mlp: bool) {
        let surrogate = surrogate(model, layers, mlp);
        let hidden = numbers(5 * model.hidden, 77).iter().map(|x| 20.0 * x).collect::<Vec<_>>();
        let tensor = Tensor::from_slice(&hidden).view([1, 5, model.hidden as i64]);
        let array = Array::new(hidden, &[1, 5, model.hidden]).unwrap();
        for (kind, tolerance) in [(Kind::Float, 1e-4), (Kind::BFloat16, 0.05)] {
            let scorer = TorchSurrogate::new(&surrogate, kind, Device::Cpu).unwrap();
            let tensor = tensor.to_kind(kind);
            for layer in 0..layers {
                let input = LayerInput {
                    layer,
                    hidden: &tensor,
                    queries: &tensor,
                    keys: &tensor,
                    values: &tensor,
                };
                let found = scorer.score(input).unwrap();
                assert_eq!(found.size(), [1, model.kv_heads as i64, 5]);
                let found =
                    Vec::<f32>::try_from(found.to_kind(Kind::Float).flatten(0, -1)).unwrap();
                if layer > 1 {
                    continue; // the plain twin takes a second a layer
                }
                let wanted = surrogate.forward(layer, &array).unwrap();
                for (found, wanted) in found.iter().zip(wanted.data()) {
                    assert!(
                        (found - wanted).abs() <= tolerance * (1.0 + wanted.abs()),
                        "{found} {wanted}"
                    );
                }
            }
        }
    }

    #[test]
    fn surrogates_of_the_published_sizes_run_in_f32_and_bf16() {
        for (_, model) in ModelShape::PUBLISHED {
            runs_as_written(&model, model.layers, false);
            runs_as_written(&model, 1, true);
        }
    }

    #[test]
    #[ignore = "takes 1.9 GB and ten seconds"]
    fn whole_mlps_of_the_published_sizes_run() {
        for (_, model) in ModelShape::PUBLISHED {
            runs_as_written(&model, model.layers, true);
        }
    }
}
