//! What is asked of a pruned context: the tokens of a right answer, or of the text that follows.

use super::Args;
use crate::commands::{facts, train::corpus::Corpus};
use crate::runner::context_ids;
use crate::{Ruler, Task, Texts, documents};
use anyhow::{Context, Result, ensure};
use models::{Model, Specials};

/// A context, a question, and the tokens that should follow.
pub struct Probe {
    /// What is read and pruned.
    pub context: Vec<u32>,
    /// How many of its tokens the chat template puts first.
    pub prefix: usize,
    /// What is read next; may be empty where `target` continues the context.
    pub question: Vec<u32>,
    /// What should follow.
    pub target: Vec<u32>,
    /// How.
    pub scored: Scored,
}

/// What a score is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scored {
    /// 1 if each token of the target is the likeliest after those before it, as a greedy answer would have it; else 0.
    Right,
    /// The mean negative logarithm of the target's probability, nats a token.
    Nats,
}

/// The samples of one task and length.
pub struct Probes<'a> {
    /// Its name.
    pub task: String,
    /// Tokens of a context, about.
    pub tokens: usize,
    /// How it is scored.
    pub scored: Scored,
    model: &'a Model,
    source: Source,
    seed: u64,
}

enum Source {
    /// One of RULER's tasks.
    Ruler(Box<Texts>, &'static str),
    /// The token ids of documents, in a row.
    Documents(Vec<Vec<u32>>),
    /// Noise for the tasks of `longctx facts`, which take turns.
    Facts(Corpus),
}

/// Tokens after the context whose perplexity is taken.
const CONTINUED: usize = 128;

impl<'a> Probes<'a> {
    /// The task called `task`, with contexts of about `tokens` tokens.
    pub fn open(args: &Args, model: &'a Model, task: &str, tokens: usize) -> Result<Self> {
        let ruler = |name| -> Result<Source> {
            let folder = args.texts.as_deref().context("RULER's tasks need --texts")?;
            Ok(Source::Ruler(Box::new(Texts::new(folder)), name))
        };
        let (scored, source) = match task {
            "perplexity" => {
                let path = args.documents.as_ref().context("perplexity needs --documents")?;
                let mut long = Vec::new();
                for text in documents(path)? {
                    let ids = model.tokenizer.encode(&text, Specials::Text)?;
                    if ids.len() >= tokens + CONTINUED {
                        long.push(ids);
                    }
                }
                ensure!(
                    long.len() as u64 >= args.samples,
                    "{} of the documents have {} tokens, --samples asks for {}; give more of them, or fewer --samples or --tokens",
                    long.len(),
                    tokens + CONTINUED,
                    args.samples
                );
                (Scored::Nats, Source::Documents(long))
            }
            "facts" => {
                let path = args.documents.as_ref().context("facts need --documents for noise")?;
                let config = model.lm.config();
                let end = model.stop.first().copied().or(config.bos_token).unwrap_or(0);
                let paths = std::slice::from_ref(path);
                let corpus = Corpus::read(paths, &model.tokenizer, end)?;
                corpus.at_least(tokens, paths)?;
                (Scored::Right, Source::Facts(corpus))
            }
            "answer-nll" => (Scored::Nats, ruler("qa_2")?),
            name => {
                let known = Ruler::names().find(|known| *known == name);
                let one = [
                    "niah_single_1",
                    "niah_single_2",
                    "niah_single_3",
                    "niah_multikey_1",
                    "niah_multikey_2",
                    "niah_multikey_3",
                ];
                let known = known.filter(|known| one.contains(known)).with_context(|| {
                    format!(
                        "no task is called {name}; there are {}, answer-nll, perplexity, facts",
                        one.join(", ")
                    )
                })?;
                (Scored::Right, ruler(known)?)
            }
        };
        Ok(Self { task: task.to_owned(), tokens, scored, model, source, seed: args.seed })
    }

    /// Sample `index`; the same index gives the same sample.
    pub fn sample(&self, index: u64) -> Result<Probe> {
        let tokenizer = &self.model.tokenizer;
        let scored = self.scored;
        let (texts, name) = match &self.source {
            Source::Ruler(texts, name) => (texts, name),
            Source::Facts(corpus) => {
                let passage =
                    facts::in_turn(corpus, tokenizer, self.tokens, self.seed, index as usize)?;
                let mut passage = passage.with_context(|| {
                    format!("no task's facts fit {} tokens; give more --tokens", self.tokens)
                })?;
                let asked = passage.answers.iter().filter(|answer| !**answer).count();
                let target = passage.ids.split_off(asked);
                let question = passage.ids.split_off(passage.before);
                return Ok(Probe { context: passage.ids, prefix: 0, question, target, scored });
            }
            Source::Documents(documents) => {
                let ids = &documents[index as usize];
                let (context, rest) = ids.split_at(self.tokens);
                let (question, target) = rest[..CONTINUED].split_at(1);
                let (context, question) = (context.to_vec(), question.to_vec());
                return Ok(Probe { context, prefix: 0, question, target: target.to_vec(), scored });
            }
        };
        let count = |text: &str| Ok(tokenizer.encode(text, Specials::Text)?.len());
        let ruler = Ruler::new(name, texts, &count, self.tokens, self.seed)?;
        let sample = ruler.sample(index).with_context(|| format!("{name} sample {index}"))?;
        let (context, after) = context_ids(self.model, &sample.context)?;
        // The template's own tokens; what merges with the text counts as text.
        let (empty, _) = context_ids(self.model, "")?;
        let prefix = empty.iter().zip(&context).take_while(|(a, b)| a == b).count();
        let question = [&*sample.question, &after, &sample.answer_prefix].concat();
        let question = tokenizer.encode(&question, Specials::Parse)?;
        let answer = sample.answers.first().context("a sample without an answer")?;
        let target = tokenizer.encode(&format!(" {answer}"), Specials::Text)?;
        Ok(Probe { context, prefix, question, target, scored })
    }
}
