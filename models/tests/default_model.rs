//! The default model against transformers: tests/golden/default_model/make.py made the numbers.

mod common;

use anyhow::Result;
use common::golden;
use kvzap::{Budget, Rules, Scope, StreamingLlm};
use models::{
    Cpu, Dense, Hooks, KvCache, Model, Paged, Pruning, Session, Specials, WINDOW, cache_shape,
    kvzip,
};
use serde_json::Value;
use std::path::PathBuf;
use tch::{Device, Kind, Tensor};

fn load() -> Result<Model> {
    let path = std::env::var_os("LONGCTX_MODEL").map(PathBuf::from).unwrap_or_else(|| {
        let home = std::env::var_os("HOME").map(PathBuf::from).unwrap_or_default();
        home.join(".cache/longctx/models/SmolLM2-135M-Instruct.Q4_1.gguf")
    });
    Ok(Model::load(&path, Kind::Float, Device::Cpu)?)
}

fn wanted() -> Result<Value> {
    Ok(serde_json::from_slice(&std::fs::read(golden("default_model/golden.json"))?)?)
}

fn ids(json: &Value) -> Vec<u32> {
    json.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// The five highest logits: the same ids, and values that differ by at most 1e-4 of the largest.
fn assert_top(logits: &[f32], wanted: &Value, what: &str) {
    let values = wanted["logits"].as_array().unwrap();
    let scale = values[0].as_f64().unwrap().abs();
    for (id, value) in ids(&wanted["ids"]).into_iter().zip(values) {
        let difference = (f64::from(logits[id as usize]) - value.as_f64().unwrap()).abs() / scale;
        assert!(difference <= 1e-4, "{what}: token {id} is off by {difference:.1e}");
    }
}

/// The greedy continuation of the short text.
fn check(model: &Model, cache: impl KvCache) -> Result<()> {
    let short = &wanted()?["short"];
    let mut session = Session::new(model.lm.as_ref(), Device::Cpu, cache, Hooks::default());
    session.feed(&ids(&short["ids"]))?;
    assert_top(session.logits().unwrap(), &short["first"], "first");
    for (step, next) in ids(&short["next"]).into_iter().enumerate() {
        let logits = session.logits().unwrap();
        let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
        assert_eq!(best as u32, next, "choice {step}");
        if step == 63 {
            assert_top(logits, &short["last"], "last");
        } else {
            session.feed(&[next])?;
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs the default model: cargo xtask fetch"]
fn the_first_64_choices_are_those_of_transformers_on_both_caches() -> Result<()> {
    let model = load()?;
    let shape = cache_shape(model.lm.config(), 300, WINDOW, Kind::Float)?;
    check(&model, Dense::new(model.lm.config().layers, WINDOW))?;
    check(&model, Paged::new(Cpu::new(shape)?)?)
}

#[test]
#[ignore = "needs the default model: cargo xtask fetch"]
fn a_thousand_tokens_end_in_the_logits_of_transformers() -> Result<()> {
    let (model, wanted) = (load()?, wanted()?);
    let lm = model.lm.as_ref();
    let cache = Dense::new(lm.config().layers, WINDOW);
    let mut session = Session::new(lm, Device::Cpu, cache, Hooks::default());
    session.feed(&ids(&wanted["long"]["ids"]))?;
    assert_top(session.logits().unwrap(), &wanted["long"]["top"], "end");
    Ok(())
}

/// The mean negative log-likelihood of ids 700 to 900 after the others, half of whose cache is gone by recency.
fn surprise(model: &Model, ids: &[i64], sinks: Option<usize>) -> Result<f64> {
    let lm = model.lm.as_ref();
    let hooks = match sinks {
        Some(sinks) => Hooks::pruning(Pruning {
            scorer: Box::new(StreamingLlm::new(sinks)),
            policy: Box::new(Budget::new(0.5, WINDOW, Scope::Head)?),
            while_decoding: false,
        }),
        None => Hooks::default(),
    };
    let mut cache = Dense::new(lm.config().layers, WINDOW);
    let input = |range: std::ops::Range<usize>| Tensor::from_slice(&ids[range]).unsqueeze(0);
    let _ = lm.forward(&input(0..700), &mut cache, &hooks)?;
    let removed = cache.usage().removed();
    assert!((removed - if sinks.is_some() { 0.5 } else { 0.0 }).abs() < 1e-3, "{removed}");
    let logits = lm.logits(&lm.forward(&input(700..899), &mut cache, &hooks)?)?;
    let loss = logits.squeeze_dim(0).cross_entropy_for_logits(&Tensor::from_slice(&ids[701..900]));
    Ok(loss.double_value(&[]))
}

/// A tiny random model has no use for its first tokens, so only a real one shows what losing them does.
#[test]
#[ignore = "needs the default model: cargo xtask fetch"]
fn recency_loses_several_times_as_much_without_the_first_four_tokens() -> Result<()> {
    let (model, wanted) = (load()?, wanted()?);
    let ids: Vec<i64> = ids(&wanted["long"]["ids"]).into_iter().map(i64::from).collect();
    let [full, with, without] =
        [None, Some(4), Some(0)].map(|sinks| surprise(&model, &ids, sinks).unwrap());
    println!("full {full:.3}, recency with sinks {with:.3}, without {without:.3}");
    // Measured: 0.630, 0.651 and 0.761.
    assert!(with - full < 0.1, "{full:.3} {with:.3}");
    assert!(without - full > 3.0 * (with - full), "{full:.3} {with:.3} {without:.3}");
    Ok(())
}

#[test]
#[ignore = "needs the default model: cargo xtask fetch"]
fn the_oracle_scores_a_context_by_the_models_own_template() -> Result<()> {
    let (model, wanted) = (load()?, wanted()?);
    let (before, _) = model.template.as_ref().unwrap().around("")?;
    let prefix = model.tokenizer.encode(&before, Specials::Parse)?;
    let text = ids(&wanted["short"]["ids"]);
    let context = [&prefix[..], &text].concat();
    for plus in [false, true] {
        let rules = Rules { chunk: 100, ..Rules::default() };
        let mut passes = Vec::new();
        let scores = kvzip(&model, &context, prefix.len(), plus, rules, &mut |done, all| {
            passes.push((done, all));
        })?;
        assert_eq!(passes, [(0, 3), (1, 3), (2, 3), (3, 3)]);
        let config = model.lm.config();
        assert_eq!(scores.len(), config.layers);
        let scores = Tensor::cat(&scores, 0);
        let (kept, tokens) = (prefix.len() as i64, context.len() as i64);
        assert_eq!(scores.size(), [config.layers as i64, config.kv_heads as i64, tokens]);
        assert_eq!(scores.narrow(2, 0, kept).isinf().all().int64_value(&[]), 1);
        let body = scores.narrow(2, kept, tokens - kept);
        let (least, most) = (body.min().double_value(&[]), body.max().double_value(&[]));
        println!("plus {plus}: {least:.1e} to {most:.3}");
        assert!(least >= 0.0 && most.is_finite() && (plus || most <= 1.0), "{least} {most}");
        // Most of what a repetition reads stands in the original, so its heads that copy see it whole.
        assert!(plus || most > 0.9, "{most}");
    }
    Ok(())
}
