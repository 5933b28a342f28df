//! `longctx train repo`: trains a model whose tokens stand where it reads that they should, or its twin whose do not.

use super::corpus::Corpus;
use super::curve::{self, Point};
use super::pieces::files_of;
use super::rows::{Batch, Mix, Rows};
use crate::commands::{Machine, beside, progress, spinner, write, write_json};
use crate::documents;
use crate::files;
use anyhow::{Context, Result, bail, ensure};
use models::{AdamW, Config, Model, Rates, Source, Tokenizer, Trainable, Trained, Weights, open};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Instant;
use tch::{Device, Kind, Tensor};

/// What to train, on what, and how.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The model to go on with: a GGUF file or a Hugging Face folder
    #[arg(
        long,
        value_name = "PATH",
        conflicts_with = "from_scratch",
        required_unless_present = "from_scratch"
    )]
    model: Option<PathBuf>,
    /// A config.json whose model is to be made new
    #[arg(long, value_name = "FILE")]
    from_scratch: Option<PathBuf>,
    /// The new model's tokenizer.json; learned from the text if left out
    #[arg(long, value_name = "FILE", requires = "from_scratch")]
    tokenizer: Option<PathBuf>,
    /// Files of text or folders of them: plain, `.jsonl` with a field `text`, SQuAD or HotpotQA
    #[arg(long, num_args = 1.., required = true, value_name = "PATH")]
    text: Vec<PathBuf>,
    /// The folder to write: a model, or repo.safetensors for --repo; and how it went
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
    /// Where tokens stand
    #[arg(long, value_enum, default_value = "repo")]
    arm: Arm,
    /// What a map's one is worth, in tokens (arms offset and slowed)
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    offset_tokens: u32,
    /// The first layer that does not turn by the index; a third of the layers if left out
    #[arg(long)]
    first_layer: Option<usize>,
    /// What of a model is trained
    #[arg(long, value_enum, default_value = "everything", conflicts_with = "from_scratch")]
    train: What,
    /// Of the updates (low-rank)
    #[arg(long, default_value_t = 16)]
    rank: usize,
    /// Tokens to read, in thousands
    #[arg(long, default_value_t = 10_000)]
    kilotokens: u64,
    /// Tokens of a row
    #[arg(long, default_value_t = 2048)]
    length: usize,
    /// Rows at once
    #[arg(long, default_value_t = 8)]
    rows: usize,
    /// Times that many rows make a step
    #[arg(long, default_value_t = 1)]
    accumulate: usize,
    /// Compute layers again on the way back, for memory
    #[arg(long)]
    recompute: bool,
    /// The share of rows that are facts in noise, and questions
    #[arg(long, default_value_t = 0.5)]
    facts: f64,
    /// The share of the training over which passages with facts grow from 256 tokens to whole rows
    #[arg(long, default_value_t = 0.3)]
    growing: f64,
    /// What answers weigh beside text
    #[arg(long, default_value_t = 1.0)]
    answer_weight: f64,
    /// Learning rate after the warm-up; it falls to nothing in a straight line
    #[arg(long, default_value_t = 1e-3)]
    rate: f64,
    /// That of the position maps
    #[arg(long, default_value_t = 1e-2)]
    map_rate: f64,
    /// Steps of the warm-up
    #[arg(long, default_value_t = 50)]
    warmup: u64,
    /// Weight decay of matrices
    #[arg(long, default_value_t = 0.1)]
    decay: f64,
    /// The gradient's norm above which it is shortened
    #[arg(long, default_value_t = 1.0)]
    clip: f64,
    /// Steps after which the state is saved, for a run that is interrupted; 0 never
    #[arg(long, default_value_t = 200)]
    save_every: u64,
    /// Of first weights and of the order of rows
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    machine: Machine,
}

/// By what layers turn queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Arm {
    /// The index: the control
    Rope,
    /// Nothing from the first layer on
    Nope,
    /// Nothing in every third layer
    R2n1,
    /// The index in every third layer
    N2r1,
    /// Positions that maps read off the hidden state, from the first layer on
    Repo,
    /// These in every third layer, the index in the others
    R2p1,
    /// The index and what maps read off the hidden state, times --offset-tokens, from the first layer on
    Offset,
    /// What maps read, and the index divided by --offset-tokens, from the first layer on
    Slowed,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum What {
    /// Position maps alone
    Maps,
    /// And the projections of queries and keys
    Qk,
    /// And low-rank updates to all projections
    LowRank,
    /// Everything
    Everything,
}

/// Steps between two points of the curve.
const POINT: u64 = 10;
/// Batches that are made ahead.
const AHEAD: usize = 4;

impl Arm {
    /// What config.json says of the layers, as the published checkpoints have it.
    fn pe_config(self, layers: usize, first: usize, offset_tokens: u32) -> Value {
        let ids = |of: &dyn Fn(usize) -> bool| -> String {
            let ids: Vec<String> = (0..layers).filter(|&l| of(l)).map(|l| l.to_string()).collect();
            ids.join(",")
        };
        let (mode, first, ids) = match self {
            Self::Rope => ("none", 0, String::new()),
            Self::Nope => ("nope", first, String::new()),
            Self::R2n1 => ("nope", 0, ids(&|layer| layer % 3 == 2)),
            Self::N2r1 => ("nope", 0, ids(&|layer| layer % 3 != 2)),
            Self::R2p1 => ("swigluex_multihead", 0, ids(&|layer| layer % 3 == 2)),
            Self::Repo | Self::Offset | Self::Slowed => {
                ("swigluex_multihead", first, String::new())
            }
        };
        // Published readers know the misspelt keys, people the others.
        let mut config = json!({
            "dynamic_pe_mode": mode,
            "dynmaic_pe_start_layer": first, "dynamic_pe_start_layer": first,
            "dynmaic_pe_layer_ids": ids, "dynamic_pe_layer_ids": ids,
        });
        match self {
            Self::Offset => config["dynamic_pe_offset_tokens"] = offset_tokens.into(),
            Self::Slowed => config["dynamic_pe_slowed_index"] = offset_tokens.into(),
            _ => {}
        }
        config
    }

    fn name(self) -> String {
        format!("{self:?}").to_lowercase()
    }
}

/// What is trained, and where it comes from.
struct Begun {
    model: Trainable,
    tokenizer: Tokenizer,
    /// The model that an overlay is for.
    base: Option<Source>,
    pe_config: Value,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    ensure!(
        args.rows > 0 && args.accumulate > 0 && args.kilotokens > 0 && args.rank > 0,
        "--rows, --accumulate, --rank and --kilotokens must be 1 or more"
    );
    ensure!(args.length >= 16, "--length {}: give 16 or more", args.length);
    ensure!((0.0..=1.0).contains(&args.facts), "--facts {}: give a share from 0 to 1", args.facts);
    let report = args.out.join("training.json");
    std::fs::create_dir_all(&args.out).with_context(|| crate::commands::no_place(&args.out))?;
    ensure!(
        !report.exists(),
        "{} is there: this training is done; choose another --out, or remove it",
        report.display()
    );
    beside(&report)?;
    let (kind, device) = args.machine.prepare()?;
    let bar = spinner("reading the model and the text");
    let mut begun = begin(args, kind, device)?;
    let config = begun.model.config().clone();
    let end = config.eos_tokens.first().copied().or(config.bos_token).unwrap_or(0);
    let corpus = Corpus::read(&args.text, &begun.tokenizer, end)?;
    corpus.at_least(args.length + 1, &args.text)?;
    bar.finish_and_clear();

    let start = Instant::now();
    let points = train(args, &mut begun, &corpus, device)?;
    let seconds = start.elapsed().as_secs_f64();
    match &begun.base {
        Some(base) => {
            begun.model.write_overlay(
                &args.out.join("repo.safetensors"),
                base,
                &begun.pe_config,
            )?;
        }
        None => begun.model.write_folder(&args.out)?,
    }
    let title = format!("{}, seed {}", args.arm.name(), args.seed);
    write(&args.out.join("loss.svg"), curve::draw(&title, &points)?.as_bytes())?;
    write_json(&args.out.join("loss.json"), &serde_json::to_value(&points)?)?;
    let tokens = points.last().map_or(0, |point| point.tokens);
    let json = json!({
        "arm": args.arm.name(), "seed": args.seed, "tokens": tokens, "length": args.length,
        "settings": settings(args, &begun.model),
        "numbers": begun.model.numbers(), "text_tokens": corpus.len(),
        "loss": points.last(), "seconds_since_start_or_resumption": seconds,
        "run": args.machine.json(),
    });
    write_json(&report, &json)?;
    let _ = std::fs::remove_file(state(args));
    println!(
        "{}: {:.1} M tokens, {seconds:.0} s; wrote {}",
        title,
        tokens as f64 / 1e6,
        args.out.display()
    );
    Ok(())
}

fn state(args: &Args) -> PathBuf {
    args.out.join("state.safetensors")
}

/// All that a training's course depends on, for its state.
fn settings(args: &Args, model: &Trainable) -> Value {
    json!({
        "arm": args.arm.name(), "first_layer": args.first_layer, "numbers": model.numbers(),
        "train": format!("{:?} {}", args.train, args.rank),
        "kilotokens": args.kilotokens, "length": args.length,
        "rows": args.rows, "accumulate": args.accumulate, "facts": args.facts, "growing": args.growing, "answer_weight": args.answer_weight,
        "rate": args.rate, "map_rate": args.map_rate, "warmup": args.warmup, "decay": args.decay, "clip": args.clip,
        "seed": args.seed, "offset_tokens": matches!(args.arm, Arm::Offset | Arm::Slowed).then_some(args.offset_tokens),
    })
}

fn begin(args: &Args, kind: Kind, device: Device) -> Result<Begun> {
    let first = |layers: usize| args.first_layer.unwrap_or(layers / 3);
    if let Some(path) = &args.from_scratch {
        let mut json: Value = serde_json::from_slice(&files::bytes(path)?)
            .with_context(|| format!("{} is not JSON; give a config.json", path.display()))?;
        let layers = json["num_hidden_layers"].as_u64().unwrap_or(0) as usize;
        let pe_config = args.arm.pe_config(layers, first(layers), args.offset_tokens);
        json["pe_config"] = pe_config.clone();
        write_json(&args.out.join("config.json"), &json)?;
        let config = Config::of_folder(&args.out)?;
        let tokenizer = new_tokenizer(args, &config)?;
        let model = Trainable::from_scratch(config, kind, device, args.seed)?;
        return Ok(Begun { model, tokenizer, base: None, pe_config });
    }
    let path = args.model.as_deref().context("give --model or --from-scratch")?;
    let trained = match args.train {
        What::Maps => Trained::Maps,
        What::Qk => Trained::QueriesAndKeys,
        What::LowRank => Trained::LowRank(args.rank),
        What::Everything => Trained::Everything,
    };
    let weights = Weights::new(open(path)?, Kind::Float, Device::Cpu)?;
    let layers = weights.config().layers;
    let pe_config = args.arm.pe_config(layers, first(layers), args.offset_tokens);
    let config = weights.config().clone().with_positions(&pe_config)?;
    ensure!(
        args.length < config.max_positions,
        "--length {}: the model reads {}; give less",
        args.length,
        config.max_positions
    );
    let model = Trainable::continued(&weights, config, trained, kind, device, args.seed)?;
    let tokenizer = Model::tokenizer_of(weights.source())?;
    Ok(Begun { model, tokenizer, base: Some(open(path)?), pe_config })
}

/// The tokenizer that a new model is given, in its folder.
fn new_tokenizer(args: &Args, config: &Config) -> Result<Tokenizer> {
    let own = args.out.join("tokenizer.json");
    let tokenizer = match &args.tokenizer {
        Some(path) => {
            write(&own, &files::bytes(path)?)?;
            Tokenizer::from_file(&own)?
        }
        None => {
            let mut texts = Vec::new();
            for file in files_of(&args.text)? {
                texts.extend(documents(&file)?);
            }
            Tokenizer::train(&texts, config.vocab_size, &own)?
        }
    };
    let (found, limit) = (tokenizer.vocab_size(), config.vocab_size);
    ensure!(
        found <= limit,
        "{}: {found} tokens, the config has {limit}; make these agree",
        own.display()
    );
    Ok(tokenizer)
}

/// Trains to the end, from the beginning or from the state that is there.
fn train(args: &Args, begun: &mut Begun, corpus: &Corpus, device: Device) -> Result<Vec<Point>> {
    let settings = settings(args, &begun.model).to_string();
    let path = state(args);
    let mut optimizer = AdamW::new(&begun.model)?;
    let mut points: Vec<Point> = Vec::new();
    if path.exists() {
        points = serde_json::from_str(&begun.model.restore(&path, &mut optimizer, &settings)?)
            .with_context(|| {
                format!("{}: its curve is not whole; remove it to begin anew", path.display())
            })?;
        eprintln!("note: goes on after step {}", optimizer.steps());
    }
    let step_tokens = (args.rows * args.accumulate * args.length) as u64;
    let steps = (args.kilotokens * 1000).div_ceil(step_tokens).max(args.warmup + 1);
    let growing = (args.growing * (steps * (args.rows * args.accumulate) as u64) as f64) as u64;
    let mix = Mix { length: args.length, facts: args.facts, growing, seed: args.seed };
    let rows = Rows::new(corpus, &begun.tokenizer, mix);
    let bar = progress(steps, "training");
    bar.set_position(optimizer.steps());
    bar.reset_eta();
    let (rows_at_once, first) = (args.rows as u64, optimizer.steps());
    std::thread::scope(|scope| -> Result<()> {
        let (send, batches) = sync_channel(AHEAD);
        let rows = &rows;
        scope.spawn(move || {
            let first = first * args.accumulate as u64;
            for batch in first..steps * args.accumulate as u64 {
                if send.send(rows.batch(batch * rows_at_once..(batch + 1) * rows_at_once)).is_err()
                {
                    return; // the training has failed, and says how
                }
            }
        });
        let mut course = Course::new(args, device)?;
        while optimizer.steps() < steps {
            let rate = scheduled(optimizer.steps(), args.warmup, steps);
            for _ in 0..args.accumulate {
                course.learn(&mut begun.model, &batches)?;
            }
            let rates = Rates {
                weights: args.rate * rate,
                maps: args.map_rate * rate,
                decay: args.decay,
                clip: args.clip,
            };
            let norm = optimizer.step(&mut begun.model, rates)?;
            let step = optimizer.steps();
            if step.is_multiple_of(POINT) || step == steps {
                let point = course.point(step, step * step_tokens, &norm, args.rate * rate)?;
                bar.set_message(format!("text {:.2}, answers {:.2}", point.text, point.answers));
                points.push(point);
            }
            if args.save_every > 0 && step.is_multiple_of(args.save_every) && step < steps {
                begun.model.save(&path, &optimizer, &settings, &serde_json::to_string(&points)?)?;
            }
            bar.inc(1);
        }
        Ok(())
    })?;
    bar.finish_and_clear();
    Ok(points)
}

/// The share of the learning rate: up over the warm-up, then down to nothing at the end.
fn scheduled(step: u64, warmup: u64, steps: u64) -> f64 {
    let up = (step + 1) as f64 / warmup.max(1) as f64;
    let down = (steps - step) as f64 / steps.saturating_sub(warmup).max(1) as f64;
    up.min(down).min(1.0)
}

/// What was lost since the last point, on the device, so that a step waits for nothing.
struct Course<'a> {
    args: &'a Args,
    device: Device,
    lost: [Tensor; 2],
    batches: [usize; 2],
}

impl<'a> Course<'a> {
    fn new(args: &'a Args, device: Device) -> Result<Self> {
        let zero = || Tensor::f_zeros([], (Kind::Float, device));
        Ok(Self { args, device, lost: [zero()?, zero()?], batches: [0; 2] })
    }

    fn learn(&mut self, model: &mut Trainable, batches: &Receiver<Result<Batch>>) -> Result<()> {
        let batch = batches.recv().context("no more rows")??;
        let (rows, length) = (self.args.rows as i64, self.args.length as i64);
        let ids = Tensor::f_from_slice(&batch.ids)?.f_view([rows, length + 1])?;
        let ids = ids.f_to_device(self.device)?;
        let weights = |weights: &[f32]| -> Result<Tensor> {
            Ok(Tensor::f_from_slice(weights)?.f_view([rows, length])?.f_to_device(self.device)?)
        };
        let (text, answers) = (weights(&batch.text)?, weights(&batch.answers)?);
        let both = text.f_add(&answers.f_mul_scalar(self.args.answer_weight)?)?;
        let both = both.f_div_scalar(self.args.accumulate as f64)?;
        let nll = model.learn(&ids, &both, self.args.recompute)?;
        for (i, weights) in [&text, &answers].into_iter().enumerate() {
            let _ = self.lost[i].f_add_(&nll.f_mul(weights)?.f_sum(Kind::Float)?)?;
        }
        for (i, weights) in [&batch.text, &batch.answers].into_iter().enumerate() {
            self.batches[i] += usize::from(weights.iter().any(|&weight| weight > 0.0));
        }
        Ok(())
    }

    fn point(&mut self, step: u64, tokens: u64, norm: &Tensor, rate: f64) -> Result<Point> {
        let mut lost = [0.0; 2];
        for (i, lost) in lost.iter_mut().enumerate() {
            *lost = self.lost[i].f_double_value(&[])? / self.batches[i].max(1) as f64;
            self.batches[i] = 0;
            let _ = self.lost[i].f_zero_()?;
        }
        let norm = norm.f_double_value(&[])?;
        if !(norm + lost[0] + lost[1]).is_finite() {
            bail!(
                "step {step}: loss or gradient is NaN or infinite; give a smaller --rate or --map-rate; \
                 what was saved before is in {}",
                state(self.args).display()
            );
        }
        Ok(Point { step, tokens, text: lost[0], answers: lost[1], norm, rate })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_rises_falls_and_ends() {
        let at = |step| scheduled(step, 10, 110);
        assert!(
            (at(0) - 0.1).abs() < 1e-9 && (at(9) - 1.0).abs() < 1e-9 && (at(10) - 1.0).abs() < 1e-9
        );
        assert!((at(60) - 0.5).abs() < 1e-9 && at(109) <= 0.0101 && at(109) > 0.0);
    }

    #[test]
    fn each_arm_says_which_layers_turn() {
        let config = |arm: Arm| arm.pe_config(6, 2, 32);
        assert_eq!(config(Arm::R2n1)["dynmaic_pe_layer_ids"], "2,5");
        assert_eq!(config(Arm::N2r1)["dynmaic_pe_layer_ids"], "0,1,3,4");
        assert_eq!(config(Arm::Repo)["dynmaic_pe_start_layer"], 2);
        assert_eq!(config(Arm::Repo)["dynamic_pe_offset_tokens"], Value::Null);
        assert_eq!(config(Arm::R2p1)["dynmaic_pe_layer_ids"], "2,5");
        assert_eq!(config(Arm::Offset)["dynamic_pe_offset_tokens"], 32);
        assert_eq!(config(Arm::Slowed)["dynamic_pe_slowed_index"], 32);
        assert_eq!(config(Arm::Slowed)["dynamic_pe_offset_tokens"], Value::Null);
        assert_eq!(config(Arm::Rope)["dynamic_pe_mode"], "none");
    }
}
