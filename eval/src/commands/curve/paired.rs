//! Methods beside one of them, sample by sample: what both find or both miss says nothing of which is better, and goes.

use super::Row;
use crate::commands::table;
use crate::intervals::{Interval, bootstrap};
use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What a method scores more than another on the same samples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Difference {
    /// The task; the mean over all tasks and lengths without.
    #[serde(skip_serializing_if = "Option::is_none")]
    task: Option<String>,
    /// Tokens of its contexts, about.
    #[serde(skip_serializing_if = "Option::is_none")]
    context: Option<usize>,
    method: String,
    against: String,
    /// The share that was to be removed; the mean over all shares, each sample's, without.
    #[serde(skip_serializing_if = "Option::is_none")]
    asked: Option<f64>,
    difference: f64,
    /// The 95 % interval's ends: samples are drawn again within a task and length, all shares of one together.
    low: f64,
    high: f64,
    /// How many samples; of several cells the fewest.
    n: usize,
}

/// Of all methods whose samples' scores are in `rows`. Samples go together by their numbers.
///
/// # Errors
/// If there are none, or samples of different seeds.
pub fn differences(rows: &[Row], settings: &[Value], against: &str) -> Result<Vec<Difference>> {
    let rows: Vec<&Row> = rows.iter().filter(|row| !row.scores.is_empty()).collect();
    ensure!(
        rows.iter().any(|row| row.method == against),
        "no row of {against} has its samples' scores; measure it with --each or --against"
    );
    ensure!(
        settings.iter().all(|one| one["seed"] == settings[0]["seed"]),
        "these rows are of samples of different seeds, which cannot be paired; merge rows of one --seed"
    );
    let mut methods: Vec<&str> = Vec::new();
    let mut cells: Vec<(&str, usize)> = Vec::new();
    for row in rows.iter().filter(|row| row.method != against && row.asked > 0.0) {
        if !methods.contains(&&*row.method) {
            methods.push(&row.method);
        }
        if !cells.contains(&(&row.task, row.context)) {
            cells.push((&row.task, row.context));
        }
    }
    let mut found = Vec::new();
    for method in methods {
        let add = |cell: Option<(&str, usize)>, asked, tasks: &[Vec<f64>]| {
            let Interval { mean, low, high } = bootstrap(tasks);
            Difference {
                task: cell.map(|(task, _)| task.to_owned()),
                context: cell.map(|(_, context)| context),
                method: method.to_owned(),
                against: against.to_owned(),
                asked,
                difference: mean,
                low,
                high,
                n: tasks.iter().map(Vec::len).min().unwrap_or(0),
            }
        };
        let mut all = Vec::new();
        for &cell in &cells {
            let of = |row: &&Row, method: &str| {
                row.method == method && (&*row.task, row.context) == cell
            };
            let mut of_shares: Vec<Vec<f64>> = Vec::new();
            for one in rows.iter().filter(|row| of(row, method) && row.asked > 0.0) {
                // The full cache has one row for all shares.
                let other = rows
                    .iter()
                    .find(|row| of(row, against) && [0.0, one.asked].contains(&row.asked));
                if let Some(other) = other {
                    let more = one.scores.iter().zip(&other.scores).map(|(one, other)| one - other);
                    of_shares.push(more.collect());
                    found.push(add(Some(cell), Some(one.asked), &of_shares[of_shares.len() - 1..]));
                }
            }
            if let Some(samples) = of_shares.iter().map(Vec::len).min() {
                let mean = |n: usize| {
                    of_shares.iter().map(|one| one[n]).sum::<f64>() / of_shares.len() as f64
                };
                let means: Vec<f64> = (0..samples).map(mean).collect();
                found.push(add(Some(cell), None, std::slice::from_ref(&means)));
                all.push(means);
            }
        }
        if all.len() > 1 {
            found.push(add(None, None, &all));
        }
    }
    Ok(found)
}

/// The means over shares.
pub fn print(differences: &[Difference]) {
    let Some(first) = differences.first() else { return };
    println!("against {}, the mean over shares:", first.against);
    let mut table =
        table(&["method", "task", "tokens", "difference", "95 %", "samples"], &[2, 3, 5]);
    for one in differences.iter().filter(|one| one.asked.is_none()) {
        table.add_row([
            one.method.clone(),
            one.task.clone().unwrap_or_else(|| "mean of all".to_owned()),
            one.context.map_or(String::new(), |context| context.to_string()),
            format!("{:+.3}", one.difference),
            format!("{:+.3} to {:+.3}", one.low, one.high),
            one.n.to_string(),
        ]);
    }
    println!("{table}");
}

/// Numbers on one line, `1 0 1`, where JSON in lines would give each its own.
pub mod line {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    /// As `1 0 1`.
    pub fn serialize<S: Serializer>(numbers: &[f64], serializer: S) -> Result<S::Ok, S::Error> {
        let numbers: Vec<String> = numbers.iter().map(f64::to_string).collect();
        serializer.serialize_str(&numbers.join(" "))
    }

    /// From `1 0 1`.
    pub fn deserialize<'a, D: Deserializer<'a>>(deserializer: D) -> Result<Vec<f64>, D::Error> {
        let line = String::deserialize(deserializer)?;
        line.split_whitespace().map(|number| number.parse().map_err(Error::custom)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(context: usize, method: &str, asked: f64, scores: &[f64]) -> Row {
        Row {
            task: "needle".to_owned(),
            context,
            method: method.to_owned(),
            asked,
            removed: asked,
            removed_of_judged: asked,
            score: 0.0,
            low: 0.0,
            high: 1.0,
            n: scores.len(),
            scores: scores.to_vec(),
        }
    }

    #[test]
    fn differences_are_of_the_same_samples_of_each_share_and_of_all() {
        let rows = [
            row(1, "full", 0.0, &[1.0, 1.0, 1.0, 1.0]),
            row(1, "a", 0.5, &[1.0, 0.0, 1.0, 0.0]),
            row(1, "a", 0.7, &[1.0, 0.0, 0.0, 0.0]),
            row(1, "b", 0.5, &[1.0, 1.0, 1.0]),
            row(1, "b", 0.7, &[0.0, 1.0, 0.0]),
            row(1, "b", -3.0, &[0.0, 0.0, 0.0]),
            row(2, "a", 0.5, &[1.0, 1.0]),
            row(2, "b", 0.5, &[0.0, 0.0]),
            row(2, "c", 0.5, &[]),
        ];
        let of = |against: &str| differences(&rows, &[], against).unwrap();
        let short = |one: &Difference| (one.context, one.asked, one.difference, one.n);
        let found = of("a");
        let b: Vec<_> = found.iter().filter(|one| one.method == "b").map(short).collect();
        let third = 1.0 / 3.0;
        assert_eq!(b.len(), 6, "{b:?}");
        assert_eq!(b[..2], [(Some(1), Some(0.5), third, 3), (Some(1), Some(0.7), 0.0, 3)]);
        assert_eq!((b[2].0, b[2].1, b[2].3), (Some(1), None, 3));
        assert!((b[2].2 - third / 2.0).abs() < 1e-12);
        assert_eq!(b[3], (Some(2), Some(0.5), -1.0, 2));
        assert_eq!((b[4].0, b[4].1, b[4].3), (Some(2), None, 2));
        let all = found.last().unwrap();
        assert_eq!((all.context, all.asked, all.n), (None, None, 2));
        assert!((all.difference - (third / 2.0 - 1.0) / 2.0).abs() < 1e-12);
        assert!(found.iter().all(|one| one.low <= one.difference && one.difference <= one.high));
        // The first sample's -1 at one share is -0.5 of its mean, and no less is ever drawn.
        assert!((b[1].2, found[1].low) == (0.0, -1.0) && found[2].low > -1.0);
        let full = of("full");
        let a: Vec<_> = full.iter().filter(|one| one.method == "a").map(short).collect();
        assert_eq!(a[0], (Some(1), Some(0.5), -0.5, 4));
        assert_eq!(a[1], (Some(1), Some(0.7), -0.75, 4));
    }

    #[test]
    fn what_cannot_be_paired_is_refused() {
        let rows = [row(1, "a", 0.5, &[1.0]), row(1, "b", 0.5, &[1.0]), row(1, "c", 0.5, &[])];
        let said = differences(&rows, &[], "c").unwrap_err().to_string();
        assert!(said.contains("no row of c") && said.contains("--each"), "{said}");
        let settings = [serde_json::json!({"seed": 1}), serde_json::json!({"seed": 2})];
        let said = differences(&rows, &settings, "a").unwrap_err().to_string();
        assert!(said.contains("different seeds"), "{said}");
    }

    #[test]
    fn scores_are_one_line() {
        let one = row(1, "a", 0.5, &[1.0, 0.0, 2.25]);
        let text = serde_json::to_string(&one).unwrap();
        assert!(text.contains(r#""scores":"1 0 2.25""#), "{text}");
        assert_eq!(serde_json::from_str::<Row>(&text).unwrap().scores, one.scores);
        assert!(!serde_json::to_string(&row(1, "a", 0.5, &[])).unwrap().contains("scores"));
        let wrong = text.replace("2.25", "x");
        assert!(serde_json::from_str::<Row>(&wrong).is_err());
    }
}
