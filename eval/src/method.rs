//! What a run forgets.

use anyhow::{Context, Result};
use kvzap::{
    Budget, Policy, Random, Scope, Scorer, StreamingLlm, Surrogate, Threshold, TorchSurrogate,
};
use models::{Hooks, Model, Pruning};
use tch::Tensor;

/// A way to prune a cache.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Method {
    /// Nothing is forgotten.
    Full,
    /// KVzap: a surrogate's scores under a threshold go.
    Kvzap {
        /// In the logarithm of KVzip+ scores.
        threshold: f32,
    },
    /// A surrogate's lowest scores go, as many in each layer as make up `remove`.
    KvzapBudget {
        /// Share of the cache to remove.
        remove: f64,
    },
    /// Chance decides, in every head alike.
    Random {
        /// Share of the cache to remove.
        remove: f64,
        /// Of the draws.
        seed: u64,
    },
    /// The oldest go, but for the first four: StreamingLLM. Without those four, a model breaks down
    /// and any other method would look good beside it.
    Recency {
        /// Share of the cache to remove.
        remove: f64,
    },
}

impl Method {
    /// Its name in tables and files.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Kvzap { .. } => "kvzap",
            Self::KvzapBudget { .. } => "kvzap-budget",
            Self::Random { .. } => "random",
            Self::Recency { .. } => "recency",
        }
    }

    /// The threshold, if it has one.
    pub fn threshold(&self) -> Option<f32> {
        if let Self::Kvzap { threshold } = self { Some(*threshold) } else { None }
    }

    /// The hooks that make `model` forget in this way.
    pub fn hooks(
        &self,
        model: &Model,
        surrogate: Option<&Surrogate>,
        window: usize,
        while_decoding: bool,
    ) -> Result<Hooks> {
        let learned = || -> Result<Box<dyn Scorer<Tensor> + Send>> {
            let surrogate =
                surrogate.context("KVzap needs a surrogate: give --surrogate FOLDER")?;
            let config = model.lm.config();
            surrogate.check(config.layers, config.hidden_size, config.kv_heads)?;
            Ok(Box::new(TorchSurrogate::new(surrogate, model.kind, model.device)?))
        };
        let budget = |remove, scope| -> Result<Box<dyn Policy<Tensor, Drops = Tensor> + Send>> {
            Ok(Box::new(Budget::new(remove, window, scope)?))
        };
        let (scorer, policy): (Box<dyn Scorer<Tensor> + Send>, _) = match *self {
            Self::Full => return Ok(Hooks::default()),
            Self::Kvzap { threshold } => (learned()?, Box::new(Threshold::new(threshold)?) as _),
            Self::KvzapBudget { remove } => (learned()?, budget(remove, Scope::Layer)?),
            Self::Random { remove, seed } => {
                (Box::new(Random::new(seed)), budget(remove, Scope::Head)?)
            }
            Self::Recency { remove } => {
                (Box::new(StreamingLlm::new(4)), budget(remove, Scope::Head)?)
            }
        };
        Ok(Hooks::pruning(Pruning { scorer, policy, while_decoding }))
    }
}
