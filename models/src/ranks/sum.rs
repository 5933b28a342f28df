//! What ranks exchange: sums.

use crate::error::{Error, Result};
use std::fmt::Debug;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use tch::Tensor;

/// A rank's side of the sums over all ranks.
pub(crate) trait Sum: Debug + Send + Sync {
    /// `part` plus those of the others, the same bits on each rank. Waits for the others, on the host or on the card.
    fn sum(&self, part: Tensor) -> Result<Tensor>;

    /// Lets go whoever waits, on any rank: this one will not come. All sums fail from then on.
    fn give_up(&self);

    /// The side as a decode step on a card knows it.
    #[cfg(feature = "cuda")]
    fn on_card(&self) -> Option<&crate::card::CardSum> {
        None
    }
}

/// Sums in host memory, one for each rank.
pub(super) fn host(ranks: usize) -> Vec<Arc<dyn Sum>> {
    let table = Arc::new(Table::default());
    table.state().parts.resize_with(ranks, || None);
    let side = |rank| Arc::new(HostSum { table: table.clone(), rank }) as Arc<dyn Sum>;
    (0..ranks).map(side).collect()
}

#[derive(Debug)]
struct HostSum {
    table: Arc<Table>,
    rank: usize,
}

/// Where ranks lay their parts down and wait for those of the others.
#[derive(Debug, Default)]
struct Table {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    parts: Vec<Option<Tensor>>,
    /// Ranks that have taken the sum; the last one clears the table.
    taken: usize,
    given_up: Option<usize>,
}

impl Table {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `ready`, or until a rank has given up.
    fn until(&self, ready: impl Fn(&State) -> bool) -> Result<std::sync::MutexGuard<'_, State>> {
        let waits = |state: &mut State| state.given_up.is_none() && !ready(state);
        let state = self.changed.wait_while(self.state(), waits);
        let state = state.unwrap_or_else(PoisonError::into_inner);
        match state.given_up {
            None => Ok(state),
            Some(rank) => Err(Error::RankLost { rank, cause: "it has given up".to_owned() }),
        }
    }
}

impl Sum for HostSum {
    fn sum(&self, part: Tensor) -> Result<Tensor> {
        let mut state = self.table.until(|state| state.parts[self.rank].is_none())?;
        state.parts[self.rank] = Some(part);
        drop(state);
        self.table.changed.notify_all();
        let mut state = self.table.until(|state| state.parts.iter().all(Option::is_some))?;
        // In the order of the ranks, so that all get the same bits.
        let mut parts = state.parts.iter().flatten();
        let first = parts.next().expect("there is a rank").shallow_clone();
        let sum = parts.try_fold(first, |sum, part| sum.f_add(part))?;
        state.taken += 1;
        if state.taken == state.parts.len() {
            state.parts.iter_mut().for_each(|part| *part = None);
            state.taken = 0;
            drop(state);
            self.table.changed.notify_all();
        }
        Ok(sum)
    }

    fn give_up(&self) {
        self.table.state().given_up.get_or_insert(self.rank);
        self.table.changed.notify_all();
    }
}
