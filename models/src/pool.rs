//! Many texts in one pool of pages, as a network's tensors see them.

use crate::bridge;
use crate::error::Result;
use crate::paged::{attend, bits};
use paged_kernels::{CacheShape, Cpu, PagedAttention, Sequence};
use tch::{Device, Tensor};

/// Texts whose pages lie in one pool, and passes over them. Keys and values are `[1, kv_heads, tokens, head_dim]`, drop bits
/// `[1, kv_heads, tokens]` bool; the tokens of several texts stand side by side.
pub trait Pool {
    /// Its sizes.
    fn shape(&self) -> &CacheShape;

    /// Where its tensors lie.
    fn device(&self) -> Device;

    /// A text with nothing read.
    fn allocate(&mut self) -> Result<Sequence>;

    /// A text that goes on from where another is, in the same pages.
    fn fork(&mut self, text: Sequence) -> Result<Sequence>;

    /// Gives a text's pages back.
    fn release(&mut self, text: Sequence) -> Result<()>;

    /// Stores a layer of a text's first pass.
    fn fill(
        &mut self,
        text: Sequence,
        layer: usize,
        keys: &Tensor,
        values: &Tensor,
        drops: Option<&Tensor>,
    ) -> Result<()>;

    /// Announces later tokens of some texts.
    fn begin(&mut self, texts: &[(Sequence, usize)]) -> Result<()>;

    /// Stores a layer of what was announced, and attends from its queries.
    fn attend(
        &mut self,
        layer: usize,
        queries: &Tensor,
        keys: &Tensor,
        values: &Tensor,
        drops: Option<&Tensor>,
    ) -> Result<Tensor>;

    /// Rows that a text holds for each layer and kv head, `[layers, kv_heads]`.
    fn lengths(&self, text: Sequence) -> Result<Vec<usize>>;

    /// Whether the passes so far have found the pages that they wanted, where a machine says so late.
    fn settle(&self) -> Result<()> {
        Ok(())
    }
}

impl Pool for Cpu {
    fn shape(&self) -> &CacheShape {
        PagedAttention::shape(self)
    }

    fn device(&self) -> Device {
        Device::Cpu
    }

    fn allocate(&mut self) -> Result<Sequence> {
        Ok(PagedAttention::allocate(self)?)
    }

    fn fork(&mut self, text: Sequence) -> Result<Sequence> {
        Ok(PagedAttention::fork(self, text)?)
    }

    fn release(&mut self, text: Sequence) -> Result<()> {
        Ok(PagedAttention::release(self, text)?)
    }

    fn fill(
        &mut self,
        text: Sequence,
        layer: usize,
        keys: &Tensor,
        values: &Tensor,
        drops: Option<&Tensor>,
    ) -> Result<()> {
        let drops = bits(keys, drops)?;
        let (keys, values) = (bridge::view(keys)?, bridge::view(values)?);
        Ok(PagedAttention::fill(self, text, layer, keys, values, &drops)?)
    }

    fn begin(&mut self, texts: &[(Sequence, usize)]) -> Result<()> {
        Ok(self.begin_step(texts)?)
    }

    fn attend(
        &mut self,
        layer: usize,
        queries: &Tensor,
        keys: &Tensor,
        values: &Tensor,
        drops: Option<&Tensor>,
    ) -> Result<Tensor> {
        attend(self, None, layer, queries, keys, values, drops)
    }

    fn lengths(&self, text: Sequence) -> Result<Vec<usize>> {
        Ok(PagedAttention::lengths(self, text)?)
    }
}
