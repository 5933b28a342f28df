use crate::torch::{dims, expect};
use crate::{Error, LayerInput, Result};
use std::ops::Range;
use tch::{Kind, Tensor};

/// Where a text stands twice in one sequence: first as the user gives it, then as the model repeats
/// it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spans {
    /// The tokens that are scored.
    pub original: Range<usize>,
    /// The tokens whose attention scores them, all after the original.
    pub repeat: Range<usize>,
}

/// The KVzip+ score of each token of a text's first copy, which KVzap is trained to predict (arXiv
/// 2601.07891, section 3): `[1, kv_heads, original]` f32, the logarithm of
///
/// ```text
/// s+[h, i] = max over g, j of  a[g, j, i] |W_O^(g) v_i| / |h_j|
/// ```
///
/// over the query heads g that read kv head h and the tokens j of the repeat. `input` is one layer
/// over the whole sequence, batch 1, of any float dtype; `a` is causal softmax attention over all
/// of it. `output_projection` is `[hidden, query_heads * head_dim]`; `W_O^(g)` is its columns that
/// read query head g, and its factor differs within a group, so it comes before the maximum.
/// Everything is added as logarithms, so that no small weight becomes -inf; a norm of zero counts
/// as the least positive number. Rows are taken in blocks, so that memory does not grow with the
/// square of the text.
///
/// kvpress's KVzip+ *press* gives other numbers: its softmax runs over a chunk's keys, and the rows
/// of the instruction count.
pub fn kvzip_plus(
    input: LayerInput<'_, Tensor>,
    output_projection: &Tensor,
    spans: &Spans,
) -> Result<Tensor> {
    const BLOCK: i64 = 1 << 22; // numbers of attention at a time
    let [_, query_heads, tokens, dim] =
        dims(input.queries, "queries", "[1, query_heads, tokens, head_dim]")?;
    let [_, heads, ..]: [i64; 4] = dims(input.keys, "keys", "[1, kv_heads, tokens, head_dim]")?;
    let [_, _, width] = dims(input.hidden, "hidden", "[1, tokens, hidden]")?;
    let group = query_heads.checked_div(heads).unwrap_or(0);
    expect(input.queries, "queries", &[1, heads.max(1) * group.max(1), tokens, dim])?;
    expect(input.keys, "keys", &[1, heads, tokens, dim])?;
    expect(input.values, "values", &[1, heads, tokens, dim])?;
    expect(input.hidden, "hidden", &[1, tokens, width])?;
    expect(output_projection, "output_projection", &[width, query_heads * dim])?;
    let Spans { original, repeat } = spans.clone();
    if original.is_empty()
        || repeat.is_empty()
        || original.end > repeat.start
        || repeat.end > tokens as usize
    {
        return Err(Error::Spans { original, repeat, tokens: tokens as usize });
    }
    let rows = (BLOCK / (query_heads * tokens)).max(1);
    let weights = attention(input, group, spans, rows)?;
    let values =
        input.values.f_squeeze_dim(0)?.f_narrow(1, original.start as i64, original.len() as i64)?;
    Ok(weights
        .f_add(&projected_norms(&values, output_projection, group)?)?
        .f_amax([1], false)?
        .f_unsqueeze(0)?)
}

/// `[kv_heads, group, original]`: the maximum over j of `log a[g, j, i] - log |h_j|`, `block` rows
/// j at a time.
fn attention(
    input: LayerInput<'_, Tensor>,
    group: i64,
    spans: &Spans,
    block: i64,
) -> Result<Tensor> {
    let float = |tensor: &Tensor| tensor.f_squeeze_dim(0)?.f_to_kind(Kind::Float);
    let keys = float(input.keys)?.f_transpose(1, 2)?; // [kv_heads, head_dim, tokens]
    let [heads, dim, tokens] = dims(&keys, "keys", "[kv_heads, head_dim, tokens]")?;
    let queries = float(input.queries)?.f_multiply_scalar((dim as f64).powf(-0.5))?;
    let queries = queries.f_reshape([heads, group, tokens, dim])?;
    let hidden = float(input.hidden)?; // [tokens, hidden]
    let hidden = hidden.f_norm_scalaropt_dim(2, [-1].as_slice(), true)?; // [tokens, 1]
    let hidden = hidden.f_clamp_min(f64::from(f32::MIN_POSITIVE))?.f_log()?;

    let (first, columns) = (spans.original.start as i64, spans.original.len() as i64);
    let mut best =
        Tensor::f_full([heads, group, columns], f64::NEG_INFINITY, (Kind::Float, keys.device()))?;
    let (mut start, last) = (spans.repeat.start as i64, spans.repeat.end as i64);
    while start < last {
        let rows = block.min(last - start);
        let end = start + rows;
        let queries = queries.f_narrow(2, start, rows)?.f_reshape([heads, group * rows, dim])?;
        let logits =
            queries.f_matmul(&keys.f_narrow(2, 0, end)?)?.f_view([heads, group, rows, end])?;
        let later = Tensor::f_ones([rows, rows], (Kind::Bool, keys.device()))?.f_triu(1)?;
        let _ = logits.f_narrow(3, start, rows)?.f_masked_fill_(&later, f64::NEG_INFINITY)?;
        let scale = logits.f_logsumexp([3], true)?.f_add(&hidden.f_narrow(0, start, rows)?)?;
        // [kv_heads, group, rows, columns]
        let weights = logits.f_narrow(3, first, columns)?.f_sub(&scale)?;
        best = best.f_maximum(&weights.f_amax([2], false)?)?;
        start = end;
    }
    Ok(best)
}

/// `[kv_heads, group, tokens]` f32: `log |W_O^(g) v_i|`, for `values` `[kv_heads, tokens,
/// head_dim]`.
///
/// As `|W v|² = vᵀ (Wᵀ W) v`, in f64: a small matrix for each query head, and no wide vector for
/// each token.
pub(crate) fn projected_norms(
    values: &Tensor,
    output_projection: &Tensor,
    group: i64,
) -> Result<Tensor> {
    let [heads, _, dim] = dims(values, "values", "[kv_heads, tokens, head_dim]")?;
    let projection = output_projection.f_to_kind(Kind::Double)?.f_view([-1, heads * group, dim])?;
    let projection = projection.f_transpose(0, 1)?; // [query_heads, hidden, head_dim]
    let squares =
        projection.f_transpose(1, 2)?.f_matmul(&projection)?.f_view([heads, group, dim, dim])?;
    let values = values.f_to_kind(Kind::Double)?.f_unsqueeze(1)?; // [kv_heads, 1, tokens, head_dim]
    let norms = values.f_matmul(&squares)?.f_multiply(&values)?;
    let norms = norms.f_sum_dim_intlist([3].as_slice(), false, Kind::Double)?;
    let norms = norms.f_clamp_min(f64::MIN_POSITIVE)?.f_log()?;
    Ok(norms.f_multiply_scalar(0.5)?.f_to_kind(Kind::Float)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn blocks_of_rows_of_any_size_give_the_same_maximum() {
        tch::manual_seed(1);
        let random = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu));
        let (queries, keys) = (random(&[1, 6, 40, 8]), random(&[1, 2, 40, 8]));
        let hidden = random(&[1, 40, 16]);
        let input =
            LayerInput { layer: 0, hidden: &hidden, queries: &queries, keys: &keys, values: &keys };
        let spans = Spans { original: 3..18, repeat: 20..37 };
        let whole = attention(input, 3, &spans, 1000).unwrap();
        for block in [1, 4, 17] {
            let blocks = attention(input, 3, &spans, block).unwrap();
            assert!(blocks.allclose(&whole, 1e-6, 1e-6, false), "{block} rows at a time");
        }
    }
}
