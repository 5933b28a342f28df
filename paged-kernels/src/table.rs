//! Where the live tokens of one (sequence, layer, kv head) lie.

use crate::error::Result;
use crate::page::{Move, PageId, Place, Slot};
use crate::pool::PagePool;
use crate::ring::{Recent, Ring};
use std::collections::BTreeSet;

/// Pages, length and window of one head.
///
/// Slots `0..len` are all live: there are no holes, and only the last page may be partly used. Decode attention does
/// not depend on the order of its keys, which are rotated before they are stored; so a new token takes the slot of the
/// dropped token that has just left the window, and nothing is ever compacted.
#[derive(Debug, Clone)]
pub struct PageTable {
    page_size: usize,
    pages: Vec<PageId>,
    len: usize,
    ring: Ring,
}

/// Indices of the tokens that a prefill keeps: the newest `window` and those not dropped, in order.
pub(crate) fn kept(drops: &[bool], window: usize) -> impl Iterator<Item = usize> {
    let old = drops.len().saturating_sub(window);
    drops.iter().enumerate().filter(move |&(i, &drop)| i >= old || !drop).map(|(i, _)| i)
}

impl PageTable {
    /// The table of a head without tokens.
    pub fn new(page_size: usize) -> Self {
        Self { page_size, pages: Vec::new(), len: 0, ring: Ring::default() }
    }

    /// Live tokens.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token is live.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pages of slots `0..len`, in order.
    pub fn pages(&self) -> &[PageId] {
        &self.pages
    }

    /// The newest tokens, oldest first: the window, and the tokens of the last step.
    pub fn recent(&self) -> impl Iterator<Item = Recent> {
        self.ring.iter()
    }

    /// Where a live slot lies.
    ///
    /// # Panics
    /// If the slot is not in one of the table's pages.
    pub fn place(&self, slot: Slot) -> Place {
        Place {
            page: self.pages[slot.index() / self.page_size],
            row: slot.index() % self.page_size,
        }
    }

    /// Takes in the tokens of a prefill: those kept get slots `0..` in order, the newest `window` enter the ring.
    /// `drops` has a bit for each token.
    ///
    /// # Errors
    /// [`OutOfPages`](crate::Error::OutOfPages); the table is unchanged then.
    pub fn fill(&mut self, pool: &mut PagePool, window: usize, drops: &[bool]) -> Result<()> {
        let len = kept(drops, window).count();
        self.resize(pool, len)?;
        let recent = drops.len().min(window);
        for (i, &drop) in drops[drops.len() - recent..].iter().enumerate() {
            self.ring.push(Slot((len - recent + i) as u32), drop);
        }
        Ok(())
    }

    /// Length after a step of `tokens` tokens.
    fn len_after(&self, window: usize, tokens: usize) -> usize {
        (self.len - self.ring.leaving(window).count()).saturating_add(tokens)
    }

    /// Pages that a step of `tokens` tokens needs beyond those held: new ones, and copies of those that others hold too
    /// and that it writes to.
    pub fn wanted(&self, pool: &PagePool, window: usize, tokens: usize) -> usize {
        let pages = self.len_after(window, tokens).div_ceil(self.page_size);
        let shared = self.shared(pool, window, tokens).len();
        pages.saturating_sub(self.pages.len()).saturating_add(shared)
    }

    /// Which of the pages that a step writes to others hold too.
    fn shared(&self, pool: &PagePool, window: usize, tokens: usize) -> BTreeSet<usize> {
        let len = self.len_after(window, tokens);
        let held = self.pages.len() * self.page_size;
        let free = self.ring.leaving(window).map(Slot::index).filter(|&slot| slot < len);
        let written = free.chain(self.len..len.min(held)).map(|slot| slot / self.page_size);
        written.filter(|&page| pool.holders(self.pages[page]) > 1).collect()
    }

    /// Adds a holder to every page: a clone of this table may then be used beside it.
    ///
    /// # Errors
    /// [`PageNotInUse`](crate::Error::PageNotInUse) if `pool` is not the pool that the pages came from.
    pub fn share(&self, pool: &mut PagePool) -> Result<()> {
        self.pages.iter().try_for_each(|&page| pool.share(page))
    }

    /// Takes a new page in the place of each, for the clone of a table that has given its pages back.
    pub(crate) fn replace(&mut self, pool: &mut PagePool) -> Result<()> {
        pool.admit(self.pages.len())?;
        self.pages.iter_mut().try_for_each(|page| pool.take().map(|new| *page = new))
    }

    /// Puts a page of the table's own in the place of one that others hold too, with its rows but for those of the `free`
    /// slots.
    fn own(
        &mut self,
        pool: &mut PagePool,
        page: usize,
        free: &[Slot],
        moves: &mut Vec<Move>,
    ) -> Result<()> {
        let (old, new) = (self.pages[page], pool.take()?);
        let slots = page * self.page_size..self.len.min((page + 1) * self.page_size);
        for slot in slots.map(|slot| Slot(slot as u32)).filter(|slot| !free.contains(slot)) {
            let row = slot.index() % self.page_size;
            moves.push(Move { from: Place { page: old, row }, to: Place { page: new, row } });
        }
        self.pages[page] = new;
        pool.release(old)?;
        Ok(())
    }

    /// Begins a step of `tokens` tokens: ring entries beyond the newest `window` leave, the slots of the dropped ones
    /// go to the new tokens, further tokens are appended. Slots that stay free (a longer step went before) are closed
    /// by `moves` of rows from the tail, which the caller must carry out before it writes or frees a page; a step as
    /// long as the one before never moves a row. Pages that are written to and that others hold too are copied, by `moves`
    /// again. The new tokens' slots are pushed onto `slots`, in order.
    ///
    /// # Errors
    /// [`OutOfPages`](crate::Error::OutOfPages); the table is unchanged then.
    pub fn begin_step(
        &mut self,
        pool: &mut PagePool,
        window: usize,
        tokens: usize,
        slots: &mut Vec<Slot>,
        moves: &mut Vec<Move>,
    ) -> Result<()> {
        pool.admit(self.wanted(pool, window, tokens))?;
        let len = self.len_after(window, tokens);
        let shared = self.shared(pool, window, tokens);
        let mut free = self.ring.leaving(window).collect::<Vec<_>>();
        self.ring.advance(window);
        for page in shared {
            self.own(pool, page, &free, moves)?;
        }
        if free.len() > tokens {
            self.close(&mut free, len, tokens, moves);
        }
        let appended = (self.len..len).map(|slot| Slot(slot as u32));
        let first = slots.len();
        slots.extend(free.into_iter().chain(appended));
        slots[first..].iter().for_each(|&slot| self.ring.push(slot, false));
        self.resize(pool, len)
    }

    /// Leaves `tokens` of the `free` slots, all below `len`, by moving the live rows at and past `len` into the others.
    fn close(&mut self, free: &mut Vec<Slot>, len: usize, tokens: usize, moves: &mut Vec<Move>) {
        let past = free.iter().filter(|slot| slot.index() >= len).copied().collect::<BTreeSet<_>>();
        free.retain(|slot| slot.index() < len);
        let tail =
            (len..self.len).map(|slot| Slot(slot as u32)).filter(|slot| !past.contains(slot));
        for (from, to) in tail.zip(free.drain(tokens..)) {
            moves.push(Move { from: self.place(from), to: self.place(to) });
            self.ring.moved(from, to);
        }
    }

    /// Records which of the newest `drops.len()` tokens go once they leave the window.
    pub fn decide(&mut self, drops: &[bool]) {
        self.ring.decide(drops);
    }

    /// Gives every page back.
    ///
    /// # Errors
    /// [`PageNotInUse`](crate::Error::PageNotInUse) if `pool` is not the pool that the pages came from.
    pub fn clear(&mut self, pool: &mut PagePool) -> Result<()> {
        self.ring = Ring::default();
        self.resize(pool, 0)
    }

    fn resize(&mut self, pool: &mut PagePool, len: usize) -> Result<()> {
        let pages = len.div_ceil(self.page_size);
        pool.admit(pages.saturating_sub(self.pages.len()))?;
        while self.pages.len() < pages {
            self.pages.push(pool.take()?);
        }
        for page in self.pages.drain(pages..) {
            pool.release(page)?;
        }
        self.len = len;
        Ok(())
    }
}
