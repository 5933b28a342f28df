use crate::torch::{dims, expect};
use crate::{LayerInput, Result, Scorer};
use tch::{Device, Kind, Tensor};

/// What queries to come will look at, on the average (arXiv 2510.00636): the queries of the pass,
/// before rotation, are taken for draws from a normal distribution, and so will be those at the next
/// 512 positions. With that distribution's mean μ and covariance Σ, turned by the average rotation
/// there, a token's score is
///
/// ```text
/// (softmax(μ k / √d + k Σ k / 2d) + ε) |v|
/// ```
///
/// the mean over the group's heads before ε is added. The first four tokens say little of the
/// queries to come: they are left out and score +inf; kvpress gives them the largest score plus one.
/// ε is 0.01, as kvpress's registry has it for `expected_attention`.
///
/// Only for a first pass over tokens whose positions are their places, as rotations are undone by
/// place.
#[derive(Debug)]
pub struct ExpectedAttention {
    inverse_frequencies: Tensor, // [head_dim / 2] f32
}

const SINKS: i64 = 4;
const FUTURE: i64 = 512;
const EPSILON: f64 = 1e-2;

impl ExpectedAttention {
    /// For a model whose pair i of dimensions, i and `i + head_dim / 2`, turns by
    /// `inverse_frequencies[i]` radians from a token to the next.
    pub fn new(inverse_frequencies: &[f32], device: Device) -> Result<Self> {
        let inverse_frequencies = Tensor::f_from_slice(inverse_frequencies)?.f_to_device(device)?;
        Ok(Self { inverse_frequencies })
    }

    /// Cosines and sines at the positions `first..end`, `[positions, head_dim / 2]`.
    fn angles(&self, first: i64, end: i64) -> Result<(Tensor, Tensor)> {
        let float = (Kind::Float, self.inverse_frequencies.device());
        let positions = Tensor::f_arange_start(first, end, float)?.f_unsqueeze(1)?;
        let angles = positions.f_mul(&self.inverse_frequencies)?;
        Ok((angles.f_cos()?, angles.f_sin()?))
    }
}

impl Scorer<Tensor> for ExpectedAttention {
    fn score(&self, input: LayerInput<'_, Tensor>) -> Result<Tensor> {
        let [batch, query_heads, tokens, dim] =
            dims(input.queries, "queries", "[batch, query_heads, tokens, head_dim]")?;
        let [_, heads, ..]: [i64; 4] =
            dims(input.keys, "keys", "[batch, kv_heads, tokens, head_dim]")?;
        let pairs = self.inverse_frequencies.numel() as i64;
        let group = query_heads.checked_div(heads).unwrap_or(0);
        let wanted = [batch, heads.max(1) * group.max(1), tokens, 2 * pairs];
        expect(input.queries, "queries", &wanted)?;
        expect(input.keys, "keys", &[batch, heads, tokens, dim])?;
        expect(input.values, "values", &[batch, heads, tokens, dim])?;
        let rest = (tokens - SINKS).max(0);
        let sinks = tokens - rest;
        let float = |tensor: &Tensor| tensor.f_narrow(2, sinks, rest)?.f_to_kind(Kind::Float);

        let (cos, sin) = self.angles(sinks, tokens)?;
        let queries = turn(&float(input.queries)?, &cos, &sin.f_neg()?)?;
        let queries = queries.f_view([batch, heads, group, rest, dim])?;
        let mean = queries.f_mean_dim([3].as_slice(), true, Kind::Float)?;
        let centred = queries.f_sub(&mean)?;
        let covariance = centred.f_transpose(3, 4)?.f_matmul(&centred)?;
        let covariance = covariance.f_div_scalar(rest as f64)?;

        let (cos, sin) = self.angles(tokens, tokens + FUTURE)?;
        let [cos, sin] = [cos, sin].map(|x| x.f_mean_dim([0].as_slice(), false, Kind::Float));
        let (cos, sin) = (cos?, sin?);
        let mean = turn(&mean, &cos, &sin)?; // [batch, kv_heads, group, 1, head_dim]
        let covariance = turn(&covariance, &cos, &sin)?.f_transpose(3, 4)?;
        let covariance = turn(&covariance, &cos, &sin)?;

        let keys = float(input.keys)?;
        let mut scores = Tensor::f_zeros([batch, heads, rest], (Kind::Float, keys.device()))?;
        let scale = (dim as f64).sqrt();
        for head in 0..group {
            let mean = mean.f_select(2, head)?.f_transpose(2, 3)?;
            let linear = keys.f_matmul(&mean)?.f_squeeze_dim(3)?.f_div_scalar(scale)?;
            let square = keys.f_matmul(&covariance.f_select(2, head)?)?.f_mul(&keys)?;
            let square = square.f_sum_dim_intlist([3].as_slice(), false, Kind::Float)?;
            let logits = linear.f_add(&square.f_div_scalar(2.0 * dim as f64)?)?;
            scores = scores.f_add(&logits.f_softmax(-1, Kind::Float)?)?;
        }
        let norms = float(input.values)?.f_norm_scalaropt_dim(2, [-1].as_slice(), false)?;
        let scores = scores.f_div_scalar(group as f64)?.f_add_scalar(EPSILON)?.f_mul(&norms)?;
        Ok(scores.f_pad([sinks, 0], "constant", f64::INFINITY)?)
    }
}

/// Rotates the last dimension of `x`; `cos` and `sin` are for its first half.
fn turn(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let halves = x.f_chunk(2, -1)?;
    let (a, b) = (&halves[0], &halves[1]);
    let first = a.f_mul(cos)?.f_sub(&b.f_mul(sin)?)?;
    let second = b.f_mul(cos)?.f_add(&a.f_mul(sin)?)?;
    Ok(Tensor::f_cat(&[first, second], -1)?)
}
