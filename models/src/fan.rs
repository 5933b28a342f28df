//! One text that was read once and forgotten in many ways, to be continued in all of them at once.

use crate::cache::{Dense, KvCache, Usage};
use crate::error::{Error, Result};
use tch::{Kind, Tensor};

/// A cache of V texts that begin with the same context, of which each forgot other tokens.
///
/// The context's keys and values are held once for all; each text has its own drop bits, and its own rows of what came
/// after. So methods and thresholds can be compared at the price of one prefill, and V short passes cost about as much as
/// one. It forgets nothing more, and masks what is dropped.
#[derive(Debug)]
pub struct Fan {
    context: Vec<Context>,
    tokens: usize,
    /// Of each layer.
    since: Vec<Rows>,
    mark: Option<(usize, Vec<Rows>)>,
}

/// Keys and values, `[V, kv_heads, tokens since the context, head_dim]`.
type Rows = Option<(Tensor, Tensor)>;

#[derive(Debug)]
struct Context {
    keys: Tensor,   // [kv_heads, tokens, head_dim]
    values: Tensor, // [kv_heads, tokens, head_dim]
    drops: Tensor,  // [kv_heads, V, 1, tokens] bool
}

impl Fan {
    /// The text that `read` holds, batch 1, once for each row of `drops`: of every layer `[V, kv_heads, tokens]` bool, true
    /// for what that text has forgotten.
    ///
    /// What `read` itself dropped is of no account.
    pub fn new(read: &Dense, drops: &[Tensor]) -> Result<Self> {
        let rows = read.rows()?;
        let context = rows.iter().zip(drops).map(|((keys, values), drops)| {
            let mut wanted = keys.size()[..3].to_vec();
            wanted[0] = drops.size().first().copied().unwrap_or(0);
            if keys.size()[0] != 1 || drops.size() != wanted {
                return Err(Error::DropBits { wanted, found: drops.size() });
            }
            Ok(Context {
                keys: keys.f_squeeze_dim(0)?,
                values: values.f_squeeze_dim(0)?,
                drops: drops.f_transpose(0, 1)?.f_unsqueeze(2)?,
            })
        });
        let context = context.collect::<Result<Vec<_>>>()?;
        if context.len() != rows.len() {
            let [wanted, found] = [rows.len(), drops.len()].map(|layers| vec![layers as i64]);
            return Err(Error::DropBits { wanted, found });
        }
        let since = context.iter().map(|_| None).collect();
        Ok(Self { context, tokens: read.tokens(), since, mark: None })
    }
}

fn same(rows: &[Rows]) -> Vec<Rows> {
    let pair = |(a, b): &(Tensor, Tensor)| (a.shallow_clone(), b.shallow_clone());
    rows.iter().map(|rows| rows.as_ref().map(pair)).collect()
}

impl KvCache for Fan {
    fn tokens(&self) -> usize {
        self.tokens
    }

    fn window(&self) -> usize {
        usize::MAX
    }

    fn begin(&mut self, tokens: usize) -> Result<()> {
        self.tokens += tokens;
        Ok(())
    }

    /// The context's keys meet the queries of all texts in one product a head; the newer ones each their own.
    fn attend(
        &mut self,
        layer: usize,
        queries: &Tensor,
        keys: &Tensor,
        values: &Tensor,
        _drops: Option<&Tensor>,
    ) -> Result<Tensor> {
        let Context { keys: old_keys, values: old_values, drops } = &self.context[layer];
        let (texts, query_heads, new, dim) = queries.size4()?;
        let (heads, old) = (old_keys.size()[0], old_keys.size()[1]);
        let rows = query_heads / heads * new; // of a text and kv head
        let (keys, values) = match self.since[layer].take() {
            Some((k, v)) => (Tensor::f_cat(&[&k, keys], 2)?, Tensor::f_cat(&[&v, values], 2)?),
            None => (keys.shallow_clone(), values.shallow_clone()),
        };
        let all = keys.size()[2];

        // [kv_heads, V, rows, head_dim]
        let queries = queries.f_reshape([texts, heads, rows, dim])?.f_transpose(0, 1)?;
        let queries = queries.f_multiply_scalar((dim as f64).powf(-0.5))?.f_contiguous()?;
        let together = queries.f_view([heads, texts * rows, dim])?;
        let mut logits = together.f_matmul(&old_keys.f_transpose(1, 2)?)?;
        logits = logits.f_view([heads, texts, rows, old])?;
        let _ = logits.f_masked_fill_(drops, f64::NEG_INFINITY)?;
        let later = Tensor::f_ones([new, all], (Kind::Bool, keys.device()))?;
        let later = later.f_triu(all - new + 1)?.f_repeat([query_heads / heads, 1])?;
        let mut since = queries.f_matmul(&keys.f_transpose(0, 1)?.f_transpose(2, 3)?)?;
        let _ = since.f_masked_fill_(&later, f64::NEG_INFINITY)?;
        let weights = Tensor::f_cat(&[logits, since], 3)?.f_softmax(3, Kind::Float)?;
        let weights = weights.f_to_kind(values.kind())?;

        let before = weights.f_narrow(3, 0, old)?.f_reshape([heads, texts * rows, old])?;
        let before = before.f_matmul(old_values)?.f_view([heads, texts, rows, dim])?;
        let since = weights.f_narrow(3, old, all)?.f_matmul(&values.f_transpose(0, 1)?)?;
        self.since[layer] = Some((keys, values));
        let mixed = before.f_add(&since)?.f_transpose(0, 1)?; // [V, kv_heads, rows, head_dim]
        Ok(mixed.f_reshape([texts, query_heads, new, dim])?)
    }

    fn usage(&self) -> Usage {
        let mut usage = Usage::default();
        for (context, since) in self.context.iter().zip(&self.since) {
            let kept = context.drops.f_logical_not().and_then(|kept| kept.f_sum(Kind::Int64));
            let more = since.as_ref().map_or(0, |(keys, _)| keys.size()[..3].iter().product());
            usage.rows += (kept.map_or(0, |kept| kept.int64_value(&[])) + more) as usize;
            usage.dense_rows += context.drops.numel() + more as usize;
            let held = since.iter().map(|(keys, _)| keys).chain([&context.keys]);
            usage.bytes +=
                held.map(|keys| 2 * keys.numel() * keys.kind().elt_size_in_bytes()).sum::<usize>();
        }
        usage.peak_bytes = usage.bytes;
        usage
    }

    fn mark(&mut self) -> Result<()> {
        self.mark = Some((self.tokens, same(&self.since)));
        Ok(())
    }

    fn rewind(&mut self) -> Result<()> {
        let (tokens, since) = self.mark.as_ref().ok_or(Error::NoMark)?;
        (self.tokens, self.since) = (*tokens, same(since));
        Ok(())
    }
}
