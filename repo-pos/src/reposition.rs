use crate::Result;

/// Decides where each token stands, as the rotary embedding sees it.
///
/// A model asks once a layer, before it rotates queries and keys, and rotates both with the
/// answer. A position is a pure function of the token's own hidden state: it is decided when the
/// token is processed, the key is cached rotated, and neither a later token nor an eviction moves
/// it again.
///
/// `T` is a tensor: [`Array`](crate::Array) in plain Rust, `tch::Tensor` behind the feature `tch`.
/// [`Repo`](crate::Repo) and `TorchRepo` implement it; so may any rule of your own.
pub trait Repositioner<T> {
    /// Positions of the tokens of `hidden` in `layer` (0-based).
    ///
    /// `hidden` is `[batch, tokens, hidden]`, the same tensor that the layer's q, k and v
    /// projections read. The answer is f32 `[batch, heads, tokens]`: real, of any sign and order,
    /// and `heads` the model's kv heads (a kv head's queries share its positions). `None` leaves
    /// the layer with plain rotary embedding at each token's index in the text, which is not its
    /// place in a pruned cache.
    fn positions(&self, layer: usize, hidden: &T) -> Result<Option<T>>;
}
