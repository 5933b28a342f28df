//! A machine of the scheduler's on the CPU.

use super::executor::{Drawn, Executor, Held, Limits, TextId};
use crate::bridge;
use crate::causal_lm::{CausalLm, Pass, Whose};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::hooks::Hooks;
use crate::layers::FEW;
use crate::memory;
use crate::paged::{attend, cache_shape};
use crate::sampling::{Sampler, Sampling};
use crate::session::awake;
use paged_kernels::{Cpu, Dtype, HostSuspended, PagedAttention, Sequence};
use std::collections::BTreeMap;
use tch::{Kind, Tensor};

/// What a [`CpuExecutor`] has room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Bytes of keys and values at once. Memory is taken as pages are used.
    pub bytes: usize,
    /// Texts in one step, up to 64.
    pub batch: usize,
    /// Tokens of a text, read and written; no more than the model was made for.
    pub tokens: usize,
    /// The newest tokens, which always stay.
    pub window: usize,
    /// What keys and values are stored as, if not as the model's dtype.
    pub stored: Option<Dtype>,
    /// Ids that may be drawn: models pad their rows beyond the tokenizer.
    pub vocabulary: usize,
}

impl Room {
    /// For up to 16 texts of any length that `config` allows, in `bytes` bytes of keys and values.
    pub fn new(config: &Config, bytes: usize) -> Self {
        Self {
            bytes,
            batch: 16,
            tokens: config.max_positions,
            window: kvzap::WINDOW,
            stored: None,
            vocabulary: config.vocab_size,
        }
    }
}

/// A model on the CPU, over pages in host memory.
///
/// A step multiplies each weight with the rows of all its texts at once, so that it is read once for all of them. In f32
/// no row's bits depend on the others: each text gets exactly the tokens that it gets alone. In bf16 libtorch chooses its
/// sums by the number of rows, and a near tie may fall otherwise. A context is read a few layers at a time, a question at
/// once.
///
/// Tokens that come after the context are scored one text at a time, so any scorer may prune while decoding.
pub struct CpuExecutor {
    lm: Box<dyn CausalLm>,
    hooks: Hooks,
    room: Room,
    backend: Cpu,
    texts: BTreeMap<TextId, Text>,
    begun: u64,
    drawn: Vec<Drawn>,
}

#[derive(Debug)]
struct Text {
    place: Place,
    /// Tokens that are read.
    tokens: usize,
    reading: Option<Reading>,
    /// Of the next token, once all is read and until one is drawn: f32 `[vocabulary]`.
    scores: Option<Tensor>,
    sampler: Option<Sampler>,
    last: u32,
}

#[derive(Debug)]
enum Place {
    Pool(Sequence),
    Away(HostSuspended),
}

#[derive(Debug)]
struct Reading {
    tokens: Vec<u32>,
    /// Of a context: how far it has come, and how many layers it has passed.
    pass: Option<(Pass, usize)>,
}

impl CpuExecutor {
    /// `lm`, in `kind` on the CPU, with pages for `room` and what `hooks` forgets.
    ///
    /// # Errors
    /// [`Error::Room`] for a batch of no or too many texts, and for pages that do not hold one token; [`Error::Memory`] for more
    /// than there is memory for.
    pub fn new(lm: Box<dyn CausalLm>, kind: Kind, hooks: Hooks, room: Room) -> Result<Self> {
        let config = lm.config();
        let wrong = |field, found, advice| Err(Error::Room { field, found, advice });
        if !(1..=FEW).contains(&room.batch) {
            return wrong("batch", room.batch, "give 1 to 64 texts");
        }
        let mut shape = cache_shape(config, 1, room.window, kind)?;
        shape.dtype = room.stored.unwrap_or(shape.dtype);
        let least = shape.pages * shape.page_bytes();
        if room.bytes < least {
            return wrong("bytes", room.bytes, "give enough for a page a head and layer");
        }
        memory::check("pages", room.bytes as u64)?;
        shape.pages = room.bytes / shape.page_bytes();
        let room = Room {
            tokens: room.tokens.min(config.max_positions),
            vocabulary: room.vocabulary.min(config.vocab_size),
            ..room
        };
        let backend = Cpu::new(shape)?;
        Ok(Self { lm, hooks, room, backend, texts: BTreeMap::new(), begun: 0, drawn: Vec::new() })
    }

    /// The pages, for their statistics.
    pub fn backend(&self) -> &Cpu {
        &self.backend
    }

    fn text(&self, text: TextId) -> Result<&Text> {
        self.texts.get(&text).ok_or(Error::UnknownText { text: text.0 })
    }

    fn text_mut(&mut self, text: TextId) -> Result<&mut Text> {
        self.texts.get_mut(&text).ok_or(Error::UnknownText { text: text.0 })
    }

    fn sequence(&self, text: TextId, call: &'static str) -> Result<Sequence> {
        match self.text(text)?.place {
            Place::Pool(sequence) => Ok(sequence),
            Place::Away(_) => {
                Err(Error::TextState { text: text.0, call, state: "it is suspended" })
            }
        }
    }

    fn insert(&mut self, text: Text) -> TextId {
        self.begun += 1;
        self.texts.insert(TextId(self.begun), text);
        TextId(self.begun)
    }

    /// Pages that the next `tokens` tokens of a text take.
    fn wanted(&self, text: TextId, tokens: usize) -> usize {
        let sequence = self.sequence(text, "step");
        let wanted =
            sequence.and_then(|sequence| Ok(self.backend.wanted(&[(sequence, tokens)])?));
        wanted.unwrap_or(0)
    }

    /// Through `layers` of the model; of a context, those of `first` are filled.
    fn run(
        &mut self,
        pass: &mut Pass,
        layers: std::ops::Range<usize>,
        first: Option<Sequence>,
    ) -> Result<()> {
        let Self { lm, hooks, room, backend, .. } = self;
        for layer in layers {
            lm.layer(layer, pass, hooks, room.window, &mut |queries, keys, values, drops| {
                attend(backend, first, layer, queries, keys, values, drops)
            })?;
        }
        Ok(())
    }

    /// One step of `batch`, and the scores of the tokens that follow, `[texts, vocabulary]`.
    fn pass(&mut self, batch: &[TextId]) -> Result<Tensor> {
        let sequences = batch.iter().map(|&text| Ok((self.sequence(text, "step")?, 1)));
        let sequences = sequences.collect::<Result<Vec<_>>>()?;
        let texts = batch.iter().map(|&text| self.text(text)).collect::<Result<Vec<_>>>()?;
        let last: Vec<_> = texts.iter().map(|text| i64::from(text.last)).collect();
        let indices: Vec<_> = texts.iter().map(|text| text.tokens).collect();
        self.backend.begin_step(&sequences)?;
        let last = Tensor::f_from_slice(&last)?.f_unsqueeze(0)?;
        let mut pass = self.lm.enter(&last, &indices, Whose::Several)?;
        self.run(&mut pass, 0..self.lm.config().layers, None)?;
        let hidden = self.lm.leave(pass)?;
        Ok(self.lm.logits(&hidden)?.f_squeeze_dim(0)?)
    }

    /// Draws a text's next token from its row of scores.
    fn choose(&mut self, text: TextId, scores: &Tensor) -> Result<()> {
        let vocabulary = self.room.vocabulary;
        let found = self.text_mut(text)?;
        let token = match (&mut found.sampler, bridge::floats(scores)) {
            (Some(sampler), Some(scores)) => sampler.sample(&scores[..vocabulary]),
            _ => Err(Error::NoLogits),
        };
        if let Ok(token) = token {
            found.last = token;
        }
        self.drawn.push(Drawn { text, token });
        Ok(())
    }

    /// Reads some layers of a context, or a question; the last hidden states, once all is read.
    fn read_on(
        &mut self,
        text: TextId,
        reading: &mut Reading,
        budget: usize,
    ) -> Result<Option<Tensor>> {
        let sequence = self.sequence(text, "advance")?;
        let before = self.text(text)?.tokens;
        let count = reading.tokens.len();
        let layers = self.lm.config().layers;
        let (mut pass, done) = match reading.pass.take() {
            Some(pass) => pass,
            None => {
                let whose = if before == 0 { Whose::Context } else { Whose::Later };
                if whose == Whose::Later {
                    self.backend.begin_step(&[(sequence, count)])?;
                }
                let ids: Vec<_> = reading.tokens.iter().map(|&id| i64::from(id)).collect();
                let ids = Tensor::f_from_slice(&ids)?.f_unsqueeze(0)?;
                let indices: Vec<_> = (before..before + count).collect();
                (self.lm.enter(&ids, &indices, whose)?, 0)
            }
        };
        // A question's step is planned for all layers, and others cannot step until it has passed them.
        let slice = if before > 0 { layers } else { (budget * layers / count).max(1) };
        let until = layers.min(done + slice);
        self.run(&mut pass, done..until, (before == 0).then_some(sequence))?;
        if until < layers {
            reading.pass = Some((pass, until));
            return Ok(None);
        }
        Ok(Some(self.lm.leave(pass)?))
    }
}

impl Executor for CpuExecutor {
    fn limits(&self) -> Limits {
        let Room { batch, tokens, vocabulary, .. } = self.room;
        let pages = self.backend.shape().pages;
        Limits { pages, seats: usize::MAX, batch, tokens, question: tokens, vocabulary }
    }

    fn free_pages(&self) -> usize {
        self.backend.stats().pages_free
    }

    fn most_pages(&self, tokens: usize) -> usize {
        let shape = self.backend.shape();
        shape.layers * shape.kv_heads * tokens.div_ceil(shape.page_size)
    }

    fn pages_to_read(&self, text: TextId) -> usize {
        let Ok(Text { reading: Some(reading), tokens, .. }) = self.text(text) else { return 0 };
        if *tokens > 0 {
            return self.wanted(text, reading.tokens.len());
        }
        let done = reading.pass.as_ref().map_or(0, |(_, layers)| *layers);
        let layers = self.backend.shape().layers;
        self.most_pages(reading.tokens.len()) / layers * (layers - done)
    }

    fn pages_to_step(&self, text: TextId) -> usize {
        self.wanted(text, 1)
    }

    fn pages(&self, text: TextId) -> usize {
        match self.text(text).map(|text| &text.place) {
            Ok(Place::Away(suspended)) => suspended.pages(),
            Ok(Place::Pool(sequence)) => {
                let lengths = self.backend.lengths(*sequence).unwrap_or_default();
                let page_size = self.backend.shape().page_size;
                lengths.iter().map(|rows| rows.div_ceil(page_size)).sum()
            }
            Err(_) => 0,
        }
    }

    fn begin(&mut self) -> Result<TextId> {
        let place = Place::Pool(self.backend.allocate()?);
        let text = Text { place, tokens: 0, reading: None, scores: None, sampler: None, last: 0 };
        Ok(self.insert(text))
    }

    fn read(&mut self, text: TextId, tokens: &[u32]) -> Result<()> {
        let found = self.text_mut(text)?;
        let wrong = |state| Err(Error::TextState { text: text.0, call: "read", state });
        if tokens.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        if found.reading.is_some() {
            return wrong("it is reading");
        }
        if found.sampler.is_some() {
            return wrong("it has drawn tokens");
        }
        found.reading = Some(Reading { tokens: tokens.to_vec(), pass: None });
        Ok(())
    }

    fn advance(&mut self, text: TextId, budget: usize) -> Result<bool> {
        let Some(mut reading) = self.text_mut(text)?.reading.take() else {
            let state = "it has nothing to read";
            return Err(Error::TextState { text: text.0, call: "advance", state });
        };
        let Some(hidden) = self.read_on(text, &mut reading, budget)? else {
            self.text_mut(text)?.reading = Some(reading);
            return Ok(false);
        };
        let scores = self.lm.logits(&hidden.f_select(1, -1)?)?.f_squeeze_dim(0)?;
        let found = self.text_mut(text)?;
        found.tokens += reading.tokens.len();
        found.scores = Some(scores);
        Ok(true)
    }

    fn draw(&mut self, text: TextId, sampling: &Sampling) -> Result<()> {
        let found = self.text_mut(text)?;
        let (Some(scores), None) = (found.scores.take(), &found.reading) else {
            let state = "it has not read all, or was drawn from";
            return Err(Error::TextState { text: text.0, call: "draw", state });
        };
        found.sampler = Some(Sampler::new(sampling.clone())?);
        self.choose(text, &scores)
    }

    fn step(&mut self, batch: &[TextId]) -> Result<()> {
        if let Some(text) = batch.iter().find(|&&text| {
            self.text(text).is_ok_and(|text| text.sampler.is_none() || text.reading.is_some())
        }) {
            let state = "nothing was drawn from it yet";
            return Err(Error::TextState { text: text.0, call: "step", state });
        }
        let scores = awake(|| self.pass(batch))?;
        for (row, &text) in batch.iter().enumerate() {
            self.text_mut(text)?.tokens += 1;
            self.choose(text, &scores.f_get(row as i64)?)?;
        }
        Ok(())
    }

    fn drawn(&mut self, _wait: bool) -> Result<Vec<Drawn>> {
        Ok(std::mem::take(&mut self.drawn))
    }

    fn fork(&mut self, text: TextId) -> Result<TextId> {
        let sequence = self.sequence(text, "fork")?;
        let found = self.text(text)?;
        let (Some(scores), None) = (&found.scores, &found.reading) else {
            let state = "it has not read all, or was drawn from";
            return Err(Error::TextState { text: text.0, call: "fork", state });
        };
        let (scores, tokens) = (Some(scores.shallow_clone()), found.tokens);
        let place = Place::Pool(self.backend.fork(sequence)?);
        Ok(self.insert(Text { place, tokens, reading: None, scores, sampler: None, last: 0 }))
    }

    fn suspend(&mut self, text: TextId) -> Result<usize> {
        let sequence = self.sequence(text, "suspend")?;
        if self.text(text)?.reading.is_some() {
            let state = "it is reading";
            return Err(Error::TextState { text: text.0, call: "suspend", state });
        }
        let suspended = self.backend.suspend(sequence)?;
        let bytes = suspended.bytes();
        self.text_mut(text)?.place = Place::Away(suspended);
        Ok(bytes)
    }

    fn resume(&mut self, text: TextId) -> Result<()> {
        let found = self.texts.get_mut(&text).ok_or(Error::UnknownText { text: text.0 })?;
        let Place::Away(suspended) = &found.place else {
            let state = "it is not suspended";
            return Err(Error::TextState { text: text.0, call: "resume", state });
        };
        found.place = Place::Pool(self.backend.resume(suspended)?);
        Ok(())
    }

    fn release(&mut self, text: TextId) -> Result<()> {
        let found = self.texts.remove(&text).ok_or(Error::UnknownText { text: text.0 })?;
        self.drawn.retain(|drawn| drawn.text != text);
        match found.place {
            Place::Pool(sequence) => Ok(self.backend.release(sequence)?),
            Place::Away(_) => Ok(()),
        }
    }

    fn held(&mut self, text: TextId) -> Result<Held> {
        let sequence = self.sequence(text, "say what it holds")?;
        let rows = self.backend.lengths(sequence)?.iter().sum();
        let shape = self.backend.shape();
        let dense_rows = shape.layers * shape.kv_heads * self.text(text)?.tokens;
        Ok(Held { pages: self.pages(text), rows, dense_rows })
    }
}

impl std::fmt::Debug for CpuExecutor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CpuExecutor")
            .field("room", &self.room)
            .field("texts", &self.texts.len())
            .field("stats", &self.backend.stats())
            .finish_non_exhaustive()
    }
}
