//! Everything on libtorch against its plain twin, and the oracle against its definition in f64.
#![cfg(feature = "tch")]

use kvzap::{
    Array, Budget, Collector, Error, KeyDiff, Knorm, LayerInput, ObservedAttention, Policy, Random,
    Ridge, Scope, Scorer, SnapKv, Spans, StreamingLlm, Surrogate, Threshold, TorchSurrogate, Tova,
    kvzip_plus,
};
use tch::{Device, Kind, Tensor};

fn random(shape: &[i64]) -> Tensor {
    Tensor::randn(shape, (Kind::Float, Device::Cpu))
}

fn plain(tensor: &Tensor) -> Array {
    let shape: Vec<usize> = tensor.size().iter().map(|&dim| dim as usize).collect();
    Array::new(Vec::try_from(tensor.to_kind(Kind::Float).flatten(0, -1)).unwrap(), &shape).unwrap()
}

fn bools(tensor: &Tensor) -> Vec<bool> {
    assert_eq!(tensor.kind(), Kind::Bool);
    Vec::try_from(tensor.flatten(0, -1)).unwrap()
}

/// A layer whose other parts do not matter.
fn only<T>(hidden: &T) -> LayerInput<'_, T> {
    LayerInput { layer: 0, hidden, queries: hidden, keys: hidden, values: hidden }
}

fn golden() -> Vec<(String, Tensor)> {
    Tensor::read_safetensors("tests/golden/scores.safetensors").unwrap()
}

#[test]
fn scores_are_those_of_kvpress_in_f32_and_bf16() {
    let golden: std::collections::HashMap<_, _> = golden().into_iter().collect();
    for name in ["linear", "mlp"] {
        let surrogate = Surrogate::load(format!("tests/golden/{name}")).unwrap();
        for (key, kind) in [("f32", Kind::Float), ("bf16", Kind::BFloat16)] {
            let scorer = TorchSurrogate::new(&surrogate, kind, Device::Cpu).unwrap();
            let hidden = golden["hidden"].to_kind(kind);
            let score = |layer| scorer.score(LayerInput { layer, ..only(&hidden) }).unwrap();
            let found = Tensor::stack(&[score(0), score(1)], 0);
            let expected = &golden[&format!("{name}.{key}")];
            assert_eq!((found.kind(), found.size()), (kind, expected.size()));
            for (a, b) in plain(&found).data().iter().zip(plain(expected).data()) {
                let ulp = 2_f32.powi(b.abs().log2().floor() as i32 - 7);
                let tolerance = if kind == Kind::Float { 1e-5 } else { ulp };
                assert!((a - b).abs() <= tolerance, "{name}.{key}: {a} against {b}");
            }
        }
    }
}

#[test]
fn hidden_states_that_do_not_fit_are_refused() {
    let surrogate = Surrogate::load("tests/golden/linear").unwrap();
    let scorer = TorchSurrogate::new(&surrogate, Kind::BFloat16, Device::Cpu).unwrap();
    let error =
        |hidden: Tensor, layer| scorer.score(LayerInput { layer, ..only(&hidden) }).unwrap_err();
    let (fits, bf16) = (random(&[1, 2, 48]), Kind::BFloat16);
    assert!(matches!(error(fits.to_kind(bf16), 2), Error::Layer { layer: 2, layers: 2 }));
    let message = error(fits, 0).to_string();
    assert!(message.contains("Float") && message.contains("BFloat16"), "{message}");
    assert!(matches!(
        error(random(&[1, 2, 40]).to_kind(bf16), 0),
        Error::Shape { name: "hidden", .. }
    ));
    assert!(matches!(
        error(random(&[2, 48]).to_kind(bf16), 0),
        Error::Shape { name: "hidden", .. }
    ));
}

#[test]
fn policies_decide_as_their_plain_twins_do() {
    tch::manual_seed(3);
    for (batch, heads, tokens) in [(1, 1, 1), (2, 3, 40), (1, 9, 7), (2, 1, 200)] {
        let scores = (random(&[batch, heads, tokens]) * 4.0).round(); // many ties
        let special = scores.rand_like();
        let scores = scores
            .masked_fill(&special.lt(0.05), f64::NAN)
            .masked_fill(&special.gt(0.95), f64::NEG_INFINITY);
        let array = plain(&scores);
        for threshold in [-4.0, 0.0, 1.5, f32::NEG_INFINITY, f32::INFINITY] {
            let policy = Threshold::new(threshold).unwrap();
            assert_eq!(bools(&policy.drops(&scores).unwrap()), policy.drops(&array).unwrap());
        }
        for remove in [0.0, 0.3, 0.75, 1.0] {
            for window in [0, 1, 6, 128] {
                for scope in [Scope::Head, Scope::Layer] {
                    let policy = Budget::new(remove, window, scope).unwrap();
                    let drops = policy.drops(&scores).unwrap();
                    assert_eq!(drops.size(), scores.size());
                    assert_eq!(
                        bools(&drops),
                        policy.drops(&array).unwrap(),
                        "{policy:?} of {tokens}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_threshold_is_rounded_to_bf16_beside_bf16_scores() {
    let scores = Tensor::from_slice(&[-4.125_f32, -4.09375, -4.0]).view([1, 1, 3]);
    let policy = Threshold::new(-4.0901).unwrap();
    assert_eq!(bools(&policy.drops(&scores).unwrap()), [true, true, false]);
    assert_eq!(
        bools(&policy.drops(&scores.to_kind(Kind::BFloat16)).unwrap()),
        [true, false, false]
    );
}

#[test]
fn baselines_score_as_their_plain_twins_do_in_f32_whatever_the_model() {
    let keys = random(&[2, 3, 300, 4]);
    let (bf16, array) = (keys.to_kind(Kind::BFloat16), plain(&keys));
    fn check<S: Scorer<Tensor> + Scorer<Array>>(scorer: S, keys: &Tensor, array: &Array) {
        let found = scorer.score(LayerInput { layer: 5, ..only(keys) }).unwrap();
        assert_eq!(found.kind(), Kind::Float);
        assert_eq!(plain(&found), scorer.score(LayerInput { layer: 5, ..only(array) }).unwrap());
    }
    check(Random::new(7), &bf16, &array);
    check(StreamingLlm::new(4), &bf16, &array);
    check(StreamingLlm::new(1000), &bf16, &array);
}

#[test]
fn norms_and_differences_of_keys_are_those_of_their_plain_twins() {
    let keys = random(&[2, 3, 50, 4]);
    let _ = keys.get(0).get(0).get(3).fill_(0.0); // no norm, no direction
    fn check<S: Scorer<Tensor> + Scorer<Array>>(scorer: S, keys: &Tensor) {
        let (found, wanted) =
            (scorer.score(only(keys)).unwrap(), scorer.score(only(&plain(keys))).unwrap());
        assert_eq!(plain(&found).shape(), wanted.shape());
        for (a, b) in plain(&found).data().iter().zip(wanted.data()) {
            assert!((a - b).abs() <= 1e-6, "{a} against {b}");
        }
        assert_eq!(scorer.score(only(&keys.to_kind(Kind::BFloat16))).unwrap().kind(), Kind::Float);
        let flat = keys.flatten(0, 1);
        assert!(matches!(scorer.score(only(&flat)), Err(Error::Shape { name: "keys", .. })));
    }
    check(Knorm, &keys);
    check(KeyDiff, &keys);
}

#[test]
fn attention_baselines_take_rows_in_any_blocks_and_prompts_of_any_length() {
    tch::manual_seed(2);
    let layer = Layer::new(30, 1.0);
    let score = |scorer: &dyn Scorer<Tensor>| scorer.score(layer.input(0)).unwrap();
    // Every row's weights add up to 1, so all scores of a head do to the number of rows.
    let sums =
        score(&ObservedAttention::sum()).sum_dim_intlist([2i64].as_slice(), false, Kind::Float);
    assert!(plain(&sums).data().iter().all(|sum| (sum - 30.0).abs() < 1e-3), "{sums}");
    let first = score(&ObservedAttention::mean()).double_value(&[0, 0, 0]);
    assert!(
        (first - score(&ObservedAttention::sum()).double_value(&[0, 0, 0]) / 30.0).abs() < 1e-6
    );
    for scorer in [&SnapKv::new() as &dyn Scorer<Tensor>, &Tova] {
        for tokens in [1, 2, 30] {
            let layer = Layer::new(tokens, 1.0);
            let scores = scorer.score(layer.input(0)).unwrap();
            assert_eq!((scores.size(), scores.kind()), (vec![1, 2, tokens], Kind::Float));
            assert_eq!(scores.select(2, tokens - 1).isinf().all().int64_value(&[]), 1);
        }
    }
    assert_eq!(score(&SnapKv::new()).isinf().all().int64_value(&[]), 1, "all of them observe");
    let odd = random(&[1, 7, 30, 4]);
    for scorer in [&SnapKv::new() as &dyn Scorer<Tensor>, &Tova, &ObservedAttention::sum()] {
        let error = scorer.score(LayerInput { queries: &odd, ..layer.input(0) }).unwrap_err();
        assert!(matches!(error, Error::Shape { name: "queries", .. }), "{error}");
    }
}

/// One layer of a sequence: 2 kv heads of 3 query heads of dim 4, hidden 10.
struct Layer {
    hidden: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    output_projection: Tensor,
}

impl Layer {
    /// `sharp` scales the queries: at 1 attention is even, at 300 most weights underflow.
    fn new(tokens: i64, sharp: f64) -> Self {
        Self {
            hidden: random(&[1, tokens, 10]),
            queries: random(&[1, 6, tokens, 4]) * sharp,
            keys: random(&[1, 2, tokens, 4]),
            values: random(&[1, 2, tokens, 4]),
            output_projection: random(&[10, 24]),
        }
    }

    fn input(&self, layer: usize) -> LayerInput<'_, Tensor> {
        let Self { hidden, queries, keys, values, .. } = self;
        LayerInput { layer, hidden, queries, keys, values }
    }

    /// The definition, in f64 and loops.
    fn definition(&self, spans: &Spans) -> Vec<f64> {
        let at = |tensor: &Tensor, index: &[i64]| tensor.double_value(index);
        let norm = |numbers: Vec<f64>| numbers.iter().map(|x| x * x).sum::<f64>().sqrt();
        let mut scores = Vec::new();
        for head in 0..2 {
            for i in spans.original.clone() {
                let mut best = f64::NEG_INFINITY;
                for g in head * 3..head * 3 + 3 {
                    let row = |r| {
                        (0..4)
                            .map(|d| {
                                at(&self.output_projection, &[r, g * 4 + d])
                                    * at(&self.values, &[0, head, i as i64, d])
                            })
                            .sum()
                    };
                    let wide = norm((0..10).map(row).collect());
                    for j in spans.repeat.clone() {
                        let logit = |k: usize| {
                            (0..4)
                                .map(|d| {
                                    at(&self.queries, &[0, g, j as i64, d])
                                        * at(&self.keys, &[0, head, k as i64, d])
                                })
                                .sum::<f64>()
                                / 2.0
                        };
                        let top = (0..=j).map(logit).fold(f64::NEG_INFINITY, f64::max);
                        let sum: f64 = (0..=j).map(|k| (logit(k) - top).exp()).sum();
                        let weight = (logit(i) - top).exp() / sum;
                        let hidden =
                            norm((0..10).map(|c| at(&self.hidden, &[0, j as i64, c])).collect());
                        best = best.max(weight * wide / hidden);
                    }
                }
                scores.push(best.ln());
            }
        }
        scores
    }
}

#[test]
fn the_oracle_is_its_definition_even_where_weights_underflow() {
    tch::manual_seed(5);
    let spans = Spans { original: 2..9, repeat: 12..14 };
    // Sharp logits are in the hundreds, where f32 numbers are 3e-5 apart.
    for (sharp, tolerance) in [(1.0, 1e-5), (300.0, 1e-4)] {
        let layer = Layer::new(20, sharp);
        let found = kvzip_plus(layer.input(0), &layer.output_projection, &spans).unwrap();
        assert_eq!((found.size(), found.kind()), (vec![1, 2, 7], Kind::Float));
        let expected = layer.definition(&spans);
        for (&found, &expected) in plain(&found).data().iter().zip(&expected) {
            assert!(
                (f64::from(found) - expected).abs() <= tolerance * (1.0 + expected.abs()),
                "{found} {expected}"
            );
        }
        let least = expected.iter().copied().fold(0.0, f64::min);
        assert_eq!(sharp > 1.0, least < -110.0, "an f32 weight is zero below -103: {least}");
    }
    let mut layer = Layer::new(20, 1e4);
    layer.values = layer.values.zeros_like();
    layer.hidden = layer.hidden.zeros_like();
    let found = kvzip_plus(layer.input(0), &layer.output_projection, &spans).unwrap();
    assert!(plain(&found).data().iter().all(|x| x.is_finite()), "zero norms");
}

#[test]
fn the_oracle_refuses_spans_and_shapes_that_do_not_fit() {
    let layer = Layer::new(20, 1.0);
    for (original, repeat) in
        [(5..5, 6..9), (2..5, 9..9), (2..8, 7..12), (9..12, 2..5), (2..5, 15..21)]
    {
        let spans = Spans { original, repeat };
        let error = kvzip_plus(layer.input(0), &layer.output_projection, &spans).unwrap_err();
        assert!(matches!(error, Error::Spans { tokens: 20, .. }));
    }
    let spans = Spans { original: 2..5, repeat: 7..12 };
    let shape =
        |input, projection: &Tensor| match kvzip_plus(input, projection, &spans).unwrap_err() {
            Error::Shape { name, .. } => name,
            other => panic!("{other}"),
        };
    assert_eq!(shape(layer.input(0), &random(&[24, 10])), "output_projection");
    let (odd, none, short) =
        (random(&[1, 7, 20, 4]), random(&[1, 0, 20, 4]), random(&[1, 2, 19, 4]));
    assert_eq!(
        shape(LayerInput { queries: &odd, ..layer.input(0) }, &layer.output_projection),
        "queries"
    );
    assert_eq!(
        shape(LayerInput { keys: &none, ..layer.input(0) }, &layer.output_projection),
        "queries"
    );
    let headless = LayerInput { queries: &none, keys: &none, ..layer.input(0) };
    assert_eq!(shape(headless, &layer.output_projection), "queries");
    assert_eq!(
        shape(LayerInput { values: &short, ..layer.input(0) }, &layer.output_projection),
        "values"
    );
}

#[test]
fn tensors_are_added_to_a_fit_as_slices_are() {
    tch::manual_seed(9);
    let (mut plainly, mut on_tch) = (Ridge::new(1, 12, 2), Ridge::new(1, 12, 2));
    for rows in [1, 30, 50] {
        let (x, y) = (random(&[rows, 12]), random(&[rows, 2]));
        plainly.add(0, plain(&x).data(), plain(&y).data()).unwrap();
        on_tch.add_tensors(0, &x, &y).unwrap();
        assert!(matches!(on_tch.add_tensors(0, &x, &(y / 0.0)), Err(Error::Rows { layer: 0 })));
        assert!(matches!(on_tch.add_tensors(0, &x, &x), Err(Error::Shape { name: "scores", .. })));
    }
    let (a, b) = (plainly.solve(1.0).unwrap(), on_tch.solve(1.0).unwrap());
    let weights = |surrogate: &Surrogate| surrogate.maps(0).unwrap()[0].weight().to_vec();
    for (a, b) in weights(&a).iter().zip(weights(&b)) {
        assert!((a - b).abs() < 1e-6, "{a} against {b}");
    }
}

#[test]
fn a_collector_learns_the_oracle_from_forward_passes_and_forgets_nothing() {
    tch::manual_seed(11);
    let layers = [Layer::new(60, 1.0), Layer::new(60, 1.0)];
    let projections =
        || layers.iter().map(|layer| layer.output_projection.shallow_clone()).collect();
    let spans = Spans { original: 2..30, repeat: 31..59 };

    let collector = Collector::new(projections(), 1000);
    let scorer: Box<dyn Scorer<Tensor> + Send> = Box::new(collector.clone());
    assert!(matches!(scorer.score(layers[0].input(0)), Err(Error::NoText)));
    assert!(matches!(collector.take(), Err(Error::NoRows { layer: 0 })));
    collector.begin(spans.clone(), 1).unwrap();
    for (index, layer) in layers.iter().enumerate() {
        let scores = scorer.score(layer.input(index)).unwrap();
        assert_eq!(scores.size(), [1, 2, 60]);
        let LayerInput { queries, keys, values, .. } = layer.input(index);
        let none = None::<&Tensor>;
        let mixed = Tensor::scaled_dot_product_attention(
            queries, keys, values, none, 0.0, true, None, true,
        );
        assert!(collector.attended().unwrap().allclose(&mixed, 1e-5, 1e-6, false));
        assert!(collector.attended().is_none(), "taken");
        assert!(
            bools(&Threshold::new(f32::MAX).unwrap().drops(&scores).unwrap())
                .iter()
                .all(|drop| !drop)
        );
    }
    assert!(matches!(scorer.score(layers[0].input(2)), Err(Error::Layer { layer: 2, layers: 2 })));
    for (layer, (hidden, scores)) in layers.iter().zip(collector.take().unwrap()) {
        let target = kvzip_plus(layer.input(0), &layer.output_projection, &spans).unwrap();
        assert_eq!(hidden, layer.hidden.squeeze_dim(0).narrow(0, 2, 28));
        assert_eq!(scores, target.squeeze_dim(0).transpose(0, 1));
    }
    assert!(matches!(collector.take(), Err(Error::NoRows { layer: 0 })), "taken");

    let few = Collector::new(projections(), 9);
    let rows = |seed| -> (Tensor, Tensor) {
        few.begin(spans.clone(), seed).unwrap();
        for (index, layer) in layers.iter().enumerate() {
            let _ = few.score(layer.input(index)).unwrap();
        }
        few.take().unwrap().remove(1)
    };
    let gather = |seed| rows(seed).0;
    let ((hidden, scores), layer) = (rows(1), &layers[1]);
    let all = kvzip_plus(layer.input(1), &layer.output_projection, &spans).unwrap();
    for row in 0..9 {
        let same = layer.hidden.squeeze_dim(0).eq_tensor(&hidden.get(row)).all_dim(1, false);
        let token = same.to_kind(Kind::Int64).argmax(None, false).int64_value(&[]);
        let expected = all.squeeze_dim(0).select(1, token - 2);
        assert!(scores.get(row).allclose(&expected, 1e-6, 1e-6, false), "token {token}");
    }
    assert_eq!(hidden.size(), [9, 10]);
    assert_eq!(gather(1), gather(1), "a seed chooses the same tokens again");
    assert_ne!(gather(1), gather(2));
}
