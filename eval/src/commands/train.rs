//! `longctx train`: fits a KVzap surrogate to what KVzip+ says of a model's tokens.

use super::{ModelArgs, beside, progress, table, write_json};
use crate::documents;
use anyhow::{Context, Result, ensure};
use kvzap::{Collector, Ridge, Spans, Threshold};
use models::{Dense, Hooks, Model, Pruning, Specials, WINDOW};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use std::path::PathBuf;
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
    ensure!(
        args.chunks > 0 && args.tokens > 8,
        "--chunks must be 1 or more and --tokens 9 or more"
    );
    let report = args.out.join("training.json");
    std::fs::create_dir_all(&args.out)
        .with_context(|| format!("cannot make the folder {}", args.out.display()))?;
    beside(&report)?;
    let model = args.model.load()?;
    let pieces = Pieces::new(args, &model)?;
    let layers = model.lm.config().layers;
    let projections =
        (0..layers).map(|layer| model.lm.output_projection(layer).shallow_clone()).collect();
    let collector = Collector::new(projections, model.lm.config().kv_heads, args.rows)?;

    let learn = |what, range: std::ops::Range<usize>| -> Result<Ridge> {
        let bar = progress(range.len() as u64, what);
        for index in range {
            let (ids, spans) = pieces.repeated(index);
            collector.begin(spans, args.seed ^ index as u64);
            forward(&model, &ids, &collector)?;
            bar.inc(1);
        }
        bar.finish_and_clear();
        Ok(collector.take())
    };
    let held_out = learn("held-out text", args.chunks..args.chunks + args.held_out)?;
    let surrogate = learn("text", 0..args.chunks)?.solve(args.alpha)?;
    surrogate.save(&args.out)?;

    let mut table = table(&["layer", "held-out R² of each kv head"], &[0]);
    let mut all = Vec::new();
    for layer in 0..layers {
        let r2 = held_out.r2(&surrogate, layer)?;
        let cells: Vec<String> = r2.iter().map(|value| format!("{value:.2}")).collect();
        table.add_row([layer.to_string(), cells.join("  ")]);
        all.push(r2);
    }
    println!("{table}");
    let flat: Vec<f64> = all.iter().flatten().copied().collect();
    let mean = flat.iter().sum::<f64>() / flat.len() as f64;
    println!(
        "mean R² {mean:.3} on {} held-out pieces; wrote {}",
        args.held_out,
        args.out.display()
    );
    write_json(
        &report,
        &serde_json::json!({
            "text": args.text.iter().filter_map(|p| p.file_name()?.to_str()).collect::<Vec<_>>(),
            "chunks": args.chunks, "held_out": args.held_out, "tokens": args.tokens, "rows": args.rows,
            "alpha": args.alpha, "seed": args.seed, "held_out_r2": mean, "r2": all,
        }),
    )
}

fn forward(model: &Model, ids: &[u32], collector: &Collector) -> Result<()> {
    let ids: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
    let hooks = Hooks::pruning(Pruning {
        scorer: Box::new(collector.clone()),
        policy: Box::new(Threshold::new(f32::NEG_INFINITY)?),
        while_decoding: true,
    });
    let tokens = Tensor::f_from_slice(&ids)?.f_unsqueeze(0)?;
    let mut cache = Dense::new(model.lm.config().layers, WINDOW);
    let _ = model.lm.forward(&tokens, &mut cache, &hooks)?;
    Ok(())
}

/// Pieces of text, and what stands around a piece that the model repeats.
///
/// KVzap trains on "user: text, repeat it; assistant: text" (arXiv 2601.07891, section 3). Here the text is cut from
/// token ids and set between the template's ids, so that both copies have the same tokens whatever surrounds them.
struct Pieces {
    texts: Vec<Vec<u32>>,
    before: Vec<u32>,
    between: Vec<u32>,
}

impl Pieces {
    fn new(args: &Args, model: &Model) -> Result<Self> {
        let template = model
            .template
            .as_ref()
            .context("the model brings no chat template to repeat a text in")?;
        let (before, after) = template.around("")?;
        let encode = |text: &str| model.tokenizer.encode(text, Specials::Parse);
        let instruction = format!("\n\nRepeat the previous context exactly.{after}");
        let (before, between) = (encode(&before)?, encode(&instruction)?);

        let mut texts = Vec::new();
        for path in &args.text {
            // Short documents in a row make pieces too: one text, cut where a piece is full.
            let documents = documents(path)?.join("\n\n");
            let ids = model.tokenizer.encode(&documents, Specials::Text)?;
            texts.extend(ids.chunks_exact(args.tokens).map(<[u32]>::to_vec));
        }
        let wanted = args.chunks + args.held_out;
        ensure!(
            texts.len() >= wanted,
            "{wanted} pieces of {} tokens wanted, the text holds {}; give more --text or fewer --chunks",
            args.tokens,
            texts.len()
        );
        texts.shuffle(&mut ChaCha8Rng::seed_from_u64(args.seed));
        texts.truncate(wanted);
        Ok(Self { texts, before, between })
    }

    /// The ids of a pass over piece `index`, and where its two copies stand.
    fn repeated(&self, index: usize) -> (Vec<u32>, Spans) {
        let text = &self.texts[index];
        let original = self.before.len()..self.before.len() + text.len();
        let repeat =
            original.end + self.between.len()..original.end + self.between.len() + text.len();
        let ids = [&self.before, text, &self.between, text].map(Vec::as_slice).concat();
        (ids, Spans { original, repeat })
    }
}
