//! Llama against transformers, on tiny random models: tests/golden/llama/make.py made the numbers.

mod common;

use anyhow::Result;
use common::{assert_close, get, golden, logits, tensors};
use models::{
    CausalLm, Cpu, Dense, Hooks, KvCache, Llama, Paged, WINDOW, Weights, cache_shape, open,
};
use tch::{Device, Kind, Tensor};

const BOUND: f64 = 1e-4;

fn load(name: &str, kind: Kind) -> Result<Llama> {
    let source = open(&golden(&format!("llama/{name}")))?;
    Ok(Llama::load(&Weights::new(source, kind, Device::Cpu)?)?)
}

fn paged(lm: &Llama, tokens: usize, kind: Kind) -> Result<Paged<Cpu>> {
    Ok(Paged::new(Cpu::new(cache_shape(lm.config(), tokens, WINDOW, kind)?)?)?)
}

/// The logits of the prompt, and of the continuation fed token by token.
fn run(
    lm: &Llama,
    ids: &Tensor,
    next: &Tensor,
    cache: &mut dyn KvCache,
) -> Result<(Tensor, Tensor)> {
    let hooks = Hooks::default();
    let prompt = logits(lm, ids, cache, &hooks)?;
    let steps: Vec<Tensor> = (0..next.size()[0])
        .map(|i| logits(lm, &next.narrow(0, i, 1), cache, &hooks))
        .collect::<Result<_>>()?;
    Ok((prompt, Tensor::cat(&steps, 0)))
}

fn check(name: &str) -> Result<()> {
    let wanted = tensors(&format!("llama/{name}/expected.safetensors"))?;
    let (ids, next) = (get(&wanted, "ids")?, get(&wanted, "decode_ids")?);
    let lm = load(name, Kind::Float)?;
    let mut dense = Dense::new(lm.config().layers, WINDOW);
    let mut paged = paged(&lm, 64, Kind::Float)?;
    let caches: [(&str, &mut dyn KvCache); 2] = [("dense", &mut dense), ("paged", &mut paged)];
    for (cache_name, cache) in caches {
        let (prompt, steps) = run(&lm, ids, next, cache)?;
        assert_close(
            &prompt,
            get(&wanted, "logits")?,
            BOUND,
            &format!("{name}, {cache_name}, prompt"),
        );
        assert_close(
            &steps,
            get(&wanted, "decode_logits")?,
            BOUND,
            &format!("{name}, {cache_name}, decode"),
        );
    }
    Ok(())
}

#[test]
fn one_query_head_a_kv_head() -> Result<()> {
    check("gqa1")
}

#[test]
fn llama31_scaling_and_a_head_dim_of_its_own() -> Result<()> {
    check("gqa2_llama31")
}

#[test]
fn tied_embeddings() -> Result<()> {
    check("gqa3_tied")
}

#[test]
fn biases_as_configured() -> Result<()> {
    check("gqa4_biases")
}

#[test]
fn sharded_weights_and_eight_query_heads_a_kv_head() -> Result<()> {
    check("gqa8_sharded")
}

#[test]
fn bf16_is_near_f32_on_both_caches() -> Result<()> {
    let wanted = tensors("llama/gqa2_llama31/expected.safetensors")?;
    let (ids, next) = (get(&wanted, "ids")?, get(&wanted, "decode_ids")?);
    let lm = load("gqa2_llama31", Kind::BFloat16)?;
    let mut dense = Dense::new(lm.config().layers, WINDOW);
    let mut paged = paged(&lm, 64, Kind::BFloat16)?;
    let caches: [(&str, &mut dyn KvCache); 2] = [("dense", &mut dense), ("paged", &mut paged)];
    for (name, cache) in caches {
        let (prompt, steps) = run(&lm, ids, next, cache)?;
        assert_close(&prompt, get(&wanted, "logits")?, 0.06, &format!("{name}, prompt"));
        assert_close(&steps, get(&wanted, "decode_logits")?, 0.06, &format!("{name}, decode"));
    }
    Ok(())
}

/// The mask of a pass after others is anchored at its last token, not at its first (libtorch's `is_causal`).
#[test]
fn a_pass_of_several_tokens_equals_passes_of_one() -> Result<()> {
    let lm = load("gqa3_tied", Kind::Float)?;
    let ids = Tensor::arange(20, (Kind::Int64, Device::Cpu));
    let hooks = Hooks::default();
    let whole = logits(&lm, &ids, &mut Dense::new(2, WINDOW), &hooks)?;
    let mut dense = Dense::new(2, WINDOW);
    let mut paged = paged(&lm, 20, Kind::Float)?;
    let caches: [(&str, &mut dyn KvCache); 2] = [("dense", &mut dense), ("paged", &mut paged)];
    for (name, cache) in caches {
        let mut parts = Vec::new();
        for (start, length) in [(0, 5), (5, 2), (7, 12), (19, 1)] {
            parts.push(logits(&lm, &ids.narrow(0, start, length), cache, &hooks)?);
        }
        assert_close(&Tensor::cat(&parts, 0), &whole, 1e-5, name);
    }
    Ok(())
}
