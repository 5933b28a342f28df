//! What one run adds to a plain model: which tokens may be forgotten, and where tokens stand.

use crate::causal_lm::Whose;
use crate::error::Result;
use kvzap::{LayerInput, Policy, Scorer};
use repo_pos::Repositioner;
use tch::Tensor;

/// The scorer, policy and repositioner of one run. Empty hooks are the plain model.
#[derive(Default)]
pub struct Hooks {
    /// Decides which tokens leave the cache; `None` keeps all.
    pub pruning: Option<Pruning>,
    /// The first tokens of a context, which always stay, as the newest do. Models lean on theirs, and no surrogate has seen
    /// any; KVzap protects none.
    pub protect: usize,
    /// Real-valued positions in place of the model's own; layers for which it returns `None` use the token's index.
    /// Without it each layer stands as its config says.
    pub repositioner: Option<Box<dyn Repositioner<Tensor> + Send>>,
    /// How far real-valued positions are moved to the token's index: not at all at 0, and at 1 they are the index,
    /// exactly plain rotary embedding (`dynamic_pe_pdrop` of the published code).
    pub toward_index: f64,
    /// Sees the positions of each layer that has real-valued ones, f32 `[batch, kv_heads, tokens]`, as they turn the
    /// keys.
    pub on_positions: Option<PositionSink>,
}

/// Takes a layer and its positions.
pub type PositionSink = Box<dyn Fn(usize, &Tensor) + Send>;

/// A scorer, and the policy that turns its scores into decisions.
pub struct Pruning {
    /// Scores each token for each kv head.
    pub scorer: Box<dyn Scorer<Tensor> + Send>,
    /// Turns scores into drop bits.
    pub policy: Box<dyn Policy<Tensor, Drops = Tensor> + Send>,
    /// Whether tokens that come after the prefill are judged too (kvpress's `decoding`). If not, the
    /// newest `window` tokens of the prefill are never judged either.
    pub while_decoding: bool,
}

impl Hooks {
    /// Hooks that prune and leave positions alone.
    pub fn pruning(pruning: Pruning) -> Self {
        Self { pruning: Some(pruning), ..Self::default() }
    }

    /// What judges a pass of so many tokens, and how many of them, if any.
    pub(crate) fn judging(
        &self,
        tokens: i64,
        whose: Whose,
        window: usize,
    ) -> Option<(&Pruning, i64)> {
        let pruning = self.pruning.as_ref()?;
        let judged = match whose {
            _ if pruning.while_decoding => tokens,
            Whose::Context => tokens - window as i64,
            Whose::Later | Whose::Several => 0,
        };
        (judged > 0).then_some((pruning, judged))
    }

    /// The drop bits of a layer's new tokens, `[batch, kv_heads, tokens]` bool, by these `scores` or by those that the scorer is
    /// asked for; `None` keeps them all.
    pub(crate) fn drops(
        &self,
        input: LayerInput<'_, Tensor>,
        scores: Option<Tensor>,
        whose: Whose,
        window: usize,
    ) -> Result<Option<Tensor>> {
        let tokens = input.hidden.size()[1];
        let Some((pruning, judged)) = self.judging(tokens, whose, window) else { return Ok(None) };
        if whose == Whose::Several {
            // Each by itself: a scorer may compare the tokens of a pass, and sum them in another order.
            let LayerInput { layer, hidden, queries, keys, values } = input;
            let drops = (0..tokens).map(|token| {
                let hidden = &hidden.f_narrow(1, token, 1)?;
                let own = |x: &Tensor| x.f_narrow(2, token, 1);
                let (queries, keys, values) = (&own(queries)?, &own(keys)?, &own(values)?);
                pruning.drops(LayerInput { layer, hidden, queries, keys, values }, None)
            });
            return Ok(Some(Tensor::f_cat(&drops.collect::<Result<Vec<_>>>()?, 2)?));
        }
        let drops = pruning.drops(input, scores)?;
        if judged < tokens {
            let _ = drops.f_narrow(2, judged, tokens - judged)?.f_zero_()?;
        }
        if whose == Whose::Context && self.protect > 0 {
            let _ = drops.f_narrow(2, 0, tokens.min(self.protect as i64))?.f_zero_()?;
        }
        Ok(Some(drops))
    }
}

impl Pruning {
    fn drops(&self, input: LayerInput<'_, Tensor>, scores: Option<Tensor>) -> Result<Tensor> {
        let scores = scores.map_or_else(|| self.scorer.score(input), Ok)?;
        Ok(self.policy.drops(&scores)?)
    }
}

impl std::fmt::Debug for Hooks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hooks")
            .field("pruning", &self.pruning)
            .field("repositioner", &self.repositioner.is_some())
            .finish()
    }
}

impl std::fmt::Debug for Pruning {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pruning")
            .field("while_decoding", &self.while_decoding)
            .finish_non_exhaustive()
    }
}
