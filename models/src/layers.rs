//! The few layers that every architecture here is made of.

use crate::bridge;
use crate::error::Result;
use crate::gemv::gemv;
use std::ops::Range;
use tch::Tensor;

/// Rows (tokens of a batch or of a short pass) that are few: in f32 on the CPU they go through this crate's own loops, in
/// which no row's bits depend on the others. So a text's steps give the same in every batch of at most so many.
pub(crate) const FEW: usize = 64;

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

    /// The same tensors once more.
    pub fn shallow_clone(&self) -> Self {
        let Self { weight, bias } = self;
        Self { weight: weight.shallow_clone(), bias: bias.as_ref().map(Tensor::shallow_clone) }
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        linear(x, &self.weight, self.bias.as_ref())
    }
}

/// `x · weightᵀ + bias`, `[…, out]`, for `x` `[…, in]` and `weight` `[out, in]`.
pub(crate) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let plain = bias.is_none_or(|bias| bridge::floats(bias).is_some());
    let vectors = x.size().iter().rev().skip(1).product::<i64>() as usize;
    if plain
        && (1..=FEW).contains(&vectors)
        && let x = &x.f_contiguous()?
        && let (Some(rows), Some(input)) = (bridge::floats(weight), bridge::floats(x))
    {
        let mut size = x.size();
        size.pop();
        size.push(weight.size()[0]);
        let mut out = Tensor::f_empty(&size, (x.kind(), x.device()))?;
        if let Some(output) = bridge::floats_mut(&mut out) {
            gemv(rows, input, vectors, bias.and_then(bridge::floats), output);
            return Ok(out);
        }
    }
    Ok(x.f_linear(weight, bias)?)
}

/// Rotates some heads of few tokens in place, as [`repo_pos::rotate`] does, and says whether it could: `x`,
/// `[batch, tokens, all heads * head_dim]`, is f32 on the CPU. For a decode step, whose work is less than calls into libtorch.
pub(crate) fn rotate_few(
    x: &mut Tensor,
    heads: Range<i64>,
    head_dim: usize,
    angles: &(Tensor, Tensor), // [1 or batch, 1 or kv_heads, tokens, head_dim / 2]
) -> bool {
    let (&[batch, tokens, width], &[texts, runs, _, pairs]) =
        (x.size().as_slice(), angles.0.size().as_slice())
    else {
        return false;
    };
    let [batch, tokens, width, texts, runs, pairs] =
        [batch, tokens, width, texts, runs, pairs].map(|n| n as usize);
    let (Some(cos), Some(sin)) = (bridge::floats(&angles.0), bridge::floats(&angles.1)) else {
        return false;
    };
    let heads = heads.start as usize..heads.end as usize;
    let fits = (1..=FEW).contains(&(batch * tokens)) && (texts == 1 || texts == batch);
    let whole = runs > 0 && heads.len().is_multiple_of(runs) && 2 * pairs == head_dim;
    if !fits || !whole || [cos.len(), sin.len()] != [texts * runs * tokens * pairs; 2] {
        return false;
    }
    let group = heads.len() / runs;
    let Some(x) = bridge::floats_mut(x) else { return false };
    for (i, row) in x.chunks_exact_mut(width).enumerate() {
        let (text, token) = (i / tokens % texts, i % tokens);
        let row = &mut row[heads.start * head_dim..heads.end * head_dim];
        for (head, x) in row.chunks_exact_mut(head_dim).enumerate() {
            let start = ((text * runs + head / group) * tokens + token) * pairs;
            let own = start..start + pairs;
            let (first, second) = x.split_at_mut(pairs);
            let turns = cos[own.clone()].iter().zip(&sin[own]);
            for ((a, b), (cos, sin)) in first.iter_mut().zip(second).zip(turns) {
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }
    true
}

/// Root-mean-square normalisation of `x`, `[batch, tokens, …, width]`, computed in f32 whatever the dtype of `x`, as
/// transformers does.
#[derive(Debug)]
pub(crate) struct RmsNorm {
    pub weight: Tensor,
    pub epsilon: f64,
}

impl RmsNorm {
    /// The same tensor once more.
    pub fn shallow_clone(&self) -> Self {
        Self { weight: self.weight.shallow_clone(), epsilon: self.epsilon }
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if let Some(out) = self.rows(x)? {
            return Ok(out);
        }
        if x.device().is_cuda() || self.weight.requires_grad() || x.requires_grad() {
            // One kernel each way where eight would be, whose product with the weight is rounded once.
            return Ok(x.f_rms_norm(self.weight.size(), Some(&self.weight), self.epsilon)?);
        }
        let (kind, wide) = (x.kind(), x.f_to_kind(tch::Kind::Float)?);
        let scale = wide
            .f_square()?
            .f_mean_dim([-1i64].as_slice(), true, None)?
            .f_add_scalar(self.epsilon)?
            .f_rsqrt()?;
        Ok(wide.f_mul(&scale)?.f_to_kind(kind)?.f_mul(&self.weight)?)
    }

    /// The same for few tokens' rows in f32 on the CPU: eight calls into libtorch cost more than a decode step's work
    /// here.
    fn rows(&self, x: &Tensor) -> Result<Option<Tensor>> {
        let tokens: i64 = x.size().iter().take(2).product();
        if !(1..=FEW as i64).contains(&tokens) {
            return Ok(None);
        }
        let x = x.f_contiguous()?;
        let mut out = x.f_empty_like()?;
        let (Some(rows), Some(weight), Some(normed)) =
            (bridge::floats(&x), bridge::floats(&self.weight), bridge::floats_mut(&mut out))
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
    /// The same tensors once more.
    pub fn shallow_clone(&self) -> Self {
        Self { gate_up: self.gate_up.shallow_clone(), down: self.down.shallow_clone() }
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let both = self.gate_up.forward(x)?; // [batch, tokens, 2 * intermediate]
        let width = both.size()[2] / 2;
        let rows = both.size()[0] * both.size()[1];
        if (1..=FEW as i64).contains(&rows)
            && let Some(both) = bridge::floats(&both)
        {
            let mut gated = Tensor::f_empty([1, rows, width], (x.kind(), x.device()))?;
            if let Some(gated) = bridge::floats_mut(&mut gated) {
                let width = width as usize;
                for (both, gated) in both.chunks_exact(2 * width).zip(gated.chunks_exact_mut(width))
                {
                    let (gate, up) = both.split_at(width);
                    for ((gated, gate), up) in gated.iter_mut().zip(gate).zip(up) {
                        *gated = gate * (up / (1.0 + (-gate).exp()));
                    }
                }
            }
            let gated = gated.f_view([x.size()[0], x.size()[1], width])?;
            return self.down.forward(&gated);
        }
        let parts = both.f_chunk(2, 2)?;
        self.down.forward(&parts[0].f_silu()?.f_mul(&parts[1])?)
    }
}
