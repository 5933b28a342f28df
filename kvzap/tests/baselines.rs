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
