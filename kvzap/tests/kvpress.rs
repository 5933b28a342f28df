//! The other methods against kvpress 0.5.5: tests/golden/baselines.py made the numbers.
#![cfg(feature = "tch")]

use kvzap::{
    Allocation, DuoAttention, ExpectedAttention, FastKvzip, KeyDiff, Knorm, LayerInput,
    ObservedAttention, Rule, Scorer, SnapKv, StreamingLlm, Tova,
};
use std::collections::HashMap;
use tch::{Device, Kind, Tensor};

const LAYERS: i64 = 3;

struct Golden(HashMap<String, Tensor>);

impl Golden {
    fn open() -> Self {
        Self(
            Tensor::read_safetensors("tests/golden/baselines.safetensors")
                .unwrap()
                .into_iter()
                .collect(),
        )
    }

    fn get(&self, name: &str) -> &Tensor {
        self.0.get(name).unwrap_or_else(|| panic!("no tensor {name}"))
    }

    /// `[1, kv_heads, tokens]` for each layer.
    fn scores(&self, scorer: &impl Scorer<Tensor>) -> Vec<Tensor> {
        let score = |layer| {
            let [hidden, queries, keys, values] =
                ["hidden", "queries", "keys", "values"].map(|name| self.get(name).get(layer));
            let input = LayerInput {
                layer: layer as usize,
                hidden: &hidden,
                queries: &queries,
                keys: &keys,
                values: &values,
            };
            scorer.score(input).unwrap()
        };
        (0..LAYERS).map(score).collect()
    }

    /// Whether `scores` that are not +inf are kvpress's, and those that are are kvpress's highest:
    /// sinks and windows, which it sets to its maximum plus one.
    fn assert_scores(&self, name: &str, scores: &[Tensor], protected: i64) {
        let wanted = self.get(&format!("{name}.scores"));
        let found = Tensor::cat(scores, 0);
        assert_eq!((found.size(), found.kind()), (wanted.size(), Kind::Float), "{name}");
        let infinite = found.isinf();
        assert_eq!(infinite.sum(Kind::Int64).int64_value(&[]), protected * 2 * LAYERS, "{name}");
        let error = (&found - wanted).masked_fill(&infinite, 0.0).abs().max().double_value(&[]);
        assert!(error <= 1e-5, "{name}: {error:.1e}");
        let least = wanted.where_scalarother(&infinite, f64::INFINITY).amin([1, 2], true);
        let others = wanted.masked_fill(&infinite, f64::NEG_INFINITY);
        assert_eq!(others.ge_tensor(&least).any().int64_value(&[]), 0, "{name}");
    }

    /// Whether what stays of `scores` under `rule` is what kvpress keeps at `ratio`. kvpress keeps
    /// `floor((1 - ratio) * tokens)` where we remove `round(ratio * tokens)`, so the share is its.
    fn assert_kept(&self, name: &str, ratio: f64, scores: &[Tensor], window: usize, rule: Rule) {
        let wanted = self.get(&format!("{name}.{ratio}")).to_kind(Kind::Bool);
        let share = 1.0 - wanted.to_kind(Kind::Double).mean(None).double_value(&[]);
        let drops = Allocation::new(share, window, 0, rule).unwrap().drops(scores).unwrap();
        let kept = Tensor::cat(&drops, 0).logical_not();
        let differ =
            kept.logical_xor(&wanted).sum_dim_intlist([2i64].as_slice(), false, Kind::Int64);
        let differ = Vec::<i64>::try_from(differ.flatten(0, -1)).unwrap();
        assert_eq!(differ, [0; 6], "{name} at {ratio}: {share}");
    }
}

#[test]
fn scores_and_kept_tokens_are_those_of_kvpress() {
    let golden = Golden::open();
    let check = |name: &str, scores: Vec<Tensor>, protected, ratios: &[f64]| {
        golden.assert_scores(name, &scores, protected);
        for &ratio in ratios {
            golden.assert_kept(name, ratio, &scores, 0, Rule::Head);
        }
    };
    let all = [0.25, 0.5, 0.9];
    check("knorm", golden.scores(&Knorm), 0, &all);
    check("keydiff", golden.scores(&KeyDiff), 0, &all);
    check("tova", golden.scores(&Tova), 1, &all);
    let inverse = Vec::<f32>::try_from(golden.get("inverse_frequencies")).unwrap();
    let expected = ExpectedAttention::new(&inverse, Device::Cpu).unwrap();
    check("expected", golden.scores(&expected), 4, &all);
    check("observed", golden.scores(&ObservedAttention::mean()), 0, &all);
    // At 0.9 not all of the window stays, and of equals kvpress's top-k takes any.
    check("snapkv", golden.scores(&SnapKv::new()), 64, &all[..2]);
    for ratio in all {
        golden.assert_kept(
            "streaming",
            ratio,
            &golden.scores(&StreamingLlm::new(4)),
            0,
            Rule::Head,
        );
    }
}

#[test]
fn budgets_of_heads_and_layers_are_those_of_kvpress() {
    let golden = Golden::open();
    let scores = golden.scores(&SnapKv::new());
    for ratio in [0.25, 0.5] {
        golden.assert_kept("adakv", ratio, &scores, 64, Rule::AdaKv { safe: 0.2 });
        golden.assert_kept("pyramid", ratio, &scores, 64, Rule::PyramidKv { beta: 20.0 });
    }
    let kept = golden.get("pyramid.0.5").sum_dim_intlist([2i64].as_slice(), false, Kind::Int64);
    assert_eq!(Vec::<i64>::try_from(kept.flatten(0, -1)).unwrap(), [96, 96, 80, 80, 64, 64]);
}

#[test]
fn gates_of_fast_kvzip_are_those_of_kvpress() {
    let golden = Golden::open();
    let gates = FastKvzip::load("tests/golden/gates.safetensors", Device::Cpu).unwrap();
    gates.check(3, 64, 2).unwrap();
    let scores = golden.scores(&gates);
    let error = (Tensor::cat(&scores, 0) - golden.get("fast.gates")).abs().max().double_value(&[]);
    assert!(error <= 1e-5, "{error:.1e}");
    for ratio in [0.25, 0.5, 0.9] {
        let drops = Allocation::new(ratio, 3, 4, Rule::Model).unwrap().drops(&scores).unwrap();
        let kept = golden.get(&format!("fast.{ratio}")).to_kind(Kind::Bool);
        assert_eq!(Tensor::cat(&drops, 0).logical_not(), kept, "{ratio}");
    }
}

#[test]
fn streaming_heads_are_those_of_kvpress_and_their_share_is_a_share_of_the_cache() {
    let golden = Golden::open();
    let heads = vec![vec![0.9, 0.1], vec![0.2, 0.8], vec![0.7, 0.3]];
    let scores = golden.scores(&DuoAttention::new(heads, 4, 16));
    let wanted = golden.get("duo").to_kind(Kind::Bool);
    let share = 1.0 - wanted.to_kind(Kind::Double).mean(None).double_value(&[]);
    assert!((share - 0.5 * 140.0 / 160.0).abs() < 1e-9, "kvpress calls this 0.5");
    let kept = |share| {
        let drops = Allocation::new(share, 0, 0, Rule::Model).unwrap().drops(&scores).unwrap();
        Tensor::cat(&drops, 0).logical_not()
    };
    assert_eq!(kept(share), wanted);
    let lengths = kept(0.2).sum_dim_intlist([2i64].as_slice(), false, Kind::Int64).flatten(0, -1);
    // 192 of 960: the worst head whole, the next for the rest.
    assert_eq!(Vec::<i64>::try_from(lengths).unwrap(), [160, 20, 108, 160, 160, 160]);
}
