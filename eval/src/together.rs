//! Several methods on one model: a context is read once for all of them, and their answers are written side by side.

use crate::generate::Answer;
use crate::method::{Method, TorchPolicy, TorchScorer};
#[cfg(feature = "cuda")]
use crate::runner::card::QUESTION;
use crate::runner::sample_ids;
use crate::task::Sample;
use anyhow::Result;
use kvzap::{LayerInput, Policy, Scorer, Surrogate};
use models::{
    Branches, Cpu, Hooks, Model, Pruning, Sampler, Sampling, Specials, Turn, cache_shape,
};
#[cfg(feature = "cuda")]
use models::{TextRoom, text_cache};
use std::time::Instant;
use tch::{Device, Kind, Tensor};

/// Runs samples on a model, by the protocol of a [`Runner`](crate::Runner) and, on the CPU, to the last bit with its answers, at
/// the price of one reading.
#[derive(Debug)]
pub struct Together<'a> {
    /// Answers.
    pub model: &'a Model,
    /// Scores tokens, for the methods that need it.
    pub surrogate: Option<&'a Surrogate>,
    /// Forget, each in its own branch of the text.
    pub methods: Vec<Method>,
    /// The newest tokens that always stay.
    pub window: usize,
    /// Whether question and answer are pruned too.
    pub while_decoding: bool,
    /// The most tokens of an answer.
    pub limit: usize,
}

/// The most texts that are written side by side.
pub(crate) const MOST_TEXTS: usize = 64;

/// The most tokens that answers of one context should hold while they are written side by side, all methods together.
pub(crate) const IN_FLIGHT: usize = 1 << 14;

/// A context that every method has read and pruned.
#[derive(Debug)]
pub struct Shared<'a> {
    model: &'a Model,
    branches: Branches<'a>,
    /// What the template puts after a question.
    after: String,
    /// Of each method, all but the text and what it took.
    read: Vec<Answer>,
    marked: bool,
}

/// A question to one of the methods.
#[derive(Clone, Debug)]
pub struct Asked<'s> {
    /// The method, by its place.
    pub method: usize,
    /// What is asked; its context is the one that was read.
    pub sample: &'s Sample,
    /// How the answer is drawn.
    pub sampling: Sampling,
}

impl Together<'_> {
    /// Reads a sample's context, and prunes it as each method does.
    pub fn read(&self, sample: &Sample) -> Result<Shared<'_>> {
        let model = self.model;
        let (context, after) = sample_ids(model, sample)?;
        let turn = Turn::default();
        let hooks = Hooks::pruning(Pruning {
            scorer: Box::new(Ways::new(self, turn.clone())?),
            policy: Box::new(AsDecided),
            while_decoding: self.while_decoding,
        });
        let mut branches = self.branches(context.len(), hooks, turn)?;

        let start = Instant::now();
        branches.read(&context)?;
        let prefill_seconds = start.elapsed().as_secs_f64();
        let read = (0..self.methods.len()).map(|branch| {
            let usage = branches.usage(branch)?;
            Ok(Answer {
                context_tokens: context.len(),
                removed: usage.removed(),
                kv_bytes: usage.bytes,
                kept: branches
                    .kept(branch)?
                    .chunks(model.lm.config().kv_heads)
                    .map(<[_]>::to_vec)
                    .collect(),
                prefill_seconds,
                together: self.methods.len(),
                ..Answer::default()
            })
        });
        let read = read.collect::<Result<_>>()?;
        Ok(Shared { model, branches, after, read, marked: false })
    }

    fn branches(&self, context: usize, hooks: Hooks, turn: Turn) -> Result<Branches<'_>> {
        let Self { model: Model { lm, device, kind, .. }, methods, window, .. } = self;
        let ways = methods.len();
        if *device != Device::Cpu {
            return self.on_card(context, hooks, turn);
        }
        // For the longest text in each branch, as many copies of its pages, and answers; the memory grows as they are used.
        let room = 2 * (ways * lm.config().max_positions + IN_FLIGHT);
        let shape = cache_shape(lm.config(), room, *window, *kind)?;
        Ok(Branches::new(lm.as_ref(), Cpu::new(shape)?, ways, hooks, turn)?)
    }

    #[cfg(feature = "cuda")]
    fn on_card(&self, context: usize, hooks: Hooks, turn: Turn) -> Result<Branches<'_>> {
        let Self { model: Model { lm, device, kind, .. }, methods, window, .. } = self;
        let ways = methods.len();
        // In the mean over the ways, one of which may forget nothing.
        let whole = if methods.contains(&Method::Full) { context / ways } else { 0 };
        let room = TextRoom {
            ways,
            at_once: MOST_TEXTS,
            context,
            more: QUESTION + self.limit,
            least: whole.max(*window),
            window: *window,
            kind: *kind,
            stored: None,
        };
        let pool = text_cache(lm.config(), *device, room)?;
        Ok(Branches::new(lm.as_ref(), pool, ways, hooks, turn)?)
    }

    #[cfg(not(feature = "cuda"))]
    fn on_card(&self, _: usize, _: Hooks, _: Turn) -> Result<Branches<'_>> {
        anyhow::bail!("this longctx was built without the feature cuda; build it with it")
    }
}

impl Shared<'_> {
    /// Makes every question from now on the first, as [`Reading::mark`](crate::Reading::mark) does.
    pub fn mark(&mut self) -> Result<()> {
        self.marked = true;
        Ok(self.branches.mark()?)
    }

    /// Answers in at most `limit` tokens each, in the order of `asked`. Without [`mark`](Self::mark) every method must be
    /// asked once, in their order.
    pub fn answer(&mut self, asked: &[Asked<'_>], limit: usize) -> Result<Vec<Answer>> {
        let tokenizer = &self.model.tokenizer;
        let likely = asked.first().map_or("", |asked| &asked.sample.likelihood_of).to_owned();
        let mut nlls = vec![None; asked.len()];
        if !likely.is_empty() {
            if !self.marked {
                self.mark()?;
            }
            self.pose(asked)?;
            let tokens = tokenizer.encode(&likely, Specials::Text)?;
            let each = self.branches.log_likelihoods(&tokens, tokenizer.vocab_size())?;
            let mean = |each: Vec<f64>| Some(-each.iter().sum::<f64>() / each.len() as f64);
            nlls = each.into_iter().map(mean).collect();
        }
        self.pose(asked)?;
        let samplers = asked.iter().map(|asked| Sampler::new(asked.sampling.clone()));
        let mut samplers = samplers.collect::<models::Result<Vec<_>>>()?;
        let mut streams: Vec<_> = asked.iter().map(|_| tokenizer.stream()).collect();
        let mut texts = vec![String::new(); asked.len()];
        let start = Instant::now();
        let mut seconds = vec![0.0; asked.len()];
        let written = self.branches.generate(
            &mut samplers,
            &self.model.stop,
            tokenizer.vocab_size(),
            limit,
            &mut |branch, token| {
                texts[branch].extend(streams[branch].push(token));
                seconds[branch] = start.elapsed().as_secs_f64();
            },
        )?;
        let streams = streams.into_iter().zip(&mut texts);
        streams.for_each(|(stream, text)| text.extend(stream.finish()));
        let answers = asked.iter().zip(texts).zip(nlls).zip(written).zip(seconds);
        let answer = |((((asked, text), nll), written), seconds): (_, _)| {
            let asked: &Asked<'_> = asked;
            let written: models::Generated = written;
            let decode = (written.tokens.len(), seconds);
            Answer { text, nll, decode, ..self.read[asked.method].clone() }
        };
        Ok(answers.map(answer).collect())
    }

    fn pose(&mut self, asked: &[Asked<'_>]) -> Result<()> {
        if self.marked {
            let methods: Vec<usize> = asked.iter().map(|asked| asked.method).collect();
            self.branches.rewind(&methods)?;
        }
        for (branch, Asked { sample, .. }) in asked.iter().enumerate() {
            let question = [&*sample.question, &self.after, &sample.answer_prefix].concat();
            let question = self.model.tokenizer.encode(&question, Specials::Parse)?;
            self.branches.feed(branch, &question)?;
        }
        Ok(())
    }
}

/// The methods' decisions: of all when the text is read, later of the one whose turn it is. Each has a rule of its own, so
/// they are made where the scores are.
struct Ways {
    scorers: Vec<TorchScorer>,
    /// Of each method, its scorer's place and what decides by its scores; `None` keeps all.
    rules: Vec<Option<(usize, TorchPolicy)>>,
    turn: Turn,
}

impl Ways {
    fn new(
        Together { model, surrogate, methods, window, .. }: &Together<'_>,
        turn: Turn,
    ) -> Result<Self> {
        let mut ways = Self { scorers: Vec::new(), rules: Vec::new(), turn };
        let mut names = Vec::new();
        for method in methods {
            // Levels of one method, and KVzap with a threshold and with a budget, look at the same scores.
            let name = method.name().trim_end_matches("-budget");
            let place = match names.iter().position(|known| *known == name) {
                Some(place) => place,
                None => match method.scorer(model, *surrogate)? {
                    None => {
                        ways.rules.push(None);
                        continue;
                    }
                    Some(scorer) => {
                        names.push(name);
                        ways.scorers.push(scorer);
                        names.len() - 1
                    }
                },
            };
            ways.rules.push(Some((place, method.policy(*window)?)));
        }
        Ok(ways)
    }
}

impl Ways {
    /// What `way` drops, by scores that are made at most once.
    fn drops(
        &self,
        way: usize,
        input: LayerInput<'_, Tensor>,
        scored: &mut [Option<Tensor>],
    ) -> kvzap::Result<Tensor> {
        let Some((place, policy)) = &self.rules[way] else {
            let (texts, heads, tokens, _) = input.keys.size4()?;
            let kind = (Kind::Bool, input.keys.device());
            return Ok(Tensor::f_zeros([texts, heads, tokens], kind)?);
        };
        let scores = match &mut scored[*place] {
            Some(scores) => scores,
            none => none.insert(self.scorers[*place].score(input)?),
        };
        policy.drops(scores)
    }
}

impl Scorer<Tensor> for Ways {
    fn score(&self, input: LayerInput<'_, Tensor>) -> kvzap::Result<Tensor> {
        let mut scored: Vec<Option<Tensor>> = self.scorers.iter().map(|_| None).collect();
        if let Some(way) = self.turn.next() {
            return self.drops(way, input, &mut scored);
        }
        let all = (0..self.rules.len()).map(|way| self.drops(way, input, &mut scored));
        Ok(Tensor::f_cat(&all.collect::<kvzap::Result<Vec<_>>>()?, 0)?)
    }
}

/// Takes what [`Ways`] has decided.
struct AsDecided;

impl Policy<Tensor> for AsDecided {
    type Drops = Tensor;

    fn drops(&self, decided: &Tensor) -> kvzap::Result<Tensor> {
        Ok(decided.shallow_clone())
    }
}
