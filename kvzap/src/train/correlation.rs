use crate::error::Result;
use crate::torch::{dims, expect};
use crate::{LayerInput, Scorer};
use tch::{Kind, Tensor};

/// How well a scorer of hidden states ranks rows of a layer that it was not fitted to: the squared Pearson correlation of
/// its scores with `scores`, `[rows, kv_heads]`, for each kv head; NaN where either is constant.
///
/// `hidden` is `[rows, hidden]` in the dtype that the scorer wants. This is the paper's R² (arXiv 2601.07891, table 1), which
/// does not tell a scale or an offset that is wrong.
pub fn r2(
    scorer: &dyn Scorer<Tensor>,
    layer: usize,
    hidden: &Tensor,
    scores: &Tensor,
) -> Result<Vec<f64>> {
    let [rows, _] = dims(hidden, "hidden", "[rows, hidden]")?;
    let [_, heads] = dims(scores, "scores", "[rows, kv_heads]")?;
    expect(scores, "scores", &[rows, heads])?;
    let hidden = hidden.f_unsqueeze(0)?;
    // The others are not looked at by who scores hidden states.
    let input =
        LayerInput { layer, hidden: &hidden, queries: &hidden, keys: &hidden, values: &hidden };
    let found = scorer.score(input)?.f_squeeze_dim(0)?; // [kv_heads, rows]
    let centred = |tensor: &Tensor| -> Result<Tensor> {
        let tensor = tensor.f_to_kind(Kind::Double)?;
        Ok(tensor.f_sub(&tensor.f_mean_dim([1i64].as_slice(), true, None)?)?)
    };
    let (x, y) = (centred(&found)?, centred(&scores.f_transpose(0, 1)?)?);
    let sum = |a: &Tensor, b: &Tensor| {
        a.f_mul(b)?.f_sum_dim_intlist([1i64].as_slice(), false, Kind::Double)
    };
    let r2 = sum(&x, &y)?.f_square()?.f_div(&sum(&x, &x)?.f_mul(&sum(&y, &y)?)?)?;
    Ok(Vec::try_from(&r2)?)
}
