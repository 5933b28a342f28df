//! The two caches against each other, and what both must keep to, on the tiny model of tests/golden/kvzap.

mod common;

use anyhow::Result;
use common::{assert_close, difference, golden, logits};
use kvzap::{Random, StreamingLlm, Threshold};
use models::{
    CausalLm, Cpu, Decoder, Dense, Hooks, KvCache, Paged, Pruning, Usage, Weights, cache_shape,
    open,
};
use paged_kernels::{CacheShape, Dtype, Reference};
use repo_pos::Repositioner;
use tch::{Device, Kind, Tensor};

const WINDOW: usize = 32;

fn model() -> Result<Decoder> {
    let source = open(&golden("kvzap/model"))?;
    Ok(Decoder::load(&Weights::new(source, Kind::Float, Device::Cpu)?)?)
}

fn ids(tokens: i64) -> Tensor {
    (Tensor::arange(tokens, (Kind::Int64, Device::Cpu)) * 37 + 11).remainder(128)
}

/// About half of all tokens go, another half in every head.
fn half(while_decoding: bool) -> Result<Hooks> {
    let (scorer, policy) = (Box::new(Random::new(5)), Box::new(Threshold::new(0.5)?));
    Ok(Hooks::pruning(Pruning { scorer, policy, while_decoding }))
}

fn cpu(lm: &Decoder, tokens: usize) -> Result<Paged<Cpu>> {
    Ok(Paged::new(Cpu::new(cache_shape(lm.config(), tokens, WINDOW, Kind::Float)?)?)?)
}

fn reference(lm: &Decoder, tokens: usize) -> Result<Paged<Reference>> {
    Ok(Paged::new(Reference::new(cache_shape(lm.config(), tokens, WINDOW, Kind::Float)?)?)?)
}

/// Logits of passes of these lengths, one after another.
fn passes(lm: &Decoder, cache: &mut dyn KvCache, hooks: &Hooks, lengths: &[i64]) -> Result<Tensor> {
    let (ids, mut at, mut all) = (ids(lengths.iter().sum()), 0, Vec::new());
    for &length in lengths {
        all.push(logits(lm, &ids.narrow(0, at, length), cache, hooks)?);
        at += length;
    }
    Ok(Tensor::cat(&all, 0))
}

#[test]
fn paged_equals_dense_whatever_is_dropped() -> Result<()> {
    let lm = model()?;
    let plans: [&[i64]; 4] =
        [&[100, 1, 1, 1, 1, 1], &[100, 9, 1, 20, 1, 1, 40, 1], &[1, 1, 50, 1, 1], &[33, 1, 1]];
    for lengths in plans {
        for hooks in [Hooks::default(), half(false)?, half(true)?] {
            let total = lengths.iter().sum::<i64>() as usize;
            let mut dense = Dense::new(lm.config().layers, WINDOW);
            let (mut cpu, mut reference) = (cpu(&lm, total)?, reference(&lm, total)?);
            let wanted = passes(&lm, &mut dense, &hooks, lengths)?;
            let what = format!("{lengths:?}, {hooks:?}");
            assert_close(&passes(&lm, &mut cpu, &hooks, lengths)?, &wanted, 2e-5, &what);
            assert_close(&passes(&lm, &mut reference, &hooks, lengths)?, &wanted, 2e-5, &what);
        }
    }
    Ok(())
}

#[test]
fn a_pruned_prefill_holds_the_kept_pages_and_never_more() -> Result<()> {
    let lm = model()?;
    // All that may go goes: the window stays, in every layer and head.
    let (scorer, policy) = (Box::new(Random::new(1)), Box::new(Threshold::new(f32::INFINITY)?));
    let hooks = Hooks::pruning(Pruning { scorer, policy, while_decoding: false });
    let mut paged = cpu(&lm, 300)?;
    let _ = passes(&lm, &mut paged, &hooks, &[300])?;
    let heads = lm.config().layers * lm.config().kv_heads;
    let bytes = heads * WINDOW * 2 * lm.config().head_dim * 4; // the window is whole pages
    let wanted = Usage { bytes, peak_bytes: bytes, rows: heads * WINDOW, dense_rows: heads * 300 };
    assert_eq!(paged.usage(), wanted);
    assert!((paged.usage().removed() - (1.0 - WINDOW as f64 / 300.0)).abs() < 1e-12);
    Ok(())
}

#[test]
fn the_first_tokens_of_a_context_stay_where_they_are_protected() -> Result<()> {
    let lm = model()?;
    let (scorer, policy) = (Box::new(Random::new(1)), Box::new(Threshold::new(f32::INFINITY)?));
    let pruning = Pruning { scorer, policy, while_decoding: true };
    let hooks = Hooks { protect: 4, ..Hooks::pruning(pruning) };
    let heads = lm.config().layers * lm.config().kv_heads;
    let mut paged = cpu(&lm, 300)?;
    // Of later passes nothing is protected: they have no first tokens.
    let mut dense = Dense::new(lm.config().layers, WINDOW);
    let wanted = passes(&lm, &mut dense, &hooks, &[100, 7, 1, 150])?;
    assert_close(&passes(&lm, &mut paged, &hooks, &[100, 7, 1, 150])?, &wanted, 2e-5, "protected");
    let _ = passes(&lm, &mut paged, &hooks, &[1])?;
    assert_eq!(paged.usage().rows, heads * (4 + WINDOW + 1));
    let masked = dense.masked(0)?.expect("it was attended").to_kind(tch::Kind::Int64);
    assert_eq!(masked.narrow(2, 0, 4).sum(tch::Kind::Int64).int64_value(&[]), 0);
    Ok(())
}

#[test]
fn eight_bits_a_number_change_little_and_hold_a_quarter() -> Result<()> {
    let lm = model()?;
    let mut wide = cpu(&lm, 300)?;
    let shape = cache_shape(lm.config(), 300, WINDOW, Kind::Float)?;
    let mut narrow = Paged::new(Cpu::new(CacheShape { dtype: Dtype::F8, ..shape })?)?;
    let hooks = Hooks::default();
    let wanted = passes(&lm, &mut wide, &hooks, &[200, 1, 9, 1])?;
    let found = passes(&lm, &mut narrow, &hooks, &[200, 1, 9, 1])?;
    assert_close(&found, &wanted, 0.2, "fp8"); // random weights make much of little
    assert!(difference(&found, &wanted) > 1e-6, "it is rounded");
    let dim = lm.config().head_dim;
    assert_eq!(wide.usage().bytes * (dim + 4), narrow.usage().bytes * 4 * dim); // a scale a row
    Ok(())
}

#[test]
fn decoding_with_pruning_stops_growing() -> Result<()> {
    let lm = model()?;
    let (scorer, policy) = (Box::new(Random::new(1)), Box::new(Threshold::new(f32::INFINITY)?));
    let hooks = Hooks::pruning(Pruning { scorer, policy, while_decoding: true });
    let mut paged = cpu(&lm, 200)?;
    let _ = passes(&lm, &mut paged, &hooks, &[50])?;
    let _ = passes(&lm, &mut paged, &hooks, &[1])?;
    let after_one = paged.usage().rows;
    let _ = passes(&lm, &mut paged, &hooks, &[1; 100])?;
    assert_eq!(paged.usage().rows, after_one);
    assert_eq!(after_one, lm.config().layers * lm.config().kv_heads * (WINDOW + 1));
    Ok(())
}

/// A cache that takes its rows for its tokens, the fault of pruning caches elsewhere.
struct Forgetful(Dense, usize);

impl KvCache for Forgetful {
    fn tokens(&self) -> usize {
        self.1
    }
    fn window(&self) -> usize {
        self.0.window()
    }
    fn begin(&mut self, tokens: usize) -> models::Result<()> {
        self.0.begin(tokens)
    }
    fn attend(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        drops: Option<&Tensor>,
    ) -> models::Result<Tensor> {
        self.0.attend(layer, q, k, v, drops)
    }
    fn usage(&self) -> Usage {
        self.0.usage()
    }
    fn mark(&mut self) -> models::Result<()> {
        self.0.mark()
    }
    fn rewind(&mut self) -> models::Result<()> {
        self.0.rewind()
    }
}

#[test]
fn questions_after_a_rewind_are_those_after_a_first_reading() -> Result<()> {
    let lm = model()?;
    let question = |seed: i64| (ids(20) + seed).remainder(128);
    // A question of several tokens and two more, after the text or after what another question has left.
    let ask = |cache: &mut dyn KvCache, hooks: &Hooks, seed: i64| -> Result<Tensor> {
        let first = logits(&lm, &question(seed).narrow(0, 0, 18), cache, hooks)?;
        let second = logits(&lm, &question(seed).narrow(0, 18, 1), cache, hooks)?;
        let third = logits(&lm, &question(seed).narrow(0, 19, 1), cache, hooks)?;
        Ok(Tensor::cat(&[first, second, third], 0))
    };
    for hooks in [half(false)?, half(true)?] {
        let (mut dense, mut paged) = (Dense::new(lm.config().layers, WINDOW), cpu(&lm, 400)?);
        for cache in [&mut dense as &mut dyn KvCache, &mut paged] {
            assert!(matches!(cache.rewind(), Err(models::Error::NoMark)));
            let _ = logits(&lm, &ids(100), cache, &hooks)?;
            cache.mark()?;
            let marked = cache.usage();
            for seed in [1, 2, 1] {
                let found = ask(cache, &hooks, seed)?;
                let mut fresh = Dense::new(lm.config().layers, WINDOW);
                let _ = logits(&lm, &ids(100), &mut fresh, &hooks)?;
                assert_close(&found, &ask(&mut fresh, &hooks, seed)?, 2e-5, "a question");
                cache.rewind()?;
                assert_eq!((cache.tokens(), cache.usage().rows), (100, marked.rows));
                assert_eq!(cache.usage().bytes, marked.bytes, "no page is left behind");
            }
        }
    }
    Ok(())
}

#[test]
fn a_position_is_the_index_in_the_text_not_the_place_in_the_cache() -> Result<()> {
    let (lm, hooks) = (model()?, half(false)?);
    let question = ids(320).narrow(0, 300, 20);
    let after = |tokens: usize| -> Result<Tensor> {
        let mut cache = Forgetful(Dense::new(lm.config().layers, WINDOW), 0);
        let _ = logits(&lm, &ids(300), &mut cache, &hooks)?;
        cache.1 = tokens;
        logits(&lm, &question, &mut cache, &hooks)
    };
    let mut paged = cpu(&lm, 320)?;
    let _ = logits(&lm, &ids(300), &mut paged, &hooks)?;
    let found = logits(&lm, &question, &mut paged, &hooks)?;
    assert_close(&found, &after(300)?, 2e-5, "position 300");
    assert!(
        difference(&found, &after(120)?) > 0.05,
        "the model is blind to positions: the test proves nothing"
    );
    Ok(())
}

/// Positions that stretch the index, another stretch in each kv head; layer 0 keeps the index.
struct Stretch(Vec<f64>);

impl Repositioner<Tensor> for Stretch {
    fn positions(&self, layer: usize, hidden: &Tensor) -> repo_pos::Result<Option<Tensor>> {
        if layer == 0 {
            return Ok(None);
        }
        let index = Tensor::arange(hidden.size()[1], (Kind::Float, Device::Cpu));
        let heads: Vec<Tensor> = self.0.iter().map(|factor| &index * *factor).collect();
        Ok(Some(Tensor::stack(&heads, 0).unsqueeze(0)))
    }
}

#[test]
fn positions_of_a_hook_replace_the_index_and_the_index_changes_nothing() -> Result<()> {
    let lm = model()?;
    let with = |factors: Vec<f64>| -> Result<Tensor> {
        let hooks = Hooks { repositioner: Some(Box::new(Stretch(factors))), ..Hooks::default() };
        logits(&lm, &ids(60), &mut Dense::new(lm.config().layers, WINDOW), &hooks)
    };
    let plain =
        logits(&lm, &ids(60), &mut Dense::new(lm.config().layers, WINDOW), &Hooks::default())?;
    assert_close(&with(vec![1.0])?, &plain, 1e-6, "one position for all heads");
    assert_close(&with(vec![1.0, 1.0])?, &plain, 1e-6, "one position a kv head");
    assert!(difference(&with(vec![1.0, 0.25])?, &plain) > 0.01);
    assert!(with(vec![1.0; 3]).is_err(), "three positions for two kv heads");
    Ok(())
}

#[test]
fn recency_keeps_the_sinks() -> Result<()> {
    let lm = model()?;
    let budget = kvzap::Budget::new(0.5, WINDOW, kvzap::Scope::Head)?;
    let scorer = Box::new(StreamingLlm::new(4));
    let hooks = Hooks::pruning(Pruning { scorer, policy: Box::new(budget), while_decoding: false });
    let mut dense = Dense::new(lm.config().layers, WINDOW);
    let _ = logits(&lm, &ids(100), &mut dense, &hooks)?;
    for layer in 0..lm.config().layers {
        let masked = dense.masked(layer)?.expect("rows").squeeze_dim(0);
        for head in 0..lm.config().kv_heads as i64 {
            let masked = Vec::<bool>::try_from(&masked.get(head))?;
            let wanted: Vec<bool> = (0..100).map(|i| (4..54).contains(&i)).collect();
            assert_eq!(masked, wanted);
        }
    }
    Ok(())
}

/// SmolLM2-135M's cache: 30 layers, 9 query heads that share 3 kv heads, head dim 64, f32.
#[test]
fn the_pool_holds_a_row_a_kv_head_and_only_the_window_where_all_else_goes() -> Result<()> {
    let shape = CacheShape {
        layers: 30,
        kv_heads: 3,
        query_heads: 9,
        head_dim: 64,
        page_size: 16,
        window: 128,
        pages: 30 * 3 * 300_usize.div_ceil(16),
        dtype: Dtype::F32,
    };
    for (tokens, removed) in [(128, 0.0), (300, 1.0 - 128.0 / 300.0)] {
        let mut cache = Paged::new(Cpu::new(shape.clone())?)?;
        let zeros = |heads| Tensor::zeros([1, heads, tokens, 64], (Kind::Float, Device::Cpu));
        let (queries, rows) = (zeros(9), zeros(3));
        let all = Tensor::ones([1, 3, tokens], (Kind::Bool, Device::Cpu));
        cache.begin(tokens as usize)?;
        for layer in 0..30 {
            let _ = cache.attend(layer, &queries, &rows, &rows, Some(&all))?;
        }
        let usage = cache.usage();
        assert_eq!(usage.bytes, 5_898_240, "{tokens} tokens: 128 rows in each of 90 heads");
        assert!((usage.removed() - removed).abs() < 1e-9, "{}", usage.removed());
    }
    Ok(())
}
