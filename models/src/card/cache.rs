//! A text in a cache on the card, as libtorch's networks see it.

use super::memory;
use crate::cache::{KvCache, Usage, causal};
use crate::error::{Error, Result};
use paged_kernels::{Resident, Sequence};
use std::borrow::BorrowMut;
use tch::{Kind, Tensor};

/// One text of a [`Resident`] cache, its own or borrowed.
///
/// A first pass attends densely on libtorch, a layer at a time, and stores what is kept; later ones read the pages alone.
/// libtorch's stream and the cache's wait for each other, never the host.
#[derive(Debug)]
pub struct CardCache<R> {
    resident: R,
    sequence: Sequence,
    tokens: usize,
    /// Tokens of the pass that is under way, and whether it is the first.
    pass: (usize, bool),
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
        Self { resident, sequence, tokens, pass: (0, true), mark: None }
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
        let words = words(keys, drops)?;
        let resident = self.resident.borrow_mut();
        let stream = resident.stream().clone();
        memory::after_torch(&stream)?;
        let bits = memory::bits(&words, self.pass.0)?;
        resident.fill(self.sequence, layer, memory::rows(keys)?, memory::rows(values)?, bits)?;
        memory::before_torch(&stream)
    }

    /// Goes on with a first pass of `tokens` that another of these has begun.
    pub(super) fn goes_on(&mut self, tokens: usize) {
        (self.pass, self.tokens) = ((tokens, true), tokens);
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
        let first = self.tokens == 0;
        self.pass = (tokens, first);
        if !first {
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
        if self.pass.1 {
            self.store(layer, keys, values, drops)?;
            return causal(queries, keys, values);
        }
        let words = words(keys, drops)?;
        let out = Tensor::f_empty(queries.size(), (queries.kind(), queries.device()))?;
        let resident = self.resident.borrow_mut();
        let stream = resident.stream().clone();
        memory::after_torch(&stream)?;
        let bits = memory::bits(&words, self.pass.0)?;
        resident.append(layer, memory::rows(keys)?, memory::rows(values)?, Some(bits))?;
        let seen = memory::rows(queries)?;
        let scale = (seen.shape()[2] as f32).powf(-0.5);
        resident.attend(layer, seen, scale, memory::view_mut(&out, seen.shape())?, None)?;
        memory::before_torch(&stream)?;
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

/// The words of a pass's drop bits; without any all stay.
fn words(keys: &Tensor, drops: Option<&Tensor>) -> Result<Tensor> {
    match drops {
        Some(drops) => packed(drops),
        None => {
            let words = (keys.size()[2] + 31) / 32;
            Ok(Tensor::f_zeros([keys.size()[1], words], (Kind::Int, keys.device()))?)
        }
    }
}

/// Drop bits `[1, heads, tokens]` as words, i32 `[heads, tokens / 32 rounded up]`, the first token in the lowest bit.
fn packed(drops: &Tensor) -> Result<Tensor> {
    let [_, heads, tokens] = drops.size()[..] else { unreachable!("drop bits of a text") };
    let words = (tokens + 31) / 32;
    let padded = drops.f_constant_pad_nd([0, 32 * words - tokens])?;
    // As wide as the sum needs, its last bit negative as in a signed word.
    let places = (0..32).map(|bit| i64::from(1i32 << bit)).collect::<Vec<_>>();
    let places = Tensor::f_from_slice(&places)?.f_to_device(drops.device())?;
    let spread = padded.f_view([heads, words, 32])?.f_to_kind(Kind::Int64)?;
    Ok(spread
        .f_mul(&places)?
        .f_sum_dim_intlist([-1i64].as_slice(), false, Kind::Int64)?
        .f_to_kind(Kind::Int)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_lie_as_the_kernels_read_them() {
        let tokens = 70;
        let drops: Vec<bool> = (0..2 * tokens).map(|i| i % 3 == 0 || i % 32 == 31).collect();
        let tensor = Tensor::from_slice(&drops).view([1, 2, tokens as i64]);
        let words = Vec::<i32>::try_from(packed(&tensor).unwrap().reshape([-1])).unwrap();
        assert_eq!(words.len(), 6);
        for (i, &drop) in drops.iter().enumerate() {
            let (head, token) = (i / tokens, i % tokens);
            assert_eq!(words[head * 3 + token / 32] >> (token % 32) & 1 == 1, drop, "bit {i}");
        }
        assert_eq!(words[2] as u32 >> 6, 0, "bits past the last token are zero");
    }
}
