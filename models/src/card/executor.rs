//! Many texts on one card: prompts through libtorch, steps through the graph.

use super::step::decoder;
use super::{CardCache, CardRoom, Gates, Place, Step, Token, resident_for};
use crate::cache::KvCache;
use crate::causal_lm::{CausalLm, Pass, Whose};
use crate::config::Config;
use crate::engine::{Drawn, Executor, Held, Limits, TextId};
use crate::error::{Error, Result};
use crate::hooks::Hooks;
use crate::paged::cache_shape;
use crate::sampling::{Sampler, Sampling};
use paged_kernels::{CacheShape, Resident, Seats, Sequence, Suspended};
use std::collections::{BTreeMap, VecDeque};
use tch::{Device, Kind, Tensor};

const PAGE_SIZE: usize = 16;

/// The [`Executor`] of a card: weights in bf16, a [`Resident`] cache, and a graph for each size of a batch.
///
/// A step waits for nothing. [`drawn`](Executor::drawn), if it is to wait, [`draw`](Executor::draw), `suspend`, `resume`,
/// `release` and `held` wait for the card.
pub struct CardExecutor {
    model: Box<dyn CausalLm>,
    hooks: Hooks,
    cache: Resident,
    step: Step,
    limits: Limits,
    texts: BTreeMap<TextId, Text>,
    begun: u64,
    /// Steps whose tokens the host has not seen, oldest first.
    flights: VecDeque<Flight>,
    /// Drawn by the host.
    known: Vec<Drawn>,
    /// Of the last step; and whether the cache still has it seated.
    batch: Vec<TextId>,
    seated: bool,
    free: Free,
}

/// Pages that were free when the card last said so, and the most that was taken since.
#[derive(Debug, Default)]
struct Free {
    known: usize,
    /// Since the last step was queued; that of a flight is its own.
    taken: usize,
}

#[derive(Debug)]
struct Flight {
    number: usize,
    texts: Vec<TextId>,
    /// Pages that were taken at most from the step before to this one.
    taken: usize,
    /// Whether the card was asked for its free pages since: what the step says of them is older.
    settled: bool,
}

#[derive(Debug)]
struct Text {
    place: Whereabouts,
    /// Tokens that went through.
    tokens: usize,
    /// Pages at most, when the text had `counted` tokens.
    pages: usize,
    counted: usize,
    /// Whether pages may be shared with another text.
    shared: bool,
    reading: Option<Reading>,
    /// Of what may follow the last token read, f32 `[vocabulary]`.
    scores: Option<Tensor>,
    sampler: Option<Sampler>,
    sampling: Sampling,
    /// The token that was drawn last, once the host knows it.
    next: Option<u32>,
}

#[derive(Debug)]
enum Whereabouts {
    Seat(Sequence),
    Host(Box<Suspended>),
}

#[derive(Debug)]
struct Reading {
    tokens: Vec<u32>,
    /// A context between two layers.
    pass: Option<Pass>,
    layers: usize,
}

impl CardExecutor {
    /// Takes over a model on the card in bf16. `hooks` prune contexts and questions, `gates` the tokens of steps: of one surrogate, or
    /// none in both.
    ///
    /// # Errors
    /// [`Error::Step`]; a cache that the card has no memory for.
    pub fn new(
        model: Box<dyn CausalLm>,
        hooks: Hooks,
        gates: Option<&Gates>,
        room: CardRoom,
    ) -> Result<Self> {
        let config = model.config();
        let shape = cache_shape(config, 1, room.window, Kind::BFloat16)?;
        let shape = CacheShape { pages: room.pages, dtype: room.stored, ..shape };
        let CardRoom { seats: texts, tokens, question: pass, mode, .. } = room;
        let seats = Seats { texts, tokens, pass, mode };
        let cache = resident_for(decoder(model.as_ref())?, shape, seats)?;
        let vocabulary = room.vocabulary.min(config.vocab_size);
        let step = Step::new(model.as_ref(), gates, &cache, vocabulary)?;
        let limits = Limits {
            pages: room.pages,
            seats: room.seats,
            batch: room.batch.min(room.seats).min(64),
            tokens: room.tokens.min(config.max_positions),
            question: room.question,
            vocabulary,
        };
        Ok(Self {
            hooks,
            step,
            limits,
            texts: BTreeMap::new(),
            begun: 0,
            flights: VecDeque::new(),
            known: Vec::new(),
            batch: Vec::new(),
            seated: false,
            free: Free { known: room.pages, taken: 0 },
            cache,
            model,
        })
    }

    fn config(&self) -> &Config {
        self.model.config()
    }

    /// Heads of all layers: what a token costs in rows.
    fn heads(&self) -> usize {
        self.config().layers * self.config().kv_heads
    }

    fn text(&self, text: TextId) -> Result<&Text> {
        self.texts.get(&text).ok_or(Error::Cache(paged_kernels::Error::UnknownSequence))
    }

    fn text_mut(&mut self, text: TextId) -> Result<&mut Text> {
        self.texts.get_mut(&text).ok_or(Error::Cache(paged_kernels::Error::UnknownSequence))
    }

    fn seat(&self, text: TextId) -> Result<Sequence> {
        match self.text(text)?.place {
            Whereabouts::Seat(sequence) => Ok(sequence),
            Whereabouts::Host(_) => Err(Error::Cache(paged_kernels::Error::UnknownSequence)),
        }
    }

    /// Asks the card what is free. Waits for it.
    fn settle(&mut self) -> Result<()> {
        let missing = self.cache.missing()?;
        if missing > 0 {
            // Never, while the scheduler holds to the bounds: what the texts hold now is not what they should.
            return Err(Error::Cache(paged_kernels::Error::OutOfPages {
                wanted: missing,
                free: 0,
            }));
        }
        self.free = Free { known: self.cache.free_pages()?, taken: 0 };
        self.flights.iter_mut().for_each(|flight| (flight.taken, flight.settled) = (0, true));
        Ok(())
    }

    /// Counts what a text holds. Waits for the card.
    fn count(&mut self, text: TextId) -> Result<Held> {
        let lengths = self.cache.lengths(self.seat(text)?)?;
        let rows = lengths.iter().sum();
        let pages = lengths.iter().map(|rows| rows.div_ceil(PAGE_SIZE)).sum();
        let heads = self.heads();
        let text = self.text_mut(text)?;
        (text.pages, text.counted) = (pages, text.tokens);
        Ok(Held { pages, rows, dense_rows: heads * text.tokens })
    }

    /// Takes in the tokens of a step.
    fn land(&mut self, wait: bool) -> Result<Option<Vec<Drawn>>> {
        let Some(flight) = self.flights.front() else { return Ok(None) };
        let Some(report) = self.step.drawn(flight.number, wait)? else { return Ok(None) };
        if report.missing > 0 {
            let wanted = report.missing;
            return Err(Error::Cache(paged_kernels::Error::OutOfPages { wanted, free: 0 }));
        }
        let flight = self.flights.pop_front().expect("it was there");
        if !flight.settled {
            self.free.known = report.free_pages;
        }
        let mut drawn = Vec::new();
        for (&id, token) in flight.texts.iter().zip(report.tokens) {
            let Some(text) = self.texts.get_mut(&id) else { continue };
            text.next = token;
            drawn.push(Drawn { text: id, token: token.ok_or(Error::NoLogits) });
        }
        Ok(Some(drawn))
    }

    /// The input of a text that was all read, or is.
    fn input(&self, tokens: &[u32]) -> Result<Tensor> {
        let ids = tokens.iter().map(|&id| i64::from(id)).collect::<Vec<_>>();
        let device = self.model.output_projection(0).device();
        Ok(Tensor::f_from_slice(&ids)?.f_to_device(device)?.f_unsqueeze(0)?)
    }
}

impl Executor for CardExecutor {
    fn limits(&self) -> Limits {
        self.limits
    }

    fn free_pages(&self) -> usize {
        let flying: usize = self.flights.iter().map(|flight| flight.taken).sum();
        self.free.known.saturating_sub(flying + self.free.taken)
    }

    fn most_pages(&self, tokens: usize) -> usize {
        self.heads() * tokens.div_ceil(PAGE_SIZE)
    }

    fn pages_to_read(&self, text: TextId) -> usize {
        let Some(text) = self.texts.get(&text) else { return 0 };
        let Some(reading) = &text.reading else { return 0 };
        let pages = reading.tokens.len().div_ceil(PAGE_SIZE);
        if text.tokens == 0 {
            return (self.config().layers - reading.layers) * self.config().kv_heads * pages;
        }
        // A page that is begun; and where others hold it, copies of all that the window and the pass reach into.
        let window = self.cache.shape().window.div_ceil(PAGE_SIZE);
        self.heads() * (pages + 1 + if text.shared { pages + window + 1 } else { 0 })
    }

    fn pages_to_step(&self, text: TextId) -> usize {
        let shared = self.texts.get(&text).is_some_and(|text| text.shared);
        let window = self.cache.shape().window.div_ceil(PAGE_SIZE);
        self.heads() * if shared { 2 + window } else { 1 }
    }

    fn pages(&self, text: TextId) -> usize {
        let Some(text) = self.texts.get(&text) else { return 0 };
        let since = (text.tokens - text.counted).div_ceil(PAGE_SIZE);
        (text.pages + self.heads() * since).min(self.most_pages(text.tokens))
    }

    fn begin(&mut self) -> Result<TextId> {
        let sequence = self.cache.allocate()?;
        let id = TextId(self.begun);
        self.begun += 1;
        let text = Text {
            place: Whereabouts::Seat(sequence),
            tokens: 0,
            pages: 0,
            counted: 0,
            shared: false,
            reading: None,
            scores: None,
            sampler: None,
            sampling: Sampling::default(),
            next: None,
        };
        self.texts.insert(id, text);
        Ok(id)
    }

    fn read(&mut self, text: TextId, tokens: &[u32]) -> Result<()> {
        let limits = self.limits;
        let before = self.text(text)?.tokens;
        if tokens.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        if let Some(&id) = tokens.iter().find(|&&id| id as usize >= limits.vocabulary) {
            return Err(Error::UnknownToken { id, vocabulary: limits.vocabulary });
        }
        let wanted = before + tokens.len();
        if wanted > limits.tokens {
            return Err(Error::ContextTooLong { wanted, limit: limits.tokens });
        }
        if before > 0 && tokens.len() > limits.question {
            let (found, most) = (tokens.len(), limits.question);
            return Err(Error::Cache(paged_kernels::Error::PassTooLong { found, most }));
        }
        let reading = Reading { tokens: tokens.to_vec(), pass: None, layers: 0 };
        self.text_mut(text)?.reading = Some(reading);
        Ok(())
    }

    fn advance(&mut self, id: TextId, budget: usize) -> Result<bool> {
        let _no_grad = tch::no_grad_guard();
        let sequence = self.seat(id)?;
        let before = self.text(id)?.tokens;
        let wanted = self.pages_to_read(id);
        let Some(mut reading) = self.text_mut(id)?.reading.take() else { return Ok(true) };
        let (tokens, all) = (reading.tokens.len(), self.config().layers);
        // A question goes through at once: between its layers no other text could step.
        let layers = if before > 0 { all } else { (budget * all / tokens).clamp(1, all) };
        let pages = tokens.div_ceil(PAGE_SIZE);
        self.free.taken += match before {
            0 => layers.min(all - reading.layers) * self.config().kv_heads * pages,
            _ => wanted,
        };
        let input = self.input(&reading.tokens)?;
        let mut cache = CardCache::resumed(&mut self.cache, sequence, before);
        let mut pass = match reading.pass.take() {
            Some(pass) => {
                cache.goes_on(tokens);
                pass
            }
            None => {
                cache.begin(tokens)?;
                let whose = if before == 0 { Whose::Context } else { Whose::Later };
                let indices = (before..before + tokens).collect::<Vec<_>>();
                self.model.enter(&input, &indices, whose)?
            }
        };
        let window = cache.window();
        let end = (reading.layers + layers).min(all);
        for layer in reading.layers..end {
            let attend =
                &mut |queries: &Tensor, keys: &Tensor, values: &Tensor, drops: Option<&Tensor>| {
                    cache.attend(layer, queries, keys, values, drops)
                };
            self.model.layer(layer, &mut pass, &self.hooks, window, attend)?;
        }
        if before > 0 {
            self.seated = false;
        }
        reading.layers = end;
        if end < all {
            reading.pass = Some(pass);
            self.text_mut(id)?.reading = Some(reading);
            return Ok(false);
        }
        let last = self.model.leave(pass)?.f_select(1, -1)?;
        let scores = self.model.logits(&last)?.f_reshape([-1])?;
        let text = self.text_mut(id)?;
        text.scores = Some(scores);
        text.tokens += tokens;
        text.next = None;
        self.count(id)?;
        self.settle()?;
        Ok(true)
    }

    fn draw(&mut self, id: TextId, sampling: &Sampling) -> Result<()> {
        let vocabulary = self.limits.vocabulary;
        let text = self.text_mut(id)?;
        let scores = text.scores.as_ref().ok_or(Error::EmptyPrompt)?;
        let scores = Vec::<f32>::try_from(&scores.f_to_device(Device::Cpu)?)?;
        let mut sampler = Sampler::new(sampling.clone())?;
        let token = sampler.sample(&scores[..vocabulary]);
        text.next = token.as_ref().ok().copied();
        text.scores = None;
        (text.sampler, text.sampling) = (Some(sampler), sampling.clone());
        self.known.push(Drawn { text: id, token });
        Ok(())
    }

    fn step(&mut self, batch: &[TextId]) -> Result<()> {
        // At most one step is under way when the next is queued.
        while self.flights.len() > 1 {
            let landed = self.land(true)?;
            self.known.extend(landed.into_iter().flatten());
        }
        if !self.seated || batch != self.batch {
            let mut places = Vec::with_capacity(batch.len());
            for &id in batch {
                let flying = self.flights.iter().any(|flight| flight.texts.contains(&id));
                let seat = self.batch.iter().position(|&other| other == id);
                let text = self.text(id)?;
                let token = match (flying, seat, text.next) {
                    (true, Some(place), _) => Token::Of(place),
                    (_, _, Some(token)) => Token::Known(token),
                    _ => return Err(Error::EmptyPrompt),
                };
                let (sequence, position) = (self.seat(id)?, text.tokens);
                places.push(Some(Place {
                    sequence,
                    token,
                    position,
                    sampling: text.sampling.clone(),
                }));
            }
            self.step.batch(&mut self.cache, &places)?;
            (self.batch, self.seated) = (batch.to_vec(), true);
        }
        let taken = batch.iter().map(|&text| self.pages_to_step(text)).sum::<usize>();
        let mut randoms = Vec::with_capacity(batch.len());
        for &id in batch {
            let text = self.text_mut(id)?;
            randoms.push(text.sampler.as_mut().map_or(0.0, Sampler::chance));
            text.tokens += 1;
        }
        let number = self.step.run(&self.cache, &randoms)?;
        let taken = std::mem::take(&mut self.free.taken) + taken;
        let texts = batch.to_vec();
        self.flights.push_back(Flight { number, texts, taken, settled: false });
        Ok(())
    }

    fn drawn(&mut self, wait: bool) -> Result<Vec<Drawn>> {
        let mut drawn = std::mem::take(&mut self.known);
        while let Some(landed) = self.land(wait)? {
            drawn.extend(landed);
        }
        Ok(drawn)
    }

    fn fork(&mut self, id: TextId) -> Result<TextId> {
        let sequence = self.cache.fork(self.seat(id)?)?;
        let text = self.text_mut(id)?;
        text.shared = true;
        let fork = Text {
            place: Whereabouts::Seat(sequence),
            tokens: text.tokens,
            pages: text.pages,
            counted: text.counted,
            shared: true,
            reading: None,
            scores: text.scores.as_ref().map(Tensor::shallow_clone),
            sampler: text.sampler.clone(),
            sampling: text.sampling.clone(),
            next: text.next,
        };
        let id = TextId(self.begun);
        self.begun += 1;
        self.texts.insert(id, fork);
        Ok(id)
    }

    fn suspend(&mut self, id: TextId) -> Result<usize> {
        // Its last token may be on its way: it is known before the seat is another's.
        while let Some(landed) = self.land(true)? {
            self.known.extend(landed);
        }
        self.count(id)?;
        let suspended = self.cache.suspend(self.seat(id)?)?;
        let bytes = suspended.bytes();
        self.seated = false;
        let text = self.text_mut(id)?;
        if let Some(scores) = &text.scores {
            text.scores = Some(scores.f_to_device(Device::Cpu)?);
        }
        text.shared = false;
        text.place = Whereabouts::Host(Box::new(suspended));
        self.settle()?;
        Ok(bytes)
    }

    fn resume(&mut self, id: TextId) -> Result<()> {
        let text = self.texts.get_mut(&id).ok_or(paged_kernels::Error::UnknownSequence)?;
        let Whereabouts::Host(suspended) = &text.place else { return Ok(()) };
        let sequence = self.cache.resume(suspended)?;
        text.place = Whereabouts::Seat(sequence);
        self.seated = false;
        self.settle()
    }

    fn release(&mut self, id: TextId) -> Result<()> {
        if let Whereabouts::Seat(sequence) = self.text(id)?.place {
            self.cache.release(sequence)?;
        }
        self.texts.remove(&id);
        if self.batch.contains(&id) {
            self.seated = false;
        }
        self.known.retain(|drawn| drawn.text != id);
        self.settle()
    }

    fn held(&mut self, id: TextId) -> Result<Held> {
        self.count(id)
    }
}

impl std::fmt::Debug for CardExecutor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CardExecutor")
            .field("limits", &self.limits)
            .field("texts", &self.texts.len())
            .finish_non_exhaustive()
    }
}
