//! A machine of several: each rank's on a thread of its own.

use super::Rank;
use crate::engine::{Drawn, Executor, Held, Limits, TextId};
use crate::error::{Error, Result};
use crate::sampling::Sampling;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long the others are waited for once a rank has failed: they are let go, and come out within moments.
const PATIENCE: Duration = Duration::from_secs(20);

/// An [`Executor`] of one on each [`Rank`], which all do the same.
///
/// Ranks keep different numbers of rows, so pages are counted on each: what is free is the least that is free on any, and
/// what a call takes is the most that it takes on any. [`Held`] and the bytes of a suspended text are sums.
///
/// A token is drawn on every rank, from the same scores with the same random state, and handed out once all have it. A rank
/// that fails where others wait for it loses the machine: [`Error::RankLost`].
pub struct Ranks<E> {
    workers: Vec<Worker<E>>,
    limits: Limits,
    figures: Figures,
    /// Of each rank, what the others have not drawn yet.
    drawn: Vec<VecDeque<Drawn>>,
    lost: Option<(usize, String)>,
}

struct Worker<E> {
    rank: Rank,
    calls: Option<Sender<Call<E>>>,
    thread: Option<JoinHandle<()>>,
}

type Call<E> = Box<dyn FnOnce(&mut Seat<E>) + Send>;

/// A rank's machine and the texts on it.
struct Seat<E> {
    machine: E,
    texts: BTreeSet<TextId>,
}

/// Pages, after a call: free ones, and of each text those to read, to step, and held.
#[derive(Default)]
struct Figures {
    free: usize,
    texts: BTreeMap<TextId, [usize; 3]>,
}

impl Figures {
    /// Of all ranks: what is free on each, and what suffices on each.
    fn joined(all: impl Iterator<Item = Self>) -> Self {
        let join = |mut joined: Self, other: Self| {
            joined.free = joined.free.min(other.free);
            for (text, pages) in other.texts {
                let most = joined.texts.entry(text).or_default();
                most.iter_mut().zip(pages).for_each(|(most, pages)| *most = pages.max(*most));
            }
            joined
        };
        all.reduce(join).unwrap_or_default()
    }
}

impl<E: Executor> Seat<E> {
    fn figures(&self) -> Figures {
        let machine = &self.machine;
        let pages = |&text: &TextId| {
            (text, [machine.pages_to_read(text), machine.pages_to_step(text), machine.pages(text)])
        };
        Figures { free: machine.free_pages(), texts: self.texts.iter().map(pages).collect() }
    }
}

/// Lets the other ranks go if this one's thread panics.
pub(super) struct Panics<'a>(pub &'a Rank);

impl Drop for Panics<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.sums.give_up();
        }
    }
}

impl<E: Executor + 'static> Ranks<E> {
    /// Starts a thread for each of `ranks`, on which `make` makes its machine and where that stays.
    ///
    /// # Errors
    /// The first of `make`'s.
    pub fn start(
        ranks: Vec<Rank>,
        make: impl Fn(&Rank) -> Result<E> + Send + Sync + 'static,
    ) -> Result<Self> {
        let make = Arc::new(make);
        let (mut workers, mut started) = (Vec::new(), Vec::new());
        for rank in ranks {
            let (calls, received) = channel::<Call<E>>();
            let (ready, start) = channel();
            let (make, own) = (make.clone(), rank.clone());
            let work = move || {
                let _panics = Panics(&own);
                // In host memory ranks are side by side already: a part's loops stay on its own thread.
                let alone = rayon::ThreadPoolBuilder::new().num_threads(1).use_current_thread();
                let _alone = alone.build();
                match make(&own) {
                    Err(error) => {
                        own.sums.give_up();
                        let _ = ready.send(Err(error)); // nobody waits where another failed first
                    }
                    Ok(machine) => {
                        let limits = machine.limits();
                        let mut seat = Seat { machine, texts: BTreeSet::new() };
                        let _ = ready.send(Ok((limits, seat.figures())));
                        received.iter().for_each(|call| call(&mut seat));
                    }
                }
            };
            let thread = std::thread::Builder::new().name(format!("rank {}", rank.index()));
            let thread = thread.spawn(work).map_err(|_| Error::EngineStopped)?;
            workers.push(Worker { rank, calls: Some(calls), thread: Some(thread) });
            started.push(start);
        }
        let started = started.iter().map(|start| start.recv().map_err(|_| Error::EngineStopped)?);
        let (limits, figures): (Vec<_>, Vec<_>) =
            started.collect::<Result<Vec<_>>>()?.into_iter().unzip();
        let drawn = workers.iter().map(|_| VecDeque::new()).collect();
        let least = limits.into_iter().reduce(|a: Limits, b| Limits {
            pages: a.pages.min(b.pages),
            seats: a.seats.min(b.seats),
            ..a
        });
        let limits = least.ok_or(Error::EngineStopped)?;
        Ok(Self {
            workers,
            limits,
            figures: Figures::joined(figures.into_iter()),
            drawn,
            lost: None,
        })
    }

    /// What each rank answers. Where `together`, they wait for each other within the call.
    fn all<R: Send + 'static>(
        &mut self,
        together: bool,
        call: impl Fn(&mut Seat<E>) -> Result<R> + Send + Sync + 'static,
    ) -> Result<Vec<R>> {
        if let Some((rank, cause)) = &self.lost {
            return Err(Error::RankLost { rank: *rank, cause: cause.clone() });
        }
        let (call, (answer, answers)) = (Arc::new(call), channel());
        for (index, worker) in self.workers.iter().enumerate() {
            let (call, answer, rank) = (call.clone(), answer.clone(), worker.rank.clone());
            let work: Call<E> = Box::new(move |seat| {
                let result = call(seat);
                if together && result.is_err() {
                    rank.sums.give_up();
                }
                let _ = answer.send((index, result, seat.figures()));
            });
            if let Some(calls) = &worker.calls {
                let _ = calls.send(work); // a thread that is gone does not answer
            }
        }
        drop(answer);
        let (mut found, mut failed) = (BTreeMap::new(), Vec::new());
        for _ in 0..self.workers.len() {
            let patience = if failed.is_empty() { Duration::MAX } else { PATIENCE };
            match answers.recv_timeout(patience) {
                Ok((index, Ok(answer), figures)) => drop(found.insert(index, (answer, figures))),
                Ok((index, Err(error), _)) => failed.push((index, error)),
                Err(_) => break,
            }
        }
        let ranks = self.workers.len();
        if found.len() == ranks {
            let (answers, figures): (Vec<_>, Vec<_>) = found.into_values().unzip();
            self.figures = Figures::joined(figures.into_iter());
            return Ok(answers);
        }
        // Those who were let go tell of who failed first.
        failed.sort_by_key(|(index, error)| (matches!(error, Error::RankLost { .. }), *index));
        let alike = !together && failed.len() == ranks;
        let first = failed.into_iter().next();
        if let (false, Some((rank, error))) = (alike, &first) {
            self.lost = Some((*rank, error.to_string()));
        }
        let silent = || (0..ranks).find(|index| !found.contains_key(index)).unwrap_or(0);
        Err(first.map_or_else(
            || {
                let (rank, cause) = (silent(), "its thread has panicked".to_owned());
                self.lost = Some((rank, cause.clone()));
                Error::RankLost { rank, cause }
            },
            |(_, error)| error,
        ))
    }

    /// One answer of all, which must be the same.
    fn one<R: Send + PartialEq + 'static>(
        &mut self,
        together: bool,
        call: impl Fn(&mut Seat<E>) -> Result<R> + Send + Sync + 'static,
    ) -> Result<R> {
        let mut answers = self.all(together, call)?.into_iter();
        let first = answers.next().ok_or(Error::EngineStopped)?;
        match answers.position(|answer| answer != first) {
            None => Ok(first),
            Some(index) => Err(self.apart(index + 1)),
        }
    }

    fn apart(&mut self, rank: usize) -> Error {
        let cause = "it has done other than the first, of the same work".to_owned();
        self.lost = Some((rank, cause.clone()));
        Error::RankLost { rank, cause }
    }

    /// Refuses what could leave one rank without pages, and the others waiting for it.
    fn fits(&self, wanted: usize) -> Result<()> {
        let free = self.figures.free;
        if wanted > free {
            return Err(Error::Cache(paged_kernels::Error::OutOfPages { wanted, free }));
        }
        Ok(())
    }

    fn pages_of(&self, text: TextId) -> [usize; 3] {
        self.figures.texts.get(&text).copied().unwrap_or_default()
    }
}

impl<E: Executor + 'static> Executor for Ranks<E> {
    fn limits(&self) -> Limits {
        self.limits
    }

    fn free_pages(&self) -> usize {
        self.figures.free
    }

    fn most_pages(&self, tokens: usize) -> usize {
        let ask = |worker: &Worker<E>| {
            let (answer, answered) = channel();
            let call: Call<E> = Box::new(move |seat| {
                let _ = answer.send(seat.machine.most_pages(tokens));
            });
            worker.calls.as_ref()?.send(call).ok()?;
            answered.recv().ok()
        };
        // Of a rank that is lost: no text fits it.
        self.workers.iter().map(|worker| ask(worker).unwrap_or(usize::MAX)).max().unwrap_or(0)
    }

    fn pages_to_read(&self, text: TextId) -> usize {
        self.pages_of(text)[0]
    }

    fn pages_to_step(&self, text: TextId) -> usize {
        self.pages_of(text)[1]
    }

    fn pages(&self, text: TextId) -> usize {
        self.pages_of(text)[2]
    }

    fn begin(&mut self) -> Result<TextId> {
        self.one(false, |seat| {
            let text = seat.machine.begin()?;
            seat.texts.insert(text);
            Ok(text)
        })
    }

    fn read(&mut self, text: TextId, tokens: &[u32]) -> Result<()> {
        let tokens = tokens.to_vec();
        self.one(false, move |seat| seat.machine.read(text, &tokens))
    }

    fn advance(&mut self, text: TextId, budget: usize) -> Result<bool> {
        self.fits(self.pages_to_read(text))?;
        self.one(true, move |seat| seat.machine.advance(text, budget))
    }

    fn draw(&mut self, text: TextId, sampling: &Sampling) -> Result<()> {
        let sampling = sampling.clone();
        self.one(false, move |seat| seat.machine.draw(text, &sampling))
    }

    fn step(&mut self, batch: &[TextId]) -> Result<()> {
        self.fits(batch.iter().map(|&text| self.pages_to_step(text)).sum())?;
        let batch = batch.to_vec();
        self.one(true, move |seat| seat.machine.step(&batch))
    }

    fn drawn(&mut self, wait: bool) -> Result<Vec<Drawn>> {
        let drawn = self.all(false, move |seat| seat.machine.drawn(wait))?;
        self.drawn.iter_mut().zip(drawn).for_each(|(all, drawn)| all.extend(drawn));
        let mut out = Vec::new();
        while self.drawn.iter().all(|drawn| !drawn.is_empty()) {
            let mut drawn = self.drawn.iter_mut().filter_map(VecDeque::pop_front);
            let Some(first) = drawn.next() else { break };
            let said = |drawn: &Drawn| (drawn.text, drawn.token.as_ref().ok().copied());
            let other = drawn.position(|other| said(&other) != said(&first));
            if let Some(index) = other {
                return Err(self.apart(index + 1));
            }
            out.push(first);
        }
        Ok(out)
    }

    fn fork(&mut self, text: TextId) -> Result<TextId> {
        self.one(false, move |seat| {
            let fork = seat.machine.fork(text)?;
            seat.texts.insert(fork);
            Ok(fork)
        })
    }

    fn suspend(&mut self, text: TextId) -> Result<usize> {
        Ok(self.all(false, move |seat| seat.machine.suspend(text))?.iter().sum())
    }

    fn resume(&mut self, text: TextId) -> Result<()> {
        self.one(false, move |seat| seat.machine.resume(text))
    }

    fn release(&mut self, text: TextId) -> Result<()> {
        for drawn in &mut self.drawn {
            drawn.retain(|drawn| drawn.text != text);
        }
        self.one(false, move |seat| {
            seat.texts.remove(&text);
            seat.machine.release(text)
        })
    }

    fn held(&mut self, text: TextId) -> Result<Held> {
        let join = |a: Held, b: Held| Held {
            pages: a.pages + b.pages,
            rows: a.rows + b.rows,
            dense_rows: a.dense_rows + b.dense_rows,
        };
        let held = self.all(false, move |seat| seat.machine.held(text))?;
        Ok(held.into_iter().reduce(join).unwrap_or_default())
    }
}

impl<E> Drop for Ranks<E> {
    fn drop(&mut self) {
        for worker in &mut self.workers {
            worker.calls = None;
            let Some(thread) = worker.thread.take() else { continue };
            // One that is lost may never come back.
            let start = Instant::now();
            while self.lost.is_some() && !thread.is_finished() && start.elapsed() < PATIENCE {
                std::thread::sleep(Duration::from_millis(1));
            }
            if self.lost.is_none() || thread.is_finished() {
                let _ = thread.join(); // a panic there has been reported
            }
        }
    }
}

impl<E> std::fmt::Debug for Ranks<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ranks")
            .field("ranks", &self.workers.len())
            .field("limits", &self.limits)
            .field("lost", &self.lost)
            .finish_non_exhaustive()
    }
}
