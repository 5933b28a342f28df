//! Names for places, so that none is mistaken for another.

use std::fmt;

/// A page of the pool: room for the keys and values of `page_size` tokens of one head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageId(pub(crate) u32);

impl PageId {
    /// Its place in the pool, widened before anyone multiplies it: 32-bit row or element numbers wrap in pools
    /// that exist.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for PageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A row of one head's own list of live tokens. Slots say nothing of age: a new token takes the slot of a dropped one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub(crate) u32);

impl Slot {
    /// Its place in the head's list.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Where a slot lies in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Place {
    /// The page.
    pub page: PageId,
    /// The row in it, `< page_size`.
    pub row: usize,
}

/// A row that a backend must copy before it writes a step's tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Move {
    /// From where; stale afterwards.
    pub from: Place,
    /// To where.
    pub to: Place,
}
