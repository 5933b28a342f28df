use crate::attention::Attention;
use crate::{LayerInput, Result, Scorer};
use tch::{Kind, Tensor};

/// What the newest tokens look at is worth keeping (arXiv 2404.14469): a token's score is the mean
/// over the newest queries and over the group's heads of the attention to it, smoothed over its
/// neighbours, zeros beyond the ends.
///
/// The observing tokens themselves score +inf, and so does all of a pass that has no others; kvpress
/// gives them the largest score plus one, and fails where there are no others.
#[derive(Clone, Copy, Debug)]
pub struct SnapKv {
    window: i64,
    kernel: i64,
}

impl SnapKv {
    /// As kvpress has it: 64 observing tokens, smoothed over 5.
    pub fn new() -> Self {
        Self { window: 64, kernel: 5 }
    }
}

impl Default for SnapKv {
    fn default() -> Self {
        Self::new()
    }
}

impl Scorer<Tensor> for SnapKv {
    fn score(&self, input: LayerInput<'_, Tensor>) -> Result<Tensor> {
        let Observed { weights, batch, heads } = Observed::new(input, self.window)?;
        let older = weights.size()[3];
        let mean = weights.f_mean_dim([2].as_slice(), false, Kind::Float)?;
        let kernel = self.kernel;
        let smooth = match older {
            0 => mean, // libtorch pools no empty rows
            _ => mean.f_avg_pool1d([kernel], [1], [kernel / 2], false, true)?,
        };
        let scores = smooth.f_mean_dim([1].as_slice(), false, Kind::Float)?;
        let scores = scores.f_reshape([batch, heads, older])?;
        let window = input.keys.size()[2] - older;
        Ok(scores.f_pad([0, window], "constant", f64::INFINITY)?)
    }
}

/// The attention of the newest tokens to the older ones.
pub(super) struct Observed {
    pub weights: Tensor, // [batch * kv_heads, group, observing tokens, older tokens] f32
    pub batch: i64,
    pub heads: i64,
}

impl Observed {
    pub fn new(input: LayerInput<'_, Tensor>, window: i64) -> Result<Self> {
        let (batch, heads, tokens, _) = input.keys.size4()?;
        let attention = Attention::new(input.queries, input.keys)?;
        let older = (tokens - window).max(0);
        let weights = attention.weights(older..tokens)?.f_narrow(3, 0, older)?;
        Ok(Self { weights, batch, heads })
    }
}
