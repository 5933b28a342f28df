//! Branches of one text against a session for each: the same tokens and the same bits, whatever is beside them.

mod common;

use anyhow::Result;
use common::{Each, golden};
use kvzap::{Policy, Random, Scorer, Threshold};
use models::{
    Branches, CausalLm, Cpu, Decoder, Error, Hooks, Paged, Pruning, Sampler, Sampling, Session,
    Turn, Weights, cache_shape, open,
};
use std::ops::ControlFlow;
use tch::{Device, Kind, Tensor};

const WINDOW: usize = 16;
const THRESHOLDS: [f32; 3] = [f32::NEG_INFINITY, 0.3, 0.8];

fn model() -> Result<Decoder> {
    Ok(Decoder::load(&Weights::new(open(&golden("kvzap/model"))?, Kind::Float, Device::Cpu)?)?)
}

fn cpu(lm: &Decoder) -> Result<Cpu> {
    Ok(Cpu::new(cache_shape(lm.config(), 90 * lm.config().max_positions, WINDOW, Kind::Float)?)?)
}

fn hooks(
    scorer: impl Scorer<Tensor> + Send + 'static,
    policy: impl Policy<Tensor, Drops = Tensor> + Send + 'static,
    while_decoding: bool,
) -> Hooks {
    Hooks::pruning(Pruning { scorer: Box::new(scorer), policy: Box::new(policy), while_decoding })
}

fn alone(lm: &Decoder, threshold: f32, while_decoding: bool) -> Result<Session<'_>> {
    let hooks = hooks(Random::new(5), Threshold::new(threshold)?, while_decoding);
    Ok(Session::new(lm, Device::Cpu, Paged::new(cpu(lm)?)?, hooks))
}

fn together(lm: &Decoder, while_decoding: bool) -> Result<Branches<'_>> {
    let turn = Turn::default();
    let hooks = hooks(Random::new(5), Each(turn.clone(), THRESHOLDS), while_decoding);
    Ok(Branches::new(lm, cpu(lm)?, THRESHOLDS.len(), hooks, turn)?)
}

fn text() -> Vec<u32> {
    (0..60).map(|i| (i * 37 + 11) % 128).collect()
}

fn sampler(seed: u64) -> Result<Sampler> {
    Ok(Sampler::new(Sampling { temperature: 0.9, seed, ..Sampling::default() })?)
}

/// What a session writes after `question`, and what it then expects next.
fn wanted(session: &mut Session<'_>, question: &[u32], seed: u64) -> Result<(Vec<u32>, Vec<f32>)> {
    session.feed(question)?;
    let each = &mut |_| ControlFlow::Continue(());
    let written = session.generate(&mut sampler(seed)?, &[9, 10, 11], usize::MAX, 40, each)?;
    Ok((written.tokens, session.logits().map(<[f32]>::to_vec).unwrap_or_default()))
}

#[test]
fn branches_write_to_the_last_bit_what_each_would_write_alone() -> Result<()> {
    let lm = model()?;
    for while_decoding in [false, true] {
        let mut branches = together(&lm, while_decoding)?;
        branches.read(&text())?;
        branches.mark()?;
        // First every way once, then the first way three times and the last twice, asked at different lengths.
        let (same, other) = (vec![3, 4, 5, 6], vec![7, 8]);
        let mut lengths = Vec::new();
        for from in [vec![0, 1, 2], vec![0, 0, 2, 0, 2]] {
            branches.rewind(&from)?;
            let question = |branch: usize| if branch == 1 { &other } else { &same };
            for branch in 0..from.len() {
                branches.feed(branch, question(branch))?;
            }
            let mut samplers = (0..from.len() as u64).map(sampler).collect::<Result<Vec<_>>>()?;
            let mut heard = vec![Vec::new(); from.len()];
            let each = &mut |branch: usize, token| heard[branch].push(token);
            let written = branches.generate(&mut samplers, &[9, 10, 11], usize::MAX, 40, each)?;
            for (branch, way) in from.into_iter().enumerate() {
                let mut alone = alone(&lm, THRESHOLDS[way], while_decoding)?;
                alone.feed(&text())?;
                assert!(way == 0 || alone.cache().usage().removed() > 0.1);
                let (tokens, logits) = wanted(&mut alone, question(branch), branch as u64)?;
                assert_eq!(written[branch].tokens, tokens, "way {way}, branch {branch}");
                assert_eq!(branches.logits(branch), Some(&*logits), "way {way}, branch {branch}");
                assert_eq!(heard[branch], tokens);
                let (usage, whole) = (branches.usage(branch)?, alone.cache().usage());
                assert_eq!((usage.rows, usage.bytes), (whole.rows, whole.bytes));
                lengths.push(tokens.len());
            }
        }
        lengths.sort_unstable();
        assert!(lengths[0] < 40 && lengths[0] != lengths[4], "some end before others: {lengths:?}");
    }
    Ok(())
}

#[test]
fn more_branches_than_a_step_takes_write_the_same_too() -> Result<()> {
    let lm = model()?;
    let mut branches = together(&lm, true)?;
    branches.read(&text())?;
    branches.mark()?;
    branches.rewind(&[1; 70])?;
    let mut samplers = (0..70).map(sampler).collect::<Result<Vec<_>>>()?;
    let written = branches.generate(&mut samplers, &[], usize::MAX, 12, &mut |_, _| {})?;
    for (seed, written) in written.into_iter().enumerate().skip(60) {
        let mut alone = alone(&lm, THRESHOLDS[1], true)?;
        alone.feed(&text())?;
        let each = &mut |_| ControlFlow::Continue(());
        let tokens = alone.generate(&mut sampler(seed as u64)?, &[], usize::MAX, 12, each)?.tokens;
        assert_eq!(written.tokens, tokens, "branch {seed}");
    }
    Ok(())
}

#[test]
fn likelihoods_are_those_of_a_session() -> Result<()> {
    let lm = model()?;
    let mut branches = together(&lm, false)?;
    branches.read(&text())?;
    let found = branches.log_likelihoods(&[4, 5, 6], usize::MAX)?;
    for (threshold, found) in THRESHOLDS.into_iter().zip(found) {
        let mut alone = alone(&lm, threshold, false)?;
        alone.feed(&text())?;
        assert_eq!(found, alone.log_likelihoods(&[4, 5, 6], usize::MAX)?);
    }
    Ok(())
}

#[test]
fn what_a_session_refuses_branches_refuse() -> Result<()> {
    let lm = model()?;
    let most = lm.config().max_positions;
    let mut branches = together(&lm, false)?;
    assert!(matches!(branches.rewind(&[0]), Err(Error::NoMark)));
    assert!(matches!(branches.read(&[]), Err(Error::EmptyPrompt)));
    assert!(matches!(branches.read(&vec![1; most + 1]), Err(Error::ContextTooLong { .. })));
    let unread = branches.generate(&mut [sampler(0)?], &[], usize::MAX, 1, &mut |_, _| {});
    assert!(matches!(unread, Err(Error::EmptyPrompt)));
    branches.read(&text())?;
    assert!(matches!(branches.feed(1, &[1_000_000]), Err(Error::UnknownToken { .. })));
    assert!(matches!(branches.feed(1, &vec![1; most]), Err(Error::ContextTooLong { .. })));

    // Bits for one branch where there are two.
    let hooks = hooks(Random::new(1), Threshold::new(0.5)?, false);
    let refused = Branches::new(&lm, cpu(&lm)?, 2, hooks, Turn::default())?.read(&text());
    assert!(matches!(refused, Err(Error::DropBits { .. })));
    Ok(())
}
