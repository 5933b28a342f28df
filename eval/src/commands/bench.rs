//! `longctx bench`: how fast a model reads and writes, beside what the machine allows.

#[cfg(feature = "cuda")]
mod card;
mod positions;

use super::{ModelArgs, megabytes, spinner, table, write};
use crate::Method;
use anyhow::{Context, Result, ensure};
use models::{
    CausalLm, Config, Cpu, Hooks, Model, Paged, Sampler, Sampling, Session, Usage, WINDOW,
    cache_shape,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;
use tch::{Device, Kind, Tensor};

/// What to measure.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Tokens to read
    #[arg(long, num_args = 1.., default_values_t = [2048])]
    context: Vec<usize>,
    /// Tokens to write after them
    #[arg(long, default_value_t = 64)]
    decode: usize,
    /// Shares of the cache to remove, by chance: what is removed does not matter for speed
    #[arg(long, num_args = 1.., default_values_t = [0.0, 0.6])]
    remove: Vec<f64>,
    /// Texts that are written at once, on a card
    #[arg(long, num_args = 1.., default_values_t = [1])]
    batch: Vec<usize>,
    /// What to measure on a card
    #[arg(long, value_enum, num_args = 1.., default_values = ["decode", "prefill"])]
    parts: Vec<Part>,
    /// Measure what learned positions cost, in turns with the index over the same weights
    #[arg(long)]
    positions: bool,
    /// Draw the weights from a seed: the model folder need hold no more than config.json. On a card, or with --positions
    #[arg(long)]
    random_weights: bool,
    /// Cut each head by its own length alone, so that a text's bits are the same whatever its neighbours. On a card
    #[arg(long)]
    batch_invariant: bool,
    /// Cards to cut the model over: kv heads, and the MLP's width, must divide. Capacity is of one
    #[arg(long, default_value_t = 1)]
    cards: usize,
    /// A date for the rows of --json
    #[arg(long)]
    date: Option<String>,
    /// A file of such rows to put these into, in the place of older ones of the same kind. On a card, or with --positions
    #[arg(long, value_name = "FILE")]
    results: Option<std::path::PathBuf>,
    /// How often; the best counts, and the median is beside it
    #[arg(long, default_value_t = 3)]
    repeat: usize,
    /// Print one JSON object instead of the table
    #[arg(long)]
    json: bool,
}

/// What can be measured on a card.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// Steps of one token a text.
    Decode,
    /// Prompts.
    Prefill,
    /// Texts that fit 72 GB, and what they write together.
    Capacity,
}

/// What the machine can do, measured in the same run.
#[derive(Clone, Copy, Debug, Serialize)]
struct Machine {
    read_bytes_per_second: f64,
    flops_per_second: f64,
}

/// One share removed.
#[derive(Clone, Debug, Serialize)]
struct Row {
    context: usize,
    removed: f64,
    kv_bytes: usize,
    prefill_tps: f64,
    prefill_tps_median: f64,
    /// Time over the time that the matrix products alone would take at the measured FLOP rate.
    prefill_over_floor: f64,
    decode_tps: f64,
    decode_tps_median: f64,
    /// Time over the time that reading weights and cache would take at the measured bandwidth.
    decode_over_floor: f64,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    ensure!(
        args.repeat > 0 && args.decode > 1,
        "--repeat must be 1 or more and --decode 2 or more"
    );
    if args.positions {
        return positions::run(args);
    }
    if args.model.is_cuda() {
        #[cfg(feature = "cuda")]
        return card::run(args);
        #[cfg(not(feature = "cuda"))]
        anyhow::bail!("this longctx was built without the feature cuda; build it with it");
    }
    ensure!(
        args.batch == [1]
            && !args.random_weights
            && !args.batch_invariant
            && args.cards == 1
            && args.results.is_none(),
        "--batch, --cards, --random-weights, --batch-invariant and --results are for a card: give --device cuda"
    );
    let start = Instant::now();
    let model = args.model.load()?;
    let load_seconds = start.elapsed().as_secs_f64();
    let bar = spinner("measuring");
    let machine = machine(model.kind)?;
    let mut rows = Vec::new();
    for &context in &args.context {
        for &remove in &args.remove {
            rows.push(row(args, &model, machine, context, remove)?);
        }
    }
    bar.finish_and_clear();
    if args.json {
        let json = serde_json::json!({
            "decode": args.decode,
            "repeat": args.repeat,
            "load_seconds": load_seconds,
            "machine": machine,
            "rows": rows,
            "settings": args.model.json(),
        });
        println!("{json:#}");
        return Ok(());
    }
    let header = ["context", "removed", "KV held", "prefill", "over floor", "decode", "over floor"];
    let mut table = table(&header, &[0, 1, 2, 3, 4, 5, 6]);
    for row in &rows {
        table.add_row([
            row.context.to_string(),
            format!("{:.0} %", 100.0 * row.removed),
            megabytes(row.kv_bytes),
            format!("{:.0}/s", row.prefill_tps),
            format!("{:.2}×", row.prefill_over_floor),
            format!("{:.1}/s", row.decode_tps),
            format!("{:.2}×", row.decode_over_floor),
        ]);
    }
    println!("{table}");
    println!(
        "{} tokens written, best of {}; loaded in {load_seconds:.1} s; floors from {:.1} GB/s and {:.0} GFLOP/s measured here",
        args.decode,
        args.repeat,
        machine.read_bytes_per_second / 1e9,
        machine.flops_per_second / 1e9,
    );
    Ok(())
}

fn row(args: &Args, model: &Model, machine: Machine, context: usize, remove: f64) -> Result<Row> {
    let config = model.lm.config();
    let method = if remove > 0.0 { Method::Random { remove, seed: 1 } } else { Method::Full };
    let ids = ids(context, config);
    let (mut reads, mut writes, mut usage) = (Vec::new(), Vec::new(), Usage::default());
    for _ in 0..args.repeat {
        let (hooks, _) = method.hooks(model, None, WINDOW, false)?;
        let (read, write, held) =
            read_and_write(model.lm.as_ref(), model.kind, hooks, &ids, args.decode)?;
        reads.push(read);
        writes.push(write);
        usage = held;
    }
    let ([read, read_median], [write, write_median]) =
        (best_and_median(reads), best_and_median(writes));
    let blocks = config.matrix_elements() - config.vocab_size * config.hidden_size;
    let attention = config.layers * config.query_heads * config.head_dim * context.pow(2);
    let flops = 2 * blocks * context + 2 * attention;
    let bytes = config.matrix_elements() * model.kind.elt_size_in_bytes() + usage.bytes;
    Ok(Row {
        context,
        removed: usage.removed(),
        kv_bytes: usage.bytes,
        prefill_tps: context as f64 / read,
        prefill_tps_median: context as f64 / read_median,
        prefill_over_floor: read * machine.flops_per_second / flops as f64,
        decode_tps: 1.0 / write,
        decode_tps_median: 1.0 / write_median,
        decode_over_floor: write * machine.read_bytes_per_second / bytes as f64,
    })
}

/// Tokens of no meaning.
fn ids(count: usize, config: &Config) -> Vec<u32> {
    let most = config.vocab_size as u64 - 100;
    (0..count as u64).map(|i| (i * 7919 % most + 50) as u32).collect()
}

/// Seconds for reading `ids` on the CPU, and for each of `decode` tokens written after them; what they held.
fn read_and_write(
    lm: &dyn CausalLm,
    kind: Kind,
    hooks: Hooks,
    ids: &[u32],
    decode: usize,
) -> Result<(f64, f64, Usage)> {
    let config = lm.config();
    let shape = cache_shape(config, ids.len() + decode, WINDOW, kind)?;
    let mut session = Session::new(lm, Device::Cpu, Paged::new(Cpu::new(shape)?)?, hooks);
    let start = Instant::now();
    session.feed(ids)?;
    let read = start.elapsed().as_secs_f64();
    let usage = session.cache().usage();
    let mut sampler = Sampler::new(Sampling::default())?;
    let start = Instant::now();
    let each = &mut |_| ControlFlow::Continue(());
    session.generate(&mut sampler, &[], config.vocab_size, decode + 1, each)?;
    Ok((read, start.elapsed().as_secs_f64() / decode as f64, usage))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Puts rows into a file, a line each, in the place of those that say the same.
fn merge<R: Clone + Serialize + DeserializeOwned>(
    path: &Path,
    rows: &[R],
    same: impl Fn(&R, &R) -> bool,
) -> Result<()> {
    let mut all: Vec<R> = match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .with_context(|| format!("{}: not rows of a bench; give a new file", path.display()))?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error).with_context(|| path.display().to_string()),
    };
    for row in rows {
        match all.iter_mut().find(|old| same(old, row)) {
            Some(old) => old.clone_from(row),
            None => all.push(row.clone()),
        }
    }
    let lines = all.iter().map(|row| Ok(format!("  {}", line(row)?)));
    let lines = lines.collect::<Result<Vec<_>>>()?.join(",\n");
    write(path, format!("[\n{lines}\n]\n").as_bytes())
}

/// An object on one line, a space after each colon and comma.
fn line<R: Serialize>(row: &R) -> Result<String> {
    let Value::Object(fields) = serde_json::to_value(row)? else { unreachable!("a row") };
    let fields = fields.iter().map(|(name, value)| format!("{}: {value}", json!(name)));
    Ok(format!("{{{}}}", fields.collect::<Vec<_>>().join(", ")))
}

fn best_and_median(mut seconds: Vec<f64>) -> [f64; 2] {
    seconds.sort_by(f64::total_cmp);
    [seconds[0], seconds[seconds.len() / 2]]
}

fn machine(kind: Kind) -> Result<Machine> {
    let best = |f: &dyn Fn() -> Result<Tensor>| -> Result<f64> {
        let _ = f()?;
        let mut best = f64::INFINITY;
        for _ in 0..5 {
            let start = Instant::now();
            let _ = f()?;
            best = best.min(start.elapsed().as_secs_f64());
        }
        Ok(best)
    };
    let options = (Kind::Float, Device::Cpu);
    let large = Tensor::f_ones([128 << 20], options)?; // 512 MB: far beyond any cache
    let read = best(&|| Ok(large.f_sum(Kind::Float)?))?;
    let side = 1536;
    let matrix = Tensor::f_rand([side, side], options)?.f_to_kind(kind)?;
    let product = best(&|| Ok(matrix.f_matmul(&matrix)?))?;
    Ok(Machine {
        read_bytes_per_second: (large.numel() * 4) as f64 / read,
        flops_per_second: 2.0 * (side as f64).powi(3) / product,
    })
}
