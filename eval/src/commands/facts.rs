//! `longctx facts`: asks models for facts that are scattered in noise, within the length they were trained on and beyond.

mod compare;
mod difference;
mod measure;
mod picture;

use anyhow::Result;
use serde::{Deserialize, Serialize};

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
    /// Put several measured models beside one another, twins seed by seed
    Compare(compare::Args),
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    match &args.what {
        What::Measure(args) => measure::run(args),
        What::Compare(args) => compare::run(args),
    }
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
