//! The seam between an architecture and everything that runs one.

use crate::cache::KvCache;
use crate::config::Config;
use crate::decoder::Decoder;
use crate::error::Result;
use crate::hooks::Hooks;
use tch::Tensor;

/// A network that predicts the next token.
///
/// A pass of some tokens goes in by [`enter`](Self::enter), through each [`layer`](Self::layer), and out by
/// [`leave`](Self::leave); [`forward`](Self::forward) does all three.
pub trait CausalLm: Send {
    /// Its shapes.
    fn config(&self) -> &Config;

    /// Embeds `tokens`, `[batch, tokens]` int64, whose indices in their texts are `indices`, `[tokens]`.
    fn enter(&self, tokens: &Tensor, indices: &[usize], whose: Whose) -> Result<Pass>;

    /// Takes a pass through one layer. `window` is what its cache lets nobody judge, `attend` stores keys and values, and
    /// attends, as [`KvCache::attend`] does.
    fn layer(
        &self,
        layer: usize,
        pass: &mut Pass,
        hooks: &Hooks,
        window: usize,
        attend: &mut Attend<'_>,
    ) -> Result<()>;

    /// The normed last hidden states, `[batch, tokens, hidden]`.
    fn leave(&self, pass: Pass) -> Result<Tensor>;

    /// Scores of the next token, `[…, vocabulary]` f32, from hidden states `[…, hidden]`.
    fn logits(&self, hidden: &Tensor) -> Result<Tensor>;

    /// `W_O` of a layer, `[hidden, query_heads * head_dim]`: what KVzip+ weighs values by.
    fn output_projection(&self, layer: usize) -> &Tensor;

    /// Itself as the network that a card's steps are made of; `None` for another.
    fn as_decoder(&self) -> Option<&Decoder> {
        None
    }

    /// Runs `tokens`, `[batch, tokens]` int64, after what `cache` holds: the first has the position
    /// [`KvCache::tokens`]. Returns the normed last hidden states, `[batch, tokens, hidden]`.
    fn forward(&self, tokens: &Tensor, cache: &mut dyn KvCache, hooks: &Hooks) -> Result<Tensor> {
        let (first, count) = (cache.tokens(), tokens.size()[1] as usize);
        cache.begin(count)?;
        let whose = if first == 0 { Whose::Context } else { Whose::Later };
        let indices: Vec<_> = (first..first + count).collect();
        let mut pass = self.enter(tokens, &indices, whose)?;
        let window = cache.window();
        for layer in 0..self.config().layers {
            self.layer(layer, &mut pass, hooks, window, &mut |queries, keys, values, drops| {
                cache.attend(layer, queries, keys, values, drops)
            })?;
        }
        self.leave(pass)
    }
}

/// Stores a layer's keys and values with their drop bits, and attends: queries, keys, values, drops.
pub type Attend<'a> = dyn FnMut(&Tensor, &Tensor, &Tensor, Option<&Tensor>) -> Result<Tensor> + 'a;

/// Whose the tokens of a pass are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// The first of a text.
    Context,
    /// Later ones of a text.
    Later,
    /// One each of as many texts, side by side as the tokens of a batch of 1: what one gets does not depend on the
    /// others. What is wrong with one, such as a position that is NaN, stays in its own rows.
    Several,
}

/// Tokens on their way through the layers.
#[derive(Debug)]
pub struct Pass {
    pub(crate) hidden: Tensor,           // [batch, tokens, hidden]
    pub(crate) index: Tensor,            // f32 [1, 1, tokens]
    pub(crate) angles: (Tensor, Tensor), // of the index, [1, 1, tokens, head_dim / 2]
    pub(crate) whose: Whose,
}
