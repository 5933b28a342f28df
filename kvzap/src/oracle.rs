use crate::torch::{dims, expect};
use crate::{Error, LayerInput, Result};
use std::ops::Range;
use tch::{Kind, Tensor};

/// Where a text stands twice in one sequence: first as the user gives it, then as the model repeats it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spans {
    /// The tokens that are scored.
    pub original: Range<usize>,
    /// The tokens whose attention scores them, after the original.
    pub repeat: Range<usize>,
}

/// The KVzip+ score of each token of a text's first copy, as KVzap is trained to predict it (arXiv 2601.07891,
/// section 3): `[1, kv_heads, original]`, f32, the logarithm of
///
/// ```text
/// s+[h, i] = max over query heads g of h, tokens j of the repeat:  a[g, j, i] |W_O^(g) v_i| / |h_j|
/// ```
///
/// `input` is one layer over the whole sequence, batch 1, of any float dtype. `a` is causal softmax attention
/// over the whole sequence, with no scaling but `1/√head_dim`. `output_projection` is `[hidden, query_heads *
/// head_dim]`, of which `W_O^(g)` is the columns that read query head g; its norm differs within a group, so it
/// comes before the maximum. All in logarithms, so no weight underflows to -inf. Rows are taken in blocks: at
/// most 64 MB of attention are alive.
///
/// kvpress's KVzip+ *press* is another number: it takes the softmax over a chunk's keys and counts the
/// instruction's rows.
pub fn kvzip_plus(
    input: LayerInput<'_, Tensor>,
    output_projection: &Tensor,
    spans: &Spans,
) -> Result<Tensor> {
    const ATTENTION: i64 = 1 << 24; // f32 numbers
    let [_, query_heads, tokens, dim] =
        dims(input.queries, "queries", "[1, query_heads, tokens, head_dim]")?;
    let [_, heads, ..]: [i64; 4] = dims(input.keys, "keys", "[1, kv_heads, tokens, head_dim]")?;
    let [_, _, width] = dims(input.hidden, "hidden", "[1, tokens, hidden]")?;
    if heads == 0 || query_heads % heads != 0 {
        let expected = format!("[1, a multiple of the {heads} kv heads, tokens, head_dim]");
        return Err(Error::Shape {
            name: "queries",
            expected,
            found: vec![1, query_heads as usize],
        });
    }
    let group = query_heads / heads;
    expect(input.queries, "queries", &[1, query_heads, tokens, dim])?;
    expect(input.keys, "keys", &[1, heads, tokens, dim])?;
    expect(input.values, "values", &[1, heads, tokens, dim])?;
    expect(input.hidden, "hidden", &[1, tokens, width])?;
    expect(output_projection, "output_projection", &[width, query_heads * dim])?;
    let Spans { original, repeat } = spans;
    if original.is_empty()
        || repeat.is_empty()
        || original.end > repeat.start
        || repeat.end > tokens as usize
    {
        let (original, repeat) = (original.clone(), repeat.clone());
        return Err(Error::Spans { original, repeat, tokens: tokens as usize });
    }
    let (first, columns) = (original.start as i64, original.len() as i64);

    let float = |tensor: &Tensor| tensor.f_squeeze_dim(0)?.f_to_kind(Kind::Float);
    let queries = float(input.queries)?
        .f_multiply_scalar((dim as f64).powf(-0.5))?
        .f_view([heads, group, tokens, dim])?;
    let keys = float(input.keys)?.f_transpose(1, 2)?; // [heads, dim, tokens]
    let hidden = log_norm(&float(input.hidden)?)?; // [tokens]
    let mut best =
        Tensor::f_full([heads, group, columns], f64::NEG_INFINITY, (Kind::Float, keys.device()))?;
    let block = (ATTENTION / (query_heads * tokens)).max(1);
    let mut start = repeat.start as i64;
    while start < repeat.end as i64 {
        let rows = block.min(repeat.end as i64 - start);
        let end = start + rows;
        let logits = (queries.f_narrow(2, start, rows)?.f_reshape([heads, group * rows, dim])?)
            .f_matmul(&keys.f_narrow(2, 0, end)?)?
            .f_view([heads, group, rows, end])?;
        let later = Tensor::f_ones([rows, rows], (Kind::Bool, keys.device()))?.f_triu(1)?;
        let _ = logits.f_narrow(3, start, rows)?.f_masked_fill_(&later, f64::NEG_INFINITY)?;
        let scale = logits
            .f_logsumexp([3], true)?
            .f_add(&hidden.f_narrow(0, start, rows)?.f_unsqueeze(1)?)?;
        let weights = logits.f_narrow(3, first, columns)?.f_sub(&scale)?; // [heads, group, rows, columns]
        best = best.f_maximum(&weights.f_amax([2], false)?)?;
        start = end;
    }

    // |W v|² = vᵀ (Wᵀ W) v: a matrix of [dim, dim] for each query head, and no wide vector for each token.
    let double = |tensor: &Tensor| tensor.f_to_kind(Kind::Double);
    let wide = double(output_projection)?.f_view([width, query_heads, dim])?.f_transpose(0, 1)?;
    let squares = wide.f_transpose(1, 2)?.f_matmul(&wide)?.f_view([heads, group, dim, dim])?;
    let values =
        double(&input.values.f_squeeze_dim(0)?.f_narrow(1, first, columns)?)?.f_unsqueeze(1)?;
    let norms = values.f_matmul(&squares)?.f_multiply(&values)?.f_sum_dim_intlist(
        [3].as_slice(),
        false,
        Kind::Double,
    )?;
    let norms = norms
        .f_clamp_min(f64::MIN_POSITIVE)?
        .f_log()?
        .f_multiply_scalar(0.5)?
        .f_to_kind(Kind::Float)?;
    Ok(best.f_add(&norms)?.f_amax([1], false)?.f_unsqueeze(0)?)
}

/// The logarithm of the norms over the last dimension; a norm of zero counts as the least f32.
fn log_norm(x: &Tensor) -> std::result::Result<Tensor, tch::TchError> {
    x.f_norm_scalaropt_dim(2, [-1].as_slice(), false)?
        .f_clamp_min(f64::from(f32::MIN_POSITIVE))?
        .f_log()
}
