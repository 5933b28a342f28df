//! The fit against what defines it: its gradient is zero.

use kvzap::{Affine, Error, Ridge};

const HIDDEN: usize = 37; // three blocks of the factorisation
const HEADS: usize = 2;

/// Deterministic numbers in [-1, 1).
fn noise(seed: u64, count: usize) -> Vec<f32> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// Rows whose scores are a linear map of them, and noise; means far from zero.
fn rows(seed: u64, rows: usize, noisy: f32) -> (Vec<f32>, Vec<f32>) {
    let x: Vec<f32> = noise(seed, rows * HIDDEN).iter().map(|x| x + 3.0).collect();
    let weight = noise(99, HEADS * HIDDEN);
    let error = noise(seed + 1, rows * HEADS);
    let y = (0..rows * HEADS).map(|i| {
        let (row, head) = (i / HEADS, i % HEADS);
        let product: f32 =
            (0..HIDDEN).map(|k| x[row * HIDDEN + k] * weight[head * HIDDEN + k]).sum();
        product - 4.0 + noisy * error[i]
    });
    let y = y.collect();
    (x, y)
}

fn predict(map: &Affine, x: &[f32], head: usize) -> f64 {
    let weight = &map.weight()[head * HIDDEN..][..HIDDEN];
    f64::from(map.bias()[head])
        + x.iter().zip(weight).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum::<f64>()
}

#[test]
fn the_fit_is_where_the_penalised_error_is_least() {
    let (x, y) = rows(5, 200, 1.0);
    for alpha in [0.0, 1.0, 50.0] {
        let mut ridge = Ridge::new(1, HIDDEN, HEADS);
        for (x, y) in x.chunks(33 * HIDDEN).zip(y.chunks(33 * HEADS)) {
            ridge.add(0, x, y).unwrap();
        }
        assert_eq!(ridge.rows(0), 200);
        let surrogate = ridge.solve(alpha).unwrap();
        let map = &surrogate.maps(0).unwrap()[0];
        for head in 0..HEADS {
            let residual: Vec<f64> = (0..200)
                .map(|row| {
                    f64::from(y[row * HEADS + head])
                        - predict(map, &x[row * HIDDEN..][..HIDDEN], head)
                })
                .collect();
            assert!(residual.iter().sum::<f64>().abs() < 1e-2, "the intercept is penalised");
            for k in 0..HIDDEN {
                let pull: f64 = residual
                    .iter()
                    .enumerate()
                    .map(|(row, r)| r * f64::from(x[row * HIDDEN + k]))
                    .sum();
                let penalty = alpha * f64::from(map.weight()[head * HIDDEN + k]);
                assert!(
                    (pull - penalty).abs() < 1e-2,
                    "alpha {alpha}, weight {k}: {pull} against {penalty}"
                );
            }
        }
    }
}

#[test]
fn rows_that_cannot_be_fitted_are_refused_and_change_nothing() {
    let mut ridge = Ridge::new(2, HIDDEN, HEADS);
    assert!(matches!(ridge.solve(1.0), Err(Error::NoRows { layer: 0 })));
    let (x, y) = rows(5, 10, 1.0);
    ridge.add(0, &x, &y).unwrap();
    assert!(matches!(ridge.solve(1.0), Err(Error::NoRows { layer: 1 })));
    ridge.add(1, &x, &y).unwrap();

    let before = ridge.solve(1.0).unwrap();
    let mut broken = y.clone();
    broken[7] = f32::NEG_INFINITY;
    assert!(matches!(ridge.add(1, &x, &broken), Err(Error::Rows { layer: 1 })));
    assert!(matches!(ridge.add(2, &x, &y), Err(Error::Layer { layer: 2, layers: 2 })));
    assert!(matches!(ridge.add(1, &x, &y[1..]), Err(Error::Shape { .. })));
    assert!(matches!(ridge.add(1, &x[1..], &y), Err(Error::Shape { .. })));
    assert_eq!(ridge.solve(1.0).unwrap(), before);

    assert!(matches!(Ridge::new(1, 0, 2).add(0, &[], &[]), Err(Error::Shape { .. })));
    assert!(matches!(Ridge::new(1, 2, 0).add(0, &[], &[]), Err(Error::Shape { .. })));

    for alpha in [-1.0, f64::NAN, f64::INFINITY] {
        assert!(matches!(ridge.solve(alpha), Err(Error::Alpha(_))));
    }
    // Ten rows do not determine 37 weights.
    assert!(matches!(ridge.solve(0.0), Err(Error::Singular { layer: 0, .. })));
    // Nor do many rows, where one hidden dimension is the sum of the others.
    for seed in 0..10 {
        let (mut x, y) = rows(seed, 100, 1.0);
        x.iter_mut().for_each(|x| *x = (*x * 256.0).round() / 256.0); // so that sums are exact
        x.chunks_exact_mut(HIDDEN).for_each(|x| x[HIDDEN - 1] = x[..HIDDEN - 1].iter().sum());
        let mut ridge = Ridge::new(1, HIDDEN, HEADS);
        ridge.add(0, &x, &y).unwrap();
        assert!(matches!(ridge.solve(0.0), Err(Error::Singular { layer: 0, .. })), "seed {seed}");
        assert!(ridge.solve(1e-3).is_ok());
    }
}
