//! A model and a way to forget, as something that answers.

#[cfg(feature = "cuda")]
pub(crate) mod card;

use crate::generate::{Answer, Generate};
use crate::method::Method;
use crate::task::Sample;
use anyhow::Result;
use kvzap::Surrogate;
use models::{Cpu, Dtype, Hooks, Model, Paged, Sampler, Sampling, Session, Specials, cache_shape};
use std::ops::ControlFlow;
use std::time::Instant;
use tch::Device;

/// Runs samples on a model.
///
/// The protocol is kvpress's: the context is read and pruned before the question is seen, context and question
/// are tokenised apart, and the answer prefix stands after the assistant header.
#[derive(Debug)]
pub struct Runner<'a> {
    /// Answers.
    pub model: &'a Model,
    /// Scores tokens, for the methods that need it.
    pub surrogate: Option<&'a Surrogate>,
    /// Forgets.
    pub method: Method,
    /// The newest tokens that always stay.
    pub window: usize,
    /// The first tokens that always stay.
    pub protect: usize,
    /// What keys and values are stored as; the model's dtype if `None`.
    pub stored: Option<Dtype>,
    /// Whether question and answer are pruned too.
    pub while_decoding: bool,
    /// The most tokens of an answer.
    pub limit: usize,
    /// How they are chosen.
    pub sampling: Sampling,
}

/// A context that is read and pruned, to be asked about.
#[derive(Debug)]
pub struct Reading<'a> {
    runner: &'a Runner<'a>,
    session: Session<'a>,
    /// What the template puts after a question.
    after: String,
    /// All but the text and what it took.
    read: Answer,
    /// Why steps on a card go through libtorch, if they do.
    slow: Option<String>,
    marked: bool,
}

/// The ids of a context, what the chat template puts before it included, and what the template puts after a question.
pub(crate) fn context_ids(model: &Model, context: &str) -> Result<(Vec<u32>, String)> {
    sample_ids(model, &Sample { context: context.to_owned(), ..Sample::default() })
}

/// The same of a sample's context.
pub(crate) fn sample_ids(model: &Model, sample: &Sample) -> Result<(Vec<u32>, String)> {
    let context = &sample.context;
    let (context, after) = match &model.template {
        Some(template) if sample.thinking => template.around_thinking(context)?,
        Some(template) => template.around(context)?,
        // A template brings a BOS of its own.
        None => return Ok((model.tokenizer.encode_prompt(context)?, "\n".to_owned())),
    };
    Ok((model.tokenizer.encode(&context, Specials::Parse)?, after))
}

impl Runner<'_> {
    /// A session for a text that begins with `context` tokens, and why its steps on a card don't run in a graph.
    fn session(&self, hooks: Hooks, context: usize) -> Result<(Session<'_>, Option<String>)> {
        let Model { lm, device, kind, .. } = self.model;
        if *device != Device::Cpu {
            return self.on_card(hooks, context);
        }
        // For the longest text and as many copies of its pages; the memory grows as they are used.
        let room = 2 * lm.config().max_positions;
        let mut shape = cache_shape(lm.config(), room, self.window, *kind)?;
        shape.dtype = self.stored.unwrap_or(shape.dtype);
        let cache = Paged::new(Cpu::new(shape)?)?;
        Ok((Session::new(lm.as_ref(), *device, cache, hooks), None))
    }

    #[cfg(not(feature = "cuda"))]
    fn on_card(&self, _: Hooks, _: usize) -> Result<(Session<'_>, Option<String>)> {
        anyhow::bail!("this longctx was built without the feature cuda; build it with it")
    }

    /// Reads a context and prunes it.
    pub fn read(&self, context: &str) -> Result<Reading<'_>> {
        self.read_sample(&Sample { context: context.to_owned(), ..Sample::default() })
    }

    /// Reads a sample's context and prunes it.
    pub fn read_sample(&self, sample: &Sample) -> Result<Reading<'_>> {
        let (context, after) = sample_ids(self.model, sample)?;
        let (mut hooks, first_token) =
            self.method.hooks(self.model, self.surrogate, self.window, self.while_decoding)?;
        hooks.protect = self.protect;
        let (mut session, slow) = self.session(hooks, context.len())?;

        let start = Instant::now();
        session.feed(&context)?;
        let prefill_seconds = start.elapsed().as_secs_f64();
        let usage = session.cache().usage();
        let read = Answer {
            context_tokens: context.len(),
            removed: usage.removed(),
            first_dropped: first_token.dropped(),
            kv_bytes: usage.bytes,
            prefill_seconds,
            ..Answer::default()
        };
        Ok(Reading { runner: self, session, after, read, slow, marked: false })
    }
}

impl Reading<'_> {
    /// What is known before a question: how long the context is, and what is left of it. Without a text.
    pub fn read(&self) -> &Answer {
        &self.read
    }

    /// Why steps on a card go through libtorch's launches and not a graph, if they do.
    pub fn slow(&self) -> Option<&str> {
        self.slow.as_deref()
    }

    /// Makes every question from now on the first: for several of them, at the price of copies of the pages that their
    /// answers write to.
    pub fn mark(&mut self) -> Result<()> {
        self.marked = true;
        Ok(self.session.mark()?)
    }

    /// Answers a question about the context, and hands out the text as it is written. Without [`mark`](Self::mark) a second
    /// question follows the first one's answer.
    pub fn ask(
        &mut self,
        question: &str,
        answer_prefix: &str,
        each: &mut dyn FnMut(&str),
    ) -> Result<Answer> {
        let Runner { limit, sampling, .. } = self.runner;
        self.pose(question, answer_prefix)?;
        self.write(*limit, sampling, each)
    }

    /// Answers a sample of this context in at most `limit` tokens, and says how likely the answer is that it asks about.
    pub fn answer(&mut self, sample: &Sample, limit: usize, sampling: &Sampling) -> Result<Answer> {
        let tokenizer = &self.runner.model.tokenizer;
        let mut nll = None;
        if !sample.likelihood_of.is_empty() {
            if !self.marked {
                self.mark()?;
            }
            self.pose(&sample.question, &sample.answer_prefix)?;
            let tokens = tokenizer.encode(&sample.likelihood_of, Specials::Text)?;
            let each = self.session.log_likelihoods(&tokens, tokenizer.vocab_size())?;
            nll = Some(-each.iter().sum::<f64>() / each.len() as f64);
        }
        self.pose(&sample.question, &sample.answer_prefix)?;
        Ok(Answer { nll, ..self.write(limit, sampling, &mut |_| {})? })
    }

    fn pose(&mut self, question: &str, answer_prefix: &str) -> Result<()> {
        if self.marked {
            self.session.rewind()?;
        }
        let question = [question, &self.after, answer_prefix].concat();
        Ok(self.session.feed(&self.runner.model.tokenizer.encode(&question, Specials::Parse)?)?)
    }

    fn write(
        &mut self,
        limit: usize,
        sampling: &Sampling,
        each: &mut dyn FnMut(&str),
    ) -> Result<Answer> {
        let model = self.runner.model;
        let tokenizer = &model.tokenizer;
        let mut stream = tokenizer.stream();
        let mut text = String::new();
        let mut push = |piece: String| {
            each(&piece);
            text.push_str(&piece);
        };
        let start = Instant::now();
        let generated = self.session.generate(
            &mut Sampler::new(sampling.clone())?,
            &model.stop,
            tokenizer.vocab_size(),
            limit,
            &mut |token| {
                stream.push(token).into_iter().for_each(&mut push);
                ControlFlow::Continue(())
            },
        )?;
        let decode_seconds = start.elapsed().as_secs_f64();
        stream.finish().into_iter().for_each(&mut push);
        let decode = (generated.tokens.len(), decode_seconds);
        Ok(Answer { text, decode, ..self.read.clone() })
    }
}

impl Generate for Runner<'_> {
    fn generate(&mut self, sample: &Sample) -> Result<Answer> {
        let limit = if sample.max_new_tokens > 0 { sample.max_new_tokens } else { self.limit };
        self.read_sample(sample)?.answer(sample, limit.min(self.limit), &self.sampling)
    }
}
