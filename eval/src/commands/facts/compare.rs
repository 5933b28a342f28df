//! Models beside one another.

use super::difference::{self, Difference};
use super::{Cell, Measured, Text, picture};
use crate::commands::train::curve::Point;
use crate::commands::{beside, table, write};
use crate::files;
use crate::intervals::{Interval, wilson};
use anyhow::{Context, Result, ensure};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// What to compare.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Files that `longctx facts measure` wrote
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// The arm that others are compared with, or several, each with all others
    #[arg(long, num_args = 1.., default_value = "rope", value_name = "ARM")]
    against: Vec<String>,
    /// A name for the rows
    #[arg(long, default_value = "facts")]
    experiment: String,
    /// The rows as JSON: one for each arm, seed, task and length, then the differences; what the file holds of other
    /// experiments stays
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// A picture of score against length, as SVG
    #[arg(long, value_name = "FILE")]
    picture: Option<PathBuf>,
    /// A picture of how answers were learned, as SVG, from the loss.json beside each file
    #[arg(long, value_name = "FILE")]
    course: Option<PathBuf>,
    /// Print the rows instead of the tables
    #[arg(long)]
    json: bool,
}

/// Which lengths are taken together.
const SPANS: [(&str, Option<bool>); 3] =
    [("inside", Some(true)), ("outside", Some(false)), ("all", None)];

/// Each arm beside each that it is compared with, for each span of lengths.
fn pairs<'a>(
    arms: &[&'a str],
    against: &'a [String],
) -> Vec<(&'a str, &'a str, &'static str, Option<bool>)> {
    let mut pairs = Vec::new();
    for against in against {
        for arm in arms.iter().filter(|arm| **arm != against) {
            pairs.extend(SPANS.map(|(span, inside)| (*arm, &**against, span, inside)));
        }
    }
    pairs
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let what = "what longctx facts measure writes; give the file that its --output names";
    let all: Vec<Measured> =
        args.files.iter().map(|path| read_json(path, what)).collect::<Result<_>>()?;
    for path in args.output.iter().chain(&args.picture).chain(&args.course) {
        drop(beside(path)?);
    }
    let mut arms: Vec<&str> = Vec::new();
    for measured in &all {
        if !arms.contains(&&*measured.arm) {
            arms.push(&measured.arm);
        }
    }
    let of = |arm: &str| -> Vec<&Measured> { all.iter().filter(|m| m.arm == arm).collect() };
    for against in &args.against {
        let known = arms.contains(&&**against);
        ensure!(known, "no file is of arm {against}; there are {}", arms.join(", "));
    }

    let mut rows: Vec<Value> = all.iter().flat_map(|m| rows_of(&args.experiment, m)).collect();
    for (arm, against, span, inside) in pairs(&arms, &args.against) {
        let Some(found) = span_difference(&of(arm), &of(against), inside) else { continue };
        rows.push(json!({
            "experiment": args.experiment, "arm": arm, "against": against, "task": "mean of all",
            "context": span, "points": found.points.mean, "low": found.points.low, "high": found.points.high,
            "each_seed": found.seeds, "n": found.pairs,
        }));
    }
    if let Some(path) = &args.output {
        write_rows(path, &args.experiment, &rows)?;
    }
    if let Some(path) = &args.picture {
        let of_arms: Vec<(&str, Vec<&Measured>)> = arms.iter().map(|arm| (*arm, of(arm))).collect();
        write(path, picture::draw(&of_arms)?.as_bytes())?;
    }
    if let Some(path) = &args.course {
        let courses = all.iter().zip(&args.files).map(|(measured, file)| {
            let what = "what longctx train repo writes; leave --course out, or copy it from there";
            let points = read_json::<Vec<Point>>(&file.with_file_name("loss.json"), what)?;
            Ok((measured.arm.clone(), points))
        });
        let courses: Vec<_> = courses.collect::<Result<_>>()?;
        write(path, picture::courses(&arms, &courses)?.as_bytes())?;
    }
    if args.json {
        println!("{:#}", json!(rows));
    } else {
        print(&arms, &args.against, &of);
    }
    Ok(())
}

pub(super) fn read_json<T: DeserializeOwned>(path: &Path, what: &str) -> Result<T> {
    let text = files::bytes(path)?;
    serde_json::from_slice(&text).with_context(|| format!("{} is not {what}", path.display()))
}

/// Writes an experiment's rows, a line each, after those of other experiments that the file has, if it is there.
pub(super) fn write_rows(path: &Path, experiment: &str, rows: &[Value]) -> Result<()> {
    let mut kept: Vec<Value> = match path.exists() {
        true => read_json(path, "a list of rows; choose another --output")?,
        false => Vec::new(),
    };
    kept.retain(|row| row["experiment"] != experiment);
    let lines: Vec<String> = kept.iter().chain(rows).map(|row| format!("  {row}")).collect();
    write(path, format!("[\n{}\n]\n", lines.join(",\n")).as_bytes())
}

fn is_inside(measured: &Measured, cell: &Cell) -> bool {
    cell.context <= measured.trained
}

fn span_difference(
    arm: &[&Measured],
    other: &[&Measured],
    inside: Option<bool>,
) -> Option<Difference> {
    let trained = arm.first()?.trained;
    difference::of(arm, other, |cell| {
        inside.is_none_or(|inside| (cell.context <= trained) == inside)
    })
}

fn rows_of(experiment: &str, measured: &Measured) -> Vec<Value> {
    let mut rows: Vec<Value> = Vec::new();
    for cell in &measured.cells {
        let Interval { mean, low, high } = wilson(cell.scores().sum(), cell.marks.len());
        rows.push(json!({
            "experiment": experiment, "arm": measured.arm, "seed": measured.seed, "tokens": measured.tokens,
            "task": cell.task, "context": cell.context, "inside": is_inside(measured, cell),
            "score": 100.0 * mean, "low": 100.0 * low, "high": 100.0 * high, "n": cell.marks.len(),
        }));
    }
    for text in &measured.text {
        rows.push(json!({
            "experiment": experiment, "arm": measured.arm, "seed": measured.seed, "tokens": measured.tokens,
            "task": "perplexity", "context": text.context, "inside": text.context <= measured.trained,
            "score": text.nll.exp(), "n": text.tokens,
        }));
    }
    rows
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let values: Vec<f64> = values.collect();
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

fn print<'a>(arms: &[&'a str], against: &[String], of: &dyn Fn(&str) -> Vec<&'a Measured>) {
    let first = arms.first().map(|arm| of(arm));
    let Some(first) = first.as_ref().and_then(|first| first.first()) else { return };
    let mut contexts: Vec<usize> = first.cells.iter().map(|cell| cell.context).collect();
    contexts.sort_unstable();
    contexts.dedup();
    let mut tasks: Vec<&str> = first.cells.iter().map(|cell| &*cell.task).collect();
    tasks.dedup();
    let header: Vec<&str> = ["task", "tokens"].into_iter().chain(arms.iter().copied()).collect();
    let numbers: Vec<usize> = (1..header.len()).collect();
    let shown = |value: Option<f64>, digits: usize| {
        value.map_or("-".to_owned(), |v| format!("{v:.digits$}"))
    };
    let mut scores = table(&header, &numbers);
    for (task, context) in tasks.iter().flat_map(|task| contexts.iter().map(move |c| (*task, *c))) {
        let score = |arm: &&str| {
            let measured = of(arm);
            let cells = measured.iter().flat_map(|m| &m.cells);
            let alike = cells.filter(|cell| cell.task == task && cell.context == context);
            shown(mean(alike.map(|cell| 100.0 * cell.score())), 1)
        };
        scores.add_row(
            [task.to_owned(), context.to_string()].into_iter().chain(arms.iter().map(score)),
        );
    }
    for Text { context, .. } in &first.text {
        let perplexity = |arm: &&str| {
            let measured = of(arm);
            let texts = measured.iter().flat_map(|m| &m.text).filter(|t| t.context == *context);
            shown(mean(texts.map(|text| text.nll)).map(f64::exp), 2)
        };
        let row = ["perplexity".to_owned(), context.to_string()];
        scores.add_row(row.into_iter().chain(arms.iter().map(perplexity)));
    }
    println!("{scores}\n");
    let mut ahead =
        table(&["points ahead", "of", "lengths", "mean", "95 %", "each seed"], &[3, 4, 5]);
    for (arm, against, span, inside) in pairs(arms, against) {
        let Some(found) = span_difference(&of(arm), &of(against), inside) else { continue };
        let seeds: Vec<String> = found.seeds.iter().map(|points| format!("{points:+.1}")).collect();
        ahead.add_row([
            arm.to_owned(),
            against.to_owned(),
            span.to_owned(),
            format!("{:+.1}", found.points.mean),
            format!("{:+.1} to {:+.1}", found.points.low, found.points.high),
            seeds.join(" "),
        ]);
    }
    println!("{ahead}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_arm_is_compared_with_each_control_and_none_with_itself() {
        let against = ["rope".to_owned(), "yarn".to_owned()];
        let pairs = pairs(&["rope", "slowed", "yarn"], &against);
        let inside = pairs.iter().filter(|(.., inside)| *inside == Some(true));
        let inside: Vec<_> = inside.map(|&(arm, against, ..)| (arm, against)).collect();
        let expected = [("slowed", "rope"), ("yarn", "rope"), ("rope", "yarn"), ("slowed", "yarn")];
        assert_eq!(inside, expected);
        assert_eq!(pairs.len(), expected.len() * SPANS.len());
    }
}
