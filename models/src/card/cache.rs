//! A text in a cache on the card, as libtorch's networks see it.

use crate::cache::{KvCache, Usage, causal};
use crate::error::{Error, Result};
use crate::pool::Pool;
use paged_kernels::{Resident, Sequence};
use std::borrow::BorrowMut;
use tch::Tensor;

/// One text of a [`Resident`] cache, its own or borrowed.
///
/// A first pass attends densely on libtorch, a layer at a time, and stores what is kept; later ones read the pages alone.
/// libtorch's stream and the cache's wait for each other, never the host.
#[derive(Debug)]
pub struct CardCache<R> {
    resident: R,
    sequence: Sequence,
    tokens: usize,
    /// Whether the pass that is under way is the first.
    first: bool,
    mark: Option<(Sequence, usize)>,
}

impl<R: BorrowMut<Resident>> CardCache<R> {
    /// A new text in `resident`.
    ///
    /// # Errors
    /// No seat is free.
    pub fn new(mut resident: R) -> Result<Self> {
        let sequence = resident.borrow_mut().allocate()?;
        Ok(Self::resumed(resident, sequence, 0))
    }

    /// A text of which `tokens` went through.
    pub fn resumed(resident: R, sequence: Sequence, tokens: usize) -> Self {
        Self { resident, sequence, tokens, first: true, mark: None }
    }

    /// Stores a layer of a first pass that was attended elsewhere, as [`attend`](KvCache::attend) does.
    ///
    /// # Errors
    /// Those of [`Resident::fill`].
    pub fn store(
        &mut self,
        layer: usize,
        keys: &Tensor,
        values: &Tensor,
        drops: Option<&Tensor>,
    ) -> Result<()> {
        Pool::fill(self.resident.borrow_mut(), self.sequence, layer, keys, values, drops)
    }

    /// Goes on with a first pass of `tokens` that another of these has begun.
    pub(super) fn goes_on(&mut self, tokens: usize) {
        (self.first, self.tokens) = (true, tokens);
    }

    /// Counts a token that a step reads; the cache, and the text in it.
    pub(super) fn step(&mut self) -> (&mut Resident, Sequence) {
        self.tokens += 1;
        (self.resident.borrow_mut(), self.sequence)
    }

    /// Says what is held where more was wanted. Waits for the card.
    pub(super) fn out_of_pages(&self) -> Error {
        let resident = self.resident.borrow();
        let (pages, free) = (resident.shape().pages, resident.free_pages().unwrap_or(0));
        let (tokens, held) = (self.tokens, pages.saturating_sub(free));
        Error::TextOutOfPages { tokens, held, free, pages }
    }

    /// Whether a pass found the pages that it wanted, which the host learns after the last layer. Waits for the card.
    fn settle(&self, layer: usize) -> Result<()> {
        let resident = self.resident.borrow();
        let last = layer + 1 == resident.shape().layers;
        if last && resident.missing()? > 0 { Err(self.out_of_pages()) } else { Ok(()) }
    }

    /// The cache in which it is.
    pub fn resident(&self) -> &Resident {
        self.resident.borrow()
    }

    /// The text.
    pub fn sequence(&self) -> Sequence {
        self.sequence
    }
}

impl<R: BorrowMut<Resident>> KvCache for CardCache<R> {
    fn tokens(&self) -> usize {
        self.tokens
    }

    fn window(&self) -> usize {
        self.resident.borrow().shape().window
    }

    fn begin(&mut self, tokens: usize) -> Result<()> {
        self.first = self.tokens == 0;
        if !self.first {
            self.resident.borrow_mut().begin_pass(&[(self.sequence, tokens)])?;
        }
        self.tokens += tokens;
        Ok(())
    }

    fn attend(
        &mut self,
        layer: usize,
        queries: &Tensor,
        keys: &Tensor,
        values: &Tensor,
        drops: Option<&Tensor>,
    ) -> Result<Tensor> {
        if self.first {
            self.store(layer, keys, values, drops)?;
            let out = causal(queries, keys, values)?;
            self.settle(layer)?;
            return Ok(out);
        }
        let resident = self.resident.borrow_mut();
        let out = Pool::attend(resident, layer, queries, keys, values, drops)?;
        self.settle(layer)?;
        Ok(out)
    }

    /// What is held now; pages that a mark shares count once. Waits for the card.
    fn usage(&self) -> Usage {
        let resident = self.resident.borrow();
        let shape = resident.shape();
        let lengths = resident.lengths(self.sequence).unwrap_or_default();
        let pages: usize = lengths.iter().map(|rows| rows.div_ceil(shape.page_size)).sum();
        let bytes = pages * shape.page_bytes();
        Usage {
            bytes,
            peak_bytes: bytes,
            rows: lengths.iter().sum(),
            dense_rows: lengths.len() * self.tokens,
        }
    }

    fn mark(&mut self) -> Result<()> {
        let resident = self.resident.borrow_mut();
        let fork = resident.fork(self.sequence)?;
        if let Some((old, _)) = self.mark.replace((fork, self.tokens)) {
            resident.release(old)?;
        }
        Ok(())
    }

    fn rewind(&mut self) -> Result<()> {
        let (marked, tokens) = self.mark.ok_or(Error::NoMark)?;
        let resident = self.resident.borrow_mut();
        resident.release(self.sequence)?;
        self.sequence = resident.fork(marked)?;
        self.tokens = tokens;
        Ok(())
    }
}
