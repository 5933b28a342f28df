//! Passages of facts in noise as text: what a model that answers about facts is asked to remember.

use crate::commands::train::corpus::Corpus;
use crate::commands::{beside, write};
use crate::{Family, Words};
use anyhow::{Context, Result, ensure};
use models::{Model, open};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::path::PathBuf;

/// How many, and of what.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The model whose tokens are counted: a GGUF file or a Hugging Face folder
    #[arg(long, value_name = "PATH")]
    model: PathBuf,
    /// Text for noise: files or folders
    #[arg(long, num_args = 1.., required = true, value_name = "PATH")]
    text: Vec<PathBuf>,
    /// How many passages
    #[arg(long, default_value_t = 1000)]
    passages: usize,
    /// Tokens of each
    #[arg(long, default_value_t = 512)]
    tokens: usize,
    /// Of what is drawn
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// The file to write, as JSON lines with a field `text`
    #[arg(long, value_name = "FILE", default_value = "passages.jsonl")]
    output: PathBuf,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    ensure!(args.passages > 0 && args.tokens >= 128, "give --passages from 1, --tokens from 128");
    drop(beside(&args.output)?);
    let source = open(&args.model)?;
    let tokenizer = Model::tokenizer_of(&source)?;
    let end = source.config().eos_tokens.first().copied().unwrap_or(0);
    let corpus = Corpus::read(&args.text, &tokenizer, end)?;
    corpus.at_least(args.tokens, &args.text)?;
    let mut lines = String::new();
    for index in 0..args.passages {
        let mut random = ChaCha8Rng::seed_from_u64(args.seed);
        random.set_stream(index as u64);
        let mut size = random.random_range(4..=32);
        let passage = loop {
            let family = Family::ALL[index % Family::ALL.len()];
            let facts = family.draw(&mut random, size, 1, Words::Training);
            match corpus.passage(&mut random, &tokenizer, &facts, args.tokens, true)? {
                Some(passage) => break passage,
                None if size > 1 => size /= 2,
                None => anyhow::bail!("--tokens {}: no fact fits; give more", args.tokens),
            }
        };
        let text = tokenizer.decode(&passage.ids, true).context("a passage of its own tokens")?;
        lines.push_str(&serde_json::json!({ "text": text }).to_string());
        lines.push('\n');
    }
    write(&args.output, lines.as_bytes())?;
    println!("{}: {} passages of {} tokens", args.output.display(), args.passages, args.tokens);
    Ok(())
}
