//! From scores to the numbers that a benchmark prints.

use super::Row;
use crate::metrics::{percent, round};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};

/// The shape of a benchmark's `metrics.json`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Summary {
    /// `{task: {"string_match": x}}`: RULER, and what is scored like it.
    StringMatch,
    /// One number: LongBench, a data set a run.
    Number,
    /// A number for each of three ranges of length: LongBench-E.
    Lengths,
    /// A share of 1: InfiniteBench, a task a run.
    Share,
    /// The same, and of each difficulty and range of length: LongBench-v2.
    Groups,
    /// Counts of right and of answered samples, and pass@k over rollouts: AIME.
    Rollouts,
}

impl Summary {
    /// kvpress's name for the column of right answers.
    pub(super) fn answers(self) -> &'static str {
        match self {
            Self::StringMatch | Self::Share | Self::Groups | Self::Rollouts => "answer",
            Self::Number | Self::Lengths => "answers",
        }
    }

    /// Whether that column holds a text instead of a list.
    pub(super) fn one_answer(self) -> bool {
        matches!(self, Self::Groups | Self::Rollouts)
    }

    /// What goes into `metrics.json`.
    pub fn metrics(self, rows: &[Row]) -> Value {
        let scores = || rows.iter().map(|row| row.score);
        match self {
            Self::StringMatch => {
                let task = |(task, rows): (&str, Vec<&Row>)| {
                    let mut found =
                        json!({"string_match": percent(rows.iter().map(|row| row.score))});
                    let nlls: Vec<f64> = rows.iter().filter_map(|row| row.nll).collect();
                    if !nlls.is_empty() {
                        let mean = nlls.iter().sum::<f64>() / nlls.len() as f64;
                        found["nll"] = round(mean, 4).into();
                    }
                    (task.to_owned(), found)
                };
                Value::Object(by_task(rows).into_iter().map(task).collect())
            }
            Self::Number => percent(scores()).into(),
            Self::Share => mean(scores()).into(),
            Self::Groups => {
                let mut found = json!({"average": mean(scores())});
                for name in ["difficulty", "length"] {
                    let mut groups: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
                    for row in rows {
                        let group = row.facts.get(name).and_then(Value::as_str);
                        groups.entry(group.unwrap_or_default()).or_default().push(row.score);
                    }
                    for (group, scores) in groups.into_iter().filter(|(group, _)| !group.is_empty())
                    {
                        found[group] = mean(scores).into();
                    }
                }
                found
            }
            Self::Lengths => {
                let length =
                    |row: &&Row| row.facts.get("length").and_then(Value::as_u64).unwrap_or(0);
                let within = |low, high| {
                    let rows = rows.iter().filter(|row| (low..high).contains(&length(row)));
                    let scores: Vec<f64> = rows.map(|row| row.score).collect();
                    // Of nothing kvpress says NaN, which is not JSON.
                    if scores.is_empty() { Value::Null } else { percent(scores).into() }
                };
                json!({"0-4k": within(0, 4000), "4-8k": within(4000, 8000), "8k+": within(8000, u64::MAX)})
            }
            Self::Rollouts => {
                let correct = rows.iter().filter(|row| row.score == 1.0).count();
                let boxed = |row: &&Row| row.predicted_answer.contains("boxed{");
                let answered = rows.iter().filter(boxed).count();
                let mut problems: HashMap<_, Vec<bool>> = HashMap::new();
                for row in rows {
                    let problem = row.facts.get("problem").map_or(String::new(), Value::to_string);
                    problems.entry(problem).or_default().push(row.score == 1.0);
                }
                let k = problems.values().map(Vec::len).max().unwrap_or(0);
                let passed = problems.values().filter(|right| right.contains(&true)).count();
                json!({
                    "correct": correct,
                    "answered": answered,
                    "accuracy": correct as f64 / rows.len().max(1) as f64,
                    "total": rows.len(),
                    format!("pass@{k}"): passed as f64 / problems.len().max(1) as f64,
                })
            }
        }
    }
}

fn mean(scores: impl IntoIterator<Item = f64>) -> f64 {
    let scores: Vec<f64> = scores.into_iter().collect();
    scores.iter().sum::<f64>() / scores.len().max(1) as f64
}

/// The rows of each task.
pub fn by_task(rows: &[Row]) -> BTreeMap<&str, Vec<&Row>> {
    let mut tasks: BTreeMap<&str, Vec<&Row>> = BTreeMap::new();
    for row in rows {
        tasks.entry(&row.task).or_default().push(row);
    }
    tasks
}
