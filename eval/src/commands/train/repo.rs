//! `longctx train repo`: trains a model whose tokens stand where it reads that they should, or its twin whose do not.

use super::corpus::Corpus;
use super::course::{Course, Weighed};
use super::curve::{self, Point};
use super::pieces::files_of;
use super::rows::{Mix, Rows};
use crate::commands::{Machine, beside, progress, spinner, write, write_json};
use crate::documents;
use crate::files;
use anyhow::{Context, Result, bail, ensure};
use models::{
    AdamW, Config, Extent, Model, Rates, Source, Tokenizer, Trainable, Trained, Way, Weights, open,
};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::mpsc::sync_channel;
use std::time::Instant;
use tch::{Device, Kind};

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
    /// The folder to write: a model, or repo.safetensors for --repo; and how it went. One in it for each of several arms
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
    /// Where tokens stand; several are trained side by side on the same rows, and share what is below --train-from
    #[arg(long, value_enum, num_args = 1.., default_value = "repo")]
    arm: Vec<Arm>,
    /// What a map's one is worth, in tokens (arms offset and slowed)
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    offset_tokens: u32,
    /// The first layer that does not turn by the index; a third of the layers if left out
    #[arg(long)]
    first_layer: Option<usize>,
    /// The layers that do not turn by the index, where some above the first of them do
    #[arg(long, num_args = 1.., conflicts_with = "first_layer", value_name = "LAYER")]
    layers: Vec<usize>,
    /// What of a model is trained
    #[arg(long, value_enum, default_value = "everything", conflicts_with = "from_scratch")]
    train: What,
    /// The first layer of which anything is trained; the embedding only from 0 on
    #[arg(long, default_value_t = 0, value_name = "LAYER", conflicts_with = "from_scratch")]
    train_from: usize,
    /// The share of the training over which learned positions leave the index, where a trained model has them
    #[arg(long, default_value_t = 0.0)]
    settling: f64,
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
    /// Learn from each answer, and from one in so many other tokens
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    text_every: u64,
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
    fn pe_config(self, layers: usize, first: usize, own: &[usize], offset_tokens: u32) -> Value {
        let listed = |ids: &mut dyn Iterator<Item = usize>| -> String {
            ids.map(|id| id.to_string()).collect::<Vec<_>>().join(",")
        };
        let ids = |of: &dyn Fn(usize) -> bool| listed(&mut (0..layers).filter(|&l| of(l)));
        let (first, own) =
            (if own.is_empty() { first } else { 0 }, listed(&mut own.iter().copied()));
        let (mode, first, ids) = match self {
            Self::Rope => ("none", 0, String::new()),
            Self::Nope => ("nope", first, own),
            Self::R2n1 => ("nope", 0, ids(&|layer| layer % 3 == 2)),
            Self::N2r1 => ("nope", 0, ids(&|layer| layer % 3 != 2)),
            Self::R2p1 => ("swigluex_multihead", 0, ids(&|layer| layer % 3 == 2)),
            Self::Repo | Self::Offset | Self::Slowed => ("swigluex_multihead", first, own),
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

    /// Whether the arm says itself which layers do not turn by the index.
    fn chooses(self) -> bool {
        matches!(self, Self::R2n1 | Self::N2r1 | Self::R2p1)
    }

    fn name(self) -> String {
        format!("{self:?}").to_lowercase()
    }
}

/// One arm: what is trained, where it comes from, and how far it is.
struct Twin {
    arm: Arm,
    out: PathBuf,
    model: Trainable,
    /// The model that an overlay is for.
    base: Option<Source>,
    pe_config: Value,
    settings: String,
    optimizer: AdamW,
    points: Vec<Point>,
    course: Course,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    ensure!(
        args.rows > 0 && args.accumulate > 0 && args.kilotokens > 0 && args.rank > 0,
        "--rows, --accumulate, --rank and --kilotokens must be 1 or more"
    );
    ensure!(args.length >= 16, "--length {}: give 16 or more", args.length);
    for (name, share) in
        [("facts", args.facts), ("growing", args.growing), ("settling", args.settling)]
    {
        ensure!((0.0..=1.0).contains(&share), "--{name} {share}: give a share from 0 to 1");
    }
    if let Some(arm) = args.arm.iter().find(|arm| arm.chooses() && !args.layers.is_empty()) {
        bail!("--layers: arm {} has layers of its own; leave one of them out", arm.name());
    }
    let due = due(args)?;
    let (kind, device) = args.machine.prepare()?;
    let bar = spinner("reading the model and the text");
    let (mut twins, mut tokenizer) = (Vec::new(), None);
    for (arm, out) in due {
        let (twin, own) = begin(args, arm, out, kind, device)?;
        twins.push(twin);
        tokenizer.get_or_insert(own);
    }
    let (tokenizer, config) =
        (tokenizer.context("give an --arm")?, twins[0].model.config().clone());
    let end = config.eos_tokens.first().copied().or(config.bos_token).unwrap_or(0);
    let corpus = Corpus::read(&args.text, &tokenizer, end)?;
    corpus.at_least(args.length + 1, &args.text)?;
    bar.finish_and_clear();

    let start = Instant::now();
    train(args, &mut twins, &tokenizer, &corpus, device)?;
    let seconds = start.elapsed().as_secs_f64();
    for twin in &twins {
        twin.write(args, &corpus, seconds)?;
    }
    Ok(())
}

/// The arms that are not done yet, and a folder for each.
fn due(args: &Args) -> Result<Vec<(Arm, PathBuf)>> {
    let several = args.arm.len() > 1;
    let (mut due, mut done): (Vec<(Arm, PathBuf)>, _) = (Vec::new(), Vec::new());
    for &arm in &args.arm {
        let out = if several { args.out.join(arm.name()) } else { args.out.clone() };
        let twice = due.iter().any(|(other, _)| *other == arm) || done.contains(&arm);
        ensure!(!twice, "--arm {} is there twice; give each once", arm.name());
        let report = out.join("training.json");
        std::fs::create_dir_all(&out).with_context(|| crate::commands::no_place(&out))?;
        if report.exists() {
            let found: Value = serde_json::from_slice(&files::bytes(&report)?).unwrap_or_default();
            let numbers = found["numbers"].as_u64().unwrap_or(0) as usize;
            // One of several that came to its end, after which they were interrupted.
            let other = args.arm.iter().any(|&other| {
                other != arm && !args.out.join(other.name()).join("training.json").exists()
            });
            ensure!(
                several && other && found["settings"] == settings(args, arm, numbers),
                "{} is there: this training is done; choose another --out, or remove it",
                report.display()
            );
            eprintln!("note: {} is done", arm.name());
            done.push(arm);
            continue;
        }
        beside(&report)?;
        due.push((arm, out));
    }
    Ok(due)
}

impl Twin {
    fn state(&self) -> PathBuf {
        self.out.join("state.safetensors")
    }

    fn save(&self) -> Result<()> {
        let notes = serde_json::to_string(&self.points)?;
        Ok(self.model.save(&self.state(), &self.optimizer, &self.settings, &notes)?)
    }

    /// Goes on from the state that is there, if it is.
    fn restore(&mut self) -> Result<()> {
        let path = self.state();
        if path.exists() {
            let notes = self.model.restore(&path, &mut self.optimizer, &self.settings)?;
            self.points = serde_json::from_str(&notes).with_context(|| {
                format!("{}: its curve is not whole; remove it to begin anew", path.display())
            })?;
            eprintln!("note: {} goes on after step {}", self.arm.name(), self.optimizer.steps());
        }
        Ok(())
    }

    fn write(&self, args: &Args, corpus: &Corpus, seconds: f64) -> Result<()> {
        match &self.base {
            Some(base) => {
                let path = self.out.join("repo.safetensors");
                self.model.write_overlay(&path, base, &self.pe_config)?;
            }
            None => self.model.write_folder(&self.out)?,
        }
        let title = format!("{}, seed {}", self.arm.name(), args.seed);
        write(&self.out.join("loss.svg"), curve::draw(&title, &self.points)?.as_bytes())?;
        write_json(&self.out.join("loss.json"), &serde_json::to_value(&self.points)?)?;
        let tokens = self.points.last().map_or(0, |point| point.tokens);
        let json = json!({
            "arm": self.arm.name(), "seed": args.seed, "tokens": tokens, "length": args.length,
            "settings": settings(args, self.arm, self.model.numbers()),
            "numbers": self.model.numbers(), "text_tokens": corpus.len(),
            "loss": self.points.last(), "seconds_since_start_or_resumption": seconds,
            "run": args.machine.json(),
        });
        write_json(&self.out.join("training.json"), &json)?;
        let _ = std::fs::remove_file(self.state());
        println!(
            "{title}: {:.1} M tokens, {seconds:.0} s; wrote {}",
            tokens as f64 / 1e6,
            self.out.display()
        );
        Ok(())
    }
}

/// All that a training's course depends on, for its state.
fn settings(args: &Args, arm: Arm, numbers: usize) -> Value {
    json!({
        "arm": arm.name(), "first_layer": args.first_layer, "layers": args.layers, "numbers": numbers,
        "train": format!("{:?} {}", args.train, args.rank), "train_from": args.train_from,
        "kilotokens": args.kilotokens, "length": args.length,
        "rows": args.rows, "accumulate": args.accumulate, "facts": args.facts, "growing": args.growing, "answer_weight": args.answer_weight,
        "text_every": args.text_every, "settling": args.settling,
        "rate": args.rate, "map_rate": args.map_rate, "warmup": args.warmup, "decay": args.decay, "clip": args.clip,
        "seed": args.seed, "offset_tokens": matches!(arm, Arm::Offset | Arm::Slowed).then_some(args.offset_tokens),
    })
}

/// An arm as it begins, or from where it was interrupted; and the tokenizer, which is the same for all.
fn begin(
    args: &Args,
    arm: Arm,
    out: PathBuf,
    kind: Kind,
    device: Device,
) -> Result<(Twin, Tokenizer)> {
    let plan = |layers: usize| -> Result<Value> {
        if let Some(layer) = args.layers.iter().find(|&&layer| layer >= layers) {
            bail!("--layers {layer}: the model has {layers}, from 0 on; give some of these");
        }
        if let Some(first) = args.first_layer.filter(|&first| first >= layers) {
            bail!("--first-layer {first}: the model has {layers}, from 0 on; give a smaller one");
        }
        let first = args.first_layer.unwrap_or(layers / 3);
        Ok(arm.pe_config(layers, first, &args.layers, args.offset_tokens))
    };
    let (model, tokenizer, base, pe_config);
    if let Some(path) = &args.from_scratch {
        let mut json: Value = serde_json::from_slice(&files::bytes(path)?)
            .with_context(|| format!("{} is not JSON; give a config.json", path.display()))?;
        pe_config = plan(json["num_hidden_layers"].as_u64().unwrap_or(0) as usize)?;
        json["pe_config"] = pe_config.clone();
        write_json(&out.join("config.json"), &json)?;
        let config = Config::of_folder(&out)?;
        tokenizer = new_tokenizer(args, &out, &config)?;
        model = Trainable::from_scratch(config, kind, device, args.seed)?;
        base = None;
    } else {
        let path = args.model.as_deref().context("give --model or --from-scratch")?;
        let trained = match args.train {
            What::Maps => Trained::Maps,
            What::Qk => Trained::QueriesAndKeys,
            What::LowRank => Trained::LowRank(args.rank),
            What::Everything => Trained::Everything,
        };
        let weights = Weights::new(open(path)?, Kind::Float, Device::Cpu)?;
        pe_config = plan(weights.config().layers)?;
        let config = weights.config().clone().with_positions(&pe_config)?;
        ensure!(
            args.length < config.max_positions,
            "--length {}: the model reads {}; give less",
            args.length,
            config.max_positions
        );
        let mut below = config.positions.iter().take(args.train_from);
        ensure!(
            !below.any(|positions| positions.learned()),
            "--train-from {}: arm {} has maps below, which would stay as they begin; give a smaller one, or a larger --first-layer or --layers",
            args.train_from,
            arm.name()
        );
        let extent = Extent { trained, from: args.train_from };
        model = Trainable::continued(&weights, config, extent, kind, device, args.seed)?;
        tokenizer = Model::tokenizer_of(weights.source())?;
        base = Some(open(path)?);
    }
    let mut twin = Twin {
        settings: settings(args, arm, model.numbers()).to_string(),
        optimizer: AdamW::new(&model)?,
        points: Vec::new(),
        course: Course::new(device)?,
        arm,
        out,
        model,
        base,
        pe_config,
    };
    twin.restore()?;
    Ok((twin, tokenizer))
}

/// The tokenizer that a new model is given, in its folder.
fn new_tokenizer(args: &Args, out: &Path, config: &Config) -> Result<Tokenizer> {
    let own = out.join("tokenizer.json");
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

/// Trains all arms to the end, from the beginning or from where they are.
fn train(
    args: &Args,
    twins: &mut [Twin],
    tokenizer: &Tokenizer,
    corpus: &Corpus,
    device: Device,
) -> Result<()> {
    let step_tokens = (args.rows * args.accumulate * args.length) as u64;
    let steps = (args.kilotokens * 1000).div_ceil(step_tokens).max(args.warmup + 1);
    let growing = (args.growing * (steps * (args.rows * args.accumulate) as u64) as f64) as u64;
    let (length, every) = (args.length, args.text_every);
    let mix = Mix { length, facts: args.facts, growing, text_every: every, seed: args.seed };
    let rows = Rows::new(corpus, tokenizer, mix);
    let bar = progress(steps, "training");
    // An arm that was saved later than another waits for it.
    let first = twins.iter().map(|twin| twin.optimizer.steps()).min().unwrap_or(0);
    bar.set_position(first);
    bar.reset_eta();
    let (size, rows_at_once) = ([args.rows, args.length], args.rows as u64);
    // A step's batches are learned from in the mean.
    let weights = [1.0, args.answer_weight].map(|weight| weight / args.accumulate as f64);
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
        for at in first..steps {
            let mut due: Vec<&mut Twin> =
                twins.iter_mut().filter(|twin| twin.optimizer.steps() == at).collect();
            let rate = scheduled(at, args.warmup, steps);
            let settled = at as f64 / (args.settling * steps as f64).max(1.0);
            let toward_index =
                if args.settling > 0.0 { (1.0 - settled).max(0.0).powi(2) } else { 0.0 };
            let way = Way { recompute: args.recompute, toward_index };
            for _ in 0..args.accumulate {
                let batch = batches.recv().context("no more rows")??;
                learn(&mut due, &Weighed::new(&batch, size, weights, device)?, way)?;
            }
            let rates = Rates {
                weights: args.rate * rate,
                maps: args.map_rate * rate,
                decay: args.decay,
                clip: args.clip,
            };
            let step = at + 1;
            for twin in &mut due {
                let norm = twin.optimizer.step(&mut twin.model, rates)?;
                if step.is_multiple_of(POINT) || step == steps {
                    let point = twin.course.point(step, step * step_tokens, &norm, rates.weights);
                    let point = point.with_context(|| {
                        format!("what was saved before is in {}", twin.state().display())
                    })?;
                    bar.set_message(format!(
                        "text {:.2}, answers {:.2}",
                        point.text, point.answers
                    ));
                    twin.points.push(point);
                }
                if args.save_every > 0 && step.is_multiple_of(args.save_every) && step < steps {
                    twin.save()?;
                }
            }
            bar.inc(1);
        }
        Ok(())
    })?;
    bar.finish_and_clear();
    Ok(())
}

/// Adds a batch's gradient to each arm's. What they share of it is computed once.
fn learn(twins: &mut [&mut Twin], batch: &Weighed, way: Way) -> Result<()> {
    let Some(first) = twins.first() else { return Ok(()) };
    let shared = twins.iter().all(|twin| first.model.shares_rows(&twin.model));
    let mut rows = first.model.rows(&batch.ids)?;
    for (i, twin) in twins.iter_mut().enumerate() {
        if i > 0 && !shared {
            rows = twin.model.rows(&batch.ids)?;
        }
        let nll = twin.model.learn(&rows, &batch.both, way)?;
        twin.course.add(&nll, batch)?;
    }
    Ok(())
}

/// The share of the learning rate: up over the warm-up, then down to nothing at the end.
fn scheduled(step: u64, warmup: u64, steps: u64) -> f64 {
    let up = (step + 1) as f64 / warmup.max(1) as f64;
    let down = (steps - step) as f64 / steps.saturating_sub(warmup).max(1) as f64;
    up.min(down).min(1.0)
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
        let config = |arm: Arm| arm.pe_config(6, 2, &[], 32);
        assert_eq!(config(Arm::R2n1)["dynmaic_pe_layer_ids"], "2,5");
        assert_eq!(config(Arm::N2r1)["dynmaic_pe_layer_ids"], "0,1,3,4");
        assert_eq!(config(Arm::Repo)["dynmaic_pe_start_layer"], 2);
        assert_eq!(config(Arm::Repo)["dynamic_pe_offset_tokens"], Value::Null);
        assert_eq!(config(Arm::R2p1)["dynmaic_pe_layer_ids"], "2,5");
        assert_eq!(config(Arm::Offset)["dynamic_pe_offset_tokens"], 32);
        assert_eq!(config(Arm::Slowed)["dynamic_pe_slowed_index"], 32);
        assert_eq!(config(Arm::Slowed)["dynamic_pe_offset_tokens"], Value::Null);
        assert_eq!(config(Arm::Rope)["dynamic_pe_mode"], "none");
        let some = |arm: Arm| arm.pe_config(6, 2, &[3, 5], 32);
        for arm in [Arm::Nope, Arm::Slowed] {
            assert_eq!(some(arm)["dynmaic_pe_layer_ids"], "3,5");
            assert_eq!(some(arm)["dynmaic_pe_start_layer"], 0);
        }
        assert_eq!(some(Arm::Rope), config(Arm::Rope));
    }
}
