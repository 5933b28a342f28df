//! Pruned runs against kvpress 0.5.5's `DMSPress(KVzapPress)`: tests/golden/kvzap/make.py made the numbers.
//!
//! [`Dense`] must mask the very tokens that kvpress masks, after the prefill and after every later pass.
//! [`Paged`] must hold exactly as many rows in every head, and both must give kvpress's logits.

mod common;

use anyhow::Result;
use common::{Tensors, assert_close, get, golden, logits, tensors};
use kvzap::{Surrogate, Threshold, TorchSurrogate};
use models::{
    CausalLm, Cpu, Decoder, Dense, Hooks, KvCache, Paged, Pruning, Weights, cache_shape, open,
};
use paged_kernels::PagedAttention;
use serde::Deserialize;
use std::rc::Rc;
use tch::{Device, Kind, Tensor};

/// A row of runs.json.
#[derive(Deserialize)]
struct Run {
    name: String,
    surrogate: String,
    prompt: i64,
    window: usize,
    threshold: f32,
    decoding: bool,
    forwards: Vec<i64>,
    rows: Vec<i64>,
    ratio: f64,
}

impl Run {
    fn hooks(&self) -> Result<Hooks> {
        let surrogate = Surrogate::load(golden(&format!("kvzap/{}", self.surrogate)))?;
        Ok(Hooks::pruning(Pruning {
            scorer: Box::new(TorchSurrogate::new(&surrogate, Kind::Float, Device::Cpu)?),
            policy: Box::new(Threshold::new(self.threshold)?),
            while_decoding: self.decoding,
        }))
    }

    /// Where each pass begins and how many tokens it has.
    fn passes(&self) -> Vec<(i64, i64)> {
        let mut at = 0;
        let counts = [self.prompt].into_iter().chain(self.forwards.iter().copied());
        counts
            .map(|count| {
                at += count;
                (at - count, count)
            })
            .collect()
    }
}

fn model() -> Result<Decoder> {
    let source = open(&golden("kvzap/model"))?;
    Ok(Decoder::load(&Weights::new(source, Kind::Float, Device::Cpu)?)?)
}

/// The runs of both files, each with the tensors of its own.
fn runs() -> Result<Vec<(Run, Rc<Tensors>)>> {
    let mut all = Vec::new();
    for file in ["runs", "long"] {
        let runs = std::fs::read(golden(&format!("kvzap/{file}.json")))?;
        let wanted = Rc::new(tensors(&format!("kvzap/{file}.safetensors"))?);
        let runs = serde_json::from_slice::<Vec<Run>>(&runs)?;
        all.extend(runs.into_iter().map(|run| (run, wanted.clone())));
    }
    Ok(all)
}

#[test]
fn dense_masks_the_tokens_that_kvpress_masks() -> Result<()> {
    let lm = model()?;
    for (run, wanted) in runs()? {
        let (hooks, mut cache) = (run.hooks()?, Dense::new(lm.config().layers, run.window));
        let dropped_at = get(&wanted, &format!("{}.dropped_at", run.name))?; // [L, H, tokens]
        for (pass, (at, count)) in run.passes().into_iter().enumerate() {
            let _ = logits(&lm, &get(&wanted, "ids")?.narrow(0, at, count), &mut cache, &hooks)?;
            for layer in 0..lm.config().layers {
                let masked = cache
                    .masked(layer)?
                    .expect("a layer that was attended has rows")
                    .squeeze_dim(0);
                let kvpress = dropped_at.get(layer as i64).narrow(1, 0, at + count).le(pass as i64);
                assert_eq!(masked, kvpress, "{}, pass {pass}, layer {layer}", run.name);
            }
            // kvpress counts when it judges: without decoding, at the prefill alone.
            if pass == if run.decoding { run.forwards.len() } else { 0 } {
                let removed = cache.usage().removed();
                assert!(
                    (removed - run.ratio).abs() < 1e-6,
                    "{}: {removed}, kvpress {}",
                    run.name,
                    run.ratio
                );
            }
        }
    }
    Ok(())
}

/// The rows of `all` that the golden file kept: `rows` counts tokens beyond the prompt.
fn kept_rows(run: &Run, all: &[Tensor]) -> Tensor {
    Tensor::cat(all, 0).index_select(0, &Tensor::from_slice(&run.rows))
}

#[test]
fn both_caches_give_the_logits_of_kvpress() -> Result<()> {
    let lm = model()?;
    for (run, wanted) in runs()? {
        let hooks = run.hooks()?;
        let total = (run.prompt + run.forwards.iter().sum::<i64>()) as usize;
        let shape = cache_shape(lm.config(), total, run.window, Kind::Float)?;
        let mut dense = Dense::new(lm.config().layers, run.window);
        let mut paged = Paged::new(Cpu::new(shape)?)?;
        let caches: [(&str, &mut dyn KvCache); 2] = [("dense", &mut dense), ("paged", &mut paged)];
        for (name, cache) in caches {
            let mut all = Vec::new();
            for (at, count) in run.passes() {
                let found = logits(&lm, &get(&wanted, "ids")?.narrow(0, at, count), cache, &hooks)?;
                all.push(if at == 0 { found.narrow(0, count - 1, 1) } else { found });
            }
            let kvpress = get(&wanted, &format!("{}.logits", run.name))?;
            assert_close(&kept_rows(&run, &all), kvpress, 1e-4, &format!("{}, {name}", run.name));
        }
    }
    Ok(())
}

#[test]
fn paged_holds_as_many_rows_a_head_as_kvpress_leaves() -> Result<()> {
    let lm = model()?;
    for (run, wanted) in runs()? {
        let hooks = run.hooks()?;
        let total = (run.prompt + run.forwards.iter().sum::<i64>()) as usize;
        let shape = cache_shape(lm.config(), total, run.window, Kind::Float)?;
        let mut cache = Paged::new(Cpu::new(shape)?)?;
        let ids = get(&wanted, "ids")?;
        let dropped_at = get(&wanted, &format!("{}.dropped_at", run.name))?;
        for (pass, (at, count)) in run.passes().into_iter().enumerate() {
            let _ = logits(&lm, &ids.narrow(0, at, count), &mut cache, &hooks)?;
            // What this pass let go is obeyed when the next one begins, but the prefill's at once.
            let obeyed = if pass == 0 { 0 } else { pass as i64 - 1 };
            let lengths = cache.backend().lengths(cache.sequence())?;
            for layer in 0..lm.config().layers {
                for head in 0..lm.config().kv_heads {
                    let dropped =
                        dropped_at.get(layer as i64).get(head as i64).narrow(0, 0, at + count);
                    let gone = dropped.le(obeyed).sum(Kind::Int64).int64_value(&[]);
                    let rows = lengths[layer * lm.config().kv_heads + head];
                    assert_eq!(
                        rows as i64,
                        at + count - gone,
                        "{}, pass {pass}, {layer}/{head}",
                        run.name
                    );
                }
            }
        }
    }
    Ok(())
}
