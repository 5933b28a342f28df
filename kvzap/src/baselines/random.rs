use crate::{Array, LayerInput, Result, Scorer};

/// The baseline of chance: uniform scores in [0, 1).
///
/// Each is a hash of the seed, layer, kv head and place in the forward pass: the same on any device
/// and in any batch.
#[derive(Clone, Copy, Debug)]
pub struct Random {
    seed: u64,
}

impl Random {
    /// Scores drawn from `seed`.
    pub fn new(seed: u64) -> Self {
        Self { seed }
    }

    /// `[kv_heads, tokens]`
    fn draw(self, layer: usize, heads: usize, tokens: usize) -> impl Iterator<Item = f32> {
        let layer = mix(self.seed ^ mix(layer as u64));
        (0..heads).flat_map(move |head| {
            let head = mix(layer ^ head as u64);
            (0..tokens).map(move |token| (mix(head ^ token as u64) >> 40) as f32 / (1 << 24) as f32)
        })
    }
}

/// A step of the generator SplitMix64 (Steele, Lea, Flood 2014), a bijection whose every output bit
/// depends on every input bit.
pub(crate) fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

impl Scorer<Array> for Random {
    fn score(&self, input: LayerInput<'_, Array>) -> Result<Array> {
        let [batch, heads, tokens, _] =
            input.keys.dims("keys", "[batch, kv_heads, tokens, head_dim]")?;
        let scores = (0..batch).flat_map(|_| self.draw(input.layer, heads, tokens)).collect();
        Array::new(scores, &[batch, heads, tokens])
    }
}

#[cfg(feature = "tch")]
impl Scorer<tch::Tensor> for Random {
    fn score(&self, input: LayerInput<'_, tch::Tensor>) -> Result<tch::Tensor> {
        let name = "[batch, kv_heads, tokens, head_dim]";
        let [batch, heads, tokens, _] = crate::torch::dims(input.keys, "keys", name)?;
        let scores: Vec<f32> = self.draw(input.layer, heads as usize, tokens as usize).collect();
        let scores = tch::Tensor::f_from_slice(&scores)?.f_reshape([1, heads, tokens])?;
        Ok(scores.f_to_device(input.keys.device())?.f_expand([batch, heads, tokens], false)?)
    }
}
