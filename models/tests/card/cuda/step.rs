//! The decode step and the cache.

use crate::common::golden;
use crate::{ids, learned, load, pruning, random_surrogate, wide, wide_with};
use anyhow::Result;
use kvzap::TorchSurrogate;
use models::{
    CardCache, CausalLm, Config, Cpu, Decoder, Dense, Gates, Hooks, KvCache, Paged, Place, Random,
    Sampler, Sampling, Source, Step, Token, cache_shape, cuda, open, resident,
};
use paged_kernels::{Mode, PagedAttention, Resident, Seats, Sequence};
use serde_json::json;
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// What bf16 costs a tiny model: the distance of its scores from those in f32, over their length. Single tokens go up to four
/// times as far, on libtorch's CPU too.
pub const BF16: f64 = 0.05;

pub fn distance(found: &Tensor, wanted: &Tensor) -> f64 {
    ((found - wanted).norm() / wanted.norm()).double_value(&[])
}

fn assert_near(found: &Tensor, wanted: &Tensor, bound: f64, what: &str) {
    let distance = distance(found, wanted);
    assert!(distance <= bound, "{what}: {distance:.1e} apart, allowed {bound:.0e}");
}

fn cache(
    config: &Config,
    device: Device,
    texts: usize,
    pass: usize,
    mode: Mode,
) -> Result<Resident> {
    let shape = cache_shape(config, 1024 * texts, 128, Kind::BFloat16)?;
    Ok(resident(device, shape, Seats { texts, tokens: 1024, pass, mode })?)
}

fn input(ids: &[u32], device: Device) -> Tensor {
    let ids = ids.iter().map(|&id| i64::from(id)).collect::<Vec<_>>();
    Tensor::from_slice(&ids).to_device(device).unsqueeze(0)
}

/// The scores after the last of `ids`, f32 `[vocabulary]` on the CPU.
pub fn read(lm: &Decoder, ids: &[u32], cache: &mut dyn KvCache, hooks: &Hooks) -> Result<Tensor> {
    let device = lm.output_projection(0).device();
    let hidden = lm.forward(&input(ids, device), cache, hooks)?;
    Ok(lm.logits(&hidden.select(1, -1))?.squeeze().to_device(Device::Cpu))
}

pub fn place(sequence: Sequence, token: u32, position: usize) -> Place {
    Place { sequence, token: Token::Known(token), position, sampling: Sampling::default() }
}

pub fn best(scores: &Tensor) -> u32 {
    scores.argmax(-1, false).int64_value(&[]) as u32
}

type Opened = Box<dyn Fn() -> Result<Source>>;

fn sources(folder: &Path) -> Result<Vec<(&'static str, Opened)>> {
    let file = |path: &'static str| -> Opened { Box::new(move || Ok(open(&golden(path))?)) };
    let random = |name: &str, changes| -> Result<Opened> {
        let folder = folder.join(name);
        std::fs::create_dir(&folder)?;
        wide_with(&folder, changes)?;
        Ok(Box::new(move || Ok(Source::Random(Random::open(&folder, 3)?))))
    };
    let nope = json!({"pe_config": {"dynamic_pe_mode": "nope", "dynamic_pe_layer_ids": "1"}});
    let yarn = json!({"rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
    }});
    let with_maps = |name: &str, beside| -> Result<Opened> {
        let folder = folder.join(name);
        std::fs::create_dir(&folder)?;
        learned(&folder, beside)?;
        Ok(Box::new(move || Ok(open(&folder)?)))
    };
    Ok(vec![
        ("llama", file("kvzap/model")),
        ("qwen3", file("families/qwen3")),
        ("qwen3, tied", file("families/qwen3_tied_sharded")),
        ("olmo2", file("families/olmo2")),
        ("olmo2, yarn", file("families/olmo2_gqa_yarn_sharded")),
        ("wide", random("wide", json!({}))?),
        ("wide, nope", random("nope", nope)?),
        ("wide, yarn", random("yarn", yarn)?),
        ("wide olmo2, repo", with_maps("maps", None)?),
        ("wide olmo2, offset", with_maps("offset", Some(("dynamic_pe_offset_tokens", 2)))?),
        ("wide olmo2, slowed", with_maps("slowed", Some(("dynamic_pe_slowed_index", 32)))?),
    ])
}

#[test]
#[ignore = "needs a CUDA device"]
fn steps_give_the_scores_of_the_cpu() -> Result<()> {
    let (folder, device) = (tempfile::tempdir()?, cuda()?);
    for (name, source) in sources(folder.path())? {
        let cpu = load(source()?, Kind::Float, Device::Cpu)?;
        let card = load(source()?, Kind::BFloat16, device)?;
        let config = cpu.config().clone();
        let mut resident = cache(&config, device, 3, 1, Mode::Fast)?;
        let mut step = Step::new(&card, None, &resident, config.vocab_size)?;
        let mut texts = Vec::new();
        for (i, length) in [40, 1, 150].into_iter().enumerate() {
            let ids = ids(length, config.vocab_size, i);
            let mut dense = Dense::new(config.layers, 128);
            let wanted = read(&cpu, &ids, &mut dense, &Hooks::default())?;
            let mut on_card = CardCache::new(&mut resident)?;
            let found = read(&card, &ids, &mut on_card, &Hooks::default())?;
            assert_near(&found, &wanted, BF16, &format!("{name}, prefill of {length}"));
            texts.push((on_card.sequence(), length, best(&found), dense));
        }
        let places = texts
            .iter()
            .map(|&(sequence, position, token, _)| Some(place(sequence, token, position)));
        step.batch(&mut resident, &places.collect::<Vec<_>>())?;
        let mut worst: f64 = 0.0;
        for round in 0..24 {
            let number = step.run(&resident, &[])?;
            let scores = step.scores()?;
            let tokens = step.drawn(number, true)?.expect("waited for").tokens;
            for (i, (_, _, token, dense)) in texts.iter_mut().enumerate() {
                let wanted = read(&cpu, &[*token], dense, &Hooks::default())?;
                let found = scores.get(i as i64);
                assert_near(
                    &found,
                    &wanted,
                    4.0 * BF16,
                    &format!("{name}, text {i}, step {round}"),
                );
                worst = worst.max(distance(&found, &wanted));
                assert_eq!(tokens[i], Some(best(&found)), "{name}, text {i}, step {round}");
                *token = best(&found);
            }
        }
        assert_eq!(resident.missing()?, 0);
        println!("{name}: scores differ by {worst:.1e} at most");
    }
    Ok(())
}

#[test]
#[ignore = "needs a CUDA device"]
fn a_prompt_is_turned_as_libtorch_turns_it() -> Result<()> {
    let (folder, device) = (tempfile::tempdir()?, cuda()?);
    for (name, source) in sources(folder.path())? {
        let card = load(source()?, Kind::BFloat16, device)?;
        let (config, ids) = (card.config(), ids(300, card.config().vocab_size, 5));
        let by = |hooks: &Hooks| -> Result<Tensor> {
            read(&card, &ids, &mut Dense::new(config.layers, 128), hooks)
        };
        // Who looks at positions gets them from libtorch.
        let seen = Hooks { on_positions: Some(Box::new(|_, _| {})), ..Hooks::default() };
        let (found, wanted) = (by(&Hooks::default())?, by(&seen)?);
        assert_near(&found, &wanted, 0.5 * BF16, name);
        assert_ne!(found, wanted, "{name}: the two round differently, or the kernel did not run");
    }
    Ok(())
}

#[test]
#[ignore = "needs a CUDA device"]
fn steps_keep_what_the_cpu_keeps() -> Result<()> {
    let (folder, device) = (tempfile::tempdir()?, cuda()?);
    for (name, source) in sources(folder.path())? {
        let cpu = load(source()?, Kind::Float, Device::Cpu)?;
        let card = load(source()?, Kind::BFloat16, device)?;
        let config = cpu.config().clone();
        let all = [(24, f32::NEG_INFINITY), (24, 0.0), (24, f32::INFINITY), (0, 0.0)];
        for (units, threshold) in all {
            let surrogate = random_surrogate(&config, units)?;
            let on_torch = TorchSurrogate::new(&surrogate, Kind::BFloat16, device)?;
            let mut resident = cache(&config, device, 2, 64, Mode::Fast)?;
            let gates = Gates::new(&on_torch, vec![threshold; config.layers]);
            let mut step = Step::new(&card, Some(&gates), &resident, config.vocab_size)?;
            let ids = ids(200, config.vocab_size, 1);
            let shape = cache_shape(&config, 1024, 128, Kind::Float)?;
            let mut paged = Paged::new(Cpu::new(shape)?)?;
            let hooks = pruning(&surrogate, threshold, Kind::Float, Device::Cpu)?;
            let on_card = pruning(&surrogate, threshold, Kind::BFloat16, device)?;
            let mut eager = CardCache::new(cache(&config, device, 1, 64, Mode::Fast)?)?;
            let wanted = read(&cpu, &ids, &mut paged, &hooks)?;
            let _ = read(&card, &ids, &mut eager, &on_card)?;
            let mut text = CardCache::new(&mut resident)?;
            let found = read(&card, &ids, &mut text, &on_card)?;
            assert_near(&found, &wanted, BF16, &format!("{name}, {threshold}, prefill"));
            let (sequence, mut token) = (text.sequence(), best(&found));
            step.batch(&mut resident, &[Some(place(sequence, token, ids.len()))])?;
            let (mut ours, mut theirs): (f64, f64) = (0.0, 0.0);
            for _ in 0..150 {
                step.run(&resident, &[])?;
                let eager_scores = read(&card, &[token], &mut eager, &on_card)?;
                let wanted = read(&cpu, &[token], &mut paged, &hooks)?;
                let found = step.scores()?.get(0);
                ours += distance(&found, &wanted) / 150.0;
                theirs += distance(&eager_scores, &wanted) / 150.0;
                token = best(&found);
            }
            // A score that bf16 moves over the threshold moves a row: few may.
            let lengths = resident.lengths(sequence)?;
            let wanted = paged.backend().lengths(paged.sequence())?;
            let rows: usize = wanted.iter().sum();
            let apart: usize =
                lengths.iter().zip(&wanted).map(|(found, wanted)| found.abs_diff(*wanted)).sum();
            println!(
                "{name}, {threshold}: {apart} of {rows} rows differ; scores {ours:.1e} from \
                 f32 in the mean, libtorch's {theirs:.1e}"
            );
            // Where bf16 moves a score over the threshold, another row stays, and scores part.
            let allowed = if threshold == 0.0 { 3.0 } else { 1.5 };
            assert!(ours < allowed * theirs + 0.005, "{name}, {threshold}: {ours}, {theirs}");
            let most = if threshold == 0.0 { rows / 50 } else { 0 };
            assert!(apart <= most, "{name}, {threshold}: {lengths:?}, expected {wanted:?}");
            assert_eq!(resident.missing()?, 0);
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs a CUDA device"]
fn a_text_gets_the_same_bits_whatever_its_neighbours() -> Result<()> {
    let (folder, device) = (tempfile::tempdir()?, cuda()?);
    wide(folder.path())?;
    let card = load(Source::Random(Random::open(folder.path(), 3)?), Kind::BFloat16, device)?;
    let config = card.config().clone();
    let surrogate = random_surrogate(&config, 24)?;
    let gates = TorchSurrogate::new(&surrogate, Kind::BFloat16, device)?;
    let gates = Gates::new(&gates, vec![0.0; config.layers]);
    let hooks = pruning(&surrogate, 0.0, Kind::BFloat16, device)?;
    let mut alone: Option<Tensor> = None;
    // With how many others, and where among them.
    for (others, place) in [(0, 0), (1, 1), (6, 3), (12, 12), (30, 17), (63, 40)] {
        let mut resident = cache(&config, device, others + 1, 1, Mode::BatchInvariant)?;
        let mut step = Step::new(&card, Some(&gates), &resident, config.vocab_size)?;
        let mut places = Vec::new();
        for i in 0..=others {
            let ids = if i == place {
                ids(333, config.vocab_size, 9)
            } else {
                ids(1 + i * 37 % 400, config.vocab_size, i)
            };
            let mut text = CardCache::new(&mut resident)?;
            let token = best(&read(&card, &ids, &mut text, &hooks)?);
            let sequence = text.sequence();
            places.push(Some(self::place(sequence, token, ids.len())));
        }
        step.batch(&mut resident, &places)?;
        let mut all = Vec::new();
        for _ in 0..40 {
            step.run(&resident, &[])?;
            all.push(step.scores()?.get(place as i64));
        }
        let scores = Tensor::stack(&all, 0);
        match &alone {
            None => alone = Some(scores),
            Some(alone) => assert_eq!(alone, &scores, "with {others} others"),
        }
    }
    Ok(())
}

/// Random numbers as a [`Sampler`] draws them, and what it makes of `scores` with each.
#[test]
#[ignore = "needs a CUDA device"]
fn tokens_are_drawn_as_on_the_cpu() -> Result<()> {
    use rand::{Rng, SeedableRng};
    let (folder, device) = (tempfile::tempdir()?, cuda()?);
    wide(folder.path())?;
    let card = load(Source::Random(Random::open(folder.path(), 3)?), Kind::BFloat16, device)?;
    let config = card.config().clone();
    let settings =
        [(0.0, 0, 1.0), (1.0, 0, 1.0), (0.7, 5, 1.0), (1.5, 0, 0.5), (1.2, 40, 0.9), (1.5, 1, 1.0)];
    let mut resident = cache(&config, device, settings.len(), 1, Mode::Fast)?;
    let mut step = Step::new(&card, None, &resident, 490)?;
    let (mut places, mut samplers, mut chances) = (Vec::new(), Vec::new(), Vec::new());
    for (i, (temperature, top_k, top_p)) in settings.into_iter().enumerate() {
        let mut text = CardCache::new(&mut resident)?;
        let ids = ids(20 + i, config.vocab_size, i);
        let token = best(&read(&card, &ids, &mut text, &Hooks::default())?);
        let sampling = Sampling { temperature, top_k, top_p, seed: i as u64 };
        samplers.push(Sampler::new(sampling.clone())?);
        chances.push(rand_chacha::ChaCha8Rng::seed_from_u64(i as u64));
        places.push(Some(Place { sampling, ..place(text.sequence(), token, ids.len()) }));
    }
    step.batch(&mut resident, &places)?;
    let mut others = 0;
    for _ in 0..100 {
        let randoms = chances.iter_mut().map(|chance| chance.random::<f64>()).collect::<Vec<_>>();
        let number = step.run(&resident, &randoms)?;
        let (scores, drawn) = (step.scores()?, step.drawn(number, true)?.expect("waited for"));
        for (i, sampler) in samplers.iter_mut().enumerate() {
            let scores = Vec::<f32>::try_from(&scores.get(i as i64))?;
            let wanted = sampler.sample(&scores[..490])?;
            others += usize::from(drawn.tokens[i] != Some(wanted));
        }
    }
    // A random number at the very edge of a token's share may fall on either side.
    assert!(others <= 1, "{others} of 600 tokens differ");
    Ok(())
}

#[test]
#[ignore = "needs a CUDA device"]
fn a_batch_that_changes_carries_its_tokens_on() -> Result<()> {
    let (folder, device) = (tempfile::tempdir()?, cuda()?);
    wide(folder.path())?;
    let card = load(Source::Random(Random::open(folder.path(), 3)?), Kind::BFloat16, device)?;
    let config = card.config().clone();
    let start = |resident: &mut Resident, i: usize| -> Result<Place> {
        let ids = ids(30 + 9 * i, config.vocab_size, i);
        let mut text = CardCache::new(resident)?;
        let token = best(&read(&card, &ids, &mut text, &Hooks::default())?);
        Ok(place(text.sequence(), token, ids.len()))
    };
    // Alone, eight steps each.
    let mut alone = Vec::new();
    for i in 0..3 {
        let mut resident = cache(&config, device, 4, 1, Mode::BatchInvariant)?;
        let mut step = Step::new(&card, None, &resident, config.vocab_size)?;
        let text = start(&mut resident, i)?;
        step.batch(&mut resident, &[Some(text)])?;
        let mut tokens = Vec::new();
        for _ in 0..8 {
            let number = step.run(&resident, &[])?;
            tokens.push(step.drawn(number, true)?.expect("waited for").tokens[0]);
        }
        alone.push(tokens);
    }
    // 0 and 1 together, then 2, 1 and 0, whose tokens the host has not seen.
    let mut resident = cache(&config, device, 4, 1, Mode::BatchInvariant)?;
    let mut step = Step::new(&card, None, &resident, config.vocab_size)?;
    let texts = (0..3).map(|i| start(&mut resident, i)).collect::<Result<Vec<_>>>()?;
    step.batch(&mut resident, &[Some(texts[0].clone()), Some(texts[1].clone())])?;
    let first = (0..4).map(|_| step.run(&resident, &[])).collect::<models::Result<Vec<_>>>()?;
    let mut found = vec![Vec::new(); 3];
    for number in first {
        let drawn = step.drawn(number, true)?.expect("waited for").tokens;
        (0..2).for_each(|i| found[i].push(drawn[i]));
    }
    let on = |i: usize| Place {
        token: Token::Of(i),
        position: texts[i].position + 4,
        ..texts[i].clone()
    };
    step.batch(&mut resident, &[Some(texts[2].clone()), Some(on(1)), Some(on(0))])?;
    for _ in 0..4 {
        let number = step.run(&resident, &[])?;
        let drawn = step.drawn(number, true)?.expect("waited for").tokens;
        for (place, text) in [2, 1, 0].into_iter().enumerate() {
            found[text].push(drawn[place]);
        }
    }
    assert_eq!([&found[0], &found[1]], [&alone[0], &alone[1]]);
    assert_eq!(found[2], alone[2][..4]);
    Ok(())
}
