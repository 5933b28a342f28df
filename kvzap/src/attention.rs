use crate::Result;
use crate::torch::{dims, expect};
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// The attention of one layer in f32, some rows at a time: nobody ever holds `[tokens, tokens]`.
#[derive(Debug)]
pub(crate) struct Attention {
    queries: Tensor, // [batch * kv_heads, group, rows, head_dim], in the model's dtype
    keys: Tensor,    // [batch * kv_heads, head_dim, past + rows], likewise
    past: i64,
}

/// Elements that a scale is made of: three hold an f32 in 16 bits each, and rows stay aligned.
const PARTS: i64 = 8;

/// `x` as a sum of [`PARTS`] tensors of a kind.
fn parts(x: Tensor, kind: Kind) -> Result<Vec<Tensor>> {
    let (mut rest, mut parts) = (x, Vec::new());
    for _ in 0..3 {
        let part = rest.f_to_kind(kind)?;
        rest = rest.f_sub(&part.f_to_kind(Kind::Float)?)?;
        parts.push(part);
    }
    let mut zeros = rest.size();
    zeros[rest.dim() - 1] = PARTS - 3;
    parts.push(Tensor::f_zeros(zeros, (kind, rest.device()))?);
    Ok(parts)
}

impl Attention {
    /// For `queries` `[batch, query_heads, rows, head_dim]` and `keys` `[batch, kv_heads, past +
    /// rows, head_dim]`: row j sees the keys `..= past + j`.
    pub fn new(queries: &Tensor, keys: &Tensor) -> Result<Self> {
        let [batch, query_heads, rows, dim] =
            dims(queries, "queries", "[batch, query_heads, tokens, head_dim]")?;
        let [_, heads, tokens, _] = dims(keys, "keys", "[batch, kv_heads, tokens, head_dim]")?;
        let group = query_heads.checked_div(heads).unwrap_or(0);
        expect(queries, "queries", &[batch, heads.max(1) * group.max(1), rows, dim])?;
        expect(keys, "keys", &[batch, heads, tokens.max(rows), dim])?;
        Ok(Self {
            queries: queries.f_reshape([batch * heads, group, rows, dim])?,
            keys: keys.f_reshape([batch * heads, tokens, dim])?.f_transpose(1, 2)?,
            past: tokens - rows,
        })
    }

    /// `[batch * kv_heads, group, rows, past + rows.end]`: products over the root of the head dim,
    /// -inf where a key comes after its row.
    pub fn logits(&self, rows: Range<i64>) -> Result<Tensor> {
        let [heads, group, _, dim] = dims(&self.queries, "queries", "")?;
        let (count, end) = (rows.end - rows.start, self.past + rows.end);
        let queries =
            self.queries.f_narrow(2, rows.start, count)?.f_reshape([heads, group * count, dim])?;
        let queries = queries.f_to_kind(Kind::Float)?.f_multiply_scalar((dim as f64).powf(-0.5))?;
        let keys = self.keys.f_narrow(2, 0, end)?.f_to_kind(Kind::Float)?;
        let logits = queries.f_matmul(&keys)?.f_view([heads, group, count, end])?;
        let later = Tensor::f_ones([count, count], (Kind::Bool, logits.device()))?.f_triu(1)?;
        let _ = logits
            .f_narrow(3, self.past + rows.start, count)?
            .f_masked_fill_(&later, f64::NEG_INFINITY)?;
        Ok(logits)
    }

    /// `[batch * kv_heads, group, columns]`: the maximum over all rows, taken in `blocks`, of their products with `keys`
    /// `[batch * kv_heads, columns, head_dim]` over the root of the head dim, less `scales` `[batch * kv_heads, group, rows]`.
    ///
    /// A scale is some more elements of its row, which meet ones in each key: a product and a maximum are all that passes over
    /// `[rows, columns]`. On a card the product is of 16-bit elements if queries are, whose sums are f32 and exact.
    pub fn most(
        &self,
        keys: &Tensor,
        scales: &Tensor,
        blocks: impl Iterator<Item = Range<i64>>,
    ) -> Result<Tensor> {
        let [heads, group, _, dim] = dims(&self.queries, "queries", "")?;
        let (kind, device) = (self.queries.kind(), self.queries.device());
        let half = device.is_cuda() && matches!(kind, Kind::Half | Kind::BFloat16);
        let kind = if half { kind } else { Kind::Float };
        let (scale, width) = ((dim as f64).powf(-0.5), keys.size()[1]);
        let ones = Tensor::f_ones([heads, width, PARTS], (kind, device))?;
        let keys = Tensor::f_cat(&[&keys.f_to_kind(kind)?, &ones], 2)?.f_transpose(1, 2)?;
        let less = scales.f_multiply_scalar(-1.0 / scale)?.f_unsqueeze(3)?;
        let less = Tensor::f_cat(&parts(less, kind)?, 3)?; // [heads, group, rows, PARTS]
        let most = Tensor::f_full([heads, group, width], f64::NEG_INFINITY, (Kind::Float, device))?;
        blocks.into_iter().try_fold(most, |most, block| {
            let (start, count) = (block.start, block.end - block.start);
            let queries = Tensor::f_empty([heads, group, count, dim + PARTS], (kind, device))?;
            let row = self.queries.f_narrow(2, start, count)?;
            queries.f_narrow(3, 0, dim)?.f_copy_(&row)?;
            let less = less.f_narrow(2, start, count)?;
            queries.f_narrow(3, dim, PARTS)?.f_copy_(&less)?;
            let queries = queries.f_view([heads, group * count, dim + PARTS])?;
            let logits = if half {
                queries.f_bmm_dtype(&keys, Kind::Float)?
            } else {
                queries.f_bmm(&keys)?
            };
            let weights = logits.f_view([heads, group, count, width])?.f_amax([2], false)?;
            Ok(most.f_maximum(&weights.f_multiply_scalar(scale)?)?)
        })
    }

    /// [`logits`](Self::logits) after softmax.
    pub fn weights(&self, rows: Range<i64>) -> Result<Tensor> {
        Ok(self.logits(rows)?.f_softmax(-1, Kind::Float)?)
    }

    /// All rows in blocks of a few million logits.
    pub fn blocks(&self) -> impl Iterator<Item = Range<i64>> + use<> {
        let rows = self.queries.size().get(2).copied().unwrap_or(0);
        self.blocks_of(0..rows, self.past + rows)
    }

    /// These rows in such blocks, for `columns` logits a row; on a card larger ones, as there a launch costs more than
    /// memory.
    pub fn blocks_of(
        &self,
        rows: Range<i64>,
        columns: i64,
    ) -> impl Iterator<Item = Range<i64>> + use<> {
        let [heads, group, _, _] = self.queries.size4().map_or([0; 4], |size| size.into());
        let most = if self.queries.device() == Device::Cpu { 1 << 22 } else { 1 << 28 };
        let block = (most / (heads * group * columns).max(1)).max(1);
        let Range { start, end } = rows;
        (start..end).step_by(block as usize).map(move |start| start..end.min(start + block))
    }
}
