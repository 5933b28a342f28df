use crate::{Array, LayerInput, Result, Scorer};

/// Keys unlike the others are worth keeping (arXiv 2504.15364): a token's score is minus the cosine
/// between its key and the mean of its head's keys, each first divided by its norm.
///
/// The mean is over the tokens of one forward pass; the paper goes on block by block.
#[derive(Clone, Copy, Debug, Default)]
pub struct KeyDiff;

impl Scorer<Array> for KeyDiff {
    fn score(&self, input: LayerInput<'_, Array>) -> Result<Array> {
        let [batch, heads, tokens, dim] =
            input.keys.dims("keys", "[batch, kv_heads, tokens, head_dim]")?;
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        let norm = |key: &[f32], least: f32| dot(key, key).sqrt().max(least);
        let mut scores = Vec::with_capacity(batch * heads * tokens);
        for keys in input.keys.data().chunks_exact((tokens * dim).max(1)) {
            let mut anchor = vec![0.0; dim];
            for key in keys.chunks_exact(dim) {
                let scale = norm(key, 1e-12) * tokens as f32;
                anchor.iter_mut().zip(key).for_each(|(sum, x)| *sum += x / scale);
            }
            let length = norm(&anchor, 1e-8);
            scores.extend(
                keys.chunks_exact(dim).map(|key| -dot(key, &anchor) / (norm(key, 1e-8) * length)),
            );
        }
        Array::new(scores, &[batch, heads, tokens])
    }
}

#[cfg(feature = "tch")]
impl Scorer<tch::Tensor> for KeyDiff {
    fn score(&self, input: LayerInput<'_, tch::Tensor>) -> Result<tch::Tensor> {
        let _: [_; 4] =
            crate::torch::dims(input.keys, "keys", "[batch, kv_heads, tokens, head_dim]")?;
        let keys = input.keys.f_to_kind(tch::Kind::Float)?;
        let norms = keys.f_norm_scalaropt_dim(2, [-1].as_slice(), true)?.f_clamp_min(1e-12)?;
        let anchor = keys.f_div(&norms)?.f_mean_dim([2].as_slice(), true, tch::Kind::Float)?;
        Ok(tch::Tensor::f_cosine_similarity(&keys, &anchor, -1, 1e-8)?.f_neg()?)
    }
}
