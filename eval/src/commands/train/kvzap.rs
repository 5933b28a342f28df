//! `longctx train kvzap`: fits a KVzap surrogate to what KVzip+ says of a model's tokens.

use super::heat;
use super::pieces::{Lengths, Pieces};
use crate::commands::{ModelArgs, beside, progress, table, write, write_json};
use crate::fnv::Fnv;
use anyhow::{Context, Result, ensure};
use kvzap::{
    Affine, Collector, Dtype, MlpFit, MlpSettings, Ridge, Rows, Samples, Surrogate, Threshold,
    TorchSurrogate, r2,
};
use models::{Dense, Hooks, Model, Pruning, WINDOW, Whose, causal};
use std::path::{Path, PathBuf};
use std::sync::mpsc::sync_channel;
use std::time::Instant;
use tch::{Device, Kind, Tensor};

/// What to learn from, and how.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Files of text or folders of them: plain, `.jsonl` with a field `text`, SQuAD or HotpotQA
    #[arg(long, num_args = 1.., required = true, value_name = "PATH")]
    text: Vec<PathBuf>,
    /// Text of other sources, to measure on as well
    #[arg(long, num_args = 1.., value_name = "PATH")]
    unseen: Vec<PathBuf>,
    /// The folder to write: config.json and model.safetensors as NVIDIA publishes them
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
    /// Where samples are kept, for a second fit or another run after this one was interrupted; inside
    /// OUT and removed at the end if left out
    #[arg(long, value_name = "FOLDER")]
    samples: Option<PathBuf>,
    /// A linear map, or a map with a hidden layer
    #[arg(long, value_enum, default_value = "linear")]
    form: Form,
    /// Pieces of text to learn from
    #[arg(long, default_value_t = 200)]
    pieces: usize,
    /// Further pieces to measure on
    #[arg(long, default_value_t = 20)]
    held_out: usize,
    /// Tokens of a piece, or a range such as 500-2000
    #[arg(long, default_value = "480")]
    tokens: Lengths,
    /// Tokens of each piece to learn from
    #[arg(long, default_value_t = 400)]
    rows: usize,
    /// Of the ridge (linear)
    #[arg(long, default_value_t = 1.0)]
    alpha: f64,
    /// Units of the hidden layer (mlp); an eighth of the hidden size if left out
    #[arg(long)]
    width: Option<usize>,
    /// How often the MLP sees each row
    #[arg(long, default_value_t = MlpSettings::default().epochs)]
    epochs: usize,
    /// Rows of a step (mlp)
    #[arg(long, default_value_t = MlpSettings::default().batch)]
    batch: usize,
    /// Learning rate at the start (mlp)
    #[arg(long, default_value_t = MlpSettings::default().rate)]
    rate: f64,
    /// Memory for the samples of the layers that are fitted at once (mlp), in GB
    #[arg(long, default_value_t = 2.0)]
    memory: f64,
    /// What the surrogate's numbers are saved in
    #[arg(long, value_enum, default_value = "bf16")]
    save_as: SaveAs,
    /// Of the choice of pieces and tokens, and of first weights
    #[arg(long, default_value_t = 42)]
    seed: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, clap::ValueEnum)]
enum Form {
    Linear,
    Mlp,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum SaveAs {
    F32,
    Bf16,
}

/// Pieces of a shard, which are read together where they are of one length: what an interruption loses at most. A card
/// wants many, since each launch costs it what a piece does.
fn shard(device: Device) -> usize {
    if device.is_cuda() { 32 } else { 8 }
}

/// Shards that are written at once: a card collects faster than one thread writes.
const WRITERS: usize = 6;

/// Shards that are read together where a fit needs no more at once.
const READ: usize = 16;

/// Rows of one kind, collected.
struct Set {
    name: &'static str,
    samples: Samples,
    shards: usize,
}

/// What collecting took.
#[derive(Default)]
struct Took {
    /// Tokens read; those of shards that were there are not among them.
    tokens: usize,
    /// Seconds for which the model waited for a file to be written.
    waited: f64,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    ensure!(args.pieces > 0 && args.held_out > 0, "--pieces and --held-out must be 1 or more");
    ensure!(
        args.rows > 0 && args.batch > 0 && args.epochs > 0 && args.width != Some(0),
        "--rows, --batch, --epochs and --width must be 1 or more"
    );
    let report = args.out.join("training.json");
    std::fs::create_dir_all(&args.out).with_context(|| crate::commands::no_place(&args.out))?;
    beside(&report)?;
    let model = args.model.load()?;
    let folder = args.samples.clone().unwrap_or_else(|| args.out.join("samples"));

    let (text, held_out) = Pieces::cut(
        &model,
        &args.text,
        args.pieces + args.held_out,
        args.tokens,
        shard(model.device),
        args.seed,
    )?
    .split_at(args.pieces);
    let mut sets = vec![("text", text), ("held-out", held_out)];
    if !args.unseen.is_empty() {
        let unseen = Pieces::cut(
            &model,
            &args.unseen,
            args.held_out,
            args.tokens,
            shard(model.device),
            args.seed,
        )?;
        sets.push(("unseen", unseen));
    }
    let prefill = prefill_speed(&model, &sets[1].1)?;
    let start = Instant::now();
    let (sets, took) = collect(args, &model, &sets, &folder)?;
    let collecting = start.elapsed().as_secs_f64();
    let (train, measured) = (&sets[0], &sets[1..]);

    let start = Instant::now();
    let dtype = match args.save_as {
        SaveAs::F32 => Dtype::F32,
        SaveAs::Bf16 => Dtype::Bf16,
    };
    let surrogate = match args.form {
        Form::Linear => linear(args, &model, train)?,
        Form::Mlp => mlp(args, &model, train, &folder)?,
    };
    let surrogate = surrogate.rounded(dtype);
    let fitting = start.elapsed().as_secs_f64();
    surrogate.save(&args.out)?;

    let measured = measured
        .iter()
        .map(|set| Ok((set.name, measure(&model, &surrogate, set)?)))
        .collect::<Result<Vec<(&str, Vec<Vec<f64>>)>>>()?;
    let panels: Vec<_> = measured.iter().map(|(name, r2)| (*name, r2.as_slice())).collect();
    write(&args.out.join("r2.svg"), heat::draw(&panels)?.as_bytes())?;
    print(&panels);
    let names = |paths: &[PathBuf]| -> Vec<String> {
        paths.iter().filter_map(|p| Some(p.file_name()?.to_str()?.to_owned())).collect()
    };
    let mut json = serde_json::json!({
        "form": format!("{:?}", args.form).to_lowercase(),
        "text": names(&args.text), "unseen": names(&args.unseen),
        "pieces": args.pieces, "held_out": args.held_out, "tokens": args.tokens.to_string(),
        "rows": args.rows, "seed": args.seed,
        "collecting_seconds": collecting, "tokens_per_second": took.tokens as f64 / collecting,
        "prefill_tokens_per_second": prefill, "waited_for_files_seconds": took.waited,
        "fitting_seconds": fitting,
        "run": args.model.json(),
    });
    match args.form {
        Form::Linear => json["alpha"] = args.alpha.into(),
        Form::Mlp => {
            json["mlp"] = serde_json::json!({
                "width": surrogate.maps(0).map(|maps| maps[0].outputs()),
                "epochs": args.epochs, "batch": args.batch, "rate": args.rate,
            })
        }
    }
    for (name, r2) in &measured {
        json[format!("{name}_r2")] = mean(r2).into();
    }
    for (name, r2) in measured {
        json[format!("{name}_r2_of_each_head")] = serde_json::json!(r2);
    }
    write_json(&report, &json)?;
    println!(
        "collected in {collecting:.0} s, fitted in {fitting:.0} s; wrote {}",
        args.out.display()
    );
    if args.samples.is_none() {
        std::fs::remove_dir_all(&folder)?;
    }
    Ok(())
}

/// Collects what is missing of each set.
fn collect(
    args: &Args,
    model: &Model,
    sets: &[(&'static str, Pieces)],
    folder: &Path,
) -> Result<(Vec<Set>, Took)> {
    let (projections, size) = (projections(model), shard(model.device));
    let of_model = format!("{:016x}", fingerprint(&projections)?);
    let open = |(name, pieces): &(&'static str, Pieces)| -> Result<Set> {
        let settings = serde_json::json!({
            "model": of_model, "pieces": pieces.len(),
            "text": format!("{:016x}", pieces.fingerprint()),
            "rows": args.rows, "seed": args.seed, "dtype": format!("{:?}", model.kind), "shard": size,
        });
        let samples = Samples::open(folder.join(name), settings.to_string())?;
        Ok(Set { name, samples, shards: pieces.len().div_ceil(size) })
    };
    let opened = sets.iter().map(open).collect::<Result<Vec<_>>>()?;
    let collector = Collector::new(projections, args.rows);
    let mut took = Took::default();
    // Shards are written while the next ones are collected.
    std::thread::scope(|scope| -> Result<()> {
        let writers: Vec<_> = (0..WRITERS)
            .map(|_| {
                let (send, receive) = sync_channel::<(&Samples, usize, Rows)>(0);
                let write =
                    |(samples, shard, rows): (&Samples, usize, Rows)| samples.write(shard, &rows);
                (send, scope.spawn(move || receive.into_iter().try_for_each(write)))
            })
            .collect();
        let mut sent = 0;
        'sets: for (set, (name, pieces)) in opened.iter().zip(sets) {
            let bar = progress(pieces.len() as u64, *name);
            for shard in 0..set.shards {
                let range = shard * size..pieces.len().min((shard + 1) * size);
                if set.samples.has(shard)? {
                    bar.inc(range.len() as u64);
                    bar.reset_eta();
                    continue;
                }
                for (index, texts) in pieces.alike(range).enumerate() {
                    let (ids, spans) = pieces.repeated(texts);
                    took.tokens += ids.iter().map(Vec::len).sum::<usize>();
                    collector.begin(spans, args.seed ^ (shard << 8 | index) as u64)?;
                    collect_from(model, &ids, &collector)?;
                    bar.inc(texts.len() as u64);
                }
                let (rows, start) = (collector.take()?, Instant::now());
                let failed = writers.iter().any(|(_, writer)| writer.is_finished());
                if failed || writers[sent % WRITERS].0.send((&set.samples, shard, rows)).is_err() {
                    break 'sets; // a writer has failed, and says how
                }
                sent += 1;
                took.waited += start.elapsed().as_secs_f64();
            }
            bar.finish_and_clear();
        }
        writers.into_iter().try_for_each(|(send, writer)| {
            drop(send);
            Ok(writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?)
        })
    })?;
    Ok((opened, took))
}

fn projections(model: &Model) -> Vec<Tensor> {
    let layers = 0..model.lm.config().layers;
    layers.map(|layer| model.lm.output_projection(layer).shallow_clone()).collect()
}

/// A number that other weights do not have: FNV-1a over a few of each layer's.
fn fingerprint(projections: &[Tensor]) -> Result<u64> {
    let mut hash = Fnv::default();
    for projection in projections {
        let some = projection.f_view([-1])?.f_slice(0, None, None, 997)?.f_to_kind(Kind::Float)?;
        let numbers = Vec::<f32>::try_from(&some.f_to_device(Device::Cpu)?)?;
        hash.extend(numbers.into_iter().map(f32::to_bits));
    }
    Ok(hash.0)
}

/// Reads `ids`, all of one length, for the time that it takes.
fn read(model: &Model, ids: &[Vec<u32>]) -> Result<Tensor> {
    let mut cache = Dense::new(model.lm.config().layers, WINDOW);
    let tokens = side_by_side(model, ids)?;
    Ok(tch::no_grad(|| model.lm.forward(&tokens, &mut cache, &Hooks::default()))?)
}

/// Reads `ids`, all of one length, for a collector, whose attention serves the model as well.
fn collect_from(model: &Model, ids: &[Vec<u32>], collector: &Collector) -> Result<()> {
    let hooks = Hooks::pruning(Pruning {
        scorer: Box::new(collector.clone()),
        policy: Box::new(Threshold::new(f32::NEG_INFINITY)?),
        while_decoding: true,
    });
    let tokens = side_by_side(model, ids)?;
    let indices: Vec<_> = (0..tokens.size()[1] as usize).collect();
    tch::no_grad(|| {
        let mut pass = model.lm.enter(&tokens, &indices, Whose::Context)?;
        for layer in 0..model.lm.config().layers {
            model.lm.layer(layer, &mut pass, &hooks, WINDOW, &mut |queries, keys, values, _| {
                collector.attended().map_or_else(|| causal(queries, keys, values), Ok)
            })?;
        }
        Ok(())
    })
}

/// `[texts, tokens]` int64.
fn side_by_side(model: &Model, ids: &[Vec<u32>]) -> Result<Tensor> {
    let texts = ids.len() as i64;
    let ids: Vec<i64> = ids.iter().flatten().map(|&id| i64::from(id)).collect();
    Ok(Tensor::f_from_slice(&ids)?.f_view([texts, -1])?.f_to_device(model.device)?)
}

/// Tokens a second that the model reads without collecting, in pieces of the same lengths.
fn prefill_speed(model: &Model, pieces: &Pieces) -> Result<f64> {
    let (all, size) = (pieces.len(), shard(model.device));
    let shards = (0..all).step_by(size).take(3);
    let batches: Vec<_> = shards.flat_map(|at| pieces.alike(at..all.min(at + size))).collect();
    let timed = |texts: &&[Vec<u32>]| -> Result<usize> {
        let ids = pieces.repeated(texts).0;
        let hidden = read(model, &ids)?;
        let _ = hidden.f_double_value(&[0, 0, 0])?; // waits for the card
        Ok(ids.iter().map(Vec::len).sum())
    };
    batches.iter().map(timed).sum::<Result<usize>>()?; // a first time is slower
    let start = Instant::now();
    let tokens = batches.iter().map(timed).sum::<Result<usize>>()?;
    Ok(tokens as f64 / start.elapsed().as_secs_f64())
}

fn linear(args: &Args, model: &Model, set: &Set) -> Result<Surrogate> {
    let config = model.lm.config();
    let bar = progress(config.layers as u64, "fitting");
    let mut maps: Vec<Affine> = Vec::new();
    for layer in 0..config.layers {
        let mut ridge = Ridge::new(1, config.hidden_size, config.kv_heads);
        for first in (0..set.shards).step_by(READ) {
            let some = first..set.shards.min(first + READ);
            let (hidden, scores) = set.samples.layer(layer, some, model.device)?;
            ridge.add_tensors(0, &hidden, &scores)?;
        }
        maps.extend(ridge.solve(args.alpha)?.maps(0).map(|maps| maps[0].clone()));
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(Surrogate::linear(maps)?)
}

/// Fits as many layers at once as fit into the memory; after each epoch it can be interrupted.
fn mlp(args: &Args, model: &Model, set: &Set, folder: &Path) -> Result<Surrogate> {
    let config = model.lm.config();
    let width = args.width.unwrap_or(config.hidden_size / 8).max(1);
    let settings = MlpSettings {
        width,
        epochs: args.epochs,
        batch: args.batch,
        rate: args.rate,
        seed: args.seed,
        ..MlpSettings::default()
    };
    let layer_bytes = 2 * args.pieces * args.rows * config.hidden_size;
    let at_once = ((args.memory * 1e9) as usize / layer_bytes).clamp(1, config.layers);
    let layers: Vec<usize> = (0..config.layers).collect();
    let bar = progress((config.layers.div_ceil(at_once) * args.epochs) as u64, "fitting");
    let mut modules = Vec::new();
    for group in layers.chunks(at_once) {
        let rows = group
            .iter()
            .map(|&layer| Ok(set.samples.layer(layer, 0..set.shards, model.device)?))
            .collect::<Result<_>>()?;
        let mut fit = MlpFit::new(settings, &rows)?;
        drop(rows);
        let name = format!(
            "fit-{}-{}-{width}-{}-{}-{}.safetensors",
            group[0], at_once, args.epochs, args.batch, args.rate
        );
        let checkpoint = folder.join(name);
        if checkpoint.exists() {
            fit.restore(&checkpoint)?;
            bar.inc(fit.epochs() as u64);
            bar.reset_eta();
        }
        while fit.epochs() < args.epochs {
            let error = fit.epoch()?;
            fit.save(&checkpoint)?;
            bar.set_message(format!("fitting, error {error:.3}"));
            bar.inc(1);
        }
        modules.extend(fit.modules()?);
    }
    bar.finish_and_clear();
    Ok(Surrogate::mlp(modules)?)
}

/// R² of each layer and kv head, of the surrogate as it is saved.
fn measure(model: &Model, surrogate: &Surrogate, set: &Set) -> Result<Vec<Vec<f64>>> {
    let scorer = TorchSurrogate::new(surrogate, Kind::Float, model.device)?;
    let layers = 0..surrogate.layers();
    let each = layers.map(|layer| {
        let (hidden, scores) = set.samples.layer(layer, 0..set.shards, model.device)?;
        Ok(r2(&scorer, layer, &hidden.f_to_kind(Kind::Float)?, &scores)?)
    });
    each.collect()
}

fn mean(r2: &[Vec<f64>]) -> f64 {
    let all: Vec<f64> = r2.iter().flatten().copied().collect();
    all.iter().sum::<f64>() / all.len() as f64
}

fn print(panels: &[(&str, &[Vec<f64>])]) {
    let titles: Vec<String> =
        panels.iter().map(|(name, _)| format!("{name} R² of each head")).collect();
    let header: Vec<&str> =
        ["layer"].into_iter().chain(titles.iter().map(String::as_str)).collect();
    let mut table = table(&header, &[0]);
    let layers = panels.first().map_or(0, |(_, r2)| r2.len());
    for layer in 0..layers {
        let cells = panels.iter().map(|(_, r2)| {
            let cells: Vec<String> = r2[layer].iter().map(|value| format!("{value:.2}")).collect();
            cells.join(" ")
        });
        table.add_row([layer.to_string()].into_iter().chain(cells));
    }
    println!("{table}");
    for (name, r2) in panels {
        println!("mean R² {:.3} on {name} text", mean(r2));
    }
}
