//! Which pages are free, and how often each of the others is held.

use crate::error::{Error, Result};
use crate::page::PageId;
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// A pool of pages with a count for each.
///
/// The lowest free page goes first: pages in use stay together, so that storage behind them can grow lazily and
/// shrink again, and one head's pages tend to be neighbours.
#[derive(Debug, Clone)]
pub struct PagePool {
    pages: usize,
    /// Holders of each page that was ever taken.
    holders: Vec<u32>,
    /// Pages below `holders.len()` that came back.
    returned: BinaryHeap<Reverse<u32>>,
    peak: usize,
}

impl PagePool {
    /// A pool of `pages` free pages. Memory grows with the pages taken.
    pub fn new(pages: usize) -> Self {
        Self { pages, holders: Vec::new(), returned: BinaryHeap::new(), peak: 0 }
    }

    /// Takes a free page.
    ///
    /// # Errors
    /// [`Error::OutOfPages`].
    pub fn take(&mut self) -> Result<PageId> {
        self.admit(1)?;
        let page = match self.returned.pop() {
            Some(Reverse(page)) => page,
            None => {
                self.holders.push(0);
                (self.holders.len() - 1) as u32
            }
        };
        self.holders[page as usize] = 1;
        self.peak = self.peak.max(self.used());
        Ok(PageId(page))
    }

    /// Says whether `wanted` pages could be taken now.
    ///
    /// # Errors
    /// [`Error::OutOfPages`].
    pub fn admit(&self, wanted: usize) -> Result<()> {
        let free = self.free();
        if wanted > free { Err(Error::OutOfPages { wanted, free }) } else { Ok(()) }
    }

    /// Adds a holder to a page in use.
    ///
    /// # Errors
    /// [`Error::PageNotInUse`].
    pub fn share(&mut self, page: PageId) -> Result<()> {
        *self.held(page)? += 1;
        Ok(())
    }

    /// Takes a holder from a page in use; `true` if it was the last and the page is free.
    ///
    /// # Errors
    /// [`Error::PageNotInUse`].
    pub fn release(&mut self, page: PageId) -> Result<bool> {
        let held = self.held(page)?;
        *held -= 1;
        let freed = *held == 0;
        if freed {
            self.returned.push(Reverse(page.0));
        }
        Ok(freed)
    }

    fn held(&mut self, page: PageId) -> Result<&mut u32> {
        match self.holders.get_mut(page.index()) {
            Some(held) if *held > 0 => Ok(held),
            _ => Err(Error::PageNotInUse { page }),
        }
    }

    /// Holders of a page; 0 if it is free.
    pub fn holders(&self, page: PageId) -> usize {
        self.holders.get(page.index()).map_or(0, |held| *held as usize)
    }

    /// Pages that nobody holds.
    pub fn free(&self) -> usize {
        self.pages - self.used()
    }

    /// Pages that somebody holds.
    pub fn used(&self) -> usize {
        self.holders.len() - self.returned.len()
    }

    /// The most that were ever in use at once.
    pub fn peak(&self) -> usize {
        self.peak
    }
}
