//! The seam between a model and its cache, and the cache that says what the other must do.

use crate::error::{Error, Result};
use tch::{Device, Kind, Tensor};

/// A key-value cache of one text: it stores what a layer computed and attends to what it kept.
///
/// [`Dense`] keeps every row and masks the dropped ones: the semantics. [`crate::Paged`] frees them.
/// A forward pass calls [`begin`](KvCache::begin) once, then [`attend`](KvCache::attend) for layer 0, 1, …
/// After an error in between, the cache is good for nothing but being dropped.
///
/// The rule of what a query sees (kvpress's `DMSPress`): all tokens of its own pass up to itself; of the
/// earlier ones the newest `window`, and the older ones that were not dropped. So a first pass is dense.
pub trait KvCache {
    /// Tokens that went through, kept or not: the index of the next token.
    fn tokens(&self) -> usize;

    /// The newest tokens that a drop bit cannot touch yet.
    fn window(&self) -> usize;

    /// Announces a pass of `tokens` new tokens; where memory can run out, it does so here.
    fn begin(&mut self, tokens: usize) -> Result<()>;

    /// Stores `keys` and `values`, and attends.
    ///
    /// `queries` are `[batch, query_heads, tokens, head_dim]`, `keys` and `values`
    /// `[batch, kv_heads, tokens, head_dim]`, rotated; `drops` `[batch, kv_heads, tokens]` bool, `None` drops
    /// none. Returns `[batch, query_heads, tokens, head_dim]`.
    fn attend(
        &mut self,
        layer: usize,
        queries: &Tensor,
        keys: &Tensor,
        values: &Tensor,
        drops: Option<&Tensor>,
    ) -> Result<Tensor>;

    /// What the cache holds now.
    fn usage(&self) -> Usage;

    /// Remembers the text as it is, for [`rewind`](KvCache::rewind); an earlier mark is forgotten.
    fn mark(&mut self) -> Result<()>;

    /// Goes back to the mark, which stays: another question about a text that was read and pruned once.
    ///
    /// # Errors
    /// [`Error::NoMark`].
    fn rewind(&mut self) -> Result<()>;
}

/// What a cache holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes of keys and values held now, page slack included.
    pub bytes: usize,
    /// The most that were held at any time.
    pub peak_bytes: usize,
    /// Rows (a key and a value of one token, layer and kv head) that a query can see.
    pub rows: usize,
    /// Rows that a cache which forgets nothing would hold.
    pub dense_rows: usize,
}

impl Usage {
    /// The share of the rows that is gone: 0 for a full cache, towards 1 for an empty one.
    pub fn removed(&self) -> f64 {
        if self.dense_rows == 0 { 0.0 } else { 1.0 - self.rows as f64 / self.dense_rows as f64 }
    }
}

/// A cache that keeps every row and masks the dropped ones: as slow and large as without pruning, and the
/// meaning that [`crate::Paged`] is held to.
#[derive(Debug)]
pub struct Dense {
    window: usize,
    tokens: usize,
    before: usize,
    layers: Vec<Option<Rows>>,
    mark: Option<(usize, Vec<Option<Rows>>)>,
}

/// One layer's rows, and which may go.
#[derive(Debug)]
struct Rows {
    keys: Tensor,   // [batch, kv_heads, tokens, head_dim]
    values: Tensor, // [batch, kv_heads, tokens, head_dim]
    drops: Tensor,  // [batch, kv_heads, tokens] bool
}

impl Dense {
    /// An empty cache for a model of `layers` layers.
    pub fn new(layers: usize, window: usize) -> Self {
        let layers = (0..layers).map(|_| None).collect();
        Self { window, tokens: 0, before: 0, layers, mark: None }
    }

    /// The keys and values of every layer, `[batch, kv_heads, tokens, head_dim]`, dropped or not.
    pub fn rows(&self) -> Result<Vec<(&Tensor, &Tensor)>> {
        let rows = self.layers.iter().map(|rows| rows.as_ref().ok_or(Error::EmptyPrompt));
        rows.map(|rows| rows.map(|Rows { keys, values, .. }| (keys, values))).collect()
    }

    /// Which rows of `layer` no later query will see, `[batch, kv_heads, tokens]` bool.
    pub fn masked(&self, layer: usize) -> Result<Option<Tensor>> {
        self.layers[layer].as_ref().map(|rows| rows.hidden(self.tokens, self.window)).transpose()
    }
}

impl Rows {
    /// The same rows: a pass makes new tensors and leaves these alone.
    fn same(&self) -> Self {
        let [keys, values, drops] =
            [&self.keys, &self.values, &self.drops].map(Tensor::shallow_clone);
        Self { keys, values, drops }
    }

    /// The dropped rows among those older than the newest `window` of the first `tokens`.
    fn hidden(&self, tokens: usize, window: usize) -> Result<Tensor> {
        let judged = tokens.saturating_sub(window) as i64;
        let hidden = self.drops.f_zeros_like()?;
        if judged > 0 {
            hidden.f_narrow(2, 0, judged)?.f_copy_(&self.drops.f_narrow(2, 0, judged)?)?;
        }
        Ok(hidden)
    }
}

impl KvCache for Dense {
    fn tokens(&self) -> usize {
        self.tokens
    }

    fn window(&self) -> usize {
        self.window
    }

    fn begin(&mut self, tokens: usize) -> Result<()> {
        self.before = self.tokens;
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
        let drops = match drops {
            Some(drops) => drops.shallow_clone(),
            None => Tensor::f_zeros(&keys.size()[..3], (Kind::Bool, keys.device()))?,
        };
        let Some(rows) = &mut self.layers[layer] else {
            self.layers[layer] =
                Some(Rows { keys: keys.f_contiguous()?, values: values.f_contiguous()?, drops });
            return causal(queries, keys, values);
        };
        rows.keys = Tensor::f_cat(&[&rows.keys, keys], 2)?;
        rows.values = Tensor::f_cat(&[&rows.values, values], 2)?;
        rows.drops = Tensor::f_cat(&[&rows.drops, &drops], 2)?;

        let visible = rows.hidden(self.before, self.window)?.f_logical_not()?; // [B, H, S]
        let (new, all) = ((self.tokens - self.before) as i64, self.tokens as i64);
        let later = Tensor::f_ones([new, all], (Kind::Bool, Device::Cpu))?
            .f_tril(self.before as i64)?
            .f_to_device(keys.device())?; // [T, S]: up to itself
        let group = queries.size()[1] / keys.size()[1];
        let mask = visible
            .f_repeat_interleave_self_int(group, 1, None)?
            .f_unsqueeze(2)?
            .f_logical_and(&later)?; // [B, Hq, T, S]
        Ok(Tensor::f_scaled_dot_product_attention(
            queries,
            &rows.keys,
            &rows.values,
            Some(&mask),
            0.0,
            false,
            None,
            true,
        )?)
    }

    fn usage(&self) -> Usage {
        let mut usage = Usage::default();
        for rows in self.layers.iter().flatten() {
            let dense = rows.drops.numel();
            let hidden =
                rows.hidden(self.tokens, self.window).and_then(|h| Ok(h.f_sum(Kind::Int64)?));
            usage.dense_rows += dense;
            usage.rows += dense - hidden.map_or(0, |h| h.int64_value(&[]) as usize);
            usage.bytes += 2 * rows.keys.numel() * rows.keys.kind().elt_size_in_bytes();
        }
        usage.peak_bytes = usage.bytes;
        usage
    }

    fn mark(&mut self) -> Result<()> {
        self.mark = Some((self.tokens, same(&self.layers)));
        Ok(())
    }

    fn rewind(&mut self) -> Result<()> {
        let (tokens, layers) = self.mark.as_ref().ok_or(Error::NoMark)?;
        (self.tokens, self.layers) = (*tokens, same(layers));
        Ok(())
    }
}

fn same(layers: &[Option<Rows>]) -> Vec<Option<Rows>> {
    layers.iter().map(|rows| rows.as_ref().map(Rows::same)).collect()
}

/// Attention of a first pass, `[batch, query_heads, tokens, head_dim]`: every token sees itself and all before it.
pub fn causal(queries: &Tensor, keys: &Tensor, values: &Tensor) -> Result<Tensor> {
    let tokens = queries.size()[2];
    causal_among(
        queries,
        keys,
        values,
        if queries.device() == Device::Cpu { tokens } else { few_lengths(tokens) },
    )
}

/// The next of at most eight lengths up to each power of two. cuDNN, which libtorch takes on some cards, makes a plan for each
/// length that it meets, 40 ms each on an H100: most prompts would pay for one.
fn few_lengths(tokens: i64) -> i64 {
    let step = (tokens.unsigned_abs().next_power_of_two() / 16).max(64) as i64;
    if tokens > 1 { (tokens + step - 1) / step * step } else { tokens }
}

/// With rows of zeros after the last token, which none before them sees, up to `length`.
fn causal_among(queries: &Tensor, keys: &Tensor, values: &Tensor, length: i64) -> Result<Tensor> {
    let tokens = queries.size()[2];
    let padded = |rows: &Tensor| match length - tokens {
        0 => Ok(rows.shallow_clone()),
        zeros => rows.f_constant_pad_nd([0, 0, 0, zeros]),
    };
    let out = Tensor::f_scaled_dot_product_attention(
        &padded(queries)?,
        &padded(keys)?,
        &padded(values)?,
        None::<&Tensor>,
        0.0,
        tokens > 1,
        None,
        true,
    )?;
    Ok(out.f_narrow(2, 0, tokens)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_after_a_prompt_change_nothing() {
        let rows = |heads| Tensor::randn([1, heads, 70, 16], (Kind::Float, Device::Cpu));
        let (queries, keys, values) = (rows(6), rows(2), rows(2));
        let plain = causal(&queries, &keys, &values).unwrap();
        let padded = causal_among(&queries, &keys, &values, few_lengths(70)).unwrap();
        assert_eq!(plain.size(), padded.size());
        let apart = (&plain - padded).abs().max().double_value(&[]);
        assert!(apart < 1e-6, "{apart}");
    }

    #[test]
    fn lengths_are_few_and_little_longer() {
        let of = |tokens: std::ops::RangeInclusive<i64>| {
            tokens.map(few_lengths).collect::<std::collections::BTreeSet<_>>()
        };
        assert_eq!(of(2..=1024).len(), 16);
        assert_eq!(of(32_769..=65_536).len(), 8);
        for tokens in [1, 64, 128, 4096, 32_768, 131_072] {
            assert_eq!(few_lengths(tokens), tokens);
        }
        for tokens in 512..70_000 {
            let length = few_lengths(tokens);
            assert!((tokens..=tokens + tokens / 8).contains(&length), "{tokens}: {length}");
        }
    }
}
