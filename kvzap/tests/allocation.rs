//! Budgets over a whole model: against [`Budget`], against loops, and their faults.
#![cfg(feature = "tch")]

use kvzap::{Allocation, Budget, Error, Policy, Rule, Scope};
use tch::{Device, Kind, Tensor};

/// Few values, so that many are equal.
fn scores(layers: usize, heads: i64, tokens: i64) -> Vec<Tensor> {
    (0..layers)
        .map(|_| {
            Tensor::randint(9, [1, heads, tokens], (Kind::Int64, Device::Cpu)).to_kind(Kind::Float)
        })
        .collect()
}

fn drops(
    remove: f64,
    window: usize,
    protected: usize,
    rule: Rule,
    scores: &[Tensor],
) -> Vec<Tensor> {
    Allocation::new(remove, window, protected, rule).unwrap().drops(scores).unwrap()
}

fn count(drops: &[Tensor]) -> i64 {
    drops.iter().map(|drops| drops.sum(Kind::Int64).int64_value(&[])).sum()
}

#[test]
fn heads_and_layers_alone_are_budgets() {
    tch::manual_seed(3);
    for (remove, window, tokens) in [
        (0.0, 8, 40),
        (0.3, 8, 40),
        (0.5, 0, 40),
        (0.9, 8, 40),
        (1.0, 0, 7),
        (0.5, 8, 8),
        (0.5, 8, 1),
    ] {
        let scores = scores(3, 2, tokens);
        for (rule, scope) in [(Rule::Head, Scope::Head), (Rule::Layer, Scope::Layer)] {
            let budget = Budget::new(remove, window, scope).unwrap();
            let found = drops(remove, window, 0, rule, &scores);
            for (scores, found) in scores.iter().zip(found) {
                assert_eq!(
                    found,
                    budget.drops(scores).unwrap(),
                    "{rule:?} {remove} {window} {tokens}"
                );
            }
        }
        // One layer of one model is a model of one layer.
        let found = drops(remove, window, 0, Rule::Model, &scores[..1]);
        assert_eq!(found, drops(remove, window, 0, Rule::Layer, &scores[..1]));
    }
}

/// Which go, as `[layer][head][token]`, of those that are neither protected nor in the window.
fn naive(remove: f64, window: i64, protected: i64, scores: &[Tensor]) -> Vec<Vec<Vec<bool>>> {
    let (_, heads, tokens) = scores[0].size3().unwrap();
    let mut order = Vec::new();
    for token in protected..(tokens - window).max(protected) {
        for layer in 0..scores.len() {
            order.extend((0..heads).map(|head| (layer, head, token)));
        }
    }
    let score =
        |&(layer, head, token): &(usize, i64, i64)| scores[layer].double_value(&[0, head, token]);
    order.sort_by(|a, b| score(a).partial_cmp(&score(b)).unwrap());
    let all = (scores.len() as i64 * heads * tokens) as f64;
    let mut goes = vec![vec![vec![false; tokens as usize]; heads as usize]; scores.len()];
    for &(layer, head, token) in order.iter().take((remove * all).round() as usize) {
        goes[layer][head as usize][token as usize] = true;
    }
    goes
}

#[test]
fn a_model_gives_up_its_lowest_scores_the_oldest_first_and_spares_sinks_and_window() {
    tch::manual_seed(5);
    for (remove, window, protected, tokens) in [
        (0.4, 6, 4, 30),
        (0.8, 6, 4, 30),
        (1.0, 0, 4, 30),
        (0.5, 0, 0, 30),
        (0.5, 28, 4, 30),
        (0.5, 6, 4, 3),
    ] {
        let scores = scores(3, 2, tokens);
        let found = drops(remove, window as usize, protected as usize, Rule::Model, &scores);
        let wanted = naive(remove, window, protected, &scores);
        for (found, wanted) in found.iter().zip(wanted) {
            let wanted: Vec<bool> = wanted.concat();
            assert_eq!(
                Vec::<bool>::try_from(found.flatten(0, -1)).unwrap(),
                wanted,
                "{remove} {window}"
            );
        }
    }
}

#[test]
fn every_rule_spares_sinks_and_window_and_keeps_nan() {
    tch::manual_seed(6);
    let scores = scores(4, 3, 200);
    for layer in &scores {
        let _ = layer.narrow(2, 0, 4).fill_(-100.0); // sinks score lowest: the trap
        let _ = layer.narrow(2, 100, 1).fill_(f64::NAN);
    }
    let rules = [
        Rule::Head,
        Rule::Layer,
        Rule::Model,
        Rule::ModelThreshold,
        Rule::AdaKv { safe: 0.2 },
        Rule::PyramidKv { beta: 20.0 },
    ];
    for rule in rules {
        for remove in [0.25, 0.5, 0.75] {
            let found = drops(remove, 16, 4, rule, &scores);
            for drops in &found {
                assert_eq!((drops.size(), drops.kind()), (vec![1, 3, 200], Kind::Bool));
                let gone = |first, length| drops.narrow(2, first, length).any().int64_value(&[]);
                assert_eq!([gone(0, 4), gone(184, 16)], [0; 2], "{rule:?} {remove}");
                // PyramidKV's last layer may keep its window alone.
                let all = matches!(rule, Rule::PyramidKv { .. });
                assert!(all || gone(100, 1) == 0, "{rule:?} {remove}");
            }
            if rule != Rule::ModelThreshold {
                let (found, wanted) = (count(&found), (remove * 2400.0) as i64);
                assert!((found - wanted).abs() <= 12, "{rule:?} {remove}: {found} of {wanted}");
            }
        }
        assert_eq!(count(&drops(0.0, 16, 4, rule, &scores)), 0, "{rule:?}");
        assert_eq!(count(&drops(0.9, 300, 4, rule, &scores)), 0, "{rule:?}");
    }
    let sinks = drops(0.5, 16, 0, Rule::Model, &scores);
    assert_eq!(count(&sinks.iter().map(|drops| drops.narrow(2, 0, 4)).collect::<Vec<_>>()), 48);
}

#[test]
fn adakv_leaves_each_head_its_safe_share() {
    // Head 1 scores under all of head 0.
    let scores = Tensor::from_slice(&(0..80).map(|i| -(i as f32)).collect::<Vec<_>>());
    let scores = [scores.view([1, 2, 40])];
    let kept = |rule, window| -> Vec<i64> {
        let drops = drops(0.5, window, 0, rule, &scores);
        let kept = drops[0].logical_not().sum_dim_intlist([2i64].as_slice(), false, Kind::Int64);
        Vec::try_from(kept.flatten(0, -1)).unwrap()
    };
    assert_eq!(kept(Rule::Layer, 0), [40, 0]);
    assert_eq!(kept(Rule::AdaKv { safe: 0.2 }, 0), [36, 4]);
    assert_eq!(kept(Rule::AdaKv { safe: 0.01 }, 0), [39, 1]);
    assert_eq!(kept(Rule::AdaKv { safe: 0.2 }, 3), [36, 4], "the window is of the safe ones");
    assert_eq!(kept(Rule::AdaKv { safe: 0.2 }, 6), [34, 6]);
}

#[test]
fn kvzips_own_threshold_goes_with_all_that_equal_it() {
    let scores = [Tensor::from_slice(&[5f32, 1., 4., 4., 2., 9., 3., 8.]).view([1, 2, 4])];
    // Half of 8: rank 4 - 1, score 4, and what is not above goes: both fours.
    let found = drops(0.5, 0, 0, Rule::ModelThreshold, &scores);
    let wanted = [false, true, true, true, true, false, true, false];
    assert_eq!(Vec::<bool>::try_from(found[0].flatten(0, -1)).unwrap(), wanted);
    // Protected tokens are not of the N.
    let found = drops(0.5, 0, 2, Rule::ModelThreshold, &scores);
    let wanted = [false, false, true, true, false, false, true, false];
    assert_eq!(Vec::<bool>::try_from(found[0].flatten(0, -1)).unwrap(), wanted);
}

#[test]
fn shares_constants_and_shapes_that_do_not_fit_are_refused() {
    let new = |remove, rule| Allocation::new(remove, 8, 4, rule).map(|_| ());
    for remove in [-0.1, 1.1, f64::NAN] {
        assert!(matches!(new(remove, Rule::Head), Err(Error::Share(_))));
    }
    for safe in [-0.1, 1.1, f64::NAN] {
        let error = new(0.5, Rule::AdaKv { safe }).unwrap_err();
        assert!(error.to_string().contains("safe of the rule is"), "{error}");
    }
    for beta in [0.9, f64::INFINITY, f64::NAN] {
        assert!(matches!(
            new(0.5, Rule::PyramidKv { beta }),
            Err(Error::Rule { name: "beta", .. })
        ));
    }
    let allocation = Allocation::new(0.5, 0, 0, Rule::Model).unwrap();
    assert!(allocation.drops(&[]).unwrap().is_empty());
    let mixed = [scores(1, 2, 10).remove(0), scores(1, 2, 11).remove(0)];
    assert!(matches!(allocation.drops(&mixed), Err(Error::Shape { name: "scores", .. })));
    let two = Tensor::zeros([2, 2, 10], (Kind::Float, Device::Cpu));
    assert!(matches!(allocation.drops(&[two]), Err(Error::Shape { name: "scores", .. })));
}
