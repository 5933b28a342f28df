//! A cache on the card under a network's tensors. libtorch's stream and the cache's wait for each other, never the host.

use super::memory;
use crate::error::Result;
use crate::pool::Pool;
use paged_kernels::{CacheShape, Error, Resident, Sequence};
use tch::{Device, Kind, Tensor};

impl Pool for Resident {
    fn shape(&self) -> &CacheShape {
        self.shape()
    }

    fn device(&self) -> Device {
        memory::device(self.stream())
    }

    fn allocate(&mut self) -> Result<Sequence> {
        Ok(self.allocate()?)
    }

    fn fork(&mut self, text: Sequence) -> Result<Sequence> {
        Ok(self.fork(text)?)
    }

    fn release(&mut self, text: Sequence) -> Result<()> {
        Ok(self.release(text)?)
    }

    fn fill(
        &mut self,
        text: Sequence,
        layer: usize,
        keys: &Tensor,
        values: &Tensor,
        drops: Option<&Tensor>,
    ) -> Result<()> {
        let words = words(keys, drops)?;
        let stream = self.stream().clone();
        memory::after_torch(&stream)?;
        let bits = memory::bits(&words, keys.size()[2] as usize)?;
        self.fill(text, layer, memory::rows(keys)?, memory::rows(values)?, bits)?;
        memory::before_torch(&stream)
    }

    fn begin(&mut self, texts: &[(Sequence, usize)]) -> Result<()> {
        Ok(self.begin_pass(texts)?)
    }

    fn attend(
        &mut self,
        layer: usize,
        queries: &Tensor,
        keys: &Tensor,
        values: &Tensor,
        drops: Option<&Tensor>,
    ) -> Result<Tensor> {
        let words = words(keys, drops)?;
        let out = Tensor::f_empty(queries.size(), (queries.kind(), queries.device()))?;
        let stream = self.stream().clone();
        memory::after_torch(&stream)?;
        let bits = memory::bits(&words, keys.size()[2] as usize)?;
        self.append(layer, memory::rows(keys)?, memory::rows(values)?, Some(bits))?;
        let seen = memory::rows(queries)?;
        let scale = (seen.shape()[2] as f32).powf(-0.5);
        self.attend(layer, seen, scale, memory::view_mut(&out, seen.shape())?, None)?;
        memory::before_torch(&stream)?;
        Ok(out)
    }

    /// Waits for the card.
    fn lengths(&self, text: Sequence) -> Result<Vec<usize>> {
        Ok(self.lengths(text)?)
    }

    /// Waits for the card.
    fn settle(&self) -> Result<()> {
        let wanted = self.missing()?;
        if wanted > 0 {
            return Err(Error::OutOfPages { wanted, free: self.free_pages()? }.into());
        }
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
