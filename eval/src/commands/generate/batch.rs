//! `longctx generate --batch`: many requests at once, answers in their order.

use super::lines::{self, Line};
use super::{Args, Forgetting, parts};
use crate::Method;
use crate::commands::{beside, megabytes, no_place, progress};
#[cfg(feature = "cuda")]
use crate::runner::card::gates;
use crate::runner::context_ids;
use anyhow::{Context, Result, bail, ensure};
use kvzap::Surrogate;
use models::engine::{CpuExecutor, End, Engine, Event, Request, Room, Totals};
use models::ranks::Rank;
#[cfg(feature = "cuda")]
use models::{CardExecutor, CardRoom, Dtype, Gates};
use models::{Hooks, Message, Model, RenderOptions, Sampling, Specials, Stop, Tokenizer};
use serde_json::{Value, json};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;
use tch::Device;

/// A file of requests, and how they run.
#[derive(clap::Args, Debug)]
pub struct BatchArgs {
    /// Answer every line of a file of JSON lines, many at once: {"prompt": …} or {"messages": […]}, and "question",
    /// "max_tokens", "temperature", "top_k", "top_p", "seed", "priority", "id" where they differ; `-` reads standard
    /// input
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt", "file", "question"])]
    batch: Option<PathBuf>,
    /// Where the answers of a batch go, a JSON object a line; standard output if left out
    #[arg(long, value_name = "FILE", requires = "batch")]
    output: Option<PathBuf>,
    /// Texts of a batch that are written at once, up to 64
    #[arg(long, value_name = "TEXTS", default_value_t = 16, requires = "batch")]
    at_once: usize,
    /// Gigabytes of keys and values of a batch; half of the free memory if left out, on a card all that a prompt leaves
    #[arg(long, value_name = "GB", requires = "batch")]
    memory: Option<f64>,
    /// Cards to cut the model over: its kv heads, and its MLP's width, must divide. On the CPU so many parts of host memory,
    /// which shows that they are the model and gains nothing
    #[arg(long, value_name = "CARDS", default_value_t = 1, requires = "batch")]
    cards: usize,
}

impl BatchArgs {
    pub fn file(&self) -> Option<&Path> {
        self.batch.as_deref()
    }

    fn bytes(&self) -> Result<Option<usize>> {
        match self.memory {
            Some(gigabytes) if gigabytes > 0.0 && gigabytes.is_finite() => {
                Ok(Some((gigabytes * 1e9) as usize))
            }
            Some(gigabytes) => bail!("--memory {gigabytes}: give more than 0 gigabytes"),
            None => Ok(None),
        }
    }
}

/// Answers all lines of `file`.
pub(super) fn run(args: &Args, file: &Path) -> Result<()> {
    let lines = lines::read(file)?;
    ensure!(
        !args.json || args.batch.output.is_some(),
        "--json with --batch: say by --output where the answers go"
    );
    let mut out = match &args.batch.output {
        Some(path) => Out::File(path, beside(path)?),
        None => Out::Standard,
    };
    let bytes = args.batch.bytes()?;
    let forgetting = Forgetting::of(args)?;
    let loaded = match args.batch.cards {
        1 => Loaded::Whole(Box::new(args.model.load()?)),
        cards => parts::load(&args.model, cards)?,
    };
    let requests = lines.iter().map(|(number, line)| {
        let request = request(args, loaded.first(), line);
        request.with_context(|| format!("{} line {number}", file.display()))
    });
    let requests = requests.collect::<Result<Vec<_>>>()?;
    let longest = requests.iter().map(|request| request.context.len()).max().unwrap_or(0);
    let method = forgetting.method(longest, args.window)?;
    let texts = requests
        .iter()
        .map(|request| request.context.len() + request.question.len() + request.limit);
    let work = Work { args, method, surrogate: forgetting.surrogate.as_ref(), bytes };
    let longest = texts.max().unwrap_or(1);
    let (engine, tokenizer) = match loaded {
        Loaded::Whole(model) if model.device == Device::Cpu => on_cpu(&work, *model)?,
        Loaded::Whole(model) => on_card(&work, *model, longest)?,
        Loaded::Parts(ranks, models) => parts::start(&work, ranks, models, longest)?,
    };

    let start = Instant::now();
    let bar = progress(requests.len() as u64, "answering");
    let mut answers = vec![Answer::default(); requests.len()];
    let mut next = 0;
    for (request, event) in engine.generate(requests) {
        match event {
            Event::Token(token) => answers[request].tokens.push(token),
            Event::End(end) => {
                answers[request].end = Some(end);
                bar.inc(1);
            }
        }
        while let Some(Answer { tokens, end: Some(end) }) = answers.get(next) {
            let (number, line) = &lines[next];
            let id = line.id.clone().unwrap_or_else(|| json!(number));
            out.write(&answer(&tokenizer, id, tokens, end)?)?;
            next += 1;
        }
    }
    bar.finish_and_clear();
    out.finish()?;
    let summary = Summary::new(&answers, engine.totals(), start.elapsed().as_secs_f64());
    if args.json {
        println!("{:#}", summary.json(method.name(), method.threshold(), args.model.json()));
    } else {
        eprintln!("{summary}");
    }
    ensure!(
        summary.failed == 0,
        "{} of {} requests failed; their lines say why",
        summary.failed,
        answers.len()
    );
    Ok(())
}

/// A model, or its parts, one for each rank.
pub(super) enum Loaded {
    Whole(Box<Model>),
    Parts(Vec<Rank>, Vec<Model>),
}

impl Loaded {
    /// What each part knows of the whole: template and tokenizer.
    fn first(&self) -> &Model {
        match self {
            Self::Whole(model) => model,
            Self::Parts(_, models) => &models[0],
        }
    }
}

/// What an engine is to do.
pub(super) struct Work<'a> {
    pub args: &'a Args,
    pub method: Method,
    /// Of the whole model, or of a part.
    pub surrogate: Option<&'a Surrogate>,
    /// Of keys and values on each device.
    pub bytes: Option<usize>,
}

impl Work<'_> {
    pub fn hooks(&self, model: &Model) -> Result<Hooks> {
        let Self { args, method, surrogate, .. } = self;
        let (mut hooks, _) =
            method.hooks(model, *surrogate, args.window, args.prune_while_decoding)?;
        hooks.protect = args.protect;
        Ok(hooks)
    }

    pub fn room_on_cpu(&self, model: &Model) -> Room {
        let free = || models::free_memory().map_or(1 << 30, |bytes| bytes / 2) as usize;
        Room {
            batch: self.args.batch.at_once,
            window: self.args.window,
            stored: self.args.cache_dtype.map(Into::into),
            vocabulary: model.tokenizer.vocab_size(),
            ..Room::new(model.lm.config(), self.bytes.unwrap_or_else(free))
        }
    }

    /// For texts of up to `longest` tokens.
    #[cfg(feature = "cuda")]
    pub fn room_on_card(&self, model: &Model, longest: usize) -> Result<CardRoom> {
        let at_once = self.args.batch.at_once;
        ensure!((1..=64).contains(&at_once), "--at-once {at_once}: give 1 to 64 texts");
        let stored = self.args.cache_dtype.map_or(Dtype::Bf16, Into::into);
        let (config, device) = (model.lm.config(), model.device);
        Ok(CardRoom {
            window: self.args.window,
            vocabulary: model.tokenizer.vocab_size(),
            ..CardRoom::new(config, device, at_once, longest, stored, self.bytes)?
        })
    }

    #[cfg(feature = "cuda")]
    pub fn gates(&self, model: &Model) -> Result<Option<Gates>> {
        Ok(gates(model, self.surrogate, &self.method, self.args.prune_while_decoding)?)
    }
}

/// An engine on the machine where the model lies, which it takes; and the model's tokenizer.
pub(super) type Started = Result<(Engine, Tokenizer)>;

fn on_cpu(work: &Work<'_>, model: Model) -> Started {
    let (hooks, room) = (work.hooks(&model)?, work.room_on_cpu(&model));
    let Model { lm, tokenizer, kind, .. } = model;
    let engine = Engine::builder().start(move || CpuExecutor::new(lm, kind, hooks, room))?;
    Ok((engine, tokenizer))
}

/// On a card every text gets what it gets alone, too: attention cuts each by its own length.
#[cfg(feature = "cuda")]
fn on_card(work: &Work<'_>, model: Model, longest: usize) -> Started {
    let (hooks, gates) = (work.hooks(&model)?, work.gates(&model)?);
    let room = work.room_on_card(&model, longest)?;
    let Model { lm, tokenizer, .. } = model;
    let make = move || CardExecutor::new(lm, hooks, gates.as_ref(), room);
    Ok((Engine::builder().start(make)?, tokenizer))
}

#[cfg(not(feature = "cuda"))]
fn on_card(_: &Work<'_>, _: Model, _: usize) -> Started {
    bail!("this longctx was built without the feature cuda; build it with it")
}

fn request(args: &Args, model: &Model, line: &Line) -> Result<Request> {
    let (context, question) = match (&line.prompt, &line.messages) {
        (Some(prompt), _) => {
            let (context, after) = context_ids(model, prompt)?;
            let question = [line.question.as_deref().unwrap_or_default(), &after].concat();
            (context, model.tokenizer.encode(&question, Specials::Parse)?)
        }
        (None, turns) => {
            let turns = turns.iter().flatten();
            let turn = |turn: &lines::Turn| Message {
                role: turn.role.clone(),
                content: turn.content.clone(),
            };
            let turns: Vec<_> = turns.map(turn).collect();
            let Some(template) = &model.template else {
                bail!("the model has no chat template for messages; give a prompt")
            };
            let options = RenderOptions { add_generation_prompt: true, ..RenderOptions::default() };
            let text = template.render(&turns, &options)?;
            (model.tokenizer.encode(&text, Specials::Parse)?, Vec::new())
        }
    };
    let own = args.sampling();
    Ok(Request {
        question,
        limit: line.max_tokens.unwrap_or(args.max_tokens),
        stop: model.stop.clone(),
        sampling: Sampling {
            temperature: line.temperature.unwrap_or(own.temperature),
            top_k: line.top_k.unwrap_or(own.top_k),
            top_p: line.top_p.unwrap_or(own.top_p),
            seed: line.seed.unwrap_or(own.seed),
        },
        priority: line.priority.unwrap_or(0),
        ..Request::new(context)
    })
}

#[derive(Clone, Default)]
struct Answer {
    tokens: Vec<u32>,
    end: Option<End>,
}

/// A line of the answers.
fn answer(tokenizer: &Tokenizer, id: Value, tokens: &[u32], end: &End) -> Result<Value> {
    let stop = match &end.stop {
        Ok(Stop::Token(_)) => "token",
        Ok(Stop::Length) => "length",
        Ok(Stop::Caller) => "cancelled",
        Err(error) => return Ok(json!({ "id": id, "error": error.to_string() })),
    };
    let usage = &end.usage;
    Ok(json!({
        "id": id,
        "text": tokenizer.decode(tokens, true)?,
        "stop": stop,
        "usage": {
            "context_tokens": usage.read + usage.shared,
            "shared_tokens": usage.shared,
            "question_tokens": usage.question,
            "new_tokens": usage.written,
            "removed": 1.0 - usage.held.rows as f64 / usage.held.dense_rows.max(1) as f64,
            "pages": usage.held.pages,
            "preemptions": usage.preemptions,
            "waited_seconds": usage.waited.as_secs_f64(),
            "first_token_seconds": usage.to_first.as_secs_f64(),
            "writing_seconds": usage.wrote.as_secs_f64(),
        },
    }))
}

/// Where answers go: a file that is there when all are.
enum Out<'a> {
    File(&'a Path, tempfile::NamedTempFile),
    Standard,
}

impl Out<'_> {
    fn write(&mut self, line: &Value) -> Result<()> {
        match self {
            Self::File(path, file) => writeln!(file, "{line}").with_context(|| no_place(path)),
            Self::Standard => writeln!(std::io::stdout(), "{line}")
                .context("cannot write the answers; is the pipe still open?"),
        }
    }

    fn finish(self) -> Result<()> {
        if let Self::File(path, file) = self {
            file.persist(path).with_context(|| no_place(path))?;
        }
        Ok(())
    }
}

/// What all requests took together.
struct Summary {
    requests: usize,
    failed: usize,
    written: usize,
    seconds: f64,
    totals: Totals,
    /// Of the ends, over their rows.
    removed: f64,
}

impl Summary {
    fn new(answers: &[Answer], totals: Totals, seconds: f64) -> Self {
        let ends = answers.iter().filter_map(|answer| answer.end.as_ref());
        let held = ends.clone().map(|end| end.usage.held);
        let (rows, dense) =
            held.fold((0, 0), |(rows, dense), held| (rows + held.rows, dense + held.dense_rows));
        Self {
            requests: answers.len(),
            failed: ends.clone().filter(|end| end.stop.is_err()).count(),
            written: ends.map(|end| end.usage.written).sum(),
            seconds,
            totals,
            removed: if dense == 0 { 0.0 } else { 1.0 - rows as f64 / dense as f64 },
        }
    }

    fn batch(&self) -> f64 {
        self.totals.stepped as f64 / self.totals.steps.max(1) as f64
    }

    fn json(&self, method: &str, threshold: Option<f32>, settings: Value) -> Value {
        json!({
            "requests": self.requests,
            "failed": self.failed,
            "method": method,
            "threshold": threshold,
            "read_tokens": self.totals.read,
            "new_tokens": self.written,
            "seconds": self.seconds,
            "tokens_per_second": self.written as f64 / self.seconds,
            "mean_batch": self.batch(),
            "removed": self.removed,
            "shared": self.totals.shared,
            "preemptions": self.totals.preemptions,
            "peak_suspended_bytes": self.totals.peak_suspended_bytes,
            "settings": settings,
        })
    }
}

impl std::fmt::Display for Summary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} requests in {:.1} s: {} tokens read, {} written at {:.1}/s, {:.1} texts a step, {:.0} % of their cache \
             removed",
            self.requests,
            self.seconds,
            self.totals.read,
            self.written,
            self.written as f64 / self.seconds,
            self.batch(),
            100.0 * self.removed,
        )?;
        let Totals { shared, preemptions, peak_suspended_bytes, .. } = self.totals;
        if shared > 0 {
            write!(f, "; {shared} found their prompt read")?;
        }
        if preemptions > 0 {
            let bytes = megabytes(peak_suspended_bytes);
            write!(f, "; {preemptions} times a text made room, {bytes} at once")?;
        }
        Ok(())
    }
}
