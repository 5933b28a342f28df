//! A session whose text lies on the card.

use crate::{ids, load, pruning, random_surrogate, wide};
use anyhow::Result;
use kvzap::TorchSurrogate;
use models::engine::{Event, Request, Scheduler, Settings};
use models::{
    CardCache, CardExecutor, CardRoom, CardText, CausalLm, Cpu, Decoder, Dtype, Error, Gates,
    Hooks, Paged, Random, Sampler, Sampling, Session, Source, Step, TextRoom, cache_shape, cuda,
    text_cache,
};
use paged_kernels::Mode;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Duration;
use tch::{Device, Kind};

const ROOM: TextRoom = TextRoom {
    ways: 1,
    at_once: 1,
    context: 400,
    more: 200,
    least: 128,
    window: 128,
    kind: Kind::BFloat16,
    stored: None,
};

fn model(folder: &Path, kind: Kind, device: Device) -> Result<Decoder> {
    load(Source::Random(Random::open(folder, 3)?), kind, device)
}

fn write(session: &mut Session<'_>, sampling: &Sampling, limit: usize) -> Result<Vec<u32>> {
    let mut sampler = Sampler::new(sampling.clone())?;
    let each = &mut |_| ControlFlow::Continue(());
    Ok(session.generate(&mut sampler, &[17], 490, limit, each)?.tokens)
}

fn warm() -> Sampling {
    Sampling { temperature: 1.0, top_k: 40, top_p: 0.9, seed: 5 }
}

/// Judges all tokens by chance.
fn forgetful(lm: &Decoder, device: Device) -> Result<(Hooks, Gates)> {
    let surrogate = random_surrogate(lm.config(), 24)?;
    let on_torch = TorchSurrogate::new(&surrogate, Kind::BFloat16, device)?;
    let gates = Gates::new(&on_torch, vec![0.0; lm.config().layers]);
    Ok((pruning(&surrogate, 0.0, Kind::BFloat16, device)?, gates))
}

fn stepping(lm: &Decoder, device: Device, room: TextRoom) -> Result<Session<'_>> {
    let (hooks, gates) = forgetful(lm, device)?;
    let resident = text_cache(lm.config(), device, room)?;
    let step = Step::new(lm, Some(&gates), &resident, 490)?;
    let text = CardText::new(CardCache::new(resident)?, step);
    Ok(Session::stepping(lm, device, text, hooks))
}

#[test]
#[ignore = "needs a CUDA device"]
fn every_question_after_a_mark_is_the_first_and_is_answered_as_in_a_batch() -> Result<()> {
    let (folder, device) = (tempfile::tempdir()?, cuda()?);
    wide(folder.path())?;
    let lm = model(folder.path(), Kind::BFloat16, device)?;
    let mut session = stepping(&lm, device, ROOM)?;
    let context = ids(400, 490, 7);
    session.feed(&context)?;
    let read = session.cache().usage();
    assert!(read.removed() > 0.2, "{read:?}");
    session.mark()?;
    let questions = [ids(30, 490, 1), ids(1, 490, 2), ids(70, 490, 3)];
    let mut answers = Vec::new();
    for sampling in [Sampling::default(), warm()] {
        for question in &questions {
            session.rewind()?;
            assert_eq!(session.cache().usage(), read);
            session.feed(question)?;
            answers.push(write(&mut session, &sampling, 40)?);
        }
    }
    assert!(answers.iter().all(|answer| answer.len() > 3), "{answers:?}");
    session.rewind()?;
    session.feed(&questions[0])?;
    assert_eq!(write(&mut session, &Sampling::default(), 40)?, answers[0], "asked again");
    drop(session);

    let (hooks, gates) = forgetful(&lm, device)?;
    let room = CardRoom {
        pages: 4000,
        seats: 16,
        batch: 8,
        tokens: 1024,
        question: 128,
        window: 128,
        stored: Dtype::Bf16,
        vocabulary: 490,
        mode: Mode::BatchInvariant,
    };
    let mut scheduler =
        Scheduler::new(CardExecutor::new(Box::new(lm), hooks, Some(&gates), room)?, {
            Settings::default()
        });
    let mut order = Vec::new();
    for sampling in [Sampling::default(), warm()] {
        for question in &questions {
            order.push(scheduler.submit(
                Request {
                    question: question.clone(),
                    sampling: sampling.clone(),
                    limit: 40,
                    stop: vec![17],
                    ..Request::new(context.clone())
                },
                Duration::ZERO,
            )?);
        }
    }
    let mut together = vec![Vec::new(); order.len()];
    while !scheduler.is_idle() {
        for (id, event) in scheduler.tick(|| Duration::ZERO) {
            let place = order.iter().position(|&other| other == id).expect("one of these");
            match event {
                Event::Token(token) => together[place].push(token),
                Event::End(end) => drop(end.stop.map_err(|error| anyhow::anyhow!("{error}"))?),
            }
        }
    }
    assert_eq!(together, answers);
    Ok(())
}

#[test]
#[ignore = "needs a CUDA device"]
fn in_f32_a_text_on_the_card_is_the_cpus() -> Result<()> {
    let (folder, device) = (tempfile::tempdir()?, cuda()?);
    wide(folder.path())?;
    let run = |device: Device| -> Result<_> {
        let lm = model(folder.path(), Kind::Float, device)?;
        let surrogate = random_surrogate(lm.config(), 24)?;
        let hooks = pruning(&surrogate, 0.0, Kind::Float, device)?;
        let mut session = if device == Device::Cpu {
            let shape = cache_shape(lm.config(), 1024, 128, Kind::Float)?;
            Session::new(&lm, device, Paged::new(Cpu::new(shape)?)?, hooks)
        } else {
            let room = TextRoom { kind: Kind::Float, ..ROOM };
            let cache = CardCache::new(text_cache(lm.config(), device, room)?)?;
            Session::new(&lm, device, cache, hooks)
        };
        session.feed(&ids(400, 490, 7))?;
        session.mark()?;
        session.feed(&ids(20, 490, 1))?;
        let tokens = write(&mut session, &Sampling::default(), 30)?;
        let scores = session.logits().expect("it has read").to_vec();
        let held = session.cache().usage().rows;
        session.rewind()?;
        let likely = session.log_likelihoods(&ids(5, 490, 4), 490)?;
        Ok((tokens, held, scores, likely))
    };
    let (wanted, found) = (run(Device::Cpu)?, run(device)?);
    assert_eq!((&found.0, found.1), (&wanted.0, wanted.1));
    let furthest =
        |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    let apart = furthest(&found.2, &wanted.2);
    assert!(apart < 1e-3, "{apart}");
    for (found, wanted) in found.3.iter().zip(&wanted.3) {
        assert!((found - wanted).abs() < 1e-3, "{found} {wanted}");
    }
    Ok(())
}

#[test]
#[ignore = "needs a CUDA device"]
fn likelihoods_by_the_graph_are_near_those_of_the_cpu() -> Result<()> {
    let (folder, device) = (tempfile::tempdir()?, cuda()?);
    wide(folder.path())?;
    let (context, tokens) = (ids(150, 490, 7), ids(12, 490, 4));
    let card = model(folder.path(), Kind::BFloat16, device)?;
    let resident = text_cache(card.config(), device, ROOM)?;
    let step = Step::new(&card, None, &resident, 490)?;
    let text = CardText::new(CardCache::new(resident)?, step);
    let mut session = Session::stepping(&card, device, text, Hooks::default());
    session.feed(&context)?;
    let found = session.log_likelihoods(&tokens, 490)?;
    let cpu = model(folder.path(), Kind::Float, Device::Cpu)?;
    let shape = cache_shape(cpu.config(), 1024, 128, Kind::Float)?;
    let paged = Paged::new(Cpu::new(shape)?)?;
    let mut session = Session::new(&cpu, Device::Cpu, paged, Hooks::default());
    session.feed(&context)?;
    let wanted = session.log_likelihoods(&tokens, 490)?;
    for (found, wanted) in found.iter().zip(&wanted) {
        assert!((found - wanted).abs() < 0.1, "{found} {wanted}");
    }
    Ok(())
}

#[test]
#[ignore = "needs a CUDA device"]
fn eight_bits_hold_half_as_much() -> Result<()> {
    let (folder, device) = (tempfile::tempdir()?, cuda()?);
    wide(folder.path())?;
    let lm = model(folder.path(), Kind::BFloat16, device)?;
    let mut held = Vec::new();
    for stored in [Dtype::Bf16, Dtype::F16, Dtype::F8] {
        let mut session = stepping(&lm, device, TextRoom { stored: Some(stored), ..ROOM })?;
        session.feed(&ids(400, 490, 7))?;
        held.push((session.cache().usage().rows, session.cache().usage().bytes));
        assert!(write(&mut session, &Sampling::default(), 20)?.len() > 3);
    }
    assert_eq!(held[0], held[1]);
    assert_eq!(held[0].0, held[2].0);
    let share = held[2].1 as f64 / held[0].1 as f64;
    assert!((0.5..0.55).contains(&share), "{held:?}");
    Ok(())
}

#[test]
#[ignore = "needs a CUDA device"]
fn what_the_card_cannot_hold_is_refused_with_numbers() -> Result<()> {
    let (folder, device) = (tempfile::tempdir()?, cuda()?);
    wide(folder.path())?;
    let lm = model(folder.path(), Kind::BFloat16, device)?;
    // A cache of fewer pages than the context takes: known only once the card has read it.
    let mut resident = text_cache(lm.config(), device, ROOM)?;
    let shape = paged_kernels::CacheShape { pages: 90, ..*resident.shape() };
    resident = models::resident(device, shape, resident.seats())?;
    let mut session = Session::new(&lm, device, CardCache::new(resident)?, Hooks::default());
    let error = session.feed(&ids(400, 490, 7)).unwrap_err();
    assert!(matches!(error, Error::TextOutOfPages { tokens: 400, pages: 90, .. }), "{error}");
    drop(session);

    let mut huge = lm.config().clone();
    (huge.layers, huge.max_positions) = (1000, 1 << 24);
    let room = TextRoom { context: 1 << 24, least: 1 << 24, ..ROOM };
    let error = text_cache(&huge, device, room).unwrap_err();
    assert!(matches!(error, Error::CardMemory { wanted, free, .. } if wanted > free), "{error}");

    let config = std::fs::read_to_string(folder.path().join("config.json"))?;
    let config = config.replace("\"num_hidden_layers\":3", "\"num_hidden_layers\":9000000");
    std::fs::write(folder.path().join("config.json"), config)?;
    let error = model(folder.path(), Kind::BFloat16, device).unwrap_err().to_string();
    assert!(error.contains("layers"), "{error}");
    Ok(())
}
