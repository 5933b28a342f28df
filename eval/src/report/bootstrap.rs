//! Intervals of a run's score, in percent.

use crate::intervals::{Interval, bootstrap};
use crate::results::{Row, by_task};
use std::collections::{BTreeMap, HashMap};

/// Of the mean over tasks of their mean scores.
pub fn mean_of_tasks(rows: &[Row]) -> [f64; 2] {
    let tasks = by_task(rows).into_values();
    let tasks: Vec<Vec<f64>> =
        tasks.map(|rows| rows.iter().map(|row| 100.0 * row.score).collect()).collect();
    let Interval { low, high, .. } = bootstrap(&tasks);
    [low, high]
}

/// Of the difference `rows` less `others` over the samples that both have, each with its twin; `None` if they share none.
pub fn paired(rows: &[Row], others: &[Row]) -> Option<Interval> {
    let key = |row: &Row| (row.task.clone(), row.index);
    let others: HashMap<_, f64> = others.iter().map(|row| (key(row), row.score)).collect();
    let mut tasks: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for row in rows {
        if let Some(other) = others.get(&key(row)) {
            tasks.entry(&row.task).or_default().push(100.0 * (row.score - other));
        }
    }
    let tasks: Vec<Vec<f64>> = tasks.into_values().collect();
    (!tasks.is_empty()).then(|| bootstrap(&tasks))
}
