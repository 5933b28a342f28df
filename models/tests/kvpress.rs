//! Pruned runs against kvpress 0.5.5's `DMSPress(KVzapPress)`.
//!
//! [`Dense`] must mask the very tokens that kvpress masks, after the prefill and after every later pass.
//! [`Paged`] must hold exactly as many rows in every head, and both must give kvpress's logits.

mod common;

use anyhow::Result;
use common::kvpress::{check_rows, model, runs};
use common::{get, logits};
use models::{CausalLm, Cpu, Dense, KvCache, Paged};
use paged_kernels::PagedAttention;
use tch::Device;

#[test]
fn dense_masks_the_tokens_that_kvpress_masks_and_gives_its_logits() -> Result<()> {
    let lm = model(Device::Cpu)?;
    for (run, wanted) in runs()? {
        let hooks = run.hooks(Device::Cpu)?;
        let mut cache = Dense::new(lm.config().layers, run.window);
        let dropped_at = get(&wanted, &format!("{}.dropped_at", run.name))?; // [L, H, tokens]
        let mut all = Vec::new();
        for (pass, (at, count)) in run.passes().into_iter().enumerate() {
            let ids = get(&wanted, "ids")?.narrow(0, at, count);
            all.push(logits(&lm, &ids, &mut cache, &hooks)?);
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
        run.check_logits(&all, &wanted)?;
    }
    Ok(())
}

#[test]
fn paged_holds_as_many_rows_a_head_as_kvpress_leaves_and_gives_its_logits() -> Result<()> {
    let open = |shape| Ok(Paged::new(Cpu::new(shape)?)?);
    check_rows(Device::Cpu, open, |cache| Ok(cache.backend().lengths(cache.sequence())?))
}
