//! A model over two cards.

use super::engine::{requests, same_together};
use super::step::{BF16, best, distance, place, read};
use crate::{ids, load, pruning, random_surrogate};
use anyhow::Result;
use kvzap::TorchSurrogate;
use models::ranks::{Rank, Ranks, on_each};
use models::{
    CardCache, CardExecutor, CardRoom, CausalLm, Decoder, Dense, Error, Gates, Hooks, Random,
    Source, Step, Weights, cache_shape, cuda, resident_for,
};
use paged_kernels::{Mode, Seats};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tch::{Device, Kind, Tensor};

/// A model of each architecture that a step takes, whose parts the kernels take.
fn make(folder: &Path, architecture: &str) -> Result<()> {
    let config = serde_json::json!({
        "architectures": [architecture], "hidden_size": 256, "intermediate_size": 336,
        "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128,
        "vocab_size": 500, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "tie_word_embeddings": false, "attention_bias": false,
    });
    Ok(std::fs::write(folder.join("config.json"), config.to_string())?)
}

/// Held while cards work together: the sums of two models over the same cards may wait for each other for ever.
fn together() -> MutexGuard<'static, ()> {
    static CARDS: Mutex<()> = Mutex::new(());
    CARDS.lock().unwrap_or_else(PoisonError::into_inner)
}

const ARCHITECTURES: [&str; 2] = ["LlamaForCausalLM", "Qwen3ForCausalLM"];
const STEPS: usize = 24;
const LENGTHS: [usize; 3] = [40, 1, 150];

fn source(folder: &Path) -> Result<Source> {
    Ok(Source::Random(Random::open(folder, 3)?))
}

/// Scores after each of three texts and after each step of the three together, all given the same tokens, f32
/// `[1 + steps, texts, vocabulary]`, and what was drawn last.
fn scores(card: &Decoder, tokens: &[Vec<u32>]) -> Result<(Tensor, Vec<Option<u32>>)> {
    let config = card.config();
    let shape = cache_shape(config, 1024 * 3, 128, Kind::BFloat16)?;
    let seats = Seats { texts: 3, tokens: 1024, pass: 1, mode: Mode::Fast };
    let mut resident = resident_for(card, shape, seats)?;
    let mut step = Step::new(card, None, &resident, config.vocab_size)?;
    let (mut all, mut texts) = (Vec::new(), Vec::new());
    for (i, length) in LENGTHS.into_iter().enumerate() {
        let mut text = CardCache::new(&mut resident)?;
        let ids = ids(length, config.vocab_size, i);
        all.push(read(card, &ids, &mut text, &Hooks::default())?);
        texts.push(text.sequence());
    }
    let (mut all, mut drawn) = (vec![Tensor::stack(&all, 0)], Vec::new());
    for (round, tokens) in tokens.iter().enumerate() {
        let places = texts.iter().enumerate();
        let places = places.map(|(i, &text)| Some(place(text, tokens[i], LENGTHS[i] + round)));
        step.batch(&mut resident, &places.collect::<Vec<_>>())?;
        let number = step.run(&resident, &[])?;
        all.push(step.scores()?.narrow(0, 0, 3));
        drawn = step.drawn(number, true)?.expect("waited for").tokens;
    }
    anyhow::ensure!(resident.missing()? == 0, "out of pages");
    Ok((Tensor::stack(&all, 0), drawn))
}

#[test]
#[ignore = "needs two CUDA devices"]
fn parts_on_cards_give_the_scores_of_the_cpu_and_the_tokens_of_one_card() -> Result<()> {
    let _alone = together();
    let (folder, device) = (tempfile::tempdir()?, cuda()?);
    let ranks = Rank::on_cards(2)?;
    for name in ARCHITECTURES {
        make(folder.path(), name)?;
        let cpu = load(source(folder.path())?, Kind::Float, Device::Cpu)?;
        let vocabulary = cpu.config().vocab_size;
        // What the CPU writes, and its scores.
        let mut dense = Vec::new();
        let mut wanted = Vec::new();
        for (i, length) in LENGTHS.into_iter().enumerate() {
            let mut cache = Dense::new(cpu.config().layers, 128);
            wanted.push(read(&cpu, &ids(length, vocabulary, i), &mut cache, &Hooks::default())?);
            dense.push(cache);
        }
        let (mut wanted, mut tokens) = (vec![wanted], Vec::new());
        for round in 0..STEPS {
            tokens.push(wanted[round].iter().map(best).collect::<Vec<_>>());
            let next = dense.iter_mut().zip(&tokens[round]);
            let next = next.map(|(cache, &token)| read(&cpu, &[token], cache, &Hooks::default()));
            wanted.push(next.collect::<Result<_>>()?);
        }
        let one = load(source(folder.path())?, Kind::BFloat16, device)?;
        let (one, _) = scores(&one, &tokens)?;
        let weights = Weights::new(source(folder.path())?, Kind::BFloat16, device)?;
        let weights = &weights;
        let parts = on_each(&ranks, |rank| scores(&Decoder::load_part(weights, rank)?, &tokens))?;
        let [(two, drawn), (other, theirs)] = &parts[..] else { unreachable!("two") };
        assert_eq!(two, other, "{name}: both ranks have the same bits");
        assert_eq!(drawn, theirs);
        let (mut worst, mut apart, mut near): (f64, f64, usize) = (0.0, 0.0, 0);
        for (round, wanted) in wanted.iter().enumerate() {
            for (i, wanted) in wanted.iter().enumerate() {
                let [one, two] = [&one, two].map(|all| all.get(round as i64).get(i as i64));
                let found = distance(&two, wanted);
                let bound = if round == 0 { BF16 } else { 4.0 * BF16 };
                assert!(found < bound, "{name}, round {round}, text {i}: {found}");
                worst = worst.max(found);
                apart = apart.max(distance(&two, &one));
                // The same token, or one that is as good but for the rounding.
                let (ours, theirs) = (i64::from(best(&two)), i64::from(best(&one)));
                let gap = one.double_value(&[theirs]) - one.double_value(&[ours]);
                let noise = (&two - &one).abs().max().double_value(&[]);
                assert!(gap <= 2.0 * noise, "{name}, round {round}, text {i}: {gap}, {noise}");
                near += usize::from(ours != theirs);
            }
        }
        println!(
            "{name}: scores {worst:.1e} from the CPU's and {apart:.1e} from one card's at most; {near} of {} tokens \
             differ, all near ties",
            3 * (STEPS + 1)
        );
        // And once more the same bits.
        let again = on_each(&ranks, |rank| scores(&Decoder::load_part(weights, rank)?, &tokens))?;
        assert_eq!(&again[0].0, two, "{name}: the same in every run");
    }
    Ok(())
}

fn machine(folder: &Path, room: CardRoom) -> Result<Ranks<CardExecutor>> {
    let weights = Arc::new(Weights::new(source(folder)?, Kind::BFloat16, cuda()?)?);
    let surrogate = random_surrogate(weights.config(), 24)?;
    Ok(Ranks::start(Rank::on_cards(2)?, move |rank| {
        let model = Decoder::load_part(&weights, rank)?;
        let own = surrogate.of_heads(rank.share(surrogate.kv_heads()))?;
        let on_torch = TorchSurrogate::new(&own, Kind::BFloat16, rank.device())?;
        let gates = Gates::new(&on_torch, vec![0.0; model.config().layers]);
        let hooks = pruning(&own, 0.0, Kind::BFloat16, rank.device());
        let hooks = hooks
            .map_err(|error| Error::RankLost { rank: rank.index(), cause: format!("{error:#}") })?;
        CardExecutor::new(Box::new(model), hooks, Some(&gates), room)
    })?)
}

#[test]
#[ignore = "needs two CUDA devices"]
fn each_of_many_texts_gets_over_two_cards_what_it_gets_alone() -> Result<()> {
    let _alone = together();
    let folder = tempfile::tempdir()?;
    make(folder.path(), ARCHITECTURES[1])?;
    same_together(|room| machine(folder.path(), room), &requests(48), [1500, 350])
}

#[test]
#[ignore = "needs a CUDA device"]
fn more_cards_than_there_are_is_refused_with_both_numbers() -> Result<()> {
    cuda()?;
    let error = Rank::on_cards(99).unwrap_err().to_string();
    assert!(error.starts_with("99 cards are asked for, and there are "), "{error}");
    Ok(())
}
