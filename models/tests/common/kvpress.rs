//! What kvpress 0.5.5's `DMSPress(KVzapPress)` masks and computes: tests/golden/kvzap/make.py made the numbers.

use super::{Tensors, assert_close, get, golden, logits, tensors};
use anyhow::Result;
use kvzap::{Surrogate, Threshold, TorchSurrogate};
use models::{CausalLm, Decoder, Hooks, KvCache, Pruning, Weights, cache_shape, open};
use paged_kernels::CacheShape;
use serde::Deserialize;
use std::rc::Rc;
use tch::{Device, Kind, Tensor};

/// A row of runs.json.
#[derive(Deserialize)]
pub struct Run {
    pub name: String,
    surrogate: String,
    prompt: i64,
    pub window: usize,
    threshold: f32,
    pub decoding: bool,
    pub forwards: Vec<i64>,
    rows: Vec<i64>,
    pub ratio: f64,
}

impl Run {
    pub fn hooks(&self, device: Device) -> Result<Hooks> {
        let surrogate = Surrogate::load(golden(&format!("kvzap/{}", self.surrogate)))?;
        Ok(Hooks::pruning(Pruning {
            scorer: Box::new(TorchSurrogate::new(&surrogate, Kind::Float, device)?),
            policy: Box::new(Threshold::new(self.threshold)?),
            while_decoding: self.decoding,
        }))
    }

    /// Where each pass begins and how many tokens it has.
    pub fn passes(&self) -> Vec<(i64, i64)> {
        let mut at = 0;
        let counts = [self.prompt].into_iter().chain(self.forwards.iter().copied());
        counts
            .map(|count| {
                at += count;
                (at - count, count)
            })
            .collect()
    }

    /// Holds the logits of all passes against kvpress's, of which the golden file has some: the prompt's last, and the rows
    /// after it that `rows` names.
    pub fn check_logits(&self, all: &[Tensor], wanted: &Tensors) -> Result<()> {
        let last = all[0].narrow(0, self.prompt - 1, 1);
        let later = all[1..].iter().map(Tensor::shallow_clone);
        let found = Tensor::cat(&[last].into_iter().chain(later).collect::<Vec<_>>(), 0);
        let found = found.index_select(0, &Tensor::from_slice(&self.rows));
        assert_close(&found, get(wanted, &format!("{}.logits", self.name))?, 1e-4, &self.name);
        Ok(())
    }
}

/// The model that was pruned, in f32.
pub fn model(device: Device) -> Result<Decoder> {
    let source = open(&golden("kvzap/model"))?;
    Ok(Decoder::load(&Weights::new(source, Kind::Float, device)?)?)
}

/// The runs of both files, each with the tensors of its own.
pub fn runs() -> Result<Vec<(Run, Rc<Tensors>)>> {
    let mut all = Vec::new();
    for file in ["runs", "long"] {
        let runs = std::fs::read(golden(&format!("kvzap/{file}.json")))?;
        let wanted = Rc::new(tensors(&format!("kvzap/{file}.safetensors"))?);
        let runs = serde_json::from_slice::<Vec<Run>>(&runs)?;
        all.extend(runs.into_iter().map(|run| (run, wanted.clone())));
    }
    Ok(all)
}

/// A cache that frees what is dropped holds as many rows in each head as kvpress leaves, after each pass, and gives its logits.
pub fn check_rows<C: KvCache>(
    device: Device,
    open: impl Fn(CacheShape) -> Result<C>,
    lengths: impl Fn(&C) -> Result<Vec<usize>>,
) -> Result<()> {
    let lm = model(device)?;
    for (run, wanted) in runs()? {
        let hooks = run.hooks(device)?;
        let ids = get(&wanted, "ids")?.to_device(device);
        let dropped_at = get(&wanted, &format!("{}.dropped_at", run.name))?; // [L, H, tokens]
        let total = run.passes().iter().map(|(_, count)| count).sum::<i64>() as usize;
        let mut cache = open(cache_shape(lm.config(), total, run.window, Kind::Float)?)?;
        let mut all = Vec::new();
        for (pass, (at, count)) in run.passes().into_iter().enumerate() {
            let found = logits(&lm, &ids.narrow(0, at, count), &mut cache, &hooks)?;
            all.push(found.to_device(Device::Cpu));
            // What this pass let go is obeyed when the next one begins, but the prefill's at once.
            let obeyed = if pass == 0 { 0 } else { pass as i64 - 1 };
            let left = dropped_at.narrow(2, 0, at + count).gt(obeyed);
            let left = left.sum_dim_intlist([2].as_slice(), false, Kind::Int64).flatten(0, 1);
            let rows = lengths(&cache)?.into_iter().map(|rows| rows as i64).collect::<Vec<_>>();
            assert_eq!(rows, Vec::<i64>::try_from(left)?, "{}, pass {pass}", run.name);
        }
        run.check_logits(&all, &wanted)?;
    }
    Ok(())
}
