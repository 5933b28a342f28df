//! A model over several devices, for one that does not fit a single one, or that should be read faster.
//!
//! Each [`Rank`] has some kv heads with their query heads, a share of the MLP, and a cache of its own for its heads: pages,
//! windows and drop bits never leave it. What attention and MLP add to the residual stream is summed over the ranks, twice a
//! layer; all else is the same on each, so that each draws the same tokens. [`Ranks`] runs an [`Executor`] on each and is one:
//!
//! ```no_run
//! # fn main() -> models::Result<()> {
//! use models::engine::{CpuExecutor, Engine, Room};
//! use models::ranks::{Rank, Ranks};
//! use models::{CausalLm, Decoder, Hooks, Weights, open};
//! use tch::{Device, Kind};
//!
//! let weights = Weights::new(open("model".as_ref())?, Kind::Float, Device::Cpu)?;
//! let engine = Engine::builder().start(move || {
//!     // On cards: Rank::on_cards(2)?, and a CardExecutor below.
//!     Ranks::start(Rank::on_host(2), move |rank| {
//!         let part = Decoder::load_part(&weights, rank)?; // reads its part of the files, to its device
//!         let room = Room::new(part.config(), 1 << 30);
//!         CpuExecutor::new(Box::new(part), Kind::Float, Hooks::default(), room)
//!     })
//! })?;
//! # Ok(())
//! # }
//! ```
//!
//! [`Executor`]: crate::engine::Executor

mod executor;
mod part;
mod sum;

pub use executor::Ranks;
pub(crate) use part::Part;
pub(crate) use sum::Sum;

use crate::error::{Error, Result};
use std::sync::{Arc, Mutex, PoisonError};
use tch::{Device, Tensor};

/// One of the equal parts of a model, on its device.
#[derive(Clone, Debug)]
pub struct Rank {
    index: usize,
    of: usize,
    device: Device,
    sums: Arc<dyn Sum>,
}

impl Rank {
    /// So many parts in host memory, for tests of what cards do.
    pub fn on_host(parts: usize) -> Vec<Self> {
        let sums = sum::host(parts).into_iter().enumerate();
        let rank = |(index, sums)| Self { index, of: parts, device: Device::Cpu, sums };
        sums.map(rank).collect()
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn new(index: usize, of: usize, device: Device, sums: Arc<dyn Sum>) -> Self {
        Self { index, of, device, sums }
    }

    /// Which of the parts it is, from 0.
    pub fn index(&self) -> usize {
        self.index
    }

    /// How many parts there are.
    pub fn of(&self) -> usize {
        self.of
    }

    /// Where it lies.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Its share of `all`.
    pub fn share(&self, all: usize) -> std::ops::Range<usize> {
        let each = all / self.of;
        self.index * each..(self.index + 1) * each
    }

    /// The sum of what all ranks bring, which must call alike. Gives the same bits to each.
    pub(crate) fn sum(&self, part: Tensor) -> Result<Tensor> {
        self.sums.sum(part)
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn sums(&self) -> &Arc<dyn Sum> {
        &self.sums
    }
}

/// What `work` gives on each of `ranks`, each on a thread of its own. Where one fails the others are let go, and the first
/// error in time is given.
///
/// # Errors
/// Those of `work`; [`Error::RankLost`] where it panics.
pub fn on_each<T, E>(
    ranks: &[Rank],
    work: impl Fn(&Rank) -> std::result::Result<T, E> + Sync,
) -> std::result::Result<Vec<T>, E>
where
    T: Send,
    E: Send + From<Error>,
{
    let first = Mutex::new(None);
    let failed = |rank: &Rank, error: E| {
        first.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        rank.sums.give_up();
    };
    let run = |rank: &Rank| {
        let _panics = executor::Panics(rank);
        work(rank).map_err(|error| failed(rank, error)).ok()
    };
    let found: Option<Vec<T>> = std::thread::scope(|scope| {
        let run = &run;
        let threads: Vec<_> =
            ranks.iter().map(|rank| (rank, scope.spawn(move || run(rank)))).collect();
        let join = |(rank, thread): (&Rank, std::thread::ScopedJoinHandle<'_, Option<T>>)| {
            thread.join().unwrap_or_else(|_| {
                let cause = "its thread has panicked".to_owned();
                failed(rank, Error::RankLost { rank: rank.index, cause }.into());
                None
            })
        };
        // All are waited for, whatever the first give.
        threads.into_iter().map(join).collect::<Vec<_>>().into_iter().collect()
    });
    let first = first.into_inner().unwrap_or_else(PoisonError::into_inner);
    match (found, first) {
        (Some(found), _) => Ok(found),
        (None, Some(error)) => Err(error),
        (None, None) => Err(Error::EngineStopped.into()),
    }
}
