use crate::Result;

/// Predicts how much later tokens will need each token of one layer.
///
/// The scoring seam: a model calls it once a layer and forward pass, with that pass's new tokens
/// alone, and hands the scores to a [`Policy`](crate::Policy). It returns `[batch, kv_heads,
/// tokens]`; a scorer that looks at queries says how it reduces a group of query heads to one kv
/// head. The larger a score, the longer its token is kept; NaN counts as the largest.
/// Implemented for `T` = [`Array`](crate::Array) by [`Surrogate`](crate::Surrogate) and the
/// baselines that look at keys or places alone, and with the feature `tch` for `tch::Tensor` by
/// those and all others, where scores stay on the device of the input.
pub trait Scorer<T> {
    /// The scores of `input`'s tokens, `[batch, kv_heads, tokens]`.
    fn score(&self, input: LayerInput<'_, T>) -> Result<T>;

    /// The maps that make the scores of `layer` out of hidden states, with GELU between: weights `[outputs or more, inputs]` and
    /// biases, for an engine that computes them in its own way. None where scores are something else.
    fn maps(&self, _layer: usize) -> &[(T, T)] {
        &[]
    }
}

/// What self-attention computes in one layer, for the new tokens of one forward pass.
///
/// `query_heads` is `kv_heads` times the size of a group; query heads `h * group..(h + 1) * group`
/// read kv head `h`.
#[derive(Debug)]
pub struct LayerInput<'a, T> {
    /// The layer, from 0.
    pub layer: usize,
    /// `[batch, tokens, hidden]`: the output of the layer's input norm, not the residual stream.
    pub hidden: &'a T,
    /// `[batch, query_heads, tokens, head_dim]`, rotated.
    pub queries: &'a T,
    /// `[batch, kv_heads, tokens, head_dim]`, rotated, not repeated for the query heads.
    pub keys: &'a T,
    /// `[batch, kv_heads, tokens, head_dim]`.
    pub values: &'a T,
}

impl<T> Clone for LayerInput<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for LayerInput<'_, T> {}
