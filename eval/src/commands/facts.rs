//! `longctx facts`: asks models for facts that are scattered in noise, within the length they were trained on and beyond.

mod compare;
mod difference;
mod forgetting;
mod measure;
mod passages;
mod picture;

use super::ModelArgs;
use super::train::corpus::{Corpus, Passage};
use crate::files;
use crate::{Family, Words};
use anyhow::{Context, Result};
use models::Tokenizer;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What to do.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand, Debug)]
enum What {
    /// Ask one model, and write down every answer's mark
    Measure(measure::Args),
    /// Write down passages of facts in noise, in training's words, for a surrogate to learn from
    Passages(passages::Args),
    /// Put several measured models beside one another, twins seed by seed
    Compare(compare::Args),
    /// What models know when more and more is forgotten, each by its own surrogate
    Forgetting(forgetting::Args),
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    match &args.what {
        What::Measure(args) => measure::run(args),
        What::Passages(args) => passages::run(args),
        What::Compare(args) => compare::run(args),
        What::Forgetting(args) => forgetting::run(args),
    }
}

/// Task, family, and about how many things.
const TASKS: [(&str, Family, usize); 8] = [
    ("keys_16", Family::Keys, 16),
    ("keys_64", Family::Keys, 64),
    ("lists_6", Family::Lists, 6),
    ("uuids_8", Family::Uuids, 8),
    ("several_6", Family::Several, 6),
    ("chain_6", Family::Chain, 6),
    ("table_12", Family::Table, 12),
    ("hops_8", Family::Hops, 8),
];

/// A passage of `tokens` tokens with a question of one of the [`TASKS`]; `None` if it does not fit.
fn asked(
    corpus: &Corpus,
    tokenizer: &Tokenizer,
    task: usize,
    tokens: usize,
    seed: u64,
    index: usize,
) -> Result<Option<Passage>> {
    let (_, family, size) = TASKS[task];
    let mut random = ChaCha8Rng::seed_from_u64(seed.wrapping_add(1 << 40));
    random.set_stream((task << 32 | tokens << 16 | index) as u64);
    let facts = family.draw(&mut random, size, 1, Words::Measuring);
    corpus.passage(&mut random, tokenizer, &facts, tokens, false)
}

/// The same of the task whose turn it is, or of the next one that fits.
pub(super) fn in_turn(
    corpus: &Corpus,
    tokenizer: &Tokenizer,
    tokens: usize,
    seed: u64,
    index: usize,
) -> Result<Option<Passage>> {
    for turn in 0..TASKS.len() {
        // No sample of another turn's.
        let (task, index) = ((index + turn) % TASKS.len(), index / TASKS.len() + (turn << 12));
        if let Some(passage) = asked(corpus, tokenizer, task, tokens, seed, index)? {
            return Ok(Some(passage));
        }
    }
    Ok(None)
}

/// What `longctx train repo` left beside the model or its overlay, if it did.
pub(super) fn training(model: &ModelArgs) -> Result<Value> {
    let file = match &model.repo {
        Some(overlay) => overlay.with_file_name("training.json"),
        None => model.model.join("training.json"),
    };
    if !file.exists() {
        return Ok(Value::Null);
    }
    let text = files::bytes(&file)?;
    serde_json::from_slice(&text)
        .with_context(|| format!("{} is not what longctx train writes; remove it", file.display()))
}

/// One model, measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Measured {
    arm: String,
    seed: u64,
    /// Tokens it was trained on.
    tokens: u64,
    /// The length of its training's rows.
    trained: usize,
    cells: Vec<Cell>,
    text: Vec<Text>,
    run: serde_json::Value,
}

/// One task at one length.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Cell {
    task: String,
    context: usize,
    /// `1` for each right answer, `0` for each wrong one, in the order of the samples.
    marks: String,
}

/// How well held-out text is predicted in windows of a length.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Text {
    context: usize,
    /// Mean `−log p` of a token.
    nll: f64,
    tokens: usize,
}

impl Cell {
    fn scores(&self) -> impl Iterator<Item = f64> {
        self.marks.bytes().map(|mark| f64::from(mark - b'0'))
    }

    fn score(&self) -> f64 {
        self.scores().sum::<f64>() / self.marks.len().max(1) as f64
    }
}
