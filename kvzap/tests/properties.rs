//! Policies and window against what the paper and kvpress say of them, on any scores.

use kvzap::{Array, Budget, Policy, Scope, Threshold, judged};
use proptest::prelude::*;
use std::cmp::Ordering;
use std::collections::BTreeSet;

/// Scores with many ties, and everything that a float can be.
fn score() -> impl Strategy<Value = f32> {
    prop_oneof![
        8 => (-3..=3_i8).prop_map(f32::from),
        4 => -8.0_f32..8.0,
        1 => prop::sample::select(vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0]),
    ]
}

fn threshold() -> impl Strategy<Value = f32> {
    prop_oneof![
        (-3..=3_i8).prop_map(f32::from),
        -8.0_f32..8.0,
        Just(f32::NEG_INFINITY),
        Just(f32::INFINITY)
    ]
}

/// `[batch, heads, tokens]`
fn scores() -> impl Strategy<Value = Array> {
    (1..3_usize, 1..4_usize, 1..40_usize).prop_flat_map(|(batch, heads, tokens)| {
        let numbers = prop::collection::vec(score(), batch * heads * tokens);
        numbers.prop_map(move |numbers| Array::new(numbers, &[batch, heads, tokens]).unwrap())
    })
}

fn row(scores: &[f32]) -> Array {
    Array::new(scores.to_vec(), &[1, 1, scores.len()]).unwrap()
}

/// kvpress's DMSPress for one head: scores wait in a buffer as long as the window, then are judged.
fn dms_press(scores: &[f32], chunks: &[usize], window: usize, threshold: f32) -> BTreeSet<usize> {
    let (mut buffer, mut seen, mut masked) = (Vec::new(), 0, BTreeSet::new());
    for &chunk in chunks {
        buffer.extend_from_slice(&scores[seen..seen + chunk]);
        seen += chunk;
        if buffer.len() > window {
            let first = seen - buffer.len();
            let gone: Vec<f32> = buffer.drain(..buffer.len() - window).collect();
            masked.extend((0..gone.len()).filter(|&i| gone[i] < threshold).map(|i| first + i));
        }
    }
    masked
}

proptest! {
    #[test]
    fn what_is_gone_depends_on_scores_and_not_on_chunks(
        scores in prop::collection::vec(score(), 1..60),
        cuts in prop::collection::vec(1..9_usize, 0..20),
        window in prop_oneof![Just(0_usize), 1..70_usize],
        threshold in threshold(),
    ) {
        let policy = Threshold::new(threshold).unwrap();
        let mut chunks = Vec::new();
        let mut left = scores.len();
        for cut in cuts {
            let chunk = cut.min(left);
            chunks.push(chunk);
            left -= chunk;
        }
        chunks.push(left);

        // Each chunk decided when it came, obeyed when it left the window.
        let (mut bits, mut seen) = (Vec::new(), 0);
        for &chunk in &chunks {
            bits.extend(policy.drops(&row(&scores[seen..seen + chunk])).unwrap());
            seen += chunk;
        }
        let gone: BTreeSet<usize> = judged(seen, window).filter(|&i| bits[i]).collect();
        prop_assert_eq!(&gone, &dms_press(&scores, &chunks, window, threshold));
        prop_assert_eq!(&gone, &dms_press(&scores, &[seen], window, threshold));
    }

    #[test]
    fn a_threshold_keeps_equal_scores_and_nan_and_a_higher_one_keeps_less(
        scores in scores(), a in threshold(), b in threshold(),
    ) {
        let drops = |threshold| Threshold::new(threshold).unwrap().drops(&scores).unwrap();
        for (&score, drop) in scores.data().iter().zip(drops(a)) {
            prop_assert_eq!(drop, score.partial_cmp(&a) == Some(Ordering::Less));
        }
        for (low, high) in drops(a.min(b)).into_iter().zip(drops(a.max(b))) {
            prop_assert!(!low || high);
        }
    }

    #[test]
    fn a_budget_takes_the_asked_count_of_the_lowest_and_oldest_outside_the_window(
        scores in scores(), remove in 0.0..=1.0_f64, window in 0..45_usize, layer in any::<bool>(),
    ) {
        let &[_, heads, tokens] = scores.shape() else { unreachable!() };
        let scope = if layer { Scope::Layer } else { Scope::Head };
        let drops = Budget::new(remove, window, scope).unwrap().drops(&scores).unwrap();
        let old = judged(tokens, window).end;
        let together = if layer { heads } else { 1 };
        let size = together * tokens;
        for (drops, scores) in drops.chunks(size).zip(scores.data().chunks(size)) {
            let asked = (remove * size as f64).round() as usize;
            prop_assert_eq!(drops.iter().filter(|&&drop| drop).count(), asked.min(together * old));
            // Whoever goes is lower, or as low and older (then of an earlier head), than whoever
            // was judged and stays.
            let key = |i: usize| {
                let score = if scores[i].is_nan() { (1, 0.0) } else { (0, scores[i]) };
                (score, i % tokens, i / tokens)
            };
            let judged: Vec<usize> = (0..drops.len()).filter(|i| i % tokens < old).collect();
            for &gone in judged.iter().filter(|&&i| drops[i]) {
                for &stays in judged.iter().filter(|&&i| !drops[i]) {
                    prop_assert!(key(gone) < key(stays), "{gone} went, {stays} stayed");
                }
            }
            let touched = (0..size).any(|i| i % tokens >= old && drops[i]);
            prop_assert!(!touched, "the window was touched");
        }
    }
}

#[test]
fn the_window_alone_is_never_judged() {
    for (total, window, expected) in
        [(0, 0, 0..0), (5, 0, 0..5), (127, 128, 0..0), (128, 128, 0..0), (129, 128, 0..1)]
    {
        assert_eq!(judged(total, window), expected);
    }
}

#[test]
fn settings_that_mean_nothing_are_refused() {
    let message = Threshold::new(f32::NAN).unwrap_err().to_string();
    assert!(message.contains("NaN") && message.contains("-inf to keep all"), "{message}");
    for share in [f64::NAN, -0.1, 1.1, f64::INFINITY] {
        let message = Budget::new(share, 128, Scope::Head).unwrap_err().to_string();
        assert!(message.contains(&share.to_string()), "{message}");
    }
    let flat = Array::new(vec![0.0; 4], &[2, 2]).unwrap();
    let message = Budget::new(0.5, 0, Scope::Head).unwrap().drops(&flat).unwrap_err().to_string();
    assert!(
        message.contains("[2, 2]") && message.contains("[batch, kv_heads, tokens]"),
        "{message}"
    );
    assert!(Array::new(vec![0.0; 4], &[5]).is_err());
    assert!(Array::new(vec![], &[usize::MAX, 2, 0]).is_err(), "the product overflows");
}
