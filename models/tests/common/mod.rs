//! What the golden tests share.
#![allow(dead_code, reason = "each test binary uses a part of it")]

pub mod kvpress;

use anyhow::{Context, Result};
use kvzap::{Policy, Threshold};
use models::{CausalLm, Hooks, KvCache, Turn};
use std::collections::HashMap;
use std::path::PathBuf;
use tch::{Kind, Tensor};

/// A file or folder under tests/golden.
pub fn golden(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(path)
}

/// The tensors of a golden file, by name.
pub type Tensors = HashMap<String, Tensor>;

/// The tensors of a golden file.
pub fn tensors(path: &str) -> Result<Tensors> {
    Ok(Tensor::read_safetensors(golden(path))?.into_iter().collect())
}

/// Feeds `ids`, `[tokens]`, and returns the logits of every one, `[tokens, vocabulary]`.
pub fn logits(
    lm: &dyn CausalLm,
    ids: &Tensor,
    cache: &mut dyn KvCache,
    hooks: &Hooks,
) -> Result<Tensor> {
    let hidden = lm.forward(&ids.unsqueeze(0), cache, hooks)?;
    Ok(lm.logits(&hidden)?.squeeze_dim(0))
}

/// The largest difference over the largest magnitude of `wanted`.
pub fn difference(found: &Tensor, wanted: &Tensor) -> f64 {
    assert_eq!(found.size(), wanted.size());
    let [found, wanted] = [found, wanted].map(|t| t.to_kind(Kind::Double));
    ((found - &wanted).abs().max() / wanted.abs().max()).double_value(&[])
}

/// Fails, with the difference, where it is larger than `bound`.
pub fn assert_close(found: &Tensor, wanted: &Tensor, bound: f64, what: &str) {
    let difference = difference(found, wanted);
    assert!(
        difference <= bound,
        "{what}: relative difference {difference:.2e}, allowed {bound:.0e}"
    );
}

/// A tensor of a golden file by name.
pub fn get<'a>(tensors: &'a Tensors, name: &str) -> Result<&'a Tensor> {
    tensors.get(name).with_context(|| format!("the golden file has no tensor {name}"))
}

/// A threshold of its own for each branch, in the order of its ways.
pub struct Each(pub Turn, pub [f32; 3]);

impl Policy<Tensor> for Each {
    type Drops = Tensor;

    fn drops(&self, scores: &Tensor) -> kvzap::Result<Tensor> {
        let Self(turn, thresholds) = self;
        let below = |threshold: f32| Threshold::new(threshold)?.drops(scores);
        match turn.next() {
            Some(way) => below(thresholds[way]),
            None => Ok(Tensor::f_cat(
                &thresholds.map(below).into_iter().collect::<kvzap::Result<Vec<_>>>()?,
                0,
            )?),
        }
    }
}
