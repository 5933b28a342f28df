//! The seam between an architecture and everything that runs one.

use crate::cache::KvCache;
use crate::config::Config;
use crate::error::Result;
use crate::hooks::Hooks;
use tch::Tensor;

/// A network that predicts the next token.
pub trait CausalLm: Send {
    /// Its shapes.
    fn config(&self) -> &Config;

    /// Runs `tokens`, `[batch, tokens]` int64, after what `cache` holds: the first has the position
    /// [`KvCache::tokens`]. Returns the normed last hidden states, `[batch, tokens, hidden]`.
    fn forward(&self, tokens: &Tensor, cache: &mut dyn KvCache, hooks: &Hooks) -> Result<Tensor>;

    /// Scores of the next token, `[…, vocabulary]` f32, from hidden states `[…, hidden]`.
    fn logits(&self, hidden: &Tensor) -> Result<Tensor>;

    /// `W_O` of a layer, `[hidden, query_heads * head_dim]`: what KVzip+ weighs values by.
    fn output_projection(&self, layer: usize) -> &Tensor;
}
