//! `longctx eval`: benchmarks, for several methods side by side, resumable, in kvpress's layout of results.

mod ask;
mod data;
mod list;

use super::{ModelArgs, surrogate, table, write, write_json};
use crate::Method;
use crate::fnv;
use crate::metrics::percent;
use crate::results::{self, Journal, Name, Row, Settings, by_task};
use crate::suite::{Group, Shard, Suite};
use crate::tasks::{published, ruler::TooShort};
use anyhow::{Context, Result, ensure};
use clap::builder::PossibleValuesParser;
use kvzap::Surrogate;
use models::{Model, Specials, WINDOW};
use serde_json::{Value, json};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Which benchmarks, with which methods.
#[derive(clap::Args, Debug)]
pub struct Args {
    // Optional for the sake of --list; clap asks for --model elsewhere.
    #[command(flatten)]
    model: Option<ModelArgs>,
    /// Tell every benchmark, its data, where they are looked for, and about how long it takes
    #[arg(long, exclusive = true)]
    list: bool,
    #[command(flatten)]
    data: data::DataArgs,
    /// Which methods
    #[arg(long, num_args = 1.., value_delimiter = ',', default_values = ["full", "kvzap"])]
    #[arg(value_parser = PossibleValuesParser::new(LEARNED.into_iter().chain(Method::baselines())))]
    method: Vec<String>,
    /// A KVzap surrogate of the model
    #[arg(long, value_name = "FOLDER")]
    surrogate: Option<PathBuf>,
    /// KVzap's thresholds, each a run
    #[arg(long, num_args = 1.., allow_negative_numbers = true, default_values_t = [-3.0])]
    threshold: Vec<f32>,
    /// Shares to remove, for the methods with a budget, each a run
    #[arg(long, num_args = 1.., value_name = "SHARE", default_values_t = [0.5])]
    remove: Vec<f64>,
    /// The newest tokens, which always stay
    #[arg(long, default_value_t = WINDOW)]
    window: usize,
    /// Prune question and answer too
    #[arg(long)]
    prune_while_decoding: bool,
    /// The most tokens of an answer; the benchmark's own number if left out
    #[arg(long)]
    max_tokens: Option<usize>,
    /// 0 takes the likeliest token; AIME is sampled at 0.6
    #[arg(long)]
    temperature: Option<f32>,
    /// Ask nothing: write the samples as JSON lines, which --data and other harnesses read
    #[arg(long, value_name = "FILE")]
    write_samples: Option<PathBuf>,
    /// Folder of result folders
    #[arg(long, value_name = "FOLDER", default_value = "results")]
    out: PathBuf,
    /// Answer only this part, such as 1/4; the parts may run at the same time
    #[arg(long, value_name = "I/N", default_value = "1/1")]
    shard: Shard,
    /// Write the table and all settings here too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// The methods that are no baseline.
const LEARNED: [&str; 3] = ["full", "kvzap", "kvzap-budget"];

/// Changes when the same settings would give other prompts or scores.
const PROTOCOL: u32 = 1;

/// A suite with a method: what one folder of results holds.
struct Run {
    folder: PathBuf,
    method: Method,
    settings: Settings,
    journal: Journal,
    name: Name,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    if args.list {
        return list::list();
    }
    let surrogate = surrogate(args.surrogate.as_deref())?;
    let methods = methods(args)?;
    if let Some(path) = &args.json {
        super::beside(path)?;
    }
    let material = args.data.open()?;
    let model = args.model()?.load()?;
    let count = |text: &str| Ok(model.tokenizer.encode(text, Specials::Text)?.len());
    let suites = args.data.suites(&material, &count)?;

    if let Some(path) = &args.write_samples {
        return write_samples(args, &suites, path);
    }
    let mut tables = Vec::new();
    for suite in &suites {
        let groups = suite.groups(args.data.samples);
        let open = |method: &Method| open(args, suite, *method, &model, surrogate.as_ref());
        let mut runs = methods.iter().map(open).collect::<Result<Vec<_>>>()?;
        let refused = ask::ask(args, suite, &groups, &mut runs, &model, surrogate.as_ref())?;
        let kept = |group: &&Group| !refused.iter().any(|(task, _)| *task == group.task);
        let wanted: usize = groups.iter().filter(kept).map(|group| group.indices.len()).sum();
        tables.push(finish(args, suite, &runs, wanted, &refused)?);
    }
    if let Some(path) = &args.json {
        write_json(path, &json!({"settings": args.model()?.json(), "suites": tables}))?;
    }
    Ok(())
}

/// The first samples of every task; of one that does not fit its length none.
fn write_samples(args: &Args, suites: &[Suite<'_>], path: &Path) -> Result<()> {
    let mut lines = Vec::new();
    for suite in suites {
        for group in suite.groups(args.data.samples) {
            let task = &suite.tasks[group.task];
            for index in group.indices {
                match task.sample(index) {
                    Ok(sample) => writeln!(lines, "{}", published::record(task.name(), &sample))?,
                    Err(error) => {
                        let short: TooShort = error.downcast()?;
                        eprintln!("note: {} sample {index} is left out: it {short}", task.name());
                    }
                }
            }
        }
    }
    write(path, &lines)
}

impl Args {
    fn model(&self) -> Result<&ModelArgs> {
        self.model.as_ref().context("which model? give --model PATH")
    }
}

/// Every method at each of its levels, once.
fn methods(args: &Args) -> Result<Vec<Method>> {
    let mut methods = Vec::new();
    for name in &args.method {
        let shares = args.remove.iter();
        let thresholds = args.threshold.iter();
        match name.as_str() {
            "full" => methods.push(Method::Full),
            "kvzap" => methods.extend(thresholds.map(|&threshold| Method::Kvzap { threshold })),
            "kvzap-budget" => methods.extend(shares.map(|&remove| Method::KvzapBudget { remove })),
            name => {
                for &share in shares {
                    methods.push(Method::baseline(name, share)?);
                }
            }
        }
    }
    let mut once = Vec::new();
    methods.retain(|&method| {
        let new = !once.contains(&method);
        once.extend(new.then_some(method));
        new
    });
    ensure!(
        args.surrogate.is_some()
            || !methods.iter().any(|method| method.name().starts_with("kvzap")),
        "KVzap needs a surrogate: give --surrogate FOLDER, or --method full"
    );
    Ok(methods)
}

/// kvpress's name of a method, and its threshold or share.
fn press(method: &Method, surrogate: Option<&Surrogate>) -> (String, f64) {
    let kind = surrogate.map_or("mlp", |s| {
        if s.maps(0).is_some_and(|maps| maps.len() == 1) { "linear" } else { "mlp" }
    });
    match *method {
        Method::Full => ("no_press".to_owned(), 0.0),
        // Through its decimal digits: -2.6 is not -2.5999999.
        Method::Kvzap { threshold } => {
            (format!("kvzap_{kind}"), threshold.to_string().parse().unwrap_or_default())
        }
        Method::KvzapBudget { remove } => (format!("kvzap_{kind}_layer"), remove),
        Method::Random { remove, .. } => ("random".to_owned(), remove),
        Method::Baseline { name, remove } => (name.replace('-', "_"), remove),
        Method::Recency { remove } => ("streaming_llm".to_owned(), remove),
    }
}

fn open(
    args: &Args,
    suite: &Suite<'_>,
    method: Method,
    model: &Model,
    surrogate: Option<&Surrogate>,
) -> Result<Run> {
    let (press, level) = press(&method, surrogate);
    let name = Name {
        dataset: suite.dataset.clone(),
        data_dir: suite.data_dir.clone(),
        model: args.model()?.model.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
        press,
        level,
        more: args.data.unusual(),
    };
    let folder = args.out.join(name.to_string());
    let mut settings = args.data.settings(suite)?;
    let mut set = |name: &str, value: Value| settings.insert(name.to_owned(), value);
    set("protocol", PROTOCOL.into());
    set("method", method.name().into());
    set("level", level.into());
    set("model", name.model.clone().into());
    set("model_files", fnv::fingerprint(&args.model()?.model)?.into());
    set("template", model.template.is_some().into());
    set("dtype", args.model()?.json()["dtype"].clone());
    set("device", args.model()?.json()["device"].clone());
    if method.name().starts_with("kvzap") {
        let path = args.surrogate.as_deref().unwrap_or(Path::new(""));
        set("surrogate_files", fnv::fingerprint(path)?.into());
    }
    set("window", args.window.into());
    set("prune_while_decoding", while_decoding(args, suite).into());
    set("max_tokens", args.max_tokens.into());
    set("temperature", f64::from(temperature(args, suite)).into());
    let journal = Journal::open(&folder, &args.shard.journal(), &settings)?;
    Ok(Run { folder, method, settings, journal, name })
}

/// A model that reasons is pruned while it does.
fn while_decoding(args: &Args, suite: &Suite<'_>) -> bool {
    args.prune_while_decoding || suite.dataset == "aime25"
}

fn temperature(args: &Args, suite: &Suite<'_>) -> f32 {
    args.temperature.unwrap_or(if suite.dataset == "aime25" { 0.6 } else { 0.0 })
}

/// Writes the files of every run that is complete, prints the table, and returns it.
fn finish(
    args: &Args,
    suite: &Suite<'_>,
    runs: &[Run],
    wanted: usize,
    refused: &[(usize, TooShort)],
) -> Result<Value> {
    let mut columns = Vec::new();
    for run in runs {
        let (_, rows) = Journal::merged(&run.folder)?;
        if rows.len() >= wanted {
            results::write(&run.folder, suite.summary, &config(args, suite, run)?)?;
        } else {
            let folder = run.folder.display();
            eprintln!(
                "{folder}: {} of {wanted} samples are there; the other shards finish it",
                rows.len()
            );
        }
        columns.push(rows);
    }
    print(suite, runs, &columns);
    let refused: Vec<Value> = refused
        .iter()
        .map(|(task, short)| json!({"task": suite.tasks[*task].name(), "needs_tokens": short.needed}))
        .collect();
    let json = runs.iter().zip(&columns).map(|(run, rows)| {
        json!({
            "folder": run.folder.display().to_string(),
            "settings": run.settings,
            "samples": rows.len(),
            "removed": mean(rows, |row| row.compression_ratio),
            "score": score(rows),
            "kv_bytes": mean(rows, |row| row.kv_bytes as f64),
            "context_tokens": mean(rows, |row| row.context_tokens as f64),
            "new_tokens": mean(rows, |row| row.new_tokens as f64),
            "prefill_seconds": mean(rows, |row| row.prefill_seconds),
            "decode_seconds": mean(rows, |row| row.decode_seconds),
            "together": rows.iter().map(|row| row.together).max(),
            "metrics": suite.summary.metrics(rows),
        })
    });
    Ok(
        json!({"dataset": suite.dataset, "data_dir": suite.data_dir, "refused": refused, "runs": json.collect::<Vec<_>>()}),
    )
}

fn print(suite: &Suite<'_>, runs: &[Run], columns: &[Vec<Row>]) {
    let title = format!("{} {}", suite.dataset, suite.data_dir);
    let names: Vec<String> = runs
        .iter()
        .map(|run| match run.method {
            Method::Full => "full".to_owned(),
            _ => format!("{} {}", run.method.name(), run.name.level),
        })
        .collect();
    let header: Vec<&str> =
        [title.as_str()].into_iter().chain(names.iter().map(String::as_str)).collect();
    let mut table = table(&header, &(1..header.len()).collect::<Vec<_>>());
    for task in &suite.tasks {
        let cells = columns.iter().map(|rows| {
            let rows: Vec<f64> =
                rows.iter().filter(|row| row.task == task.name()).map(|row| row.score).collect();
            if rows.is_empty() { "-".to_owned() } else { format!("{:.1}", percent(rows)) }
        });
        table.add_row([task.name().to_owned()].into_iter().chain(cells));
    }
    let mut line = |name: &str, cell: &dyn Fn(&Vec<Row>) -> String| {
        table.add_row([name.to_owned()].into_iter().chain(columns.iter().map(cell)));
    };
    if suite.tasks.len() > 1 {
        line("mean", &|rows| number(rows, format!("{:.1}", score(rows))));
    }
    if columns.iter().flatten().any(|row| row.nll.is_some()) {
        line("nats a token of the answer", &|rows| {
            let nlls: Vec<f64> = rows.iter().filter_map(|row| row.nll).collect();
            format!("{:.2}", nlls.iter().sum::<f64>() / nlls.len().max(1) as f64)
        });
    }
    line("removed", &|rows| {
        number(rows, format!("{:.0} %", 100.0 * mean(rows, |row| row.compression_ratio)))
    });
    line("samples", &|rows| rows.len().to_string());
    println!("{table}\n");
}

/// A mean, which no rows have.
fn number(rows: &[Row], shown: String) -> String {
    if rows.is_empty() { "-".to_owned() } else { shown }
}

/// The leaderboard's: the mean over tasks, each rounded to two digits.
fn score(rows: &[Row]) -> f64 {
    let tasks: Vec<f64> =
        by_task(rows).values().map(|rows| percent(rows.iter().map(|row| row.score))).collect();
    tasks.iter().sum::<f64>() / tasks.len().max(1) as f64
}

fn mean(rows: &[Row], value: impl Fn(&Row) -> f64) -> f64 {
    rows.iter().map(value).sum::<f64>() / rows.len().max(1) as f64
}

/// The fields of kvpress's config.
fn config(args: &Args, suite: &Suite<'_>, run: &Run) -> Result<Vec<(&'static str, Value)>> {
    let text = |text: &str| if text.is_empty() { Value::Null } else { text.into() };
    let level = match run.method {
        Method::Kvzap { .. } => ("threshold", run.name.level.into()),
        _ => ("compression_ratio", run.name.level.into()),
    };
    Ok(vec![
        ("dataset", text(&suite.dataset)),
        ("data_dir", text(&suite.data_dir)),
        ("model", text(&run.name.model)),
        ("device", args.model()?.json()["device"].clone()),
        ("press_name", text(&run.name.press)),
        level,
        ("fraction", 1.0.into()),
        ("max_new_tokens", args.max_tokens.into()),
        ("max_context_length", Value::Null),
        ("query_aware", false.into()),
        ("needle_depth", Value::Null),
        ("output_dir", args.out.display().to_string().into()),
        ("model_kwargs", json!({"dtype": args.model()?.json()["dtype"]})),
        ("press_init_command", format!("longctx {:?}", run.method).into()),
        ("seed", args.data.seed.into()),
    ])
}
