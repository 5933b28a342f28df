use super::snapkv::Observed;
use crate::torch::dims;
use crate::{LayerInput, Result, Scorer};
use tch::{Kind, Tensor};

/// What the newest token looks at is worth keeping (TOVA, arXiv 2401.06104): a token's score is the
/// mean over all query heads of the layer of the last query's attention to it, the same for every kv
/// head. The last token scores +inf.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tova;

impl Scorer<Tensor> for Tova {
    fn score(&self, input: LayerInput<'_, Tensor>) -> Result<Tensor> {
        let Observed { weights, batch, heads } = Observed::new(input, 1)?;
        let [_, group, _, older] = dims(&weights, "weights", "")?;
        let scores = weights.f_reshape([batch, heads * group, older])?;
        let scores = scores.f_mean_dim([1].as_slice(), true, Kind::Float)?;
        let scores = scores.f_pad([0, 1], "constant", f64::INFINITY)?;
        Ok(scores.f_expand([batch, heads, older + 1], false)?)
    }
}
