//! `longctx generate`: an answer from a pruned cache.

mod batch;
mod lines;
mod parts;

use super::prompt::PromptArgs;
use super::{ModelArgs, megabytes, surrogate};
use crate::runner::context_ids;
use crate::{Method, Runner};
use anyhow::{Result, bail};
use clap::builder::PossibleValuesParser;
use kvzap::{Calibration, Surrogate};
use models::{Dtype, Sampling, WINDOW};
use std::io::Write;
use std::path::PathBuf;

/// What to answer, and what to forget on the way.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    prompt: PromptArgs,
    #[command(flatten)]
    batch: batch::BatchArgs,
    /// A question about the prompt, asked after the prompt was read and pruned; give it again to ask another
    #[arg(long)]
    question: Vec<String>,
    /// A KVzap surrogate: a folder with config.json and model.safetensors
    #[arg(long, value_name = "FOLDER")]
    surrogate: Option<PathBuf>,
    /// Forget tokens that score under this
    #[arg(long, requires = "surrogate", allow_negative_numbers = true, conflicts_with = "budget")]
    threshold: Option<f32>,
    /// Forget about this share of the prompt's cache, from 0 to 1, by the threshold that `longctx calibrate` found for it
    #[arg(long, requires = "surrogate", value_name = "SHARE", conflicts_with_all = ["threshold", "budget"])]
    remove: Option<f64>,
    /// Forget this share of the prompt's cache, from 0 to 1: the lowest scores of each layer
    #[arg(long, value_name = "SHARE")]
    budget: Option<f64>,
    /// Forget as a baseline does, without a surrogate
    #[arg(long, value_name = "NAME", requires = "budget", conflicts_with = "surrogate")]
    #[arg(value_parser = PossibleValuesParser::new(Method::baselines()))]
    method: Option<String>,
    /// The newest tokens, which always stay
    #[arg(long, default_value_t = WINDOW)]
    window: usize,
    /// The first tokens, which always stay as well; a surrogate has seen none, and past three quarters removed 4 help
    #[arg(long, default_value_t = 0)]
    protect: usize,
    /// Store keys and values so, whatever the model computes in
    #[arg(long, value_name = "DTYPE")]
    cache_dtype: Option<CacheDtype>,
    /// Prune question and answer too
    #[arg(long)]
    prune_while_decoding: bool,
    /// The most tokens to write
    #[arg(long, default_value_t = 256)]
    max_tokens: usize,
    /// 0 takes the likeliest token
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Draw among this many; 0 is no limit
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Draw among the likeliest that make up this probability
    #[arg(long, default_value_t = 1.0)]
    top_p: f32,
    /// Of the draws
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Print one JSON object instead of the text
    #[arg(long)]
    json: bool,
}

/// What keys and values are stored as.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum CacheDtype {
    F32,
    Bf16,
    F16,
    /// A quarter of f32's bytes: E4M3 with a scale for each row of a head
    Fp8,
}

impl From<CacheDtype> for Dtype {
    fn from(dtype: CacheDtype) -> Self {
        match dtype {
            CacheDtype::F32 => Self::F32,
            CacheDtype::Bf16 => Self::Bf16,
            CacheDtype::F16 => Self::F16,
            CacheDtype::Fp8 => Self::F8,
        }
    }
}

impl Args {
    fn sampling(&self) -> Sampling {
        let Self { temperature, top_k, top_p, seed, .. } = *self;
        Sampling { temperature, top_k, top_p, seed }
    }
}

/// A method, whose threshold may be found once the length of the text is known.
struct Forgetting {
    method: Method,
    surrogate: Option<Surrogate>,
    /// What was found out about the surrogate, and the share to remove.
    calibration: Option<(Calibration, f64)>,
}

impl Forgetting {
    fn of(args: &Args) -> Result<Self> {
        let method = match (args.threshold, args.budget) {
            (Some(threshold), _) => Method::Kvzap { threshold },
            (None, Some(remove)) => match &args.method {
                Some(name) => Method::baseline(name, remove)?,
                None if args.surrogate.is_some() => Method::KvzapBudget { remove },
                None => bail!("--budget: say whose scores, by --surrogate FOLDER or --method NAME"),
            },
            (None, None) if args.surrogate.is_some() && args.remove.is_none() => {
                bail!(
                    "a surrogate alone forgets nothing: give --remove, --threshold or --budget as well"
                )
            }
            (None, None) => Method::Full,
        };
        let surrogate = surrogate(args.surrogate.as_deref())?;
        let calibration = match (&args.surrogate, args.remove) {
            (Some(folder), Some(remove)) => Some((Calibration::load(folder)?, remove)),
            _ => None,
        };
        Ok(Self { method, surrogate, calibration })
    }

    /// The method for a text of `tokens` tokens.
    fn method(&self, tokens: usize, window: usize) -> Result<Method> {
        match &self.calibration {
            Some((calibration, remove)) => {
                let threshold = calibration.threshold(*remove, tokens, window)?;
                Ok(Method::Kvzap { threshold })
            }
            None => Ok(self.method),
        }
    }
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    if let Some(file) = args.batch.file() {
        return batch::run(args, file);
    }
    let context = args.prompt.read()?;
    let forgetting = Forgetting::of(args)?;
    let model = args.model.load()?;
    let method = forgetting.method(context_ids(&model, &context)?.0.len(), args.window)?;
    let runner = Runner {
        model: &model,
        surrogate: forgetting.surrogate.as_ref(),
        method,
        window: args.window,
        protect: args.protect,
        stored: args.cache_dtype.map(Into::into),
        while_decoding: args.prune_while_decoding,
        limit: args.max_tokens,
        sampling: args.sampling(),
    };
    let mut reading = runner.read(&context)?;
    if let Some(slow) = reading.slow() {
        eprintln!("note: written through libtorch, a launch at a time: {slow}");
    }
    let nothing = [String::new()];
    let questions = if args.question.is_empty() { &nothing[..] } else { &args.question };
    if questions.len() > 1 {
        reading.mark()?;
    }
    let mut answers = Vec::new();
    for question in questions {
        if !args.json && questions.len() > 1 {
            println!("> {question}");
        }
        answers.push(reading.ask(question, "", &mut |piece| {
            if !args.json {
                print!("{piece}");
                let _ = std::io::stdout().flush(); // a closed pipe ends the text, not the run
            }
        })?);
        if !args.json {
            println!();
        }
    }
    let read = reading.read();
    let prefill_tps = read.context_tokens as f64 / read.prefill_seconds;
    if args.json {
        let answers = questions.iter().zip(&answers).map(|(question, answer)| {
            let (tokens, seconds) = answer.decode;
            serde_json::json!({
                "question": question,
                "text": answer.text,
                "new_tokens": tokens,
                "decode_tps": tokens as f64 / seconds,
            })
        });
        let json = serde_json::json!({
            "answers": answers.collect::<Vec<_>>(),
            "method": method.name(),
            "threshold": method.threshold(),
            "budget": args.budget,
            "window": args.window,
            "protect": args.protect,
            "cache_dtype": args.cache_dtype.map(|dtype| format!("{dtype:?}").to_lowercase()),
            "prune_while_decoding": args.prune_while_decoding,
            "context_tokens": read.context_tokens,
            "removed": read.removed,
            "first_dropped": read.first_dropped,
            "kv_bytes": read.kv_bytes,
            "slow": reading.slow(),
            "prefill_tps": prefill_tps,
            "settings": args.model.json(),
        });
        println!("{json:#}");
    } else {
        let tokens = answers.iter().map(|answer| answer.decode.0).sum::<usize>();
        let seconds = answers.iter().map(|answer| answer.decode.1).sum::<f64>();
        eprintln!(
            "{} tokens read at {prefill_tps:.0}/s, {:.0} % of their cache removed, {} held; {tokens} written at \
             {:.1}/s",
            read.context_tokens,
            100.0 * read.removed,
            megabytes(read.kv_bytes),
            tokens as f64 / seconds,
        );
    }
    Ok(())
}
