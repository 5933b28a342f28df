//! Many texts at once: they come and go, share pages, wait their turn, and get what they would get alone.
//!
//! An [`Engine`] is a thread around a [`Scheduler`], which decides what runs next on an [`Executor`], the machine:
//!
//! ```text
//! Engine ── requests, tokens ── Scheduler ── begin, advance, step, suspend … ── Executor: CpuExecutor, or one of yours
//! ```
//!
//! `examples/engine.rs` shows it on a model.

mod contexts;
mod cpu;
mod executor;
mod request;
mod scheduler;

pub use cpu::{CpuExecutor, Room};
pub use executor::{Drawn, Executor, Held, Limits, TextId};
pub use request::{End, Event, Request, RequestId, Usage};
pub use scheduler::{Admission, Scheduler, Settings, Totals};

use crate::error::{Error, Result};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Answers requests from any number of threads on one machine. Dropped, it ends what is under way with
/// [`Error::EngineStopped`].
#[derive(Debug)]
pub struct Engine {
    calls: Option<Sender<Call>>,
    worker: Option<JoinHandle<()>>,
    limits: Limits,
    totals: Arc<Mutex<Totals>>,
}

/// Sets an [`Engine`] up.
#[derive(Clone, Debug, Default)]
pub struct Builder {
    settings: Settings,
}

impl Builder {
    /// See [`Settings::slice`].
    pub fn slice(mut self, tokens: usize) -> Self {
        self.settings.slice = tokens;
        self
    }

    /// See [`Settings::patience`].
    pub fn patience(mut self, patience: Duration) -> Self {
        self.settings.patience = patience;
        self
    }

    /// See [`Settings::contexts`].
    pub fn contexts(mut self, contexts: usize) -> Self {
        self.settings.contexts = contexts;
        self
    }

    /// See [`Settings::admission`].
    pub fn admission(mut self, admission: Admission) -> Self {
        self.settings.admission = admission;
        self
    }

    /// Starts the engine. `make` makes its machine on the engine's own thread, where it stays: it need not be `Send`.
    ///
    /// # Errors
    /// Those of `make`.
    pub fn start<E, F>(self, make: F) -> Result<Engine>
    where
        E: Executor,
        F: FnOnce() -> Result<E> + Send + 'static,
    {
        let (calls, received) = channel();
        let (ready, started) = channel();
        let totals = Arc::new(Mutex::new(Totals::default()));
        let shared = totals.clone();
        let work = move || {
            let machine = match make() {
                Ok(machine) => machine,
                Err(error) => return drop(ready.send(Err(error))),
            };
            let _ = ready.send(Ok(machine.limits()));
            work(Scheduler::new(machine, self.settings), &received, &shared);
        };
        let worker = std::thread::Builder::new().name("engine".to_owned()).spawn(work);
        let worker = worker.map_err(|_| Error::EngineStopped)?;
        // Nothing comes where `make` has panicked.
        let limits = started.recv().map_err(|_| Error::EngineStopped)??;
        Ok(Engine { calls: Some(calls), worker: Some(worker), limits, totals })
    }
}

impl Engine {
    /// An engine to be set up.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// What its machine has room for.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// What it has done so far.
    pub fn totals(&self) -> Totals {
        *self.totals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers `requests`, and hands out what they write as they write it. One that is refused ends at once, with
    /// [`Scheduler::submit`]'s error.
    pub fn generate(&self, requests: impl IntoIterator<Item = Request>) -> Stream {
        let requests: Vec<_> = requests.into_iter().collect();
        let cancelled: Arc<[_]> = requests.iter().map(|_| AtomicBool::new(false)).collect();
        let open = vec![true; requests.len()];
        let (events, received) = channel();
        let call = Call { requests, cancelled: cancelled.clone(), events };
        if let Some(calls) = &self.calls {
            let _ = calls.send(call); // if nobody takes it, `events` is gone, and the stream says so
        }
        Stream { events: received, cancelled, open }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.calls = None;
        if let Some(worker) = self.worker.take() {
            let _ = worker.join(); // a panic there has been reported
        }
    }
}

/// What the requests of one call write: the request, by its place in the call, and what happened to it. Dropped, it
/// cancels those that have not ended.
#[derive(Debug)]
pub struct Stream {
    events: Receiver<(usize, Event)>,
    cancelled: Arc<[AtomicBool]>,
    open: Vec<bool>,
}

impl Stream {
    /// Ends a request where it is, with [`Stop::Caller`](crate::Stop::Caller); nothing happens if it has ended, or is not
    /// one of the call's.
    pub fn cancel(&self, request: usize) {
        if let Some(cancelled) = self.cancelled.get(request) {
            cancelled.store(true, Ordering::Relaxed);
        }
    }

    /// Waits for all: what each request wrote, and how it ended.
    pub fn finish(self) -> Vec<(Vec<u32>, End)> {
        let mut tokens = vec![Vec::new(); self.open.len()];
        let mut ends = vec![None; self.open.len()];
        for (request, event) in self {
            match event {
                Event::Token(token) => tokens[request].push(token),
                Event::End(end) => ends[request] = Some(end),
            }
        }
        // Every request has ended when there is no more event.
        tokens.into_iter().zip(ends).filter_map(|(tokens, end)| Some((tokens, end?))).collect()
    }
}

impl Iterator for Stream {
    type Item = (usize, Event);

    fn next(&mut self) -> Option<Self::Item> {
        let request = self.open.iter().position(|open| *open)?;
        let event = self.events.recv().unwrap_or_else(|_| {
            let stop = Err(Arc::new(Error::EngineStopped));
            (request, Event::End(End { stop, usage: Usage::default() }))
        });
        if let (request, Event::End(_)) = event {
            self.open[request] = false;
        }
        Some(event)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.cancelled.iter().for_each(|cancelled| cancelled.store(true, Ordering::Relaxed));
    }
}

#[derive(Debug)]
struct Call {
    requests: Vec<Request>,
    cancelled: Arc<[AtomicBool]>,
    events: Sender<(usize, Event)>,
}

/// To whom a request's events go.
struct Asker {
    request: usize,
    cancelled: Arc<[AtomicBool]>,
    events: Sender<(usize, Event)>,
}

/// Ticks as long as there is an engine.
fn work<E: Executor>(mut scheduler: Scheduler<E>, calls: &Receiver<Call>, totals: &Mutex<Totals>) {
    let start = Instant::now();
    let mut askers = HashMap::<RequestId, Asker>::new();
    loop {
        if scheduler.is_idle() {
            let Ok(call) = calls.recv() else { return };
            take(&mut scheduler, &mut askers, call, start.elapsed());
        }
        loop {
            match calls.try_recv() {
                Ok(call) => take(&mut scheduler, &mut askers, call, start.elapsed()),
                Err(std::sync::mpsc::TryRecvError::Empty) => break,
                Err(std::sync::mpsc::TryRecvError::Disconnected) => return,
            }
        }
        let gone = askers.iter().filter(|(_, asker)| {
            asker.cancelled.get(asker.request).is_some_and(|flag| flag.load(Ordering::Relaxed))
        });
        for id in gone.map(|(id, _)| *id).collect::<Vec<_>>() {
            scheduler.cancel(id, start.elapsed());
        }
        let events = scheduler.tick(|| start.elapsed());
        // Before the events: who has seen an end finds it counted.
        *totals.lock().unwrap_or_else(PoisonError::into_inner) = scheduler.totals();
        for (id, event) in events {
            let ended = matches!(event, Event::End(_));
            if let Some(asker) = askers.get(&id) {
                // Who does not listen any more has set the flag, or is about to.
                let _ = asker.events.send((asker.request, event));
            }
            if ended {
                askers.remove(&id);
            }
        }
    }
}

fn take<E: Executor>(
    scheduler: &mut Scheduler<E>,
    askers: &mut HashMap<RequestId, Asker>,
    call: Call,
    now: Duration,
) {
    let Call { requests, cancelled, events } = call;
    for (request, asked) in requests.into_iter().enumerate() {
        match scheduler.submit(asked, now) {
            Ok(id) => {
                let (cancelled, events) = (cancelled.clone(), events.clone());
                askers.insert(id, Asker { request, cancelled, events });
            }
            Err(error) => {
                let end = End { stop: Err(Arc::new(error)), usage: Usage::default() };
                let _ = events.send((request, Event::End(end)));
            }
        }
    }
}
