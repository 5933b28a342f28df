//! 95 % intervals by resampling: samples are drawn with replacement within each task, a thousand times and more.

use crate::results::{Row, by_task};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use std::collections::{BTreeMap, HashMap};

const DRAWS: usize = 2000;

/// A mean and its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Interval {
    pub mean: f64,
    pub low: f64,
    pub high: f64,
}

/// Of the mean over tasks of their mean scores, in percent.
pub fn mean_of_tasks(rows: &[Row]) -> [f64; 2] {
    let tasks = by_task(rows).into_values();
    let tasks: Vec<Vec<f64>> =
        tasks.map(|rows| rows.iter().map(|row| row.score).collect()).collect();
    let Interval { low, high, .. } = interval(&tasks);
    [low, high]
}

/// Of the difference `rows` less `others` over the samples that both have, each with its twin; `None` if they share none.
pub fn paired(rows: &[Row], others: &[Row]) -> Option<Interval> {
    let key = |row: &Row| (row.task.clone(), row.index);
    let others: HashMap<_, f64> = others.iter().map(|row| (key(row), row.score)).collect();
    let mut tasks: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for row in rows {
        if let Some(other) = others.get(&key(row)) {
            tasks.entry(&row.task).or_default().push(row.score - other);
        }
    }
    let tasks: Vec<Vec<f64>> = tasks.into_values().collect();
    (!tasks.is_empty()).then(|| interval(&tasks))
}

fn interval(tasks: &[Vec<f64>]) -> Interval {
    let mean = |values: &mut dyn FnMut(&[f64]) -> f64| {
        let sum: f64 = tasks.iter().map(|task| values(task) / task.len() as f64).sum();
        100.0 * sum / tasks.len() as f64
    };
    let mut random = ChaCha8Rng::seed_from_u64(1);
    let mut drawn: Vec<f64> = (0..DRAWS)
        .map(|_| {
            mean(&mut |task| {
                (0..task.len()).map(|_| task[random.random_range(0..task.len())]).sum()
            })
        })
        .collect();
    drawn.sort_unstable_by(f64::total_cmp);
    let at = |share: f64| drawn[(share * (DRAWS - 1) as f64).round() as usize];
    Interval { mean: mean(&mut |task| task.iter().sum()), low: at(0.025), high: at(0.975) }
}
