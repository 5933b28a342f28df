//! Decoder, Qwen3 and OLMo 2 against transformers, on tiny random models: the numbers were made by make.py in
//! tests/golden/llama and tests/golden/families.

mod common;

use anyhow::Result;
use common::{assert_close, get, golden, logits, tensors};
use models::{
    CausalLm, Cpu, Decoder, Dense, Hooks, KvCache, Paged, WINDOW, Weights, cache_shape, open,
};
use tch::{Device, Kind, Tensor};

const BOUND: f64 = 1e-4;

fn load(name: &str, kind: Kind) -> Result<Decoder> {
    let source = open(&golden(name))?;
    Ok(Decoder::load(&Weights::new(source, kind, Device::Cpu)?)?)
}

fn paged(lm: &Decoder, tokens: usize, kind: Kind) -> Result<Paged<Cpu>> {
    Ok(Paged::new(Cpu::new(cache_shape(lm.config(), tokens, WINDOW, kind)?)?)?)
}

/// The logits of the prompt, and of the continuation fed token by token.
fn run(
    lm: &Decoder,
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
    let wanted = tensors(&format!("{name}/expected.safetensors"))?;
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
    check("llama/gqa1")
}

#[test]
fn llama31_scaling_and_a_head_dim_of_its_own() -> Result<()> {
    check("llama/gqa2_llama31")
}

#[test]
fn tied_embeddings() -> Result<()> {
    check("llama/gqa3_tied")
}

#[test]
fn biases_as_configured() -> Result<()> {
    check("llama/gqa4_biases")
}

#[test]
fn sharded_weights_and_eight_query_heads_a_kv_head() -> Result<()> {
    check("llama/gqa8_sharded")
}

#[test]
fn qwen3_norms_each_query_and_key_head() -> Result<()> {
    check("families/qwen3")
}

#[test]
fn qwen3_with_biases_tied_and_sharded() -> Result<()> {
    check("families/qwen3_tied_sharded")
}

#[test]
fn olmo2_norms_what_a_branch_adds_and_all_heads_together() -> Result<()> {
    check("families/olmo2")
}

#[test]
fn olmo2_with_grouped_queries_and_yarn() -> Result<()> {
    check("families/olmo2_gqa_yarn_sharded")
}

#[test]
fn the_families_come_from_gguf_files_too() -> Result<()> {
    for name in ["qwen3", "olmo2"] {
        let wanted = tensors(&format!("families/{name}/expected.safetensors"))?;
        let source = open(&golden(&format!("gguf/{name}.gguf")))?;
        let lm = Decoder::load(&Weights::new(source, Kind::Float, Device::Cpu)?)?;
        let mut dense = Dense::new(lm.config().layers, WINDOW);
        let found = logits(&lm, get(&wanted, "ids")?, &mut dense, &Hooks::default())?;
        assert_close(&found, get(&wanted, "logits")?, BOUND, name);
    }
    Ok(())
}

#[test]
fn bf16_is_near_f32_on_both_caches() -> Result<()> {
    for model in ["llama/gqa2_llama31", "families/qwen3", "families/olmo2"] {
        let wanted = tensors(&format!("{model}/expected.safetensors"))?;
        let (ids, next) = (get(&wanted, "ids")?, get(&wanted, "decode_ids")?);
        let lm = load(model, Kind::BFloat16)?;
        let mut dense = Dense::new(lm.config().layers, WINDOW);
        let mut paged = paged(&lm, 64, Kind::BFloat16)?;
        let caches: [(&str, &mut dyn KvCache); 2] = [("dense", &mut dense), ("paged", &mut paged)];
        for (name, cache) in caches {
            let (prompt, steps) = run(&lm, ids, next, cache)?;
            let what = format!("{model}, {name}");
            assert_close(&prompt, get(&wanted, "logits")?, 0.06, &what);
            assert_close(&steps, get(&wanted, "decode_logits")?, 0.06, &what);
        }
    }
    Ok(())
}

/// The mask of a pass after others is anchored at its last token, not at its first (libtorch's `is_causal`).
#[test]
fn a_pass_of_several_tokens_equals_passes_of_one() -> Result<()> {
    let lm = load("llama/gqa3_tied", Kind::Float)?;
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
