use crate::{Array, LayerInput, Result, Scorer};

/// The baseline of recency: the first few tokens, then the newest (StreamingLLM, arXiv 2309.17453).
///
/// A token's score is its place in the forward pass, that of the first `sinks` +inf. Models lean on
/// their first tokens whatever these say; without sinks, recency breaks them and any method looks
/// good beside it.
#[derive(Clone, Copy, Debug)]
pub struct StreamingLlm {
    sinks: usize,
}

impl StreamingLlm {
    /// Keeps the first `sinks` tokens to the last; the paper and kvpress have 4.
    pub fn new(sinks: usize) -> Self {
        Self { sinks }
    }
}

impl Scorer<Array> for StreamingLlm {
    fn score(&self, input: LayerInput<'_, Array>) -> Result<Array> {
        let [batch, heads, tokens, _] =
            input.keys.dims("keys", "[batch, kv_heads, tokens, head_dim]")?;
        let place = |token| if token < self.sinks { f32::INFINITY } else { token as f32 };
        let scores = (0..batch * heads).flat_map(|_| (0..tokens).map(place)).collect();
        Array::new(scores, &[batch, heads, tokens])
    }
}

#[cfg(feature = "tch")]
impl Scorer<tch::Tensor> for StreamingLlm {
    fn score(&self, input: LayerInput<'_, tch::Tensor>) -> Result<tch::Tensor> {
        let name = "[batch, kv_heads, tokens, head_dim]";
        let [batch, heads, tokens, _] = crate::torch::dims(input.keys, "keys", name)?;
        // f32 whatever the model's dtype: bf16 knows no whole number between 256 and 258.
        let scores = tch::Tensor::f_arange(tokens, (tch::Kind::Float, input.keys.device()))?;
        let _ = scores.f_narrow(0, 0, tokens.min(self.sinks as i64))?.f_fill_(f64::INFINITY)?;
        Ok(scores.f_expand([batch, heads, tokens], false)?)
    }
}
