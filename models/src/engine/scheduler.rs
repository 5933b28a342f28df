//! Who is read, who writes and who waits.

use super::contexts::Contexts;
use super::executor::{Drawn, Executor, Limits, TextId};
use super::request::{End, Event, Request, RequestId, Usage};
use crate::error::{Error, Result};
use crate::sampling::Sampler;
use crate::session::Stop;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

/// How a scheduler weighs its requests.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Tokens that are read beside each step, about: more of them read a context sooner and let those who write wait.
    pub slice: usize,
    /// By how much a request of priority 1 goes before one of priority 0. What came still earlier goes first, so that
    /// nobody waits for ever.
    pub patience: Duration,
    /// Contexts that are kept after all who wait for them have begun. They go as soon as their pages are needed.
    pub contexts: usize,
    /// Which requests are refused.
    pub admission: Admission,
}

/// Which requests are refused because of their pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// Those that would not fit if nothing of them were forgotten: what is accepted ends as it should.
    Certain,
    /// None: one that outgrows all pages, when it has them for itself, ends with [`Error::TextOutOfPages`].
    Hopeful,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            slice: 512,
            patience: Duration::from_secs(10),
            contexts: 0,
            admission: Admission::Certain,
        }
    }
}

/// What a scheduler has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Steps.
    pub steps: usize,
    /// Tokens of all steps: over `steps`, the mean batch.
    pub stepped: usize,
    /// Tokens read, once for all who share them.
    pub read: usize,
    /// Texts moved to host memory.
    pub preemptions: usize,
    /// Requests that found their context read.
    pub shared: usize,
    /// The most bytes in host memory at once.
    pub peak_suspended_bytes: usize,
}

/// Runs requests on a machine: continuous batching, contexts read in slices beside the steps, pages held against their
/// most before anything takes them.
///
/// Pure logic on the host, driven by [`tick`](Self::tick), with the time as an argument; [`Engine`](super::Engine) gives
/// it a thread and a clock. Every request has a rank, fixed when it comes: its time of arrival, less its priority times
/// [`Settings::patience`]. The best rank is placed first; nobody overtakes it by being small. When pages are short,
/// contexts that are only kept go first, then whoever writes with the worst rank is moved to host memory, one a tick, and
/// comes back before all that rank behind. So the best rank always gets on, and every request becomes the best one some
/// day.
#[derive(Debug)]
pub struct Scheduler<E> {
    machine: E,
    limits: Limits,
    settings: Settings,
    jobs: BTreeMap<Rank, Job>,
    ranks: HashMap<RequestId, Rank>,
    texts: HashMap<TextId, Rank>,
    waiting: BTreeSet<Rank>,
    suspended: BTreeMap<Rank, usize>, // bytes
    reading: Option<Rank>,
    writing: BTreeSet<Rank>,
    contexts: Contexts,
    came: u64,
    now: Duration,
    /// Whether a text was moved to host memory in this tick.
    preempted: bool,
    /// Things done; a tick in which it stands still does nothing.
    done: usize,
    events: Vec<(RequestId, Event)>,
    totals: Totals,
}

/// The smaller, the sooner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    /// Microseconds.
    due: i128,
    id: RequestId,
}

#[derive(Debug)]
struct Job {
    request: Request,
    text: Option<TextId>,
    /// Whether the context is read, and the question is what is being read.
    asked: bool,
    /// Tokens that are drawn or under way.
    drawn: usize,
    usage: Usage,
    came: Duration,
    began: Duration,
    first: Duration,
}

impl<E: Executor> Scheduler<E> {
    /// A scheduler with nothing to do.
    pub fn new(machine: E, settings: Settings) -> Self {
        Self {
            limits: machine.limits(),
            machine,
            settings,
            jobs: BTreeMap::new(),
            ranks: HashMap::new(),
            texts: HashMap::new(),
            waiting: BTreeSet::new(),
            suspended: BTreeMap::new(),
            reading: None,
            writing: BTreeSet::new(),
            contexts: Contexts::default(),
            came: 0,
            now: Duration::ZERO,
            preempted: false,
            done: 0,
            events: Vec::new(),
            totals: Totals::default(),
        }
    }

    /// Takes a request in, at the time `now`.
    ///
    /// # Errors
    /// What can never be answered: an empty context, ids outside the vocabulary, senseless sampling settings, nothing to
    /// write, more tokens than a text may have, a question longer than the machine reads at once, and, with
    /// [`Admission::Certain`], more pages than there are.
    pub fn submit(&mut self, request: Request, now: Duration) -> Result<RequestId> {
        self.check(&request)?;
        let id = RequestId(self.came);
        self.came += 1;
        let patience = self.settings.patience.as_micros() as i128;
        let due = now.as_micros() as i128 - i128::from(request.priority) * patience;
        let rank = Rank { due, id };
        self.contexts.want(&request.context);
        self.ranks.insert(id, rank);
        self.waiting.insert(rank);
        let job = Job {
            request,
            text: None,
            asked: false,
            drawn: 0,
            usage: Usage::default(),
            came: now,
            began: now,
            first: now,
        };
        self.jobs.insert(rank, job);
        Ok(id)
    }

    fn check(&self, request: &Request) -> Result<()> {
        let Limits { pages, tokens: limit, question: most, vocabulary, .. } = self.limits;
        if request.context.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        let read = || request.context.iter().chain(&request.question);
        if let Some(&id) = read().find(|&&id| id as usize >= vocabulary) {
            return Err(Error::UnknownToken { id, vocabulary });
        }
        if request.limit == 0 {
            return Err(Error::NothingToWrite);
        }
        Sampler::new(request.sampling.clone())?;
        let wanted = request.most_tokens();
        if wanted > limit {
            return Err(Error::ContextTooLong { wanted, limit });
        }
        let found = request.question.len();
        if found > most {
            return Err(Error::QuestionTooLong { found, most });
        }
        let needed = self.machine.most_pages(wanted);
        if self.settings.admission == Admission::Certain && needed > pages {
            let free = self.machine.free_pages();
            return Err(Error::NeverFits { tokens: wanted, wanted: needed, free, pages });
        }
        Ok(())
    }

    /// Ends a request where it stands; its pages are free at once. `false` if it has ended before.
    pub fn cancel(&mut self, id: RequestId, now: Duration) -> bool {
        self.now = now;
        let rank = self.ranks.get(&id).copied();
        rank.inspect(|&rank| self.end(rank, Ok(Stop::Caller))).is_some()
    }

    /// Whether there is nothing to do and nothing to say.
    pub fn is_idle(&self) -> bool {
        self.jobs.is_empty() && self.events.is_empty()
    }

    /// What was done so far.
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// The machine, for what it holds.
    pub fn machine(&self) -> &E {
        &self.machine
    }

    /// The machine, for settings that may change between ticks.
    pub fn machine_mut(&mut self) -> &mut E {
        &mut self.machine
    }

    /// One step of all who write, and a slice of what is to be read. Says what happened since the last tick. The clock is
    /// asked again once the machine's work is done, so that a request which begins and answers in one tick has taken its time.
    pub fn tick(&mut self, clock: impl Fn() -> Duration) -> Vec<(RequestId, Event)> {
        self.now = clock();
        self.preempted = false;
        let before = self.done;
        for wait in [false, true] {
            self.place();
            self.step();
            self.read();
            self.collect(wait, &clock);
            if self.done > before {
                break;
            }
        }
        if self.done == before
            && let Some(&rank) = self.jobs.keys().next()
        {
            // Nobody else is left whose pages could help the first.
            let error = self.out_of_pages(rank);
            self.end(rank, Err(error.into()));
        }
        std::mem::take(&mut self.events)
    }

    fn out_of_pages(&self, rank: Rank) -> Error {
        let Some(job) = self.jobs.get(&rank) else { return Error::EngineStopped };
        let tokens = job.request.context.len() + job.request.question.len() + job.usage.written;
        let held = job.text.map_or(0, |text| self.machine.pages(text));
        let (free, pages) = (self.machine.free_pages(), self.limits.pages);
        Error::TextOutOfPages { tokens, held, free, pages }
    }

    /// Gives seats and pages to those who wait, best rank first, until one finds no room.
    fn place(&mut self) {
        loop {
            let waits = self.waiting.first().copied().filter(|rank| {
                // One text is read at a time; who has no need to can begin beside it.
                let shared = |job: &Job| {
                    job.request.question.is_empty() && self.contexts.contains(&job.request.context)
                };
                self.reading.is_none() || self.jobs.get(rank).is_some_and(shared)
            });
            let rests = self.suspended.keys().next().copied();
            let Some(rank) = waits.into_iter().chain(rests).min() else { break };
            let placed = if Some(rank) == rests { self.resume(rank) } else { self.begin(rank) };
            match placed {
                Ok(true) => self.done += 1,
                Ok(false) => break,
                Err(error) => self.end(rank, Err(error.into())),
            }
        }
        while let Some(text) = self.contexts.trim(self.settings.contexts) {
            self.forget(text);
        }
    }

    fn resume(&mut self, rank: Rank) -> Result<bool> {
        let Some(text) = self.jobs.get(&rank).and_then(|job| job.text) else { return Ok(false) };
        if !self.make_room(rank, self.machine.pages(text), None) {
            return Ok(false);
        }
        self.machine.resume(text)?;
        self.suspended.remove(&rank);
        self.writing.insert(rank);
        Ok(true)
    }

    /// Begins to read, or goes on from a context that was read before.
    fn begin(&mut self, rank: Rank) -> Result<bool> {
        let Some(job) = self.jobs.get(&rank) else { return Ok(false) };
        let Request { context, question, .. } = &job.request;
        let (context, question) = (context.clone(), question.clone());
        let shared = self.contexts.contains(&context);
        if !shared {
            let most = self.machine.most_pages(context.len() + question.len());
            // With `Admission::Hopeful` it may be more than there are.
            if !self.make_room(rank, most.min(self.limits.pages), None) {
                return Ok(false);
            }
        } else if !self.make_room(rank, 0, Some(&context)) {
            return Ok(false);
        }
        let text = match self.contexts.get(&context) {
            Some(kept) => self.machine.fork(kept)?,
            None => self.machine.begin()?,
        };
        self.texts.insert(text, rank);
        self.waiting.remove(&rank);
        self.contexts.unwant(&context);
        let Some(job) = self.jobs.get_mut(&rank) else { return Ok(false) };
        (job.text, job.began) = (Some(text), self.now);
        job.usage.waited = self.now.saturating_sub(job.came);
        if shared {
            job.usage.shared = context.len();
            self.totals.shared += 1;
            return self.ask(rank).map(|()| true);
        }
        job.usage.read = context.len();
        self.machine.read(text, &context)?;
        self.reading = Some(rank);
        Ok(true)
    }

    /// Goes on to the question of a text whose context is read, or to its answer.
    fn ask(&mut self, rank: Rank) -> Result<()> {
        let Some(job) = self.jobs.get_mut(&rank) else { return Ok(()) };
        let Some(text) = job.text else { return Ok(()) };
        if !job.asked && !job.request.question.is_empty() {
            job.asked = true;
            job.usage.question = job.request.question.len();
            self.machine.read(text, &job.request.question)?;
            self.reading = Some(rank);
            return Ok(());
        }
        if self.reading == Some(rank) {
            self.reading = None;
        }
        self.machine.draw(text, &job.request.sampling)?;
        job.drawn = 1;
        self.writing.insert(rank);
        Ok(())
    }

    /// Makes sure of a seat, a place in the batch and `wanted` pages for `rank`, beside what others need for a while.
    /// Contexts but `spared` go for it, and texts with a worse rank, one a tick.
    fn make_room(&mut self, rank: Rank, wanted: usize, spared: Option<&[u32]>) -> bool {
        loop {
            let texts = self.writing.len() + usize::from(self.reading.is_some());
            let seat = texts + self.contexts.len() < self.limits.seats;
            // A text takes no more in a page's worth of steps: who is placed is not moved away at once.
            let margin = if texts == 0 { 0 } else { (texts + 1) * self.machine.most_pages(1) };
            let room = self.room() >= wanted + margin;
            if seat && room && texts < self.limits.batch {
                return true;
            }
            if (!(seat && room) && self.evict(spared)) || self.preempt(Some(rank)) {
                continue;
            }
            return false;
        }
    }

    /// Free pages that whoever is being read does not need.
    fn room(&self) -> usize {
        let reader = self.reading.and_then(|rank| self.jobs.get(&rank)?.text);
        let reserved = reader.map_or(0, |text| self.machine.pages_to_read(text));
        self.machine.free_pages().saturating_sub(reserved)
    }

    fn evict(&mut self, spared: Option<&[u32]>) -> bool {
        let text = self.contexts.evict(spared);
        text.inspect(|&text| self.forget(text)).is_some()
    }

    /// Moves the worst rank of those who write to host memory, if it is worse than `than`.
    fn preempt(&mut self, than: Option<Rank>) -> bool {
        let Some(&rank) = self.writing.last() else { return false };
        let text = self.jobs.get(&rank).and_then(|job| job.text);
        let (false, Some(text)) = (self.preempted || than.is_some_and(|than| rank < than), text)
        else {
            return false;
        };
        self.preempted = true;
        self.done += 1;
        self.writing.remove(&rank);
        let held = self.machine.held(text);
        match held.and_then(|held| Ok((held, self.machine.suspend(text)?))) {
            Ok((held, bytes)) => {
                self.suspended.insert(rank, bytes);
                let bytes = self.suspended.values().sum();
                self.totals.peak_suspended_bytes = self.totals.peak_suspended_bytes.max(bytes);
                self.totals.preemptions += 1;
                if let Some(job) = self.jobs.get_mut(&rank) {
                    job.usage.preemptions += 1;
                    job.usage.held = held;
                }
            }
            Err(error) => self.end(rank, Err(error.into())),
        }
        true
    }

    /// One step of all who have something to draw and for whom there are pages, best rank first.
    fn step(&mut self) {
        let text = |rank: &Rank| {
            let job = self.jobs.get(rank)?;
            Some((*rank, job.text?)).filter(|_| job.drawn < job.request.limit)
        };
        let mut batch: Vec<_> = self.writing.iter().filter_map(text).collect();
        let pages = |batch: &[(Rank, TextId)], machine: &E| {
            batch.iter().map(|&(_, text)| machine.pages_to_step(text)).sum::<usize>()
        };
        while pages(&batch, &self.machine) > self.room() && self.evict(None) {}
        if pages(&batch, &self.machine) > self.room() && self.writing.len() > 1 {
            self.preempt(None);
            batch.retain(|(rank, _)| self.writing.contains(rank));
        }
        let mut room = self.room();
        batch.retain(|&(_, text)| {
            let wanted = self.machine.pages_to_step(text);
            let fits = wanted <= room;
            room -= if fits { wanted } else { 0 };
            fits
        });
        batch.truncate(self.limits.batch);
        if batch.is_empty() {
            return;
        }
        let texts: Vec<_> = batch.iter().map(|&(_, text)| text).collect();
        self.done += 1;
        match self.machine.step(&texts) {
            Ok(()) => {
                self.totals.steps += 1;
                self.totals.stepped += batch.len();
                for (rank, _) in batch {
                    self.jobs.entry(rank).and_modify(|job| job.drawn += 1);
                }
            }
            Err(error) => self.end_all(batch.into_iter().map(|(rank, _)| rank).collect(), error),
        }
    }

    /// Reads on by a slice; where the rest of a text is shorter, the next one begins.
    fn read(&mut self) {
        let mut slice = self.settings.slice.max(1);
        while let Some(rank) = self.reading {
            let Some(job) = self.jobs.get(&rank) else { break };
            let Some(text) = job.text else { break };
            let tokens =
                if job.asked { job.request.question.len() } else { job.request.context.len() };
            let wanted = self.machine.pages_to_read(text);
            while self.machine.free_pages() < wanted && self.evict(None) {}
            // A context has its pages reserved; a question that finds none waits for whoever is moved away.
            if self.machine.free_pages() < wanted && self.preempt(None) {
                continue;
            }
            if self.machine.free_pages() < wanted && !self.writing.is_empty() {
                break;
            }
            let read = self.machine.advance(text, slice);
            self.done += 1;
            match read {
                Ok(false) => break,
                Ok(true) => {
                    self.totals.read += tokens;
                    if let Err(error) = self.has_read(rank, text) {
                        self.end(rank, Err(error.into()));
                    }
                }
                Err(error) => self.end(rank, Err(error.into())),
            }
            slice = slice.saturating_sub(tokens);
            if slice == 0 {
                break;
            }
            self.place();
        }
    }

    /// Keeps a context for others, if there are any, and goes on.
    fn has_read(&mut self, rank: Rank, text: TextId) -> Result<()> {
        let Some(job) = self.jobs.get(&rank) else { return Ok(()) };
        let context = job.request.context.clone();
        let texts = self.writing.len() + 1 + self.contexts.len();
        let keep = self.settings.contexts > 0 || self.contexts.is_wanted(&context);
        if !job.asked && keep && texts < self.limits.seats && !self.contexts.contains(&context) {
            let kept = self.machine.fork(text)?;
            self.contexts.keep(context, kept);
        }
        self.ask(rank)
    }

    /// Hands out the tokens that have become known.
    fn collect(&mut self, wait: bool, clock: impl Fn() -> Duration) {
        let drawn = self.machine.drawn(wait);
        self.now = clock();
        let drawn = match drawn {
            Ok(drawn) => drawn,
            Err(error) => return self.end_all(self.writing.iter().copied().collect(), error),
        };
        for Drawn { text, token } in drawn {
            let Some(&rank) = self.texts.get(&text) else { continue };
            let Some(job) = self.jobs.get_mut(&rank) else { continue };
            self.done += 1;
            let token = match token {
                Ok(token) => token,
                Err(error) => {
                    self.end(rank, Err(error.into()));
                    continue;
                }
            };
            if job.usage.written == 0 {
                job.first = self.now;
                job.usage.to_first = self.now.saturating_sub(job.began);
            }
            if job.request.stop.contains(&token) {
                self.end(rank, Ok(Stop::Token(token)));
                continue;
            }
            job.usage.written += 1;
            let last = job.usage.written == job.request.limit;
            self.events.push((rank.id, Event::Token(token)));
            if last {
                self.end(rank, Ok(Stop::Length));
            }
        }
    }

    fn end_all(&mut self, ranks: Vec<Rank>, error: Error) {
        let error = Arc::new(error);
        for rank in ranks {
            self.end(rank, Err(error.clone()));
        }
    }

    fn end(&mut self, rank: Rank, stop: std::result::Result<Stop, Arc<Error>>) {
        let Some(mut job) = self.jobs.remove(&rank) else { return };
        self.done += 1;
        self.ranks.remove(&rank.id);
        if self.waiting.remove(&rank) {
            self.contexts.unwant(&job.request.context);
        }
        if self.reading == Some(rank) {
            self.reading = None;
        }
        self.writing.remove(&rank);
        let suspended = self.suspended.remove(&rank).is_some();
        if let Some(text) = job.text {
            if !suspended && let Ok(held) = self.machine.held(text) {
                job.usage.held = held;
            }
            self.texts.remove(&text);
            self.forget(text);
        }
        if job.usage.written > 0 {
            job.usage.wrote = self.now.saturating_sub(job.first);
        }
        self.events.push((rank.id, Event::End(End { stop, usage: job.usage })));
    }

    /// A machine that cannot let a text go has no use for it either.
    fn forget(&mut self, text: TextId) {
        let _ = self.machine.release(text);
    }
}
