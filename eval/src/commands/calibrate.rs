//! `longctx calibrate`: which threshold removes which share.

use super::train::pieces::{Lengths, Pieces};
use super::{ModelArgs, beside, progress, table, write_json};
use anyhow::{Context, Result, ensure};
use kvzap::{Calibration, LayerInput, Scorer, Surrogate, Threshold, TorchSurrogate, judged};
use models::{Dense, Hooks, Pruning, WINDOW};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use tch::{Kind, Tensor};

/// On what.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// The surrogate; calibration.json is written beside it, and `generate --remove` reads it
    #[arg(long, value_name = "FOLDER")]
    surrogate: PathBuf,
    /// Files of text or folders of them, which the surrogate was not trained on
    #[arg(long, num_args = 1.., required = true, value_name = "PATH")]
    text: Vec<PathBuf>,
    /// Texts to look at
    #[arg(long, default_value_t = 20)]
    pieces: usize,
    /// Tokens of a text, or a range such as 500-4000
    #[arg(long, default_value = "1000-4000")]
    tokens: Lengths,
    /// The newest tokens, which are not judged
    #[arg(long, default_value_t = WINDOW)]
    window: usize,
    /// Of the choice of texts
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// Write the table here too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Scores of judged tokens, of each layer and kv head.
type Scores = Vec<Vec<Vec<f32>>>;

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    ensure!(args.pieces > 0, "--pieces 0 looks at nothing; give 1 or more");
    ensure!(
        args.tokens.least > args.window,
        "texts of {} tokens with a window of {} have nothing to judge; give longer ones",
        args.tokens.least,
        args.window
    );
    beside(&args.surrogate.join("calibration.json"))?;
    let surrogate = Surrogate::load(&args.surrogate)?;
    let model = args.model.load()?;
    let config = model.lm.config();
    surrogate.check(config.layers, config.hidden_size, config.kv_heads)?;
    let scorer = TorchSurrogate::new(&surrogate, model.kind, model.device)?;
    let texts = Pieces::cut(&model, &args.text, args.pieces, args.tokens, 1, args.seed)?;
    let empty: Scores = vec![vec![Vec::new(); config.kv_heads]; config.layers];
    let scores = Arc::new(Mutex::new(empty));
    let hooks = Hooks::pruning(Pruning {
        scorer: Box::new(Watched { scorer, scores: scores.clone(), window: args.window }),
        policy: Box::new(Threshold::new(f32::NEG_INFINITY)?),
        while_decoding: true,
    });
    let bar = progress(args.pieces as u64, "reading");
    for ids in texts.contexts() {
        let ids: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
        let ids = Tensor::f_from_slice(&ids)?.f_to_device(model.device)?.f_unsqueeze(0)?;
        let mut cache = Dense::new(config.layers, args.window);
        let _ = tch::no_grad(|| model.lm.forward(&ids, &mut cache, &hooks))?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    let calibration = Calibration::new(&scores.lock().unwrap_or_else(PoisonError::into_inner))?;
    calibration.save(&args.surrogate)?;

    let shares = [0.25, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95];
    let mut table =
        table(&["of judged", "threshold", "of 1,000", "of 4,000", "of 32,000"], &[0, 1, 2, 3, 4]);
    let mut rows = Vec::new();
    for share in shares {
        let threshold = calibration.threshold_of_judged(share)?;
        let of = |tokens: usize| share * judged(tokens, args.window).len() as f64 / tokens as f64;
        let percent = |share: f64| format!("{:.0} %", 100.0 * share);
        table.add_row([
            percent(share),
            format!("{threshold:.2}"),
            percent(of(1000)),
            percent(of(4000)),
            percent(of(32_000)),
        ]);
        rows.push(serde_json::json!({"share_of_judged": share, "threshold": threshold}));
    }
    println!("{table}");
    let heads = calibration.half().iter().flatten().copied();
    let (least, most) = heads.fold((1.0f64, 0.0f64), |(a, b), share| (a.min(share), b.max(share)));
    println!(
        "where half goes in all, a head loses {:.0} to {:.0} %; wrote {}",
        100.0 * least,
        100.0 * most,
        args.surrogate.join("calibration.json").display()
    );
    if let Some(path) = &args.json {
        let json = serde_json::json!({
            "thresholds": rows, "half_of_each_head": calibration.half(), "run": args.model.json(),
            "pieces": args.pieces, "tokens": args.tokens.to_string(), "window": args.window, "seed": args.seed,
        });
        write_json(path, &json).context("the table")?;
    }
    Ok(())
}

/// Keeps the scores of judged tokens.
struct Watched {
    scorer: TorchSurrogate,
    scores: Arc<Mutex<Scores>>,
    window: usize,
}

impl Scorer<Tensor> for Watched {
    fn score(&self, input: LayerInput<'_, Tensor>) -> kvzap::Result<Tensor> {
        let scores = self.scorer.score(input)?; // [1, kv_heads, tokens]
        let old = judged(scores.size()[2] as usize, self.window).len() as i64;
        let seen = scores.f_squeeze_dim(0)?.f_narrow(1, 0, old)?.f_to_kind(Kind::Float)?;
        let mut all = self.scores.lock().unwrap_or_else(PoisonError::into_inner);
        for (head, kept) in all[input.layer].iter_mut().enumerate() {
            kept.extend(Vec::<f32>::try_from(&seen.f_get(head as i64)?)?);
        }
        Ok(scores)
    }
}
