//! What one arm is ahead of another, with twins beside twins: the same seed, the same samples.

use super::{Cell, Measured};
use crate::intervals::{DRAWS, Interval, middle};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A difference in points with its 95 % interval, and each seed's own. Of few seeds the interval is too narrow: a draw of
/// three seldom holds what a fourth would have shown.
#[derive(Clone, Debug, PartialEq)]
pub struct Difference {
    pub points: Interval,
    pub seeds: Vec<f64>,
    /// Pairs of answers.
    pub pairs: usize,
}

/// Of the mean over cells that `which` takes. The interval is from drawing seeds, and samples within cells, with
/// replacement: the samples are the same for all seeds, and are drawn so. `None` where nothing is shared.
pub fn of(
    arm: &[&Measured],
    other: &[&Measured],
    which: impl Fn(&Cell) -> bool,
) -> Option<Difference> {
    let twins = arm.iter().filter_map(|a| Some((*a, *other.iter().find(|b| b.seed == a.seed)?)));
    // [seed][cell][sample]
    let each: Vec<Vec<Vec<f64>>> = twins
        .map(|(a, b)| {
            let cells = a.cells.iter().filter(|cell| which(cell));
            let pair = |cell: &Cell| {
                let alike = |c: &&Cell| c.task == cell.task && c.context == cell.context;
                let twin =
                    b.cells.iter().find(alike).filter(|c| c.marks.len() == cell.marks.len())?;
                Some(cell.scores().zip(twin.scores()).map(|(a, b)| a - b).collect())
            };
            cells.filter_map(pair).collect()
        })
        .filter(|cells: &Vec<_>| !cells.is_empty())
        .collect();
    let first = each.first()?;
    if each.iter().any(|cells| cells.len() != first.len()) {
        return None;
    }
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
    let cell_means =
        |cells: &Vec<Vec<f64>>| 100.0 * mean(&cells.iter().map(|c| mean(c)).collect::<Vec<_>>());
    let seeds: Vec<f64> = each.iter().map(cell_means).collect();
    let mut random = ChaCha8Rng::seed_from_u64(1);
    let drawn = (0..DRAWS)
        .map(|_| {
            let drawn: Vec<usize> =
                (0..each.len()).map(|_| random.random_range(0..each.len())).collect();
            let cells = (0..first.len()).map(|cell| {
                let n = first[cell].len();
                let sum: f64 = (0..n)
                    .map(|_| {
                        let at = random.random_range(0..n);
                        drawn.iter().map(|&seed| each[seed][cell][at]).sum::<f64>()
                    })
                    .sum();
                sum / (n * drawn.len()) as f64
            });
            100.0 * cells.sum::<f64>() / first.len() as f64
        })
        .collect();
    let pairs = each.iter().flatten().map(Vec::len).sum();
    Some(Difference { points: middle(mean(&seeds), drawn), seeds, pairs })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(seed: u64, marks: &[&str]) -> Measured {
        let cell = |(at, marks): (usize, &&str)| Cell {
            task: format!("task {at}"),
            context: 1024,
            marks: (*marks).to_owned(),
        };
        Measured {
            arm: String::new(),
            seed,
            tokens: 0,
            trained: 2048,
            cells: marks.iter().enumerate().map(cell).collect(),
            text: Vec::new(),
            run: serde_json::Value::Null,
        }
    }

    #[test]
    fn a_difference_is_the_mean_over_seeds_and_cells_and_its_interval_holds_it() {
        let (a, b) = (measured(1, &["1111", "1100"]), measured(2, &["1110", "0000"]));
        let (c, d) = (measured(1, &["0101", "0000"]), measured(2, &["1110", "0000"]));
        let found = of(&[&a, &b], &[&d, &c], |_| true).unwrap();
        assert_eq!((found.points.mean, found.pairs), (25.0, 16));
        assert_eq!(found.seeds, [50.0, 0.0]);
        let Interval { low, high, .. } = found.points;
        assert!(low < 25.0 && high > 25.0 && low >= 0.0, "{found:?}");
        let first = of(&[&a, &b], &[&d, &c], |cell| cell.task == "task 0").unwrap();
        assert_eq!(first.points.mean, 25.0);
        assert_eq!(of(&[&a], &[&d], |_| true), None, "no twins");
    }
}
