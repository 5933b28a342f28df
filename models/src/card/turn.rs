//! Turning a pass's queries and keys in one launch, where libtorch takes a dozen, and as many again for positions that are read.

use super::driver::{Turn, Turner};
use crate::causal_lm::Pass;
use crate::decoder::Decoder;
use crate::error::Result;
use crate::hooks::Hooks;
use crate::positions::LayerPositions;
use repo_pos::{Frequencies, Precision};
use std::sync::Arc;
use tch::{Kind, Tensor};

/// What turns the heads of a bf16 model on a card.
#[derive(Debug)]
pub(crate) struct Turning {
    turner: Arc<Turner>,
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
            inverse: Tensor::f_from_slice(frequencies.inverse())?
                .f_to_device(embedding.device())?,
            turned: frequencies.scale(),
        }))
    }

    /// The same once more.
    pub fn shallow_clone(&self) -> Self {
        let Self { turner, inverse, turned } = self;
        Self { turner: turner.clone(), inverse: inverse.shallow_clone(), turned: *turned }
    }
}

impl Decoder {
    /// Turns the queries and keys in `projected` where they lie, and says whether it could.
    pub(crate) fn turn_on_card(
        &self,
        layer: usize,
        hidden: &Tensor,
        projected: &Tensor,
        pass: &Pass,
        hooks: &Hooks,
    ) -> Result<bool> {
        let Some(Turning { turner, inverse, turned }) = &self.turning else { return Ok(false) };
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
