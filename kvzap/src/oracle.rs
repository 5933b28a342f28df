use crate::attention::Attention;
use crate::torch::{dims, expect};
use crate::{Error, LayerInput, Result};
use std::ops::Range;
use std::sync::LazyLock;
use tch::{CModule, Device, IValue, Kind, Tensor};

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
/// 2601.07891, section 3): `[batch, kv_heads, original]` f32, the logarithm of
///
/// ```text
/// s+[h, i] = max over g, j of  a[g, j, i] |W_O^(g) v_i| / |h_j|
/// ```
///
/// over the query heads g that read kv head h and the tokens j of the repeat. `input` is one layer
/// over whole sequences, whose texts stand alike, of any float dtype; `a` is causal softmax attention over all
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
    Ok(kvzip_plus_of(input, output_projection, spans, &|original| Ok(original))?.0)
}

/// [`kvzip_plus`] of those tokens alone that `some` picks from `[batch, kv_heads, original, head_dim]` along that dimension;
/// and attention over all tokens where it was made on the way, see [`attended`].
pub(crate) fn kvzip_plus_of(
    input: LayerInput<'_, Tensor>,
    output_projection: &Tensor,
    spans: &Spans,
    some: &dyn Fn(Tensor) -> Result<Tensor>,
) -> Result<(Tensor, Option<Tensor>)> {
    let [batch, query_heads, tokens, dim] =
        dims(input.queries, "queries", "[batch, query_heads, tokens, head_dim]")?;
    let [_, heads, ..]: [i64; 4] = dims(input.keys, "keys", "[batch, kv_heads, tokens, head_dim]")?;
    let [_, _, width] = dims(input.hidden, "hidden", "[batch, tokens, hidden]")?;
    let group = query_heads.checked_div(heads).unwrap_or(0);
    expect(input.queries, "queries", &[batch, heads.max(1) * group.max(1), tokens, dim])?;
    expect(input.keys, "keys", &[batch, heads, tokens, dim])?;
    expect(input.values, "values", &[batch, heads, tokens, dim])?;
    expect(input.hidden, "hidden", &[batch, tokens, width])?;
    expect(output_projection, "output_projection", &[width, query_heads * dim])?;
    let Spans { original, repeat } = spans.clone();
    if original.is_empty()
        || repeat.is_empty()
        || original.end > repeat.start
        || repeat.end > tokens as usize
    {
        return Err(Error::Spans { original, repeat, tokens: tokens as usize });
    }
    let (past, rows) = (repeat.start as i64, repeat.len() as i64);
    let queries = input.queries.f_narrow(2, past, rows)?;
    let attention = Attention::new(&queries, &input.keys.f_narrow(2, 0, past + rows)?)?;
    let (mixed, sums) = match attended(input.queries, input.keys, input.values)? {
        Some((mixed, sums)) => (Some(mixed), sums.f_narrow(2, past, rows)?),
        None => (None, log_sums(&attention)?),
    };
    let sums = sums.f_reshape([batch * heads, group, rows])?;
    let norms = input.hidden.f_narrow(1, past, rows)?;
    let norms = norms.f_norm_scalaropt_dim_dtype(2, [-1].as_slice(), false, Kind::Float)?;
    let norms = norms.f_clamp_min(f64::from(f32::MIN_POSITIVE))?.f_log()?; // [batch, rows]
    let scales =
        sums.f_add(&norms.f_repeat_interleave_self_int(heads, 0, None)?.f_unsqueeze(1)?)?;
    let of_original =
        |rows: &Tensor| some(rows.f_narrow(2, original.start as i64, original.len() as i64)?);
    let keys = of_original(input.keys)?.f_flatten(0, 1)?;
    let blocks = attention.blocks_of(0..rows, keys.size()[1]);
    let weights = attention.most(&keys, &scales, blocks)?;
    let norms = projected_norms(&of_original(input.values)?, output_projection, group)?;
    Ok((weights.f_view_as(&norms)?.f_add(&norms)?.f_amax([2], false)?, mixed))
}

/// Causal attention over whole texts, `[batch, query_heads, tokens, head_dim]`, and the logarithms of what its softmax divides by,
/// `[batch, query_heads, tokens]` f32.
///
/// Fused attention finds them on the way, without writing the logits down: a model that reads a text to learn from it needs
/// no other attention. `None` where no such kernel gives them: in f32 on a card, and on cards without flash attention.
fn attended(queries: &Tensor, keys: &Tensor, values: &Tensor) -> Result<Option<(Tensor, Tensor)>> {
    let (kind, device) = (queries.kind(), queries.device());
    if device == Device::Cpu && kind == Kind::Float {
        let group = queries.size()[1] / keys.size()[1].max(1);
        let own = |x: &Tensor| x.f_repeat_interleave_self_int(group, 1, None);
        let (keys, values, none) = (own(keys)?, own(values)?, None::<&Tensor>);
        return Ok(Some(Tensor::f_internal_scaled_dot_product_flash_attention_for_cpu(
            queries, &keys, &values, 0.0, true, none, None,
        )?));
    }
    let half = matches!(kind, Kind::Half | Kind::BFloat16);
    let program = FLASH.as_ref().filter(|_| device.is_cuda() && half);
    let arguments = [queries, keys, values].map(|x| IValue::Tensor(x.shallow_clone()));
    let Some(Ok(IValue::Tuple(both))) = program.map(|flash| flash.forward_is(&arguments)) else {
        return Ok(None);
    };
    Ok(match <[IValue; 2]>::try_from(both) {
        Ok([IValue::Tensor(mixed), IValue::Tensor(sums)]) => Some((mixed, sums)),
        _ => None,
    })
}

/// A program of one call, which tch has no name for; `oracle/flash.py` writes it.
static FLASH: LazyLock<Option<CModule>> =
    LazyLock::new(|| CModule::load_data(&mut include_bytes!("oracle/flash.pt").as_slice()).ok());

/// `[batch * kv_heads, group, rows]` f32: the logarithm of what softmax divides each row by.
fn log_sums(attention: &Attention) -> Result<Tensor> {
    let sums =
        attention.blocks().map(|rows| Ok(attention.logits(rows)?.f_logsumexp([3], false)?));
    Ok(Tensor::f_cat(&sums.collect::<Result<Vec<_>>>()?, 2)?)
}

/// `[…, kv_heads, group, tokens]` f32: `log |W_O^(g) v_i|`, for `values` `[…, kv_heads, tokens,
/// head_dim]`.
///
/// As `|W v|² = vᵀ (Wᵀ W) v`, in f64: a small matrix for each query head, and no wide vector for
/// each token.
pub(crate) fn projected_norms(
    values: &Tensor,
    output_projection: &Tensor,
    group: i64,
) -> Result<Tensor> {
    let &[.., heads, _, dim] = values.size().as_slice() else {
        return Err(Error::shape("values", "[…, kv_heads, tokens, head_dim]".into(), &[]));
    };
    let projection = output_projection.f_to_kind(Kind::Double)?.f_view([-1, heads * group, dim])?;
    let projection = projection.f_transpose(0, 1)?; // [query_heads, hidden, head_dim]
    let squares =
        projection.f_transpose(1, 2)?.f_matmul(&projection)?.f_view([heads, group, dim, dim])?;
    let values = values.f_to_kind(Kind::Double)?.f_unsqueeze(-3)?; // […, kv_heads, 1, tokens, head_dim]
    let norms = values.f_matmul(&squares)?.f_multiply(&values)?;
    let norms = norms.f_sum_dim_intlist([-1].as_slice(), false, Kind::Double)?;
    let norms = norms.f_clamp_min(f64::MIN_POSITIVE)?.f_log()?;
    Ok(norms.f_multiply_scalar(0.5)?.f_to_kind(Kind::Float)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_of_rows_of_any_size_give_the_same_maximum() {
        tch::manual_seed(1);
        let random = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu));
        let (queries, keys) = (random(&[1, 6, 40, 8]), random(&[1, 2, 40, 8]));
        let scales = random(&[2, 3, 17]);
        let (queries, seen) = (queries.narrow(2, 20, 17), keys.narrow(2, 0, 37));
        let attention = Attention::new(&queries, &seen).unwrap();
        let logits = attention.logits(0..17).unwrap().narrow(3, 3, 15);
        let expected = (logits - scales.unsqueeze(3)).amax([2], false);
        let some = keys.flatten(0, 1).narrow(1, 3, 15);
        for block in [1, 4, 16, 17] {
            let blocks = (0..17).step_by(block).map(|start| start..17.min(start + block as i64));
            let found = attention.most(&some, &scales, blocks).unwrap();
            assert!(found.allclose(&expected, 1e-5, 1e-6, false), "{block} rows at a time");
        }
    }

    #[test]
    fn libtorch_takes_the_program_of_flash_attention() {
        assert!(FLASH.is_some(), "without it a card falls back to what is slower");
    }

    #[test]
    fn fused_attention_gives_what_blocks_give() {
        tch::manual_seed(2);
        let random = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu)) * 3;
        let (queries, keys) = (random(&[2, 6, 70, 8]), random(&[2, 2, 70, 8]));
        let values = random(&[2, 2, 70, 8]);
        let (mixed, sums) = attended(&queries, &keys, &values).unwrap().unwrap();
        for past in [0, 1, 40, 69] {
            let attention = Attention::new(&queries.narrow(2, past, 70 - past), &keys).unwrap();
            let expected = log_sums(&attention).unwrap().view([2, 6, 70 - past]);
            let found = sums.narrow(2, past, 70 - past);
            assert!(found.allclose(&expected, 1e-6, 1e-6, false), "after {past}");
            let expected =
                attention.weights(0..70 - past).unwrap().matmul(&values.view([4, 1, 70, 8]));
            let found = mixed.narrow(2, past, 70 - past);
            assert!(found.allclose(&expected.view([2, 6, 70 - past, 8]), 1e-4, 1e-5, false));
        }
    }
}
