//! Branches of a text whose pages lie on the card.

use crate::common::Each;
use crate::{ids, load, random_surrogate, wide};
use anyhow::Result;
use kvzap::TorchSurrogate;
use models::{
    Branches, CausalLm, Cpu, Decoder, Hooks, Pruning, Random, Source, TextRoom, Turn, cache_shape,
    cuda, text_cache,
};
use tch::{Device, Kind};

const THRESHOLDS: [f32; 3] = [f32::NEG_INFINITY, -0.2, 0.1];

fn branches(lm: &Decoder, device: Device) -> Result<Branches<'_>> {
    let (turn, ways) = (Turn::default(), THRESHOLDS.len());
    let scorer = random_surrogate(lm.config(), 24)?;
    let hooks = Hooks::pruning(Pruning {
        scorer: Box::new(TorchSurrogate::new(&scorer, Kind::Float, device)?),
        policy: Box::new(Each(turn.clone(), THRESHOLDS)),
        while_decoding: true,
    });
    if device == Device::Cpu {
        let pool = Cpu::new(cache_shape(lm.config(), 8192, 128, Kind::Float)?)?;
        return Ok(Branches::new(lm, pool, ways, hooks, turn)?);
    }
    let room = TextRoom {
        ways,
        at_once: 5,
        context: 300,
        more: 200,
        least: 128,
        window: 128,
        kind: Kind::Float,
        stored: None,
    };
    Ok(Branches::new(lm, text_cache(lm.config(), device, room)?, ways, hooks, turn)?)
}

#[test]
#[ignore = "needs a CUDA device"]
fn branches_on_the_card_are_the_cpus() -> Result<()> {
    let folder = tempfile::tempdir()?;
    wide(folder.path())?;
    let source = || Ok::<_, models::Error>(Source::Random(Random::open(folder.path(), 3)?));
    let cpu = load(source()?, Kind::Float, Device::Cpu)?;
    let card = load(source()?, Kind::Float, cuda()?)?;
    let mut all = [branches(&cpu, Device::Cpu)?, branches(&card, cuda()?)?];
    let from = [0, 2, 1, 2, 2];
    for branches in &mut all {
        branches.read(&ids(300, 490, 7))?;
        branches.mark()?;
        branches.rewind(&from)?;
        for branch in 0..from.len() {
            branches.feed(branch, &ids(3 + 9 * branch, 490, branch))?;
        }
        for round in 0..40 {
            let step = (0..from.len()).map(|branch| (branch, ids(1, 490, round + branch)[0]));
            branches.step(&step.collect::<Vec<_>>())?;
        }
    }
    let [wanted, found] = all;
    for (branch, way) in from.into_iter().enumerate() {
        let (found_usage, wanted_usage) = (found.usage(branch)?, wanted.usage(branch)?);
        // A score at the threshold may fall on either side of it.
        assert!(found_usage.rows.abs_diff(wanted_usage.rows) <= 2, "way {way}");
        assert!(way == 0 || wanted_usage.removed() > 0.1, "way {way}: {wanted_usage:?}");
        let (found, wanted) = (found.logits(branch).unwrap(), wanted.logits(branch).unwrap());
        let apart = found.iter().zip(wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(apart < 1e-2, "way {way}, branch {branch}: {apart}");
    }
    Ok(())
}
