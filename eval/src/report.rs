//! From folders of results to one page: scores against the share removed, with intervals, and all settings.

mod bootstrap;
mod chart;
mod load;
mod published;

#[cfg(test)]
mod tests;

use crate::intervals::Interval;
use crate::metrics::percent;
use crate::results::{Row, Settings, by_task};
use anyhow::Result;
pub use load::{Run, load};
use minijinja::{Environment, context};
use serde::Serialize;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// A method at one of its levels, in numbers.
#[derive(Debug, Serialize)]
pub struct Line {
    benchmark: String,
    press: String,
    level: String,
    samples: usize,
    /// In percent.
    removed: f64,
    /// The mean over tasks, in percent, and its 95 % interval.
    score: f64,
    interval: [f64; 2],
    /// Less the full cache's, over the samples that both have.
    difference: Option<Interval>,
    tasks: BTreeMap<String, f64>,
    prefill_seconds: f64,
    decode_tokens_per_second: f64,
    /// How many methods shared these seconds.
    together: usize,
    /// The share of the context that each kv head of each layer kept, in percent, `[layers][kv_heads]`.
    kept: Vec<Vec<f64>>,
    /// The same as a picture; empty where it is not known or all.
    kept_map: String,
    kv_megabytes: f64,
    folder: String,
    settings: Settings,
}

/// Everything that the page, the tables and the pictures show.
#[derive(Debug, Serialize)]
pub struct Report {
    benchmarks: Vec<Benchmark>,
    /// Needles found by depth and length, a map for each method of each model.
    maps: Vec<(String, String)>,
    /// What could not be used, and why.
    notes: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Benchmark {
    name: String,
    tasks: Vec<String>,
    lines: Vec<Line>,
    chart: String,
    task_charts: Vec<(String, String)>,
    sources: Vec<&'static str>,
    /// Whether a line shows what each head kept.
    kept: bool,
}

/// What a chart shows of a line: a score and its interval.
type ScoreOf<'a> = &'a dyn Fn(&Line) -> Option<(f64, [f64; 2])>;

/// The numbers of all runs.
pub fn report(runs: &[Run], mut notes: Vec<String>) -> Result<Report> {
    let mut benchmarks: BTreeMap<&str, Vec<&Run>> = BTreeMap::new();
    for run in runs {
        benchmarks.entry(&run.benchmark).or_default().push(run);
    }
    let mut pages = Vec::new();
    for (name, runs) in benchmarks {
        notes.extend(remarks(name, &runs));
        let full = |run: &Run| {
            let same = |other: &&&Run| other.press == "no_press" && other.data() == run.data();
            runs.iter().find(same).copied()
        };
        let mut lines: Vec<Line> = runs.iter().map(|run| line(run, full(run))).collect();
        lines.sort_by(|a, b| {
            let key = |line: &Line| (line.press != "no_press", line.press.clone());
            key(a).cmp(&key(b)).then(a.removed.total_cmp(&b.removed))
        });
        let tasks: BTreeSet<String> =
            lines.iter().flat_map(|line| line.tasks.keys().cloned()).collect();
        let published = published::of(name);
        let series = |score: ScoreOf<'_>| -> Vec<chart::Series> {
            let mut presses: BTreeMap<&str, Vec<chart::Point>> = BTreeMap::new();
            for line in &lines {
                if let Some((score, interval)) = score(line) {
                    let label = format!("{} {}", line.press, line.level);
                    let point = chart::Point { x: line.removed, y: score, interval, label };
                    presses.entry(&line.press).or_default().push(point);
                }
            }
            presses.into_iter().map(|(name, points)| chart::Series::new(name, points)).collect()
        };
        let chart =
            chart::lines(name, &series(&|line| Some((line.score, line.interval))), &published);
        let task_chart = |task: &String| {
            let score = |line: &Line| line.tasks.get(task).map(|&score| (score, [score; 2]));
            (task.clone(), chart::lines(task, &series(&score), &[]))
        };
        let task_charts = if tasks.len() > 1 && !tasks.iter().all(|task| task.starts_with("depth_"))
        {
            tasks.iter().map(task_chart).collect()
        } else {
            Vec::new()
        };
        pages.push(Benchmark {
            name: name.to_owned(),
            sources: published
                .iter()
                .map(|point| point.source)
                .collect::<BTreeSet<_>>()
                .into_iter()
                .collect(),
            tasks: tasks.into_iter().collect(),
            kept: lines.iter().any(|line| !line.kept_map.is_empty()),
            lines,
            chart,
            task_charts,
        });
    }
    Ok(Report { benchmarks: pages, maps: maps(runs), notes })
}

/// What a reader of the runs of one benchmark should know.
fn remarks(name: &str, runs: &[&Run]) -> Vec<String> {
    let mut notes = Vec::new();
    let datas: Vec<Settings> = runs.iter().map(|run| run.data()).collect();
    let names: BTreeSet<&String> = datas.iter().flat_map(|data| data.keys()).collect();
    for set in names {
        let values: BTreeSet<String> = datas
            .iter()
            .filter(|d| !d.is_empty())
            .map(|data| format!("{:?}", data.get(set)))
            .collect();
        if values.len() > 1 {
            notes.push(format!(
                "{name}: {set} is not the same in all runs; only runs that agree are compared in pairs"
            ));
        }
    }
    let lonely = |run: &&&Run| {
        !runs.iter().any(|other| other.press == "no_press" && other.data() == run.data())
    };
    if let Some(run) = runs.iter().find(lonely) {
        let folder = run.folder.display();
        notes.push(format!(
            "{name}: {folder} has no run with the full cache (no_press) beside it, so no difference"
        ));
    }
    let refused: BTreeMap<&String, &usize> = runs.iter().flat_map(|run| &run.refused).collect();
    for (task, needed) in refused {
        notes.push(format!("{name}: {task} is left out: a sample needs about {needed} tokens"));
    }
    let Some(run) = runs.iter().max_by_key(|run| run.rows.len()) else { return notes };
    for (task, rows) in by_task(&run.rows) {
        let with = |fact: &str, wanted: &dyn Fn(&Value) -> bool| {
            rows.iter().filter(|row| row.facts.get(fact).is_some_and(wanted)).count()
        };
        let dropped = with("paragraphs_dropped", &|dropped| dropped.as_u64() > Some(0));
        let cut = with("cut", &|_| true);
        for (count, what) in [
            (
                dropped,
                "had no room for all their paragraphs: those without the answer were dropped first",
            ),
            (cut, "are longer than the model reads: their contexts were cut"),
        ] {
            if count > 0 {
                notes.push(format!("{name}: of {task} {count} of {} samples {what}", rows.len()));
            }
        }
    }
    notes
}

fn line(run: &Run, full: Option<&Run>) -> Line {
    let rows = &run.rows;
    let mean =
        |value: &dyn Fn(&Row) -> f64| rows.iter().map(value).sum::<f64>() / rows.len() as f64;
    let tasks = by_task(rows)
        .into_iter()
        .map(|(task, rows)| (task.to_owned(), percent(rows.iter().map(|row| row.score))));
    let tasks: BTreeMap<String, f64> = tasks.collect();
    let difference = full.filter(|full| full.folder != run.folder);
    let kept = kept(rows);
    Line {
        benchmark: run.benchmark.clone(),
        press: run.press.clone(),
        level: run.level.clone(),
        samples: rows.len(),
        removed: 100.0 * mean(&|row| row.compression_ratio),
        score: tasks.values().sum::<f64>() / tasks.len() as f64,
        interval: bootstrap::mean_of_tasks(rows),
        difference: difference.and_then(|full| bootstrap::paired(rows, &full.rows)),
        tasks,
        prefill_seconds: mean(&|row| row.prefill_seconds),
        decode_tokens_per_second: mean(&|row| row.new_tokens as f64)
            / mean(&|row| row.decode_seconds).max(1e-9),
        together: rows.iter().map(|row| row.together).max().unwrap_or(0).max(1),
        kept_map: if kept.iter().flatten().all(|&percent| percent > 99.9) {
            String::new()
        } else {
            chart::heads(&format!("{} {}", run.press, run.level), &kept)
        },
        kept,
        kv_megabytes: mean(&|row| row.kv_bytes as f64) / 1e6,
        folder: run.folder.display().to_string(),
        settings: run.settings.clone(),
    }
}

/// The mean share of the context that each head kept, in percent, over the samples that tell it.
fn kept(rows: &[Row]) -> Vec<Vec<f64>> {
    let telling: Vec<&Row> = rows.iter().filter(|row| !row.kept.is_empty()).collect();
    let Some(first) = telling.first() else { return Vec::new() };
    let mut sums: Vec<Vec<f64>> = first.kept.iter().map(|heads| vec![0.0; heads.len()]).collect();
    for row in &telling {
        for (sums, heads) in sums.iter_mut().zip(&row.kept) {
            for (sum, &rows) in sums.iter_mut().zip(heads) {
                *sum += 100.0 * rows as f64 / row.context_tokens as f64;
            }
        }
    }
    sums.iter_mut().flatten().for_each(|sum| *sum /= telling.len() as f64);
    sums
}

fn maps(runs: &[Run]) -> Vec<(String, String)> {
    let mut maps: BTreeMap<String, BTreeMap<(u64, u64), Vec<f64>>> = BTreeMap::new();
    for run in runs {
        let Some(length) = run.settings.get("tokens").and_then(Value::as_u64) else { continue };
        for row in run.rows.iter().filter(|row| row.task.starts_with("depth_")) {
            let Some(depth) = row.facts.get("depth").and_then(Value::as_u64) else { continue };
            let map = maps.entry(format!("{} {} {}", run.model, run.press, run.level)).or_default();
            map.entry((length, depth)).or_default().push(row.score);
        }
    }
    maps.into_iter().map(|(name, map)| (name.clone(), chart::heat(&name, &map))).collect()
}

impl Report {
    /// One page that needs nothing from elsewhere.
    pub fn html(&self) -> Result<String> {
        let mut environment = Environment::new();
        environment.add_filter("percent", |value: f64| format!("{value:.1}"));
        environment.add_template("report.html", include_str!("report/page.html"))?;
        let page = environment.get_template("report.html")?;
        Ok(page.render(context! { report => self, style => chart::STYLE })?)
    }

    /// The table for a paper, in Markdown.
    pub fn markdown(&self) -> String {
        let mut text = String::new();
        for benchmark in &self.benchmarks {
            text += &format!(
                "## {}\n\n| method | level | samples | removed | score | 95 % | less full |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n",
                benchmark.name
            );
            for line in &benchmark.lines {
                let [low, high] = line.interval;
                let less = line.difference.as_ref().map_or(String::new(), |d| {
                    format!("{:+.1} ({:+.1} to {:+.1})", d.mean, d.low, d.high)
                });
                text += &format!(
                    "| {} | {} | {} | {:.1} % | {:.1} | {low:.1} to {high:.1} | {less} |\n",
                    line.press, line.level, line.samples, line.removed, line.score
                );
            }
            text.push('\n');
        }
        text
    }

    /// The same with a column for each task, as comma-separated values.
    pub fn csv(&self) -> Result<Vec<u8>> {
        let mut csv = csv::Writer::from_writer(Vec::new());
        csv.write_record([
            "benchmark",
            "press",
            "level",
            "task",
            "samples",
            "removed",
            "score",
            "low",
            "high",
        ])?;
        for line in self.benchmarks.iter().flat_map(|benchmark| &benchmark.lines) {
            let mut record = |task: &str, score: f64, [low, high]: [String; 2]| {
                let numbers = [
                    line.samples.to_string(),
                    line.removed.to_string(),
                    score.to_string(),
                    low,
                    high,
                ];
                let names = [&line.benchmark, &line.press, &line.level, task].map(str::to_owned);
                csv.write_record(names.into_iter().chain(numbers))
            };
            record("mean", line.score, line.interval.map(|bound| bound.to_string()))?;
            for (task, &score) in &line.tasks {
                record(task, score, [String::new(), String::new()])?;
            }
        }
        csv.into_inner().map_err(|error| error.into_error().into())
    }

    /// Each chart as a picture of its own: a file name without its end, and the SVG.
    pub fn pictures(&self) -> Vec<(String, String)> {
        let mut pictures = Vec::new();
        for benchmark in &self.benchmarks {
            let name =
                |part: &str| format!("{} {part}", benchmark.name).trim().replace([' ', '/'], "_");
            pictures.push((name(""), chart::alone(&benchmark.chart)));
            for (part, svg) in &benchmark.task_charts {
                pictures.push((name(part), chart::alone(svg)));
            }
            for line in benchmark.lines.iter().filter(|line| !line.kept_map.is_empty()) {
                let part = format!("kept by {} {}", line.press, line.level);
                pictures.push((name(&part), chart::alone(&line.kept_map)));
            }
        }
        for (name, svg) in &self.maps {
            pictures.push((format!("needles {name}").replace([' ', '/'], "_"), chart::alone(svg)));
        }
        pictures
    }

    /// What a person should know.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }
}
