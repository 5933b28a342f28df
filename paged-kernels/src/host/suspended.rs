//! Texts that leave the pool, and come back.

use crate::book::{Sequence, Shelved};
use crate::error::{Error, Result};
use crate::host::Host;
use crate::shape::CacheShape;
use crate::storage::Packed;

/// A text outside of the pool: see [`Host::suspend`].
#[derive(Debug, Clone)]
pub struct HostSuspended {
    shape: CacheShape,
    text: Shelved,
    pages: Packed,
}

impl HostSuspended {
    /// Bytes of its pages.
    pub fn bytes(&self) -> usize {
        self.pages.bytes()
    }

    /// Pages that it takes when it comes back.
    pub fn pages(&self) -> usize {
        self.text.pages()
    }
}

impl<K> Host<K> {
    /// Takes a text out of the pool and gives its pages back, as `release` does.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::StepUnfinished`] in the middle of a step. Nothing changes then.
    pub fn suspend(&mut self, sequence: Sequence) -> Result<HostSuspended> {
        let tables = self.book.finished(sequence)?;
        let pages = self.memory.pack(tables.iter().flat_map(|table| table.pages()).copied());
        let text = self.book.shelve(sequence)?;
        self.memory.trim(&self.book.pool);
        Ok(HostSuspended { shape: self.book.shape.clone(), text, pages })
    }

    /// Brings a text back into other pages, of its own: what it gives from then on is the same, bit for bit.
    ///
    /// # Errors
    /// [`Error::OutOfPages`]; [`Error::OtherShape`] if it comes from a cache of another shape. Nothing changes then.
    pub fn resume(&mut self, suspended: &HostSuspended) -> Result<Sequence> {
        let shape = CacheShape { pages: self.book.shape.pages, ..suspended.shape.clone() };
        if shape != self.book.shape {
            return Err(Error::OtherShape);
        }
        let sequence = self.book.unshelve(&suspended.text)?;
        let tables = self.book.tables(sequence)?;
        let pages = tables.iter().flat_map(|table| table.pages()).copied();
        self.memory.unpack(&suspended.pages, pages);
        Ok(sequence)
    }

    /// Pages that `begin_step` would take beyond those held, copies of shared ones included.
    ///
    /// # Errors
    /// Those of `begin_step`, but for `OutOfPages`.
    pub fn wanted(&self, step: &[(Sequence, usize)]) -> Result<usize> {
        self.book.wanted(step)
    }
}
