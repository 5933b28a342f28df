//! A model and a way to forget, as something that answers.

use crate::generate::{Answer, Generate};
use crate::method::Method;
use crate::task::Sample;
use anyhow::Result;
use kvzap::Surrogate;
use models::{Cpu, Model, Paged, Sampler, Sampling, Session, Specials, cache_shape};
use std::ops::ControlFlow;
use std::time::Instant;

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
    /// Whether question and answer are pruned too.
    pub while_decoding: bool,
    /// The most tokens of an answer.
    pub limit: usize,
    /// How they are chosen.
    pub sampling: Sampling,
}

impl Runner<'_> {
    /// Answers, and hands out the text as it is written.
    pub fn answer(&self, sample: &Sample, each: &mut dyn FnMut(&str)) -> Result<Answer> {
        let Model { lm, tokenizer, template, .. } = self.model;
        let (context, after) = match template {
            Some(template) => template.around(&sample.context)?,
            None => (sample.context.clone(), "\n".to_owned()),
        };
        let context = tokenizer.encode(&context, Specials::Parse)?;
        let question = [sample.question.as_str(), &after, &sample.answer_prefix].concat();
        let question = tokenizer.encode(&question, Specials::Parse)?;

        let room = context.len() + question.len() + self.limit;
        let shape = cache_shape(lm.config(), room, self.window, self.model.kind)?;
        let cache = Paged::new(Cpu::new(shape)?)?;
        let (hooks, first_token) =
            self.method.hooks(self.model, self.surrogate, self.window, self.while_decoding)?;
        let mut session = Session::new(lm.as_ref(), self.model.device, cache, hooks);

        let start = Instant::now();
        session.feed(&context)?;
        let prefill_seconds = start.elapsed().as_secs_f64();
        let usage = session.cache().usage();
        let first_dropped = first_token.dropped();
        session.feed(&question)?;

        let mut stream = tokenizer.stream();
        let mut text = String::new();
        let mut push = |piece: String| {
            each(&piece);
            text.push_str(&piece);
        };
        let start = Instant::now();
        let generated = session.generate(
            &mut Sampler::new(self.sampling.clone())?,
            &self.model.stop,
            tokenizer.vocab_size(),
            self.limit,
            &mut |token| {
                stream.push(token).into_iter().for_each(&mut push);
                ControlFlow::Continue(())
            },
        )?;
        let decode_seconds = start.elapsed().as_secs_f64();
        stream.finish().into_iter().for_each(&mut push);
        Ok(Answer {
            text,
            context_tokens: context.len(),
            removed: usage.removed(),
            first_dropped,
            kv_bytes: usage.bytes,
            prefill_seconds,
            decode: (generated.tokens.len(), decode_seconds),
        })
    }
}

impl Generate for Runner<'_> {
    fn generate(&mut self, sample: &Sample) -> Result<Answer> {
        self.answer(sample, &mut |_| {})
    }
}
