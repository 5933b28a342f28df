//! Chance and recency.

use kvzap::{Array, Budget, LayerInput, Policy, Random, Scope, Scorer, StreamingLlm};

fn scores(scorer: &impl Scorer<Array>, layer: usize, shape: [usize; 4]) -> Array {
    let keys = Array::new(vec![0.0; shape.iter().product()], &shape).unwrap();
    scorer
        .score(LayerInput { layer, hidden: &keys, queries: &keys, keys: &keys, values: &keys })
        .unwrap()
}

#[test]
fn chance_is_uniform_and_depends_on_seed_layer_head_and_place_alone() {
    let draw = |seed, layer, batch, tokens| {
        scores(&Random::new(seed), layer, [batch, 2, tokens, 1]).data().to_vec()
    };
    let one = draw(7, 3, 1, 4000);
    assert_eq!(draw(7, 3, 2, 4000), [one.clone(), one.clone()].concat());
    assert_eq!(draw(7, 3, 1, 10)[..10], one[..10]);
    let (first, second) = one.split_at(4000);
    for other in [second, &draw(8, 3, 1, 4000)[..4000], &draw(7, 4, 1, 4000)[..4000]] {
        let same = first.iter().zip(other).filter(|(a, b)| a == b).count();
        assert!(same < 3, "{same} of 4000 alike");
    }
    let mean = one.iter().sum::<f32>() / 8000.0;
    assert!((mean - 0.5).abs() < 0.02 && one.iter().all(|x| (0.0..1.0).contains(x)), "{mean}");
}

#[test]
fn recency_keeps_the_sinks_and_the_newest() {
    let scores = scores(&StreamingLlm::new(4), 0, [1, 1, 20, 1]);
    let drops = Budget::new(0.5, 2, Scope::Head).unwrap().drops(&scores).unwrap();
    let kept: Vec<usize> = (0..20).filter(|&i| !drops[i]).collect();
    assert_eq!(kept, [0, 1, 2, 3, 14, 15, 16, 17, 18, 19]);
}

#[cfg(feature = "tch")]
mod torch {
    use kvzap::{
        DuoAttention, Error, ExpectedAttention, FastKvzip, Kvzip, LayerInput, ObservedAttention,
        Pass, Rules, Scorer, Tova,
    };
    use safetensors::{SafeTensors, tensor::TensorView};
    use std::path::Path;
    use tch::{Device, Kind, Tensor};

    fn random(shape: &[i64]) -> Tensor {
        Tensor::randn(shape, (Kind::Float, Device::Cpu))
    }

    fn score(
        scorer: &dyn Scorer<Tensor>,
        [queries, keys, values]: [&Tensor; 3],
    ) -> kvzap::Result<Tensor> {
        let hidden = random(&[1, keys.size()[2], 6]);
        scorer.score(LayerInput { layer: 0, hidden: &hidden, queries, keys, values })
    }

    /// One kv head of three query heads that disagree about token 0: 1, 0 and 0 of their attention.
    #[test]
    fn a_group_that_disagrees_is_one_score_a_kv_head_the_mean_or_for_the_oracle_the_most() {
        let keys = Tensor::eye(4, (Kind::Float, Device::Cpu)).view([1, 1, 4, 4]);
        let queries = Tensor::zeros([1, 3, 4, 4], (Kind::Float, Device::Cpu));
        for (head, token) in [(0, 0), (1, 1), (2, 2)] {
            let _ = queries.get(0).get(head).select(1, token).fill_(1000.0);
        }
        // The last token's queries: whole attention to tokens 0, 1 and 2.
        let third = |scores: Tensor| {
            assert_eq!(
                scores.size(),
                [1, 1, 4],
                "a score for the kv head, not for its query heads"
            );
            scores.double_value(&[0, 0, 0])
        };
        let all = [&queries, &keys, &keys];
        assert!((third(score(&Tova, all).unwrap()) - 1.0 / 3.0).abs() < 1e-6);
        // Over the rows: 4 of head 0; 1 of head 1, as row 0 sees no other; 1.5 of head 2.
        let observed = third(score(&ObservedAttention::sum(), all).unwrap());
        assert!((observed - 6.5 / 3.0).abs() < 1e-6, "{observed}");

        let kvzip = Kvzip::new(Rules::default(), 0);
        kvzip.context(&keys, &keys).unwrap();
        kvzip.begin(&Pass { ids: Vec::new(), chunk: 0..4 });
        let none = keys.zeros_like();
        let _ = score(&kvzip, [&queries, &none, &none]).unwrap();
        let scores = kvzip.scores().unwrap().remove(0);
        assert_eq!(Vec::<f32>::try_from(scores.flatten(0, -1)).unwrap()[..3], [1.0; 3]);
    }

    #[test]
    fn expected_attention_takes_prompts_of_any_length_and_its_models_head_dim_alone() {
        let scorer = ExpectedAttention::new(&[1.0, 0.01], Device::Cpu).unwrap();
        for tokens in [1, 3, 4, 5, 6, 40] {
            let (queries, keys) = (random(&[2, 6, tokens, 4]), random(&[2, 2, tokens, 4]));
            let scores = score(&scorer, [&queries, &keys, &keys]).unwrap();
            assert_eq!(scores.size(), [2, 2, tokens]);
            let (sinks, all) = (scores.isinf().sum(Kind::Int64), scores.isnan().any());
            assert_eq!((sinks.int64_value(&[]), all.int64_value(&[])), (4 * tokens.min(4), 0));
        }
        let (queries, keys) = (random(&[1, 6, 9, 8]), random(&[1, 2, 9, 8]));
        let error = score(&scorer, [&queries, &keys, &keys]).unwrap_err();
        assert!(matches!(error, Error::Shape { name: "queries", .. }), "{error}");
    }

    #[test]
    fn heads_of_another_model_do_not_stream() {
        let keys = random(&[1, 2, 9, 4]);
        let duo = DuoAttention::of(&[random(&[1, 3, 5])], 1, 1).unwrap();
        let error = score(&duo, [&keys, &keys, &keys]).unwrap_err();
        assert!(error.to_string().contains("kv heads 3, the model 2"), "{error}");
        let none = DuoAttention::new(Vec::new(), 1, 1);
        assert!(matches!(
            score(&none, [&keys, &keys, &keys]),
            Err(Error::Layer { layer: 0, layers: 0 })
        ));
        // Protected tokens say nothing of a head.
        let scores = Tensor::from_slice(&[f32::INFINITY, 0.25, 0.5, f32::INFINITY, 0.125, 0.0]);
        let duo = DuoAttention::of(&[scores.view([1, 2, 3])], 1, 1).unwrap();
        assert_eq!(duo.heads(), [[0.5, 0.125]]);
    }

    /// The committed gates with one tensor changed, or none where `change` says so.
    fn changed(
        folder: &Path,
        name: &str,
        change: impl Fn(&mut Vec<u8>) -> Option<Vec<usize>>,
    ) -> Error {
        let bytes = std::fs::read("tests/golden/gates.safetensors").unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let mut tensors = Vec::new();
        for (found, view) in file.tensors() {
            let (mut data, mut shape) = (view.data().to_vec(), Some(view.shape().to_vec()));
            if found == name {
                shape = change(&mut data);
            }
            tensors.extend(shape.map(|shape| (found, shape, data)));
        }
        let views = tensors.iter().map(|(name, shape, data)| {
            (name, TensorView::new(safetensors::Dtype::F32, shape.clone(), data).unwrap())
        });
        let path = folder.join("gates.safetensors");
        std::fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
        FastKvzip::load(&path, Device::Cpu).unwrap_err()
    }

    #[test]
    fn gates_that_are_damaged_or_anothers_are_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let error = changed(folder, "1.q_proj.bias", |_| None);
        assert!(
            matches!(&error, Error::NoTensor { tensor, .. } if tensor == "1.q_proj.bias"),
            "{error}"
        );
        let error = changed(folder, "0.k_base", |_| None).to_string();
        assert!(
            error.contains("no tensor 0.k_base") && error.contains("gates.safetensors"),
            "{error}"
        );
        let error = changed(folder, "2.q_norm.weight", |data| {
            data.truncate(32);
            Some(vec![8])
        });
        assert!(
            matches!(&error, Error::TensorShape { expected, found, .. } if expected == &[16] && found == &[8]),
            "{error}"
        );
        let error = changed(folder, "1.b", |data| {
            data[8..12].copy_from_slice(&f32::NAN.to_le_bytes());
            Some(vec![2, 1, 2])
        });
        assert!(
            matches!(&error, Error::Weight { tensor, index: 2, value, .. } if tensor == "1.b" && value.is_nan()),
            "{error}"
        );

        let path = folder.join("pickle.pt");
        assert!(matches!(FastKvzip::load(&path, Device::Cpu), Err(Error::File { .. })));
        std::fs::write(&path, b"PK\x03\x04 a pickle is no safetensors").unwrap();
        assert!(matches!(FastKvzip::load(&path, Device::Cpu), Err(Error::Safetensors { .. })));

        let gates = FastKvzip::load("tests/golden/gates.safetensors", Device::Cpu).unwrap();
        assert!(matches!(
            gates.check(3, 64, 4),
            Err(Error::OtherModel { field: "kv heads", expected: 4, found: 2 })
        ));
        let keys = random(&[1, 2, 5, 4]);
        let error = score(&gates, [&keys, &keys, &keys]).unwrap_err();
        assert!(matches!(error, Error::Shape { name: "hidden", .. }), "{error}");
    }
}
