//! From the command's words to suites of tasks.

use crate::fnv;
use crate::metrics::BoxRule;
use crate::records;
use crate::results::{Settings, Summary};
use crate::suite::Suite;
use crate::{
    Aime, Haystack, InfiniteBench, LongBench, LongBenchV2, Needle, NoisyQa, Published, Ruler,
    Sample, SharedContext, Task, Texts,
};
use anyhow::{Context, Result, bail, ensure};
use models::{Model, Specials};
use serde_json::{Value, json};
use std::path::PathBuf;

/// Which benchmarks, and their data.
#[derive(clap::Args, Debug)]
pub struct DataArgs {
    /// Which benchmarks
    #[arg(long, value_enum, num_args = 1.., value_delimiter = ',', default_values = ["ruler"])]
    task: Vec<TaskName>,
    /// Of their tasks only these
    #[arg(long, num_args = 1.., value_delimiter = ',', value_name = "NAME")]
    only: Vec<String>,
    /// Essays, questions and words, as `cargo xtask fetch` leaves them
    #[arg(long, value_name = "FOLDER", default_value_os_t = texts_folder())]
    texts: PathBuf,
    /// Published samples, JSON lines or parquet, a file or a folder: LongBench's, AIME's, and RULER's instead of new ones
    #[arg(long, value_name = "PATH")]
    data: Option<PathBuf>,
    /// The most tokens of a prompt and its answer, where prompts are made
    #[arg(long, default_value_t = 2048)]
    tokens: usize,
    /// Samples of each task, at most
    #[arg(long, default_value_t = 20)]
    pub samples: u64,
    /// Of the samples and of chance
    #[arg(long, default_value_t = 42)]
    pub seed: u64,
    /// Of a published context that is longer than the model's: nothing (the run stops), kvpress's beginning, or
    /// LongBench's two ends
    #[arg(long, value_enum, default_value = "none")]
    cut: Cut,
    /// Depths of needles, in percent
    #[arg(long, num_args = 1.., value_delimiter = ',', default_values_t = [0, 25, 50, 75, 100])]
    depth: Vec<usize>,
    /// Distractors around the paragraphs that answer a noisy question
    #[arg(long, num_args = 1.., value_delimiter = ',', default_values_t = [0, 3, 8])]
    distractors: Vec<usize>,
    /// Where these paragraphs stand among them, from 0 to 1
    #[arg(long, num_args = 1.., value_delimiter = ',', default_values_t = [0.0, 0.5, 1.0])]
    place: Vec<f64>,
    /// Questions about a shared context
    #[arg(long, default_value_t = 5)]
    questions: u64,
    /// Rollouts of each AIME problem
    #[arg(long, default_value_t = 4)]
    rollouts: u64,
    /// Which version of kvpress finds AIME's answers
    #[arg(long, value_enum, default_value = "0.5.5")]
    boxed: BoxRule,
    /// Compare AIME's answers as integers, not as strings
    #[arg(long)]
    integers: bool,
}

/// A benchmark.
#[derive(Clone, Copy, Debug, PartialEq, clap::ValueEnum)]
pub enum TaskName {
    Ruler,
    Needle,
    NoisyQa,
    SharedContext,
    Longbench,
    LongbenchV2,
    Infinitebench,
    Aime25,
}

#[derive(Clone, Copy, Debug, PartialEq, clap::ValueEnum)]
enum Cut {
    None,
    End,
    Middle,
}

/// What tasks borrow.
pub struct Material {
    texts: Texts,
    haystack: Option<Haystack>,
}

impl DataArgs {
    /// Reads what all tasks share.
    pub fn open(&self) -> Result<Material> {
        ensure!(self.samples > 0, "--samples 0 asks nothing; give 1 or more");
        let essays = self.texts.join("PaulGrahamEssays.json");
        let needle = self.task.contains(&TaskName::Needle);
        let advice =
            || "the needle needs essays: `cargo xtask fetch` gets them, or give --texts FOLDER";
        let haystack = needle.then(|| Haystack::load(&essays)).transpose().with_context(advice)?;
        Ok(Material { texts: Texts::new(&self.texts), haystack })
    }

    /// The suites, each a folder of results.
    pub fn suites<'a>(
        &'a self,
        material: &'a Material,
        count: &'a dyn Fn(&str) -> Result<usize>,
    ) -> Result<Vec<Suite<'a>>> {
        let mut suites = Vec::new();
        for name in &self.task {
            suites.extend(self.suite(*name, material, count)?);
        }
        for suite in &mut suites {
            suite.tasks.retain(|task| {
                self.only.is_empty() || self.only.iter().any(|only| only == task.name())
            });
        }
        suites.retain(|suite| !suite.tasks.is_empty());
        ensure!(
            !suites.is_empty(),
            "no task is named {}; see longctx eval --list",
            self.only.join(" or ")
        );
        Ok(suites)
    }

    fn suite<'a>(
        &'a self,
        name: TaskName,
        Material { texts, haystack }: &'a Material,
        count: &'a dyn Fn(&str) -> Result<usize>,
    ) -> Result<Vec<Suite<'a>>> {
        let (tokens, seed) = (self.tokens, self.seed);
        let one = |dataset: &str, data_dir: String, summary, tasks: Vec<Box<dyn Task + 'a>>| {
            let source = match name {
                TaskName::LongbenchV2 | TaskName::Aime25 | TaskName::Ruler => self.data.clone(),
                _ => None,
            };
            Ok(vec![Suite { dataset: dataset.to_owned(), data_dir, source, tasks, summary }])
        };
        let published = |what: &str| {
            let data = self.data.as_deref();
            data.with_context(|| format!("{what} is read from published files: give --data PATH"))
        };
        let length = tokens.to_string();
        match name {
            TaskName::Ruler => {
                if let Some(path) = &self.data {
                    let tasks = Published::load(path)?.into_iter().map(|task| Box::new(task) as _);
                    return one(
                        "ruler",
                        records::name(path),
                        Summary::StringMatch,
                        tasks.collect(),
                    );
                }
                let task = |name| Ok(Box::new(Ruler::new(name, texts, count, tokens, seed)?) as _);
                let tasks = Ruler::names().map(task).collect::<Result<_>>()?;
                one("ruler", length, Summary::StringMatch, tasks)
            }
            TaskName::Needle => {
                let Some(haystack) = haystack else { bail!("the needle needs essays") };
                let task = |&depth: &usize| {
                    Box::new(Needle::at_depth(haystack, count, tokens, seed, depth)) as _
                };
                one("needle", length, Summary::StringMatch, self.depth.iter().map(task).collect())
            }
            TaskName::NoisyQa => {
                let mut tasks: Vec<Box<dyn Task + 'a>> = Vec::new();
                for &distractors in &self.distractors {
                    for &place in &self.place {
                        ensure!((0.0..=1.0).contains(&place), "--place {place} is not from 0 to 1");
                        // Without distractors every place is the same.
                        if distractors > 0 || tasks.is_empty() {
                            tasks.push(Box::new(NoisyQa::new(texts, distractors, place, seed)));
                        }
                    }
                }
                one("noisy_qa", String::new(), Summary::StringMatch, tasks)
            }
            TaskName::SharedContext => {
                let task = SharedContext::new(texts, count, tokens, self.questions, seed);
                one("shared_context", length, Summary::StringMatch, vec![Box::new(task)])
            }
            TaskName::Longbench => {
                let suite = |set: &PathBuf| {
                    let task = LongBench::load(set)?;
                    let (dataset, summary) = match task.is_even() {
                        true => ("longbench-e", Summary::Lengths),
                        false => ("longbench", Summary::Number),
                    };
                    Ok(Suite {
                        dataset: dataset.to_owned(),
                        data_dir: task.name().to_owned(),
                        source: Some(set.clone()),
                        tasks: vec![Box::new(task)],
                        summary,
                    })
                };
                records::sets(published("LongBench")?)?.iter().map(suite).collect()
            }
            TaskName::LongbenchV2 => {
                let task = LongBenchV2::load(published("LongBench-v2")?)?;
                one("longbench-v2", "0shot".to_owned(), Summary::Groups, vec![Box::new(task)])
            }
            TaskName::Infinitebench => {
                let suite = |set: &PathBuf| {
                    let task = InfiniteBench::load(set)?;
                    Ok(Suite {
                        dataset: "infinitebench".to_owned(),
                        data_dir: task.name().to_owned(),
                        source: Some(set.clone()),
                        tasks: vec![Box::new(task)],
                        summary: Summary::Share,
                    })
                };
                records::sets(published("InfiniteBench")?)?.iter().map(suite).collect()
            }
            TaskName::Aime25 => {
                let task =
                    Aime::load(published("AIME25")?, self.rollouts, self.boxed, self.integers)?;
                one("aime25", String::new(), Summary::Rollouts, vec![Box::new(task)])
            }
        }
    }

    /// What decides a suite's samples and scores.
    pub fn settings(&self, suite: &Suite<'_>) -> Result<Settings> {
        let mut settings = Settings::new();
        let mut set = |name: &str, value: Value| settings.insert(name.to_owned(), value);
        set("dataset", suite.dataset.clone().into());
        set("data_dir", suite.data_dir.clone().into());
        set("seed", self.seed.into());
        if let Some(source) = &suite.source {
            set("data_files", fnv::fingerprint_of(&records::files(source)?)?.into());
            set("cut", self.cut_name().into());
        } else {
            let texts = Texts::FILES.map(|name| self.texts.join(name));
            let there: Vec<PathBuf> = texts.into_iter().filter(|path| path.is_file()).collect();
            set("texts_files", fnv::fingerprint_of(&there)?.into());
        }
        if suite.source.is_none() && suite.dataset != "noisy_qa" {
            set("tokens", self.tokens.into());
        }
        match suite.dataset.as_str() {
            "shared_context" => set("questions", self.questions.into()),
            "aime25" => {
                set("thinking", true.into());
                set("scoring", json!([self.rollouts, format!("{:?}", self.boxed), self.integers]))
            }
            _ => None,
        };
        Ok(settings)
    }

    /// Parts of a folder's name that kvpress adds where something is unusual.
    pub fn unusual(&self) -> Vec<String> {
        Vec::new()
    }

    pub fn cut_name(&self) -> &'static str {
        match self.cut {
            Cut::None => "none",
            Cut::End => "end",
            Cut::Middle => "middle",
        }
    }

    /// A context that is longer than the model's, with question and answer, cut to fit; `None` if it fits.
    pub fn cut(
        &self,
        suite: &Suite<'_>,
        sample: &Sample,
        limit: usize,
        model: &Model,
    ) -> Result<Option<String>> {
        let encode = |text: &str| model.tokenizer.encode(text, Specials::Parse);
        let most = model.lm.config().max_positions;
        let context = encode(&sample.context)?;
        let question = encode(&sample.question)?.len() + encode(&sample.answer_prefix)?.len();
        let template = 64;
        // As many tokens of the answer as a quarter of the context holds; a model that writes longer ones stops there.
        let room = most.saturating_sub(question + template + limit.min(most / 4));
        if context.len() <= room {
            return Ok(None);
        }
        ensure!(
            suite.source.is_some(),
            "its context has {} tokens, the model has room for {room}; give a smaller --tokens",
            context.len()
        );
        let decode = |tokens: &[u32]| model.tokenizer.decode(tokens, false);
        Ok(Some(match self.cut {
            Cut::End => decode(&context[..room])?,
            Cut::Middle => {
                let half = room / 2;
                decode(&context[..half])? + &decode(&context[context.len() - half..])?
            }
            Cut::None => bail!(
                "its context has {} tokens, the model has room for {room}; give --cut end (kvpress's way) or --cut middle \
                 (LongBench's)",
                context.len()
            ),
        }))
    }
}

/// Where `cargo xtask fetch` puts texts.
pub fn texts_folder() -> PathBuf {
    cache().join("data")
}

/// The cache of `cargo xtask`.
pub fn cache() -> PathBuf {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("LONGCTX_CACHE")
        .or_else(|| Some(set("XDG_CACHE_HOME")?.join("longctx")))
        .or_else(|| Some(set("HOME")?.join(".cache/longctx")))
        .unwrap_or_default()
}
