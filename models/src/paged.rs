//! A cache that frees what is dropped: each layer and kv head keeps its own pages.

use crate::bridge;
use crate::cache::{KvCache, Usage, causal};
use crate::config::Config;
use crate::error::{Error, Result};
use paged_kernels::{CacheShape, Dtype, PagedAttention, Sequence};
use tch::{Kind, Tensor};

/// One text in the pool of a [`PagedAttention`] backend.
///
/// A first pass attends densely, a layer at a time, and stores what is kept: at most one layer's dense keys
/// and values are alive beside the pages. Later passes read the pages alone.
pub struct Paged<B: PagedAttention> {
    backend: B,
    sequence: Sequence,
    tokens: usize,
    /// Whether the pass that is under way is the first.
    pass_is_first: bool,
    /// The text and its tokens when it was marked: a fork, whose pages are shared.
    mark: Option<(Sequence, usize)>,
}

/// The pool that a model needs to hold `tokens` tokens of one text if nothing is dropped.
pub fn cache_shape(
    config: &Config,
    tokens: usize,
    window: usize,
    kind: Kind,
) -> Result<CacheShape> {
    let dtype = match kind {
        Kind::Float => Dtype::F32,
        Kind::BFloat16 => Dtype::Bf16,
        found => return Err(Error::CacheKind { found: format!("{found:?}") }),
    };
    let page_size = 16;
    Ok(CacheShape {
        layers: config.layers,
        kv_heads: config.kv_heads,
        query_heads: config.query_heads,
        head_dim: config.head_dim,
        page_size,
        window,
        pages: config.layers * config.kv_heads * tokens.div_ceil(page_size),
        dtype,
    })
}

/// Stores a layer's keys and values in pages and attends: of the `first` pass of a text densely, of later passes, or a
/// step of several texts, over the pages.
pub(crate) fn attend<B: PagedAttention>(
    backend: &mut B,
    first: Option<Sequence>,
    layer: usize,
    queries: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    drops: Option<&Tensor>,
) -> Result<Tensor> {
    let drops = bits(keys, drops)?;
    let (keys_view, values_view) = (bridge::view(keys)?, bridge::view(values)?);
    if let Some(sequence) = first {
        backend.fill(sequence, layer, keys_view, values_view, &drops)?;
        return causal(queries, keys, values);
    }
    backend.append(layer, keys_view, values_view, &drops)?;
    let scale = 1.0 / (backend.shape().head_dim as f32).sqrt();
    let mut out = Tensor::f_empty(queries.size(), (queries.kind(), queries.device()))?;
    let (queries, view) = (bridge::view(queries)?, bridge::view_mut(&mut out)?);
    backend.attend(layer, queries, scale, view, None)?;
    Ok(out)
}

/// A bit for each of `keys`, `[1, kv_heads, tokens]`; without `drops` all stay.
pub(crate) fn bits(keys: &Tensor, drops: Option<&Tensor>) -> Result<Vec<bool>> {
    Ok(match drops {
        Some(drops) => Vec::try_from(&drops.f_reshape([-1])?)?,
        None => vec![false; (keys.size()[1] * keys.size()[2]) as usize],
    })
}

impl<B: PagedAttention> Paged<B> {
    /// An empty cache in the pool of `backend`.
    pub fn new(mut backend: B) -> Result<Self> {
        let sequence = backend.allocate()?;
        Ok(Self { backend, sequence, tokens: 0, pass_is_first: true, mark: None })
    }

    /// The backend, for its statistics.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// The sequence that this cache occupies in its backend.
    pub fn sequence(&self) -> Sequence {
        self.sequence
    }
}

impl<B: PagedAttention> KvCache for Paged<B> {
    fn tokens(&self) -> usize {
        self.tokens
    }

    fn window(&self) -> usize {
        self.backend.shape().window
    }

    fn begin(&mut self, tokens: usize) -> Result<()> {
        let first = self.tokens == 0;
        if !first {
            self.backend.begin_step(&[(self.sequence, tokens)])?;
        }
        self.pass_is_first = first;
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
        let first = self.pass_is_first.then_some(self.sequence);
        attend(&mut self.backend, first, layer, queries, keys, values, drops)
    }

    fn usage(&self) -> Usage {
        let (stats, shape) = (self.backend.stats(), self.backend.shape());
        let lengths = self.backend.lengths(self.sequence).unwrap_or_default();
        Usage {
            bytes: stats.bytes,
            peak_bytes: stats.peak_bytes,
            rows: lengths.iter().sum(),
            dense_rows: shape.layers * shape.kv_heads * self.tokens,
        }
    }

    /// Pages are shared with the mark until they are written to, and copied then: the pool must have room for the copies.
    fn mark(&mut self) -> Result<()> {
        let fork = self.backend.fork(self.sequence)?;
        if let Some((old, _)) = self.mark.replace((fork, self.tokens)) {
            self.backend.release(old)?;
        }
        Ok(())
    }

    fn rewind(&mut self) -> Result<()> {
        let (mark, tokens) = self.mark.ok_or(Error::NoMark)?;
        let again = self.backend.fork(mark)?;
        self.backend.release(std::mem::replace(&mut self.sequence, again))?;
        self.tokens = tokens;
        Ok(())
    }
}

impl<B: PagedAttention> std::fmt::Debug for Paged<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Paged").field("tokens", &self.tokens).field("usage", &self.usage()).finish()
    }
}
