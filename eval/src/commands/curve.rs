//! `longctx curve`: what is still known of a text when more and more of it is forgotten, by every method at once.

mod methods;
mod paired;
mod picture;
mod probes;
mod unfinished;

use super::{ModelArgs, beside, facts, progress, table, write, write_json};
use crate::files;
use crate::intervals::{Interval, normal, wilson};
use anyhow::{Context, Result, bail, ensure};
use methods::{Methods, Variant};
use models::{Dense, Fan, Hooks, KvCache, Model, WINDOW};
use paired::Difference;
use probes::{Probe, Probes, Scored};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tch::{Kind, Tensor};
use unfinished::Unfinished;

/// What to ask, and what to forget before.
#[derive(clap::Args, Debug)]
#[command(mut_arg("model", |model| model.required(false)))] // --merge alone needs none
pub struct Args {
    #[command(flatten)]
    model: Option<ModelArgs>,
    /// Surrogates of the model; each is a method called as its folder
    #[arg(long, num_args = 1.., value_name = "FOLDER")]
    surrogate: Vec<PathBuf>,
    /// The folder of RULER's essays, questions and words
    #[arg(long, value_name = "FOLDER", required_unless_present_any = ["merge", "documents"])]
    texts: Option<PathBuf>,
    /// Documents for `perplexity`, and for the noise of `facts`, as JSON lines
    #[arg(long, value_name = "FILE")]
    documents: Option<PathBuf>,
    /// What to ask: RULER's tasks of one answer, `answer-nll`, `perplexity`, `facts`; nothing with --merge alone
    #[arg(long, num_args = 1.., required_unless_present = "merge")]
    task: Vec<String>,
    /// Tokens of a context, about
    #[arg(long, num_args = 1.., default_values_t = [1024])]
    tokens: Vec<usize>,
    /// Shares of the context to forget
    #[arg(long, num_args = 1.., default_values_t = [0.25, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9])]
    remove: Vec<f64>,
    /// Thresholds of the surrogates, beside the shares
    #[arg(long, num_args = 1.., allow_negative_numbers = true)]
    threshold: Vec<f64>,
    /// Methods to compare; all if left out
    #[arg(long, num_args = 1..)]
    method: Vec<String>,
    /// The newest tokens, which always stay
    #[arg(long, default_value_t = WINDOW)]
    window: usize,
    /// First tokens that always stay; surrogates are measured without as well
    #[arg(long, default_value_t = 4)]
    protect: usize,
    /// Contexts of each task and length
    #[arg(long, default_value_t = 100)]
    samples: u64,
    /// Of samples and of chance
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// Rows of earlier runs, to put beside these; what was measured again, method by method, is the later run's
    #[arg(long, num_args = 1.., value_name = "FILE")]
    merge: Vec<PathBuf>,
    /// Write the rows and all settings here; a run that is cut off leaves what it has, and the same command goes on there
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write what each sample scored beside its row, for --against
    #[arg(long)]
    each: bool,
    /// A method, or `full`, that all others are compared with, sample by sample
    #[arg(long, value_name = "METHOD")]
    against: Option<String>,
    /// Draw a picture of each task and length into this folder
    #[arg(long, value_name = "FOLDER")]
    svg: Option<PathBuf>,
}

/// A point of a curve.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    /// The task.
    pub task: String,
    /// Tokens of its contexts, about.
    pub context: usize,
    /// The method.
    pub method: String,
    /// The share that was asked for, or the threshold.
    pub asked: f64,
    /// The share of the whole context that went, the mean over samples.
    pub removed: f64,
    /// The share of the tokens that may go: all but the first and the newest.
    pub removed_of_judged: f64,
    /// The mean over samples: of 1 for right and 0 for wrong, or of nats a token.
    pub score: f64,
    /// The 95 % interval's ends.
    pub low: f64,
    /// See `low`.
    pub high: f64,
    /// How many samples.
    pub n: usize,
    /// What each of them scored, where `--each` asked for it.
    #[serde(default, skip_serializing_if = "Vec::is_empty", with = "paired::line")]
    pub scores: Vec<f64>,
}

#[derive(Default, Serialize, Deserialize)]
struct Report {
    r2: BTreeMap<String, f64>,
    settings: Vec<serde_json::Value>,
    curve: Vec<Row>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    paired: Vec<Difference>,
    #[serde(default, skip_serializing_if = "Unfinished::is_nothing")]
    unfinished: Unfinished,
}

/// What has been measured is written when writing it took so many times less than measuring it.
const SAVES: u32 = 20;

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    if let Some(path) = &args.json {
        beside(path)?;
    }
    if let Some(folder) = &args.svg {
        std::fs::create_dir_all(folder).with_context(|| super::no_place(folder))?;
    }
    ensure!(args.samples > 0, "--samples 0 asks nothing; give 1 or more");
    let (least, kept) = (args.tokens.iter().min(), args.window + args.protect);
    ensure!(
        least.is_some_and(|&least| least > kept),
        "contexts of {} tokens, of which {kept} always stay, have nothing to forget; give longer ones, or a smaller --window",
        least.copied().unwrap_or(0)
    );
    let mut report = Report::default();
    for path in &args.merge {
        let earlier: Report = serde_json::from_slice(&files::bytes(path)?).with_context(|| {
            format!(
                "{} is not what --json of this command writes; give such a file",
                path.display()
            )
        })?;
        report.r2.extend(earlier.r2);
        for settings in earlier.settings {
            if !report.settings.contains(&settings) {
                report.settings.push(settings);
            }
        }
        supersede(&mut report.curve, earlier.curve);
    }
    if !args.task.is_empty() {
        ask_all(args, &mut report)?;
    }
    if let Some(against) = &args.against {
        report.paired = paired::differences(&report.curve, &report.settings, against)?;
        paired::print(&report.paired);
    }
    save(args, &report)?;
    if let Some(folder) = &args.svg {
        for (name, svg) in picture::draw(&report.curve)? {
            write(&folder.join(name), svg.as_bytes())?;
        }
    }
    Ok(())
}

fn ask_all(args: &Args, report: &mut Report) -> Result<()> {
    let run = args.model.as_ref().context("which model is to be asked? give --model PATH")?;
    let model = run.load()?;
    let methods = Methods::load(args, &model)?;
    let variants = methods.variants();
    if let Some(against) = &args.against {
        let known = |method: &String| method == against;
        ensure!(
            variants
                .iter()
                .map(|v| &v.method)
                .chain(report.curve.iter().map(|r| &r.method))
                .any(known),
            "--against {against}: no such method is measured or merged; name one of --method, a surrogate's folder, or full"
        );
    }
    let begun = Unfinished::new(args, run, variants)?;
    let left = args.json.as_deref().map(|path| begun.report(path)).transpose()?;
    match left.flatten() {
        Some(left) => *report = left, // what is to be merged is in there
        None => {
            report.r2.extend(methods.r2());
            report.settings.push(settings(args, run)?);
            report.unfinished = begun;
        }
    }
    let cells = args.task.iter().flat_map(|task| args.tokens.iter().map(move |&n| (task, n)));
    for (task, tokens) in cells.skip(report.unfinished.cells) {
        let probes = Probes::open(args, &model, task, tokens)?;
        let bar = progress(args.samples, format!("{task} {tokens}"));
        bar.inc(report.unfinished.samples.len() as u64);
        bar.reset_eta();
        let (mut saved, mut took) = (Instant::now(), Duration::ZERO);
        for index in report.unfinished.samples.len() as u64..args.samples {
            let points = ask(args, &model, &methods, variants, &probes.sample(index)?)?;
            report.unfinished.samples.push(points);
            bar.inc(1);
            if saved.elapsed() > SAVES * took {
                let start = Instant::now();
                let rows = rows(args, variants, &probes, &report.unfinished.samples);
                let more = more(&report.curve, rows);
                supersede(&mut report.curve, more);
                save(args, report)?;
                (saved, took) = (Instant::now(), start.elapsed());
            }
        }
        bar.finish_and_clear();
        let rows = rows(args, variants, &probes, &std::mem::take(&mut report.unfinished.samples));
        print(&rows);
        supersede(&mut report.curve, rows);
        report.unfinished.cells += 1;
        save(args, report)?; // what is done is not lost
    }
    report.unfinished = Unfinished::default();
    Ok(())
}

fn save(args: &Args, report: &Report) -> Result<()> {
    match &args.json {
        Some(path) => write_json(path, &serde_json::to_value(report)?),
        None => Ok(()),
    }
}

/// Adds `rows`; of their tasks and lengths, earlier rows of methods that were measured again go.
fn supersede(curve: &mut Vec<Row>, rows: Vec<Row>) {
    curve.retain(|old| !rows.iter().any(|new| same_method(old, new)));
    curve.extend(rows);
}

/// Those of `rows`, which are not all there yet, of whose methods `curve` has no more samples.
fn more(curve: &[Row], mut rows: Vec<Row>) -> Vec<Row> {
    rows.retain(|new| !curve.iter().any(|old| same_method(old, new) && old.n > new.n));
    rows
}

fn same_method(a: &Row, b: &Row) -> bool {
    a.task == b.task && a.context == b.context && a.method == b.method
}

fn settings(args: &Args, run: &ModelArgs) -> Result<serde_json::Value> {
    let training = facts::training(run)?;
    Ok(serde_json::json!({
        "run": run.json(), "tasks": args.task, "contexts": args.tokens, "samples": args.samples,
        "window": args.window, "protect": args.protect, "seed": args.seed,
        "surrogates": args.surrogate.iter().filter_map(|p| p.file_name()?.to_str()).collect::<Vec<_>>(),
        "arm": training["arm"], "arm_seed": training["seed"], "arm_tokens": training["tokens"],
    }))
}

/// A row of each variant, over the samples so far.
fn rows(args: &Args, variants: &[Variant], probes: &Probes, samples: &[Vec<[f64; 3]>]) -> Vec<Row> {
    let row = |(index, variant): (usize, &Variant)| {
        let column = |of: usize| samples.iter().map(|points| points[index][of]).collect::<Vec<_>>();
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
        let scores = column(2);
        let Interval { mean: score, low, high } = match probes.scored {
            Scored::Right => wilson(scores.iter().sum(), scores.len()),
            Scored::Nats => normal(&scores),
        };
        Row {
            task: probes.task.clone(),
            context: probes.tokens,
            method: variant.method.clone(),
            asked: variant.asked,
            removed: mean(&column(0)),
            removed_of_judged: mean(&column(1)),
            score,
            low,
            high,
            n: scores.len(),
            scores: if args.each || args.against.is_some() { scores } else { Vec::new() },
        }
    };
    variants.iter().enumerate().map(row).collect()
}

/// Reads a context once, forgets in all ways, and asks all of them: of each variant the share removed, that of the judged
/// tokens, and the score.
fn ask(
    args: &Args,
    model: &Model,
    methods: &Methods,
    variants: &[Variant],
    probe: &Probe,
) -> Result<Vec<[f64; 3]>> {
    tch::no_grad(|| {
        let layers = model.lm.config().layers;
        let mut dense = Dense::new(layers, args.window);
        let drops = methods.drops(model, probe, &mut dense)?; // of each layer [V, kv_heads, tokens]
        let tokens = dense.tokens();
        let shares = removed(&drops)?;
        let judged = tokens.saturating_sub(args.window + args.protect).max(1) as f64;
        let texts = variants.len() as i64;
        // The last token of the target is never read.
        let ids = [probe.question.as_slice(), &probe.target[..probe.target.len() - 1]].concat();
        let ids: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
        let ids = Tensor::f_from_slice(&ids)?.f_to_device(model.device)?;
        let length = ids.size()[0];
        let ids = ids.f_unsqueeze(0)?.f_expand([texts, length], false)?;
        let mut fan = Fan::new(&dense, &drops)?;
        let hidden = model.lm.forward(&ids, &mut fan, &Hooks::default())?;
        let count = probe.target.len() as i64;
        let logits = model.lm.logits(&hidden.f_narrow(1, length - count, count)?)?; // [V, target, vocabulary]
        let target: Vec<i64> = probe.target.iter().map(|&id| i64::from(id)).collect();
        let target = Tensor::f_from_slice(&target)?.f_to_device(model.device)?;
        let scores = match probe.scored {
            Scored::Right => {
                logits.f_argmax(2, false)?.f_eq_tensor(&target)?.f_all_dim(1, false)?
            }
            Scored::Nats => {
                let index = target.f_view([1, count, 1])?.f_expand([texts, count, 1], false)?;
                let found = logits.f_gather(2, &index, false)?;
                let nats = logits.f_logsumexp([2], true)?.f_sub(&found)?;
                nats.f_mean_dim([1i64, 2].as_slice(), false, Kind::Float)?
            }
        };
        let scores = Vec::<f64>::try_from(&scores.f_to_kind(Kind::Double)?)?;
        let of_judged = |share: f64| (share * tokens as f64 / judged).min(1.0);
        Ok(shares.into_iter().zip(scores).map(|(share, s)| [share, of_judged(share), s]).collect())
    })
}

/// The share of all rows that each text has forgotten.
fn removed(drops: &[Tensor]) -> Result<Vec<f64>> {
    let mut total: Option<Tensor> = None;
    for layer in drops {
        let share =
            layer.f_to_kind(Kind::Float)?.f_mean_dim([1i64, 2].as_slice(), false, Kind::Double)?;
        total = Some(match total {
            Some(total) => total.f_add(&share)?,
            None => share,
        });
    }
    let Some(total) = total else { bail!("a model without layers") };
    Ok(Vec::try_from(&total.f_div_scalar(drops.len() as i64)?)?)
}

/// Methods down, shares across.
fn print(rows: &[Row]) {
    let Some(first) = rows.first() else { return };
    let mut shares: Vec<f64> =
        rows.iter().filter(|row| row.asked > 0.0).map(|row| row.asked).collect();
    shares.sort_by(f64::total_cmp);
    shares.dedup();
    let names: Vec<String> = shares.iter().map(|share| format!("{:.0} %", 100.0 * share)).collect();
    let header: Vec<&str> =
        ["method"].into_iter().chain(names.iter().map(String::as_str)).collect();
    let right: Vec<usize> = (1..header.len()).collect();
    let mut table = table(&header, &right);
    let mut methods: Vec<&str> = Vec::new();
    for row in rows.iter().filter(|row| row.asked > 0.0) {
        if !methods.contains(&&*row.method) {
            methods.push(&row.method);
        }
    }
    for method in methods {
        let cell = |share: &f64| {
            let row = rows.iter().find(|row| row.method == method && row.asked == *share);
            row.map_or(String::new(), |row| format!("{:.2}", row.score))
        };
        table.add_row([method.to_owned()].into_iter().chain(shares.iter().map(cell)));
    }
    println!("{} of about {} tokens, {} samples", first.task, first.context, first.n);
    if let Some(full) = rows.iter().find(|row| row.method == "full") {
        println!("full cache: {:.2} ({:.2} to {:.2})", full.score, full.low, full.high);
    }
    println!("{table}");
    for row in rows.iter().filter(|row| row.asked < 0.0) {
        let Row { method, asked, removed, score, .. } = row;
        println!("{method} τ={asked}: {score:.2} at {:.0} % removed", 100.0 * removed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_measured_again_replaces_its_method_alone() {
        let row = |task: &str, context, method: &str, score| Row {
            task: task.to_owned(),
            context,
            method: method.to_owned(),
            asked: 0.5,
            removed: 0.5,
            removed_of_judged: 0.5,
            score,
            low: 0.0,
            high: 1.0,
            n: 9,
            scores: Vec::new(),
        };
        let mut curve = vec![
            row("a", 1, "mlp", 0.1),
            row("a", 1, "mlp", 0.2),
            row("a", 1, "KVzip", 0.3),
            row("a", 2, "mlp", 0.4),
            row("b", 1, "mlp", 0.5),
        ];
        let few = Row { n: 3, ..row("a", 1, "mlp", 0.9) };
        assert!(more(&curve, vec![few]).is_empty(), "nine samples are better than three");
        let as_many = more(&curve, vec![row("a", 1, "mlp", 0.6), row("c", 1, "mlp", 0.7)]);
        assert_eq!(as_many.len(), 2);
        supersede(&mut curve, as_many[..1].to_vec());
        let scores: Vec<f64> = curve.iter().map(|row| row.score).collect();
        assert_eq!(scores, [0.3, 0.4, 0.5, 0.6]);
    }

    #[test]
    fn shares_are_counted_over_layers_and_heads() {
        let layer = |rows: &[&[i64]]| {
            let flat: Vec<i64> = rows.concat();
            Tensor::from_slice(&flat).view([rows.len() as i64, 1, -1]).to_kind(Kind::Bool)
        };
        let drops =
            [layer(&[&[1, 0, 0, 0], &[1, 1, 1, 1]]), layer(&[&[0, 0, 0, 0], &[1, 1, 0, 0]])];
        assert_eq!(removed(&drops).unwrap(), [0.125, 0.75]);
    }
}
