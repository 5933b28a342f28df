//! 95 % intervals: of a share, of a mean, and by resampling.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

/// A mean and its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Interval {
    /// Of what was measured.
    pub mean: f64,
    /// The interval's lower end.
    pub low: f64,
    /// Its upper end.
    pub high: f64,
}

/// The two-sided 95 % quantile of the normal distribution.
#[cfg(any(feature = "models", test))]
const Z: f64 = 1.96;
/// How often samples are drawn again.
pub const DRAWS: usize = 2000;

/// Wilson's, for `right` of `n`.
#[cfg(any(feature = "models", test))] // only commands ask
pub fn wilson(right: f64, n: usize) -> Interval {
    let n = n as f64;
    let (mean, z2) = (right / n, Z * Z / n);
    let middle = mean + z2 / 2.0;
    let half = Z * (mean * (1.0 - mean) / n + z2 / (4.0 * n)).sqrt();
    Interval { mean, low: (middle - half) / (1.0 + z2), high: (middle + half) / (1.0 + z2) }
}

/// Of a mean of numbers that are about normal.
#[cfg(any(feature = "models", test))]
pub fn normal(values: &[f64]) -> Interval {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    let half = Z * (variance / n).sqrt();
    Interval { mean, low: mean - half, high: mean + half }
}

/// Of the mean over tasks of their mean values: samples are drawn again, with replacement, within each task.
pub fn bootstrap(tasks: &[Vec<f64>]) -> Interval {
    let mean = |values: &mut dyn FnMut(&[f64]) -> f64| {
        tasks.iter().map(|task| values(task) / task.len() as f64).sum::<f64>() / tasks.len() as f64
    };
    let mut random = ChaCha8Rng::seed_from_u64(1);
    let mut again = |task: &[f64]| {
        (0..task.len()).map(|_| task[random.random_range(0..task.len())]).sum::<f64>()
    };
    let drawn = (0..DRAWS).map(|_| mean(&mut again)).collect();
    middle(mean(&mut |task| task.iter().sum()), drawn)
}

/// Of a mean, by what it was when samples were drawn again.
pub fn middle(mean: f64, mut drawn: Vec<f64>) -> Interval {
    drawn.sort_unstable_by(f64::total_cmp);
    let at = |share: f64| drawn[(share * (drawn.len() - 1) as f64).round() as usize];
    Interval { mean, low: at(0.025), high: at(0.975) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_those_of_the_textbooks() {
        let close = |found: Interval, [low, high]: [f64; 2]| {
            assert!(
                (found.low - low).abs() < 5e-3 && (found.high - high).abs() < 5e-3,
                "{found:?}"
            );
        };
        close(wilson(19.0, 20), [0.764, 0.991]);
        close(wilson(0.0, 100), [0.0, 0.037]);
        close(normal(&[1.0, 2.0, 3.0]), [2.0 - 1.13, 2.0 + 1.13]);
        // Of many samples the bootstrap's is the normal one.
        let many: Vec<f64> = (0..400).map(|i| f64::from(i % 2)).collect();
        close(bootstrap(&[many]), [0.5 - 0.049, 0.5 + 0.049]);
    }
}
