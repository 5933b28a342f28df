//! What a run forgets.

use anyhow::{Context, Result, bail};
use kvzap::{
    Allocation, Budget, ExpectedAttention, KeyDiff, Knorm, ObservedAttention, Policy, Random, Rule,
    Scope, Scorer, SnapKv, StreamingLlm, Surrogate, Threshold, TorchSurrogate, Tova,
};
use models::{Hooks, Model, Pruning};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tch::{Kind, Tensor};

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
    /// One of those that [`Method::baselines`] names.
    Baseline {
        /// Its name.
        name: &'static str,
        /// Share of the cache to remove.
        remove: f64,
    },
}

/// A baseline's name, where it looks for the lowest scores, and what makes its scorer.
type Baseline = (&'static str, Rule, fn(&Model) -> Result<TorchScorer>);

/// Methods of others that score a context in the pass that reads it, with the budgets of their papers.
const BASELINES: [Baseline; 8] = [
    ("knorm", Rule::Head, |_| Ok(Box::new(Knorm))),
    ("keydiff", Rule::Head, |_| Ok(Box::new(KeyDiff))),
    ("tova", Rule::Head, |_| Ok(Box::new(Tova))),
    ("h2o", Rule::Head, |_| Ok(Box::new(ObservedAttention::sum()))),
    ("observed-attention", Rule::Head, |_| Ok(Box::new(ObservedAttention::mean()))),
    ("snapkv", Rule::Head, |_| Ok(Box::new(SnapKv::new()))),
    ("adakv-snapkv", Rule::AdaKv { safe: 0.2 }, |_| Ok(Box::new(SnapKv::new()))),
    ("expected-attention", Rule::AdaKv { safe: 0.2 }, |model| {
        let frequencies = model.lm.config().frequencies()?;
        Ok(Box::new(ExpectedAttention::new(frequencies.inverse(), model.device)?))
    }),
];

impl Method {
    /// The names that [`baseline`](Self::baseline) knows.
    pub fn baselines() -> impl Iterator<Item = &'static str> {
        ["random", "recency"].into_iter().chain(BASELINES.iter().map(|(name, ..)| *name))
    }

    /// The baseline called `name`, forgetting a share `remove` of the cache.
    pub fn baseline(name: &str, remove: f64) -> Result<Self> {
        match Self::baselines().find(|known| *known == name) {
            Some("random") => Ok(Self::Random { remove, seed: 0 }),
            Some("recency") => Ok(Self::Recency { remove }),
            Some(name) => Ok(Self::Baseline { name, remove }),
            None => {
                let names: Vec<_> = Self::baselines().collect();
                bail!("no baseline is called {name}; there are {}", names.join(", "))
            }
        }
    }

    /// Its name in tables and files.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Kvzap { .. } => "kvzap",
            Self::KvzapBudget { .. } => "kvzap-budget",
            Self::Random { .. } => "random",
            Self::Recency { .. } => "recency",
            Self::Baseline { name, .. } => name,
        }
    }

    /// The threshold, if it has one.
    pub fn threshold(&self) -> Option<f32> {
        if let Self::Kvzap { threshold } = self { Some(*threshold) } else { None }
    }

    /// The hooks that make `model` forget in this way, and a count of the heads that forget the first token.
    pub fn hooks(
        &self,
        model: &Model,
        surrogate: Option<&Surrogate>,
        window: usize,
        while_decoding: bool,
    ) -> Result<(Hooks, FirstToken)> {
        let Some(scorer) = self.scorer(model, surrogate)? else {
            return Ok((Hooks::default(), FirstToken::default()));
        };
        let first = FirstToken::default();
        let policy = Box::new(Watched { policy: self.policy(window)?, first: first.clone() });
        Ok((Hooks::pruning(Pruning { scorer, policy, while_decoding }), first))
    }

    /// What scores tokens; `None` where nothing is forgotten. Methods of one name score alike.
    pub(crate) fn scorer(
        &self,
        model: &Model,
        surrogate: Option<&Surrogate>,
    ) -> Result<Option<TorchScorer>> {
        let learned = || -> Result<TorchScorer> {
            let surrogate =
                surrogate.context("KVzap needs a surrogate: give --surrogate FOLDER")?;
            let config = model.lm.config();
            surrogate.check(config.layers, config.hidden_size, config.kv_heads)?;
            Ok(Box::new(TorchSurrogate::new(surrogate, model.kind, model.device)?))
        };
        Ok(Some(match *self {
            Self::Full => return Ok(None),
            Self::Kvzap { .. } | Self::KvzapBudget { .. } => learned()?,
            Self::Random { seed, .. } => Box::new(Random::new(seed)),
            Self::Recency { .. } => Box::new(StreamingLlm::new(4)),
            Self::Baseline { name, .. } => baseline(name)?.2(model)?,
        }))
    }

    /// What decides by their scores.
    pub(crate) fn policy(&self, window: usize) -> Result<TorchPolicy> {
        Ok(match *self {
            Self::Full => Box::new(Threshold::new(f32::NEG_INFINITY)?),
            Self::Kvzap { threshold } => Box::new(Threshold::new(threshold)?),
            Self::KvzapBudget { remove } => Box::new(Budget::new(remove, window, Scope::Layer)?),
            Self::Random { remove, .. } | Self::Recency { remove } => {
                Box::new(Budget::new(remove, window, Scope::Head)?)
            }
            Self::Baseline { name, remove } => {
                Box::new(Allocation::new(remove, window, 0, baseline(name)?.1)?)
            }
        })
    }
}

fn baseline(name: &str) -> Result<&'static Baseline> {
    let known = BASELINES.iter().find(|(known, ..)| *known == name);
    known.context("this baseline is not in the table")
}

/// In how many heads a prefill's first token was judged, and in how many it goes.
///
/// Models lean on their first tokens; KVzap protects none, and never saw them in training. So a run says how often it
/// drops them. To be read right after the prefill: later passes count theirs too.
#[derive(Clone, Debug, Default)]
pub struct FirstToken(Arc<[AtomicUsize; 2]>);

impl FirstToken {
    /// The share of the heads that drop it; 0 if none judged it.
    pub fn dropped(&self) -> f64 {
        let [judged, dropped] = [0, 1].map(|index| self.0[index].load(Ordering::Relaxed) as f64);
        dropped / judged.max(1.0)
    }
}

pub(crate) type TorchScorer = Box<dyn Scorer<Tensor> + Send>;
pub(crate) type TorchPolicy = Box<dyn Policy<Tensor, Drops = Tensor> + Send>;

struct Watched {
    policy: TorchPolicy,
    first: FirstToken,
}

impl Policy<Tensor> for Watched {
    type Drops = Tensor;

    fn drops(&self, scores: &Tensor) -> kvzap::Result<Tensor> {
        let drops = self.policy.drops(scores)?;
        let first = drops.f_select(2, 0)?;
        let dropped = first.f_sum(Kind::Int64)?.f_int64_value(&[])? as usize;
        for (count, more) in self.first.0.iter().zip([first.numel(), dropped]) {
            count.fetch_add(more, Ordering::Relaxed);
        }
        Ok(drops)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn baselines_are_called_what_they_are_asked_for_by() {
        for name in Method::baselines() {
            assert_eq!(Method::baseline(name, 0.5).unwrap().name(), name);
        }
        let names: Vec<_> = Method::baselines().collect();
        let different: std::collections::BTreeSet<_> = names.iter().collect();
        assert_eq!(different.len(), names.len());
        let error = Method::baseline("snap", 0.5).unwrap_err().to_string();
        assert!(
            error.contains("no baseline is called snap") && error.contains("snapkv"),
            "{error}"
        );
    }
}
