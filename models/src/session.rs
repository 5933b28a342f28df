//! One text through one model: feed it tokens, let it continue.

use crate::cache::KvCache;
use crate::causal_lm::CausalLm;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::hooks::Hooks;
use crate::sampling::{Sampler, Sampling};
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use tch::{Device, Tensor};

/// A cache whose machine also takes steps by itself: one token through the whole model and the next one drawn, without the
/// model's own passes.
pub trait Steps: KvCache {
    /// Reads `token`, which must not be the first of the text, and draws the next.
    fn step(&mut self, token: u32, sampler: &mut Sampler) -> Result<u32>;

    /// The scores that the last step drew from, f32 `[vocabulary]`.
    fn scores(&self) -> Result<Vec<f32>>;
}

/// A model, what it has read so far, and what is forgotten on the way. Knows token ids only.
pub struct Session<'m> {
    model: &'m dyn CausalLm,
    device: Device,
    cache: Cache<'m>,
    hooks: Hooks,
    logits: Option<Vec<f32>>,
    /// Those at the mark.
    marked: Option<Vec<f32>>,
}

enum Cache<'m> {
    Plain(Box<dyn KvCache + 'm>),
    Stepping(Box<dyn Steps + 'm>),
}

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The model wrote a stop token; it is not among the tokens.
    Token(u32),
    /// The number of tokens asked for was reached.
    Length,
    /// The caller's function said so.
    Caller,
}

/// What a session wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generated {
    /// The tokens, without the stop token.
    pub tokens: Vec<u32>,
    /// Why there are no more.
    pub stop: Stop,
}

impl<'m> Session<'m> {
    /// A session with nothing read yet. `cache` must be empty.
    pub fn new(
        model: &'m dyn CausalLm,
        device: Device,
        cache: impl KvCache + 'm,
        hooks: Hooks,
    ) -> Self {
        let cache = Cache::Plain(Box::new(cache));
        Self { model, device, cache, hooks, logits: None, marked: None }
    }

    /// The same with a cache that takes its own steps, which must forget as `hooks` do.
    pub fn stepping(
        model: &'m dyn CausalLm,
        device: Device,
        cache: impl Steps + 'm,
        hooks: Hooks,
    ) -> Self {
        let cache = Cache::Stepping(Box::new(cache));
        Self { model, device, cache, hooks, logits: None, marked: None }
    }

    /// Reads `tokens`: the first call is the prefill, after which the cache is pruned; later calls see what
    /// was kept. Errors leave the session unusable.
    pub fn feed(&mut self, tokens: &[u32]) -> Result<()> {
        check(self.model.config(), self.cache().tokens(), tokens.len(), tokens)?;
        let ids: Vec<i64> = tokens.iter().map(|&id| i64::from(id)).collect();
        let input = Tensor::f_from_slice(&ids)?.f_to_device(self.device)?.f_unsqueeze(0)?;
        if tokens.len() == 1 { awake(|| self.forward(&input)) } else { self.forward(&input) }
    }

    fn forward(&mut self, input: &Tensor) -> Result<()> {
        let hidden = self.model.forward(input, self.cache.get_mut(), &self.hooks)?;
        let last = hidden.f_select(1, -1)?; // [1, hidden]: logits of the other tokens are of no use
        self.logits = Some(Vec::try_from(&self.model.logits(&last)?.f_reshape([-1])?)?);
        Ok(())
    }

    /// Remembers what was read so far, so that several questions can follow it: see [`rewind`](Self::rewind).
    pub fn mark(&mut self) -> Result<()> {
        self.cache.get_mut().mark()?;
        self.marked.clone_from(&self.logits);
        Ok(())
    }

    /// Goes back to the mark, as often as one likes: what was read until then is neither read nor pruned again.
    ///
    /// # Errors
    /// [`Error::NoMark`].
    pub fn rewind(&mut self) -> Result<()> {
        self.cache.get_mut().rewind()?;
        self.logits.clone_from(&self.marked);
        Ok(())
    }

    /// Continues the text by at most `limit` tokens, ending before any of `stop`.
    ///
    /// `vocabulary` bounds the ids that may be chosen: models pad their rows beyond the tokenizer. `each` is
    /// called with every token as it is chosen. The last token is chosen but not read.
    pub fn generate(
        &mut self,
        sampler: &mut Sampler,
        stop: &[u32],
        vocabulary: usize,
        limit: usize,
        each: &mut dyn FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Generated> {
        let (mut tokens, mut drawn) = (Vec::new(), None);
        let stop = loop {
            if tokens.len() == limit {
                break Stop::Length;
            }
            let token = match drawn.take() {
                Some(token) => token,
                None => {
                    let logits = self.logits.as_deref().ok_or(Error::EmptyPrompt)?;
                    sampler.sample(&logits[..vocabulary.min(logits.len())])?
                }
            };
            if stop.contains(&token) {
                break Stop::Token(token);
            }
            tokens.push(token);
            if each(token).is_break() {
                break Stop::Caller;
            }
            if tokens.len() < limit {
                drawn = self.step(token, sampler)?;
            }
        };
        self.hear()?;
        Ok(Generated { tokens, stop })
    }

    /// Fetches the scores that a machine drew from by itself.
    fn hear(&mut self) -> Result<()> {
        if let (Cache::Stepping(cache), None) = (&self.cache, &self.logits) {
            self.logits = Some(cache.scores()?);
        }
        Ok(())
    }

    /// Reads a token that was written. Where the machine draws the next one itself, it is returned, and its scores stay there.
    fn step(&mut self, token: u32, sampler: &mut Sampler) -> Result<Option<u32>> {
        let Cache::Stepping(cache) = &mut self.cache else {
            return self.feed(&[token]).map(|()| None);
        };
        check(self.model.config(), cache.tokens(), 1, &[token])?;
        self.logits = None;
        cache.step(token, sampler).map(Some)
    }

    /// Reads `tokens`, and says of each the natural logarithm of the probability that it had, of the ids under
    /// `vocabulary`, as the next. Something must have been read before.
    pub fn log_likelihoods(&mut self, tokens: &[u32], vocabulary: usize) -> Result<Vec<f64>> {
        let mut found = Vec::with_capacity(tokens.len());
        let mut greedy = Sampler::new(Sampling::default())?;
        for &token in tokens {
            let logits = self.logits.as_deref().ok_or(Error::EmptyPrompt)?;
            found.push(log_probability(logits, vocabulary, token)?);
            if self.step(token, &mut greedy)?.is_some() {
                self.hear()?;
            }
        }
        Ok(found)
    }

    /// The scores of the next token, `[vocabulary]`, once something was read.
    pub fn logits(&self) -> Option<&[f32]> {
        self.logits.as_deref()
    }

    /// The cache, for what it holds.
    pub fn cache(&self) -> &dyn KvCache {
        match &self.cache {
            Cache::Plain(cache) => cache.as_ref(),
            Cache::Stepping(cache) => cache.as_ref(),
        }
    }
}

impl<'m> Cache<'m> {
    fn get_mut(&mut self) -> &mut (dyn KvCache + 'm) {
        match self {
            Self::Plain(cache) => cache.as_mut(),
            Self::Stepping(cache) => cache.as_mut(),
        }
    }
}

impl std::fmt::Debug for Session<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("tokens", &self.cache().tokens())
            .field("usage", &self.cache().usage())
            .finish_non_exhaustive()
    }
}

/// That a text which has read `read` tokens can read `more`, and that the model has `ids`.
pub(crate) fn check(config: &Config, read: usize, more: usize, ids: &[u32]) -> Result<()> {
    if more == 0 {
        return Err(Error::EmptyPrompt);
    }
    let (wanted, limit) = (read + more, config.max_positions);
    if wanted > limit {
        return Err(Error::ContextTooLong { wanted, limit });
    }
    match ids.iter().find(|&&id| id as usize >= config.vocab_size) {
        Some(&id) => Err(Error::UnknownToken { id, vocabulary: config.vocab_size }),
        None => Ok(()),
    }
}

/// The natural logarithm of the probability of `token` among the ids under `vocabulary`.
pub(crate) fn log_probability(logits: &[f32], vocabulary: usize, token: u32) -> Result<f64> {
    let logits = &logits[..vocabulary.min(logits.len())];
    let Some(&own) = logits.get(token as usize) else {
        return Err(Error::UnknownToken { id: token, vocabulary: logits.len() });
    };
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - highest).exp()).sum();
    Ok(f64::from(own - highest) - sum.ln())
}

/// Runs `work` while rayon's threads look for its tasks without falling asleep: a decode step has some 200 of them, each
/// shorter than the waking of a thread.
pub(crate) fn awake<R>(work: impl FnOnce() -> R) -> R {
    struct Done<'a>(&'a AtomicBool);
    impl Drop for Done<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed); // also when `work` panics, for which the scope would wait
        }
    }
    let done = AtomicBool::new(false);
    rayon::in_place_scope(|scope| {
        let _done = Done(&done);
        for _ in 1..rayon::current_num_threads() {
            scope.spawn(|_| {
                while !done.load(Ordering::Relaxed) {
                    if rayon::yield_now() != Some(rayon::Yield::Executed) {
                        std::hint::spin_loop();
                    }
                }
            });
        }
        work()
    })
}
