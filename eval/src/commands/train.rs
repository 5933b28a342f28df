//! `longctx train`: fits a KVzap surrogate to what KVzip+ says of a model's tokens.

use super::{ModelArgs, progress, table};
use crate::documents;
use anyhow::{Context, Result, bail, ensure};
use kvzap::{Collector, Policy, Threshold};
use models::{Dense, Hooks, KvCache, Model, Pruning, Specials};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use tch::Tensor;

/// What to learn from.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Files of text: plain, `.jsonl` with a field `text`, SQuAD or HotpotQA
    #[arg(long, num_args = 1.., required = true, value_name = "FILE")]
    text: Vec<PathBuf>,
    /// The folder to write: config.json and model.safetensors as NVIDIA publishes them
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
    /// Pieces of text to learn from
    #[arg(long, default_value_t = 200)]
    chunks: usize,
    /// Further pieces to measure on
    #[arg(long, default_value_t = 20)]
    held_out: usize,
    /// Tokens of a piece
    #[arg(long, default_value_t = 480)]
    tokens: usize,
    /// Tokens of each piece to learn from
    #[arg(long, default_value_t = 400)]
    rows: usize,
    /// Of the ridge
    #[arg(long, default_value_t = 1.0)]
    alpha: f64,
    /// Of the choice of pieces and tokens
    #[arg(long, default_value_t = 42)]
    seed: u64,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let _ = args;
    bail!("to be written against kvzap")
}
