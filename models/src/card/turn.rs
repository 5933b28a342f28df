//! What a pass goes through in one launch each: queries and keys are turned, where libtorch takes a dozen, and as many again for
//! positions that are read; and what projections read is normed and scored.

use super::driver::{Scored, Turn, Turner};
use crate::causal_lm::Pass;
use crate::decoder::Decoder;
use crate::error::Result;
use crate::hooks::Hooks;
use crate::positions::LayerPositions;
use kvzap::Scorer;
use repo_pos::{Frequencies, Precision};
use std::sync::Arc;
use tch::{Kind, Tensor};

/// What turns the heads of a bf16 model on a card, and scores its tokens.
#[derive(Debug)]
pub(crate) struct Turning {
    turner: Arc<Turner>,
    scored: Arc<Scored>,
    inverse: Tensor, // f32 [head_dim / 2]
    turned: f32,
}

impl Turning {
    /// That of a model with these frequencies and this embedding; `None` for what it is not made for.
    pub fn new(frequencies: &Frequencies, embedding: &Tensor) -> Result<Option<Self>> {
        let narrow = embedding.device().is_cuda() && embedding.kind() == Kind::BFloat16;
        if !narrow || frequencies.precision() != Precision::Parity {
            return Ok(None);
        }
        Ok(Some(Self {
            turner: Arc::new(Turner::load(embedding.device())?),
            scored: Arc::new(Scored::load(embedding.device())?),
            inverse: Tensor::f_from_slice(frequencies.inverse())?
                .f_to_device(embedding.device())?,
            turned: frequencies.scale(),
        }))
    }

    /// The same once more.
    pub fn shallow_clone(&self) -> Self {
        let Self { turner, scored, inverse, turned } = self;
        let (turner, scored) = (turner.clone(), scored.clone());
        Self { turner, scored, inverse: inverse.shallow_clone(), turned: *turned }
    }
}

impl Decoder {
    /// What the projections of a layer read, and a linear surrogate's scores of it, bf16 `[batch, kv_heads, tokens]`, which so
    /// cost no reading of their own; `None` where there is no kernel for it.
    pub(crate) fn scored_on_card(
        &self,
        layer: usize,
        residual: &Tensor,
        scorer: &dyn Scorer<Tensor>,
    ) -> Result<Option<(Tensor, Tensor)>> {
        let (Some(Turning { scored, .. }), [map]) = (&self.turning, scorer.maps(layer)) else {
            return Ok(None);
        };
        let plain = !self.config.architecture.norms_outputs() && !residual.requires_grad();
        if !plain || !Scored::takes(residual, map) {
            return Ok(None);
        }
        let norm = &self.blocks[layer].attention_norm;
        scored.linear(residual, norm, map, self.config.kv_heads).map(Some)
    }

    /// Turns the queries and keys in `projected` where they lie, and says whether it could.
    pub(crate) fn turn_on_card(
        &self,
        layer: usize,
        hidden: &Tensor,
        projected: &Tensor,
        pass: &Pass,
        hooks: &Hooks,
    ) -> Result<bool> {
        let Some(Turning { turner, inverse, turned, .. }) = &self.turning else {
            return Ok(false);
        };
        let config = &self.config;
        let seen = hooks.repositioner.is_some()
            || hooks.on_positions.is_some()
            || hooks.toward_index != 0.0;
        if seen || projected.requires_grad() {
            return Ok(false);
        }
        let read = match (config.positions[layer], &self.repo[layer]) {
            (LayerPositions::Rope, _) => None,
            (LayerPositions::Repo, Some(maps)) => match maps.units(hidden)? {
                Some(units) => Some((units, &maps.0.down.weight)),
                None => return Ok(false),
            },
            _ => return Ok(false),
        };
        let inner = read.as_ref().map_or(0, |(_, last)| last.size()[1] as usize);
        if !Turner::takes(config.head_dim, inner) {
            return Ok(false);
        }
        turner.turn(Turn {
            projected,
            query_heads: config.query_heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            read: read.as_ref().map(|(units, last)| (units, *last)),
            index: &pass.index,
            inverse,
            turned: *turned,
        })?;
        Ok(true)
    }
}
