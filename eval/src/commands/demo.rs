//! `longctx demo`: needles in a haystack, with the full cache and with pruned ones.

mod picture;

use super::{ModelArgs, beside, megabytes, progress, surrogate, table, write, write_json};
use crate::files;
use crate::{Answer, Generate, Haystack, Method, Needle, Runner, Sample, Task};
use anyhow::{Result, ensure};
use clap::builder::PossibleValuesParser;
use models::{Model, Sampling, Specials, WINDOW};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// What to look for, and where.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Text to hide needles in: plain text, RULER's essays, SQuAD or HotpotQA
    #[arg(long, value_name = "FILE", required_unless_present = "prompt")]
    haystack: Option<PathBuf>,
    /// A KVzap surrogate of the model
    #[arg(long, value_name = "FOLDER")]
    surrogate: PathBuf,
    /// KVzap's thresholds; the baselines get the budget that the first one leaves
    #[arg(long, num_args = 1.., allow_negative_numbers = true, default_values_t = DEFAULT_THRESHOLDS)]
    threshold: Vec<f32>,
    /// Baselines to ask besides chance and recency, with the same budget
    #[arg(long, num_args = 1.., value_name = "NAME")]
    #[arg(value_parser = PossibleValuesParser::new(Method::baselines()))]
    also: Vec<String>,
    /// How many needles
    #[arg(long, default_value_t = 1)]
    needles: u64,
    /// Tokens of a prompt, about
    #[arg(long, default_value_t = 2000)]
    tokens: usize,
    /// The newest tokens, which always stay
    #[arg(long, default_value_t = WINDOW)]
    window: usize,
    /// The most tokens of an answer
    #[arg(long, default_value_t = 16)]
    max_tokens: usize,
    /// Of needles and of chance
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// Your own text instead of a haystack
    #[arg(long, value_name = "FILE", requires = "question")]
    prompt: Option<PathBuf>,
    /// Your question about it
    #[arg(long, value_name = "TEXT", requires = "prompt")]
    question: Option<String>,
    /// Write the table and all settings here too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw needles found against the share removed
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    svg: Option<PathBuf>,
}

/// Calibrated on held-out text, never on the essays of the demo: 75 and 84 % of the judged tokens go.
const DEFAULT_THRESHOLDS: [f32; 2] = [-3.0, -2.0];

/// A row of the table: one method over all samples.
#[derive(Clone, Debug, Serialize)]
struct Run {
    method: &'static str,
    threshold: Option<f32>,
    removed: f64,
    first_dropped: f64,
    kv_bytes: usize,
    prefill_tps: f64,
    decode_tps: f64,
    right: Option<u64>,
    answer: String,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    ensure!(!args.threshold.is_empty(), "give at least one --threshold");
    ensure!(args.needles > 0, "--needles 0 asks nothing; give 1 or more");
    for path in args.json.iter().chain(&args.svg) {
        beside(path)?;
    }
    let surrogate = surrogate(Some(&args.surrogate))?;
    let model = args.model.load()?;
    let samples = samples(args, &model)?;
    let ask = |method, bar: &dyn Fn()| -> Result<Run> {
        let mut runner = Runner {
            model: &model,
            surrogate: surrogate.as_ref(),
            method,
            window: args.window,
            protect: 0,
            stored: None,
            while_decoding: false,
            limit: if args.prompt.is_some() { 4 * args.max_tokens } else { args.max_tokens },
            sampling: Sampling::default(),
        };
        let mut answers = Vec::new();
        for (sample, score) in &samples {
            let answer = runner.generate(sample)?;
            answers.push((score(&answer.text), answer));
            bar();
        }
        Ok(summary(method, &answers, args.prompt.is_none()))
    };

    let methods = (args.threshold.len() + args.also.len()) as u64 + 3;
    let bar = progress(methods * samples.len() as u64, "asking");
    let mut runs = vec![ask(Method::Full, &|| bar.inc(1))?];
    for &threshold in &args.threshold {
        runs.push(ask(Method::Kvzap { threshold }, &|| bar.inc(1))?);
    }
    let remove = runs[1].removed;
    runs.push(ask(Method::Random { remove, seed: args.seed }, &|| bar.inc(1))?);
    runs.push(ask(Method::Recency { remove }, &|| bar.inc(1))?);
    for name in &args.also {
        runs.push(ask(Method::baseline(name, remove)?, &|| bar.inc(1))?);
    }
    bar.finish_and_clear();

    print(&runs, samples.len());
    if let Some(path) = &args.json {
        write_json(path, &json(args, &runs, samples.len()))?;
    }
    if let Some(path) = &args.svg {
        write(path, picture::draw(&runs, samples.len())?.as_bytes())?;
    }
    Ok(())
}

type Scored = (Sample, Box<dyn Fn(&str) -> f64>);

fn samples(args: &Args, model: &Model) -> Result<Vec<Scored>> {
    if let (Some(path), Some(question)) = (&args.prompt, &args.question) {
        let context = files::text(path)?;
        let sample = Sample { context, question: question.clone(), ..Sample::default() };
        return Ok(vec![(sample, Box::new(|_| 0.0))]);
    }
    let path = args.haystack.as_deref().unwrap_or(Path::new(""));
    let haystack = Haystack::load(path)?;
    let count = |text: &str| Ok(model.tokenizer.encode(text, Specials::Text)?.len());
    let task = Needle::new(&haystack, &count, args.tokens, args.seed);
    let mut samples: Vec<Scored> = Vec::new();
    for index in 0..args.needles {
        let sample = task.sample(index)?;
        let answers = sample.answers.clone();
        let right = move |text: &str| f64::from(answers.iter().all(|answer| text.contains(answer)));
        samples.push((sample, Box::new(right)));
    }
    Ok(samples)
}

fn summary(method: Method, answers: &[(f64, Answer)], scored: bool) -> Run {
    let n = answers.len() as f64;
    let mean =
        |value: &dyn Fn(&Answer) -> f64| answers.iter().map(|(_, a)| value(a)).sum::<f64>() / n;
    Run {
        method: method.name(),
        threshold: method.threshold(),
        removed: mean(&|a| a.removed),
        first_dropped: mean(&|a| a.first_dropped),
        kv_bytes: mean(&|a| a.kv_bytes as f64) as usize,
        prefill_tps: mean(&|a| a.context_tokens as f64) / mean(&|a| a.prefill_seconds),
        decode_tps: mean(&|a| a.decode.0 as f64) / mean(&|a| a.decode.1),
        right: scored.then(|| answers.iter().filter(|(score, _)| *score == 1.0).count() as u64),
        answer: answers.first().map(|(_, a)| a.text.trim().to_owned()).unwrap_or_default(),
    }
}

fn print(runs: &[Run], asked: usize) {
    let header = ["method", "removed", "KV held", "prefill", "decode", "right", "first answer"];
    let mut table = table(&header, &[1, 2, 3, 4, 5]);
    for run in runs {
        let name = match run.threshold {
            Some(threshold) => format!("{} τ={threshold}", run.method),
            None => run.method.to_owned(),
        };
        let answer: String = run.answer.replace('\n', " ").chars().take(28).collect();
        table.add_row([
            name,
            format!("{:.0} %", 100.0 * run.removed),
            megabytes(run.kv_bytes),
            format!("{:.0}/s", run.prefill_tps),
            format!("{:.1}/s", run.decode_tps),
            run.right.map_or_else(|| "-".to_owned(), |right| format!("{right}/{asked}")),
            answer,
        ]);
    }
    println!("{table}");
    println!("{}", seen(runs, asked));
}

/// One line: what the table shows.
fn seen(runs: &[Run], asked: usize) -> String {
    let [full, kvzap, .., random, recency] = runs else { return String::new() };
    let ratio = full.kv_bytes as f64 / kvzap.kv_bytes.max(1) as f64;
    let held = format!(
        "KVzap held {ratio:.1}× less cache ({:.0} % removed, the first token in {:.0} % of the heads)",
        100.0 * kvzap.removed,
        100.0 * kvzap.first_dropped,
    );
    match (full.right, kvzap.right, random.right, recency.right) {
        (Some(full), Some(kvzap), Some(random), Some(recency)) => format!(
            "{held} and found {kvzap} of {asked} where the full cache found {full}; with the same budget chance \
             found {random}, recency {recency}."
        ),
        _ => format!("{held}; compare its answer with the full cache's."),
    }
}

fn json(args: &Args, runs: &[Run], asked: usize) -> serde_json::Value {
    serde_json::json!({
        "needles": asked,
        "runs": runs,
        "settings": {
            "run": args.model.json(),
            "haystack": args.haystack.as_ref().map(|p| p.display().to_string()),
            "prompt": args.prompt.as_ref().map(|p| p.display().to_string()),
            "question": args.question,
            "surrogate": args.surrogate.display().to_string(),
            "thresholds": args.threshold,
            "tokens": args.tokens,
            "window": args.window,
            "max_tokens": args.max_tokens,
            "seed": args.seed,
            "prune_while_decoding": false,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(method: &'static str, kv_bytes: usize, removed: f64, right: Option<u64>) -> Run {
        Run {
            method,
            threshold: None,
            removed,
            first_dropped: 0.25,
            kv_bytes,
            prefill_tps: 1.0,
            decode_tps: 1.0,
            right,
            answer: String::new(),
        }
    }

    #[test]
    fn the_line_says_what_the_table_shows() {
        let runs = |right: fn(u64) -> Option<u64>| {
            vec![
                run("full", 400, 0.0, right(19)),
                run("kvzap", 100, 0.75, right(18)),
                run("random", 100, 0.75, right(2)),
                run("recency", 100, 0.75, right(5)),
            ]
        };
        assert_eq!(
            seen(&runs(Some), 20),
            "KVzap held 4.0× less cache (75 % removed, the first token in 25 % of the heads) and found 18 of 20 where \
             the full cache found 19; with the same budget chance found 2, recency 5."
        );
        assert!(seen(&runs(|_| None), 1).ends_with("compare its answer with the full cache's."));
    }
}
