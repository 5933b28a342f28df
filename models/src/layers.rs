//! The few layers that every architecture here is made of.

use crate::bridge;
use crate::error::Result;
use crate::gemv::gemv;
use std::ops::Range;
use tch::Tensor;

/// `x · weightᵀ + bias`; `weight` is `[out, in]`.
#[derive(Debug)]
pub(crate) struct Linear {
    pub weight: Tensor,
    pub bias: Option<Tensor>,
}

impl Linear {
    /// Several maps of the same input as one: their outputs lie side by side.
    pub fn joined(parts: Vec<Self>) -> Result<Self> {
        let weights: Vec<_> = parts.iter().map(|part| &part.weight).collect();
        let biases: Vec<_> = parts.iter().filter_map(|part| part.bias.as_ref()).collect();
        let bias = if biases.is_empty() { None } else { Some(Tensor::f_cat(&biases, 0)?) };
        Ok(Self { weight: Tensor::f_cat(&weights, 0)?, bias })
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        linear(x, &self.weight, self.bias.as_ref())
    }
}

/// `x · weightᵀ + bias`, `[…, out]`, for `x` `[…, in]` and `weight` `[out, in]`.
pub(crate) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let plain = bias.is_none_or(|bias| bridge::floats(bias).is_some());
    if plain
        && x.numel() as i64 == weight.size()[1]
        && let (Some(rows), Some(input)) = (bridge::floats(weight), bridge::floats(x))
    {
        let mut size = x.size();
        size.pop();
        size.push(weight.size()[0]);
        let mut out = Tensor::f_empty(&size, (x.kind(), x.device()))?;
        if let Some(output) = bridge::floats_mut(&mut out) {
            gemv(rows, input, bias.and_then(bridge::floats), output);
            return Ok(out);
        }
    }
    Ok(x.f_linear(weight, bias)?)
}

/// Rotates some heads of one token in place, as [`repo_pos::rotate`] does, and says whether it could: `x`,
/// `[1, 1, all heads * head_dim]`, is f32 on the CPU. For a decode step, whose work is less than calls into libtorch.
pub(crate) fn rotate_token(
    x: &mut Tensor,
    heads: Range<i64>,
    head_dim: usize,
    (cos, sin): &(Tensor, Tensor),
) -> bool {
    let (Some(cos), Some(sin)) = (bridge::floats(cos), bridge::floats(sin)) else { return false };
    let heads = heads.start as usize..heads.end as usize;
    let pairs = head_dim / 2;
    let rows = cos.len() / pairs; // one for each run of heads
    let one = x.size().iter().rev().skip(1).all(|&n| n == 1);
    if !one || sin.len() != cos.len() || rows == 0 || !heads.len().is_multiple_of(rows) {
        return false;
    }
    let group = heads.len() / rows;
    let Some(row) = bridge::floats_mut(x) else { return false };
    let row = &mut row[heads.start * head_dim..heads.end * head_dim];
    for (head, x) in row.chunks_exact_mut(head_dim).enumerate() {
        let angles = head / group * pairs..(head / group + 1) * pairs;
        let (first, second) = x.split_at_mut(pairs);
        let turns = cos[angles.clone()].iter().zip(&sin[angles]);
        for ((a, b), (cos, sin)) in first.iter_mut().zip(second).zip(turns) {
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }
    true
}

/// Root-mean-square normalisation of `x`, `[batch, tokens, …, width]`, computed in f32 whatever the dtype of `x`, as transformers does.
#[derive(Debug)]
pub(crate) struct RmsNorm {
    pub weight: Tensor,
    pub epsilon: f64,
}

impl RmsNorm {
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if let Some(out) = self.rows(x)? {
            return Ok(out);
        }
        let (kind, wide) = (x.kind(), x.f_to_kind(tch::Kind::Float)?);
        let scale = wide
            .f_square()?
            .f_mean_dim([-1i64].as_slice(), true, None)?
            .f_add_scalar(self.epsilon)?
            .f_rsqrt()?;
        Ok(wide.f_mul(&scale)?.f_to_kind(kind)?.f_mul(&self.weight)?)
    }

    /// The same for a token's few rows in f32 on the CPU: eight calls into libtorch cost more than a decode step's work here.
    fn rows(&self, x: &Tensor) -> Result<Option<Tensor>> {
        let tokens: i64 = x.size().iter().take(2).product();
        if tokens != 1 {
            return Ok(None);
        }
        let mut out = x.f_empty_like()?;
        let (Some(rows), Some(weight), Some(normed)) =
            (bridge::floats(x), bridge::floats(&self.weight), bridge::floats_mut(&mut out))
        else {
            return Ok(None);
        };
        for (row, normed) in
            rows.chunks_exact(weight.len()).zip(normed.chunks_exact_mut(weight.len()))
        {
            let squares: f64 = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            let scale = (squares / row.len() as f64 + self.epsilon).sqrt().recip() as f32;
            for ((normed, x), weight) in normed.iter_mut().zip(row).zip(weight) {
                *normed = x * scale * weight;
            }
        }
        Ok(Some(out))
    }
}

/// `down(silu(gate(x)) * up(x))`; gate and up are one map.
#[derive(Debug)]
pub(crate) struct GatedMlp {
    pub gate_up: Linear,
    pub down: Linear,
}

impl GatedMlp {
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut both = self.gate_up.forward(x)?; // [batch, tokens, 2 * intermediate]
        let width = both.size()[2] / 2;
        if both.numel() as i64 == 2 * width
            && let Some(row) = bridge::floats_mut(&mut both)
        {
            let (gate, up) = row.split_at_mut(width as usize);
            gate.iter_mut().zip(up).for_each(|(gate, up)| *gate *= *up / (1.0 + (-*gate).exp()));
            return self.down.forward(&both.f_narrow(2, 0, width)?);
        }
        let gate = both.f_narrow(2, 0, width)?.f_silu()?;
        self.down.forward(&gate.f_mul(&both.f_narrow(2, width, width)?)?)
    }
}
