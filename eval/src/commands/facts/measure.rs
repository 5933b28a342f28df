//! Marks of one model.

use super::{Cell, Measured, TASKS, Text, asked, training};
use crate::commands::train::corpus::{Corpus, Passage};
use crate::commands::{ModelArgs, beside, progress, table, write_json};
use anyhow::{Result, ensure};
use models::{CausalLm, Dense, Hooks, Model, WINDOW};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use std::path::PathBuf;
use tch::{Device, Kind, Tensor};

/// Which model, and what to ask.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Text that no training saw, for noise and for its likelihood: files or folders
    #[arg(long, num_args = 1.., required = true, value_name = "PATH")]
    text: Vec<PathBuf>,
    /// Tokens of a prompt and its answer
    #[arg(long, num_args = 1.., default_values_t = [1024usize, 2048, 4096, 8192])]
    contexts: Vec<usize>,
    /// Questions of each task and length
    #[arg(long, default_value_t = 100)]
    samples: usize,
    /// Of the samples; models are compared on the same ones
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// What training.json beside the model calls its arm, if not that
    #[arg(long)]
    arm: Option<String>,
    /// The file to write
    #[arg(long, value_name = "FILE", default_value = "facts.json")]
    output: PathBuf,
}

/// The window in which text is likely short for a reader too.
const SHORT: usize = 512;
/// Tokens of text that are predicted, for each length.
const TEXT: usize = 1 << 16;

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    ensure!(args.samples > 0, "--samples 0: give 1 or more");
    ensure!(args.contexts.iter().all(|&n| n >= 128), "--contexts: give 128 or more");
    drop(beside(&args.output)?);
    let known = training(&args.model)?;
    let model = args.model.load()?;
    let end = model.stop.first().copied().or(model.lm.config().bos_token).unwrap_or(0);
    let corpus = Corpus::read(&args.text, &model.tokenizer, end)?;
    let longest = args.contexts.iter().copied().max().unwrap_or(0);
    corpus.at_least(longest.max(SHORT), &args.text)?;

    let bar = progress((TASKS.len() * args.contexts.len()) as u64, "asking");
    let mut measured = Measured {
        arm: args.arm.clone().unwrap_or_else(|| known["arm"].as_str().unwrap_or("base").to_owned()),
        seed: known["seed"].as_u64().unwrap_or(0),
        tokens: known["tokens"].as_u64().unwrap_or(0),
        trained: known["length"].as_u64().map_or(model.lm.config().max_positions, |n| n as usize),
        cells: Vec::new(),
        text: Vec::new(),
        run: args.model.json(),
    };
    for (number, (task, ..)) in TASKS.into_iter().enumerate() {
        for &context in &args.contexts {
            let draw = |index| asked(&corpus, &model.tokenizer, number, context, args.seed, index);
            let passages: Vec<Option<Passage>> =
                (0..args.samples).into_par_iter().map(draw).collect::<Result<_>>()?;
            bar.inc(1);
            // A length that is too short for some sample's facts is too short for the task.
            let Some(passages) = passages.into_iter().collect::<Option<Vec<_>>>() else { continue };
            let marks = marks(&model, &passages)?;
            measured.cells.push(Cell { task: task.to_owned(), context, marks });
        }
    }
    bar.finish_and_clear();
    for context in [SHORT].iter().chain(&args.contexts) {
        let mut random = ChaCha8Rng::seed_from_u64(args.seed);
        random.set_stream(*context as u64);
        let windows = (TEXT / context).max(1);
        let windows: Vec<&[u32]> =
            (0..windows).map(|_| corpus.window(&mut random, *context)).collect();
        let (nll, tokens) = text(&model, &windows)?;
        measured.text.push(Text { context: *context, nll, tokens });
    }
    write_json(&args.output, &serde_json::to_value(&measured)?)?;
    print(&measured, &args.contexts);
    Ok(())
}

/// How many rows of `tokens` tokens are read at once.
fn at_once(device: Device, tokens: usize) -> usize {
    let tokens_at_once = if device == Device::Cpu { 1 << 12 } else { 1 << 15 };
    (tokens_at_once / tokens).max(1)
}

fn forward(lm: &dyn CausalLm, rows: &[&[u32]], device: Device) -> Result<Tensor> {
    let ids: Vec<i64> = rows.iter().flat_map(|row| row.iter().map(|&id| i64::from(id))).collect();
    let ids = Tensor::f_from_slice(&ids)?.f_view([rows.len() as i64, -1])?.f_to_device(device)?;
    let mut cache = Dense::new(lm.config().layers, WINDOW);
    Ok(tch::no_grad(|| lm.forward(&ids, &mut cache, &Hooks::default()))?)
}

/// Whether the likeliest token, wherever an answer's is due, is the answer's: what greedy writing would write.
fn marks(model: &Model, passages: &[Passage]) -> Result<String> {
    let mut marks = String::new();
    let length = passages.first().map_or(0, |passage| passage.ids.len());
    for some in passages.chunks(at_once(model.device, length)) {
        let rows: Vec<&[u32]> = some.iter().map(|p| &p.ids[..length - 1]).collect();
        let hidden = forward(&*model.lm, &rows, model.device)?.f_flatten(0, 1)?;
        let due = |passage: &Passage| -> Vec<usize> {
            (1..length).filter(|&at| passage.answers[at]).collect()
        };
        let before: Vec<i64> = some
            .iter()
            .enumerate()
            .flat_map(|(row, passage)| {
                due(passage).into_iter().map(move |at| (row * (length - 1) + at - 1) as i64)
            })
            .collect();
        let before = Tensor::f_from_slice(&before)?.f_to_device(model.device)?;
        let logits = tch::no_grad(|| model.lm.logits(&hidden.f_index_select(0, &before)?))?;
        let likeliest =
            Vec::<i64>::try_from(&logits.f_argmax(-1, false)?.f_to_device(Device::Cpu)?)?;
        let mut likeliest = likeliest.into_iter();
        for passage in some {
            let right = due(passage)
                .into_iter()
                .filter(|&at| likeliest.next() != Some(i64::from(passage.ids[at])))
                .count()
                == 0;
            marks.push(if right { '1' } else { '0' });
        }
    }
    Ok(marks)
}

/// The mean `−log p` of windows' tokens, and how many.
fn text(model: &Model, windows: &[&[u32]]) -> Result<(f64, usize)> {
    let (mut sum, mut tokens) = (0.0, 0);
    let length = windows.first().map_or(0, |window| window.len());
    for some in windows.chunks((at_once(model.device, length) / 4).max(1)) {
        let hidden = forward(&*model.lm, some, model.device)?;
        let hidden = hidden.f_narrow(1, 0, length as i64 - 1)?.f_flatten(0, 1)?;
        let targets: Vec<i64> =
            some.iter().flat_map(|window| window[1..].iter().map(|&id| i64::from(id))).collect();
        let targets = Tensor::f_from_slice(&targets)?.f_to_device(model.device)?;
        let logits = tch::no_grad(|| model.lm.logits(&hidden))?;
        let nll = logits.f_cross_entropy_loss(
            &targets,
            None::<&Tensor>,
            tch::Reduction::Sum,
            -100,
            0.0,
        )?;
        sum += nll.f_to_kind(Kind::Double)?.f_double_value(&[])?;
        tokens += targets.size()[0] as usize;
    }
    Ok((sum / tokens.max(1) as f64, tokens))
}

fn print(measured: &Measured, contexts: &[usize]) {
    let header: Vec<String> = ["right, %".to_owned()]
        .into_iter()
        .chain(contexts.iter().map(ToString::to_string))
        .collect();
    let header: Vec<&str> = header.iter().map(String::as_str).collect();
    let mut rows = table(&header, &(1..header.len()).collect::<Vec<_>>());
    for (task, ..) in TASKS {
        let cell = |context: &usize| {
            let cell = measured.cells.iter().find(|c| c.task == task && c.context == *context);
            cell.map_or("-".to_owned(), |cell| format!("{:.0}", 100.0 * cell.score()))
        };
        rows.add_row([task.to_owned()].into_iter().chain(contexts.iter().map(cell)));
    }
    let text = |context: &usize| {
        let text = measured.text.iter().find(|text| text.context == *context);
        text.map_or("-".to_owned(), |text| format!("{:.2}", text.nll.exp()))
    };
    rows.add_row(["perplexity".to_owned()].into_iter().chain(contexts.iter().map(text)));
    println!("{rows}");
}
