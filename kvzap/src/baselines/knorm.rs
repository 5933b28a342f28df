use crate::{Array, LayerInput, Result, Scorer};

/// Keys of small norm are looked at most (arXiv 2406.11430): a token's score is minus the Euclidean
/// norm of its rotated key.
///
/// In f32 whatever the model's dtype: in bf16 three quarters of the norms are equal.
#[derive(Clone, Copy, Debug, Default)]
pub struct Knorm;

impl Scorer<Array> for Knorm {
    fn score(&self, input: LayerInput<'_, Array>) -> Result<Array> {
        let [batch, heads, tokens, dim] =
            input.keys.dims("keys", "[batch, kv_heads, tokens, head_dim]")?;
        let norm = |key: &[f32]| -key.iter().map(|x| x * x).sum::<f32>().sqrt();
        let scores = input.keys.data().chunks_exact(dim.max(1)).map(norm).collect();
        Array::new(scores, &[batch, heads, tokens])
    }
}

#[cfg(feature = "tch")]
impl Scorer<tch::Tensor> for Knorm {
    fn score(&self, input: LayerInput<'_, tch::Tensor>) -> Result<tch::Tensor> {
        let _: [_; 4] =
            crate::torch::dims(input.keys, "keys", "[batch, kv_heads, tokens, head_dim]")?;
        let keys = input.keys.f_to_kind(tch::Kind::Float)?;
        Ok(keys.f_norm_scalaropt_dim(2, [-1].as_slice(), false)?.f_neg()?)
    }
}
