//! What models still know when more and more of a text is forgotten: each by its own surrogate, and by rules that look at nothing.

use super::compare::{read_json, write_rows};
use super::picture::{COLORS, chart, legend};
use crate::commands::curve::Row;
use crate::commands::{beside, table, write};
use crate::intervals::wilson;
use anyhow::{Result, ensure};
use plotters::prelude::*;
use serde::Deserialize;
use serde_json::{Value, json};
use std::path::PathBuf;

/// What to put beside one another.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Files that `longctx curve --task facts --json` wrote, of models that `longctx train repo` has trained
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// A name for the rows
    #[arg(long, default_value = "facts, forgotten")]
    experiment: String,
    /// The rows as JSON, one for each arm, seed, method, share and length; what the file holds of other experiments stays
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// A picture of right answers against the share forgotten, as SVG
    #[arg(long, value_name = "FILE")]
    picture: Option<PathBuf>,
    /// Print the rows instead of the table
    #[arg(long)]
    json: bool,
}

/// What `longctx curve` writes, as far as it counts here.
#[derive(Deserialize)]
struct Curve {
    settings: Vec<Value>,
    curve: Vec<Row>,
}

/// One model's.
struct Known {
    arm: String,
    seed: u64,
    tokens: u64,
    rows: Vec<Row>,
}

/// Methods that are drawn, and how: a model's own surrogate is called as its folder, by default so.
const DRAWN: [(&str, &str, i32); 3] = [
    ("kvzap", "its own KVzap", 0),
    ("StreamingLLM", "the newest stay", 6),
    ("random", "by chance", 2),
];

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let mut all = Vec::new();
    for path in &args.files {
        let what = "what longctx curve --json writes; give the file that its --json names";
        let Curve { settings, mut curve } = read_json(path, what)?;
        let said = |name: &str| settings.iter().map(|s| s[name].clone()).find(|v| !v.is_null());
        let arm = said("arm").and_then(|arm| arm.as_str().map(str::to_owned));
        curve.retain(|row| row.task == "facts" && row.asked >= 0.0);
        ensure!(
            arm.is_some() && !curve.is_empty(),
            "{}: no facts asked of a model that longctx train repo has trained; ask with longctx curve --task facts",
            path.display()
        );
        let number = |name: &str| said(name).and_then(|n| n.as_u64()).unwrap_or(0);
        let (seed, tokens) = (number("arm_seed"), number("arm_tokens"));
        all.push(Known { arm: arm.unwrap_or_default(), seed, tokens, rows: curve });
    }
    for path in args.output.iter().chain(&args.picture) {
        drop(beside(path)?);
    }
    let rows: Vec<Value> = all.iter().flat_map(|known| rows_of(&args.experiment, known)).collect();
    if let Some(path) = &args.output {
        write_rows(path, &args.experiment, &rows)?;
    }
    let mut arms: Vec<&str> = Vec::new();
    for known in &all {
        if !arms.contains(&&*known.arm) {
            arms.push(&known.arm);
        }
    }
    if let Some(path) = &args.picture {
        write(path, draw(&arms, &all)?.as_bytes())?;
    }
    if args.json {
        println!("{:#}", json!(rows));
    } else {
        print(&arms, &all);
    }
    Ok(())
}

fn rows_of(experiment: &str, known: &Known) -> Vec<Value> {
    let row = |row: &Row| {
        json!({
            "experiment": experiment, "arm": known.arm, "seed": known.seed, "tokens": known.tokens,
            "task": "facts", "context": row.context, "inside": true, "method": row.method,
            "removed": row.asked, "score": 100.0 * row.score, "low": 100.0 * row.low,
            "high": 100.0 * row.high, "n": row.n,
        })
    };
    known.rows.iter().map(row).collect()
}

/// The share of right answers of an arm, all seeds and lengths together, and how many were asked; `None` if none were.
fn right(all: &[Known], arm: &str, method: &str, removed: f64) -> Option<(f64, usize)> {
    let rows = all.iter().filter(|known| known.arm == arm).flat_map(|known| &known.rows);
    let rows = rows.filter(|row| row.asked == removed && (row.method == method || removed == 0.0));
    let (right, n) =
        rows.fold((0.0, 0), |(right, n), row| (right + row.score * row.n as f64, n + row.n));
    (n > 0).then_some((right, n))
}

/// The shares that were asked for, the whole cache first.
fn shares(all: &[Known]) -> Vec<f64> {
    let mut shares: Vec<f64> = all.iter().flat_map(|k| &k.rows).map(|row| row.asked).collect();
    shares.sort_by(f64::total_cmp);
    shares.dedup();
    shares
}

fn print(arms: &[&str], all: &[Known]) {
    let mut methods: Vec<&str> = Vec::new();
    for row in all.iter().flat_map(|known| &known.rows).filter(|row| row.asked > 0.0) {
        if !methods.contains(&&*row.method) {
            methods.push(&row.method);
        }
    }
    let shares = shares(all);
    let names: Vec<String> = shares.iter().map(|s| format!("{:.0} % gone", 100.0 * s)).collect();
    let header = ["right, %", "by"].into_iter().chain(names.iter().map(String::as_str));
    let header: Vec<&str> = header.collect();
    let mut rows = table(&header, &(2..header.len()).collect::<Vec<_>>());
    for (arm, method) in arms.iter().flat_map(|arm| methods.iter().map(move |m| (*arm, *m))) {
        let cell = |&share: &f64| match right(all, arm, method, share) {
            Some((right, n)) => {
                let of = wilson(right, n);
                format!("{:.1} ({:.0}–{:.0})", 100.0 * of.mean, 100.0 * of.low, 100.0 * of.high)
            }
            None => "-".to_owned(),
        };
        let begin = [arm.to_owned(), method.to_owned()];
        rows.add_row(begin.into_iter().chain(shares.iter().map(cell)));
    }
    println!("{rows}");
}

/// An SVG: an arm a colour, a method a kind of line.
fn draw(arms: &[&str], all: &[Known]) -> Result<String> {
    let shares = shares(all);
    let most = shares.iter().copied().fold(0.5, f64::max) + 0.02;
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (640, 400)).into_drawing_area();
        let mut chart = chart(&root, 0.0..most, 0.0..100.0)?;
        chart
            .configure_mesh()
            .light_line_style(WHITE)
            .x_label_formatter(&|share| format!("{:.0} %", 100.0 * share))
            .x_desc("of the context forgotten, before the question is seen")
            .y_desc("right, %")
            .draw()?;
        for (arm, color) in arms.iter().zip(COLORS.iter().cycle()) {
            for (method, name, gap) in DRAWN {
                let point = |&share: &f64| {
                    let (right, n) = right(all, arm, method, share)?;
                    Some((share, 100.0 * right / n as f64))
                };
                let points: Vec<(f64, f64)> = shares.iter().filter_map(point).collect();
                let (wide, color) = (if gap == 0 { 3 } else { 1 }, *color);
                let style = color.stroke_width(wide);
                let drawn = if gap == 0 {
                    let dots = points.iter().map(|point| Circle::new(*point, 3, color.filled()));
                    chart.draw_series(dots)?;
                    chart.draw_series(LineSeries::new(points, style))?
                } else {
                    chart.draw_series(DashedLineSeries::new(points, gap, 4, style))?
                };
                // Rules are alike for all arms, and said once.
                let label = match gap {
                    0 => format!("{arm}, {name}"),
                    _ if *arm == arms[0] => name.to_owned(),
                    _ => continue,
                };
                drawn.label(label).legend(move |(x, y)| {
                    let ends = if gap == 0 {
                        vec![(x, y), (x + 18, y)]
                    } else {
                        vec![(x, y), (x + gap + 2, y)]
                    };
                    PathElement::new(ends, style)
                });
            }
        }
        legend(&mut chart, SeriesLabelPosition::UpperRight)?;
        root.present()?;
    }
    Ok(svg)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_and_lengths_count_by_their_questions_and_the_whole_cache_is_every_methods() {
        let row = |context, method: &str, asked, score, n| Row {
            task: "facts".to_owned(),
            context,
            method: method.to_owned(),
            asked,
            removed: asked,
            removed_of_judged: asked,
            score,
            low: 0.0,
            high: 1.0,
            n,
            scores: Vec::new(),
        };
        let known = |seed, rows| Known { arm: "rope".to_owned(), seed, tokens: 9, rows };
        let all = [
            known(1, vec![row(1024, "full", 0.0, 1.0, 10), row(1024, "kvzap", 0.5, 0.5, 10)]),
            known(2, vec![row(2048, "full", 0.0, 0.5, 30), row(2048, "random", 0.5, 0.0, 30)]),
        ];
        assert_eq!(shares(&all), [0.0, 0.5]);
        assert_eq!(right(&all, "rope", "kvzap", 0.0), Some((25.0, 40)));
        assert_eq!(right(&all, "rope", "kvzap", 0.5), Some((5.0, 10)));
        assert_eq!(right(&all, "rope", "random", 0.5), Some((0.0, 30)));
        assert_eq!(right(&all, "repo", "kvzap", 0.5), None);
        assert_eq!(rows_of("x", &all[1])[1]["removed"], 0.5);
        let svg = draw(&["rope"], &all).unwrap();
        assert!(svg.contains("rope, its own KVzap") && svg.contains("50 %"), "{svg}");
    }
}
