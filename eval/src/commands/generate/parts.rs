//! `longctx generate --batch --cards`: an engine over the parts of a model.

use super::batch::{Loaded, Started, Work};
use crate::Method;
use crate::commands::{ModelArgs, note, spinner};
use anyhow::{Context, Result, ensure};
use kvzap::Surrogate;
#[cfg(feature = "cuda")]
use models::CardExecutor;
use models::engine::{CpuExecutor, Engine, Executor};
use models::ranks::{Rank, Ranks, on_each};
use models::{Error, Model, Tokenizer};
use std::sync::{Mutex, PoisonError};
use tch::Device;

/// Loads a part of the model on each of so many cards; on the CPU, in host memory.
pub(super) fn load(args: &ModelArgs, cards: usize) -> Result<Loaded> {
    ensure!(cards > 1, "--cards {cards}: give 1 or more");
    ensure!(args.repo.is_none(), "--cards cuts no model with learned positions: leave out --repo");
    let (kind, device) = args.machine()?;
    let ranks = on(device, cards)?;
    let bar = spinner("loading the model");
    let parts = on_each(&ranks, |rank| Model::load_part(args.path(), kind, rank))?;
    bar.finish_and_clear();
    note(&parts[0]);
    Ok(Loaded::Parts(ranks, parts))
}

fn on(device: Device, cards: usize) -> Result<Vec<Rank>> {
    if device == Device::Cpu {
        return Ok(Rank::on_host(cards));
    }
    #[cfg(feature = "cuda")]
    return Ok(Rank::on_cards(cards)?);
    #[cfg(not(feature = "cuda"))]
    anyhow::bail!("this longctx was built without the feature cuda; build it with it")
}

/// An engine over all parts, for texts of up to `longest` tokens.
pub(super) fn start(
    work: &Work<'_>,
    ranks: Vec<Rank>,
    models: Vec<Model>,
    longest: usize,
) -> Started {
    ensure!(
        matches!(work.method, Method::Full | Method::Kvzap { .. }),
        "--cards: only a surrogate's threshold (--threshold, --remove) forgets the same in parts as in the whole"
    );
    let surrogates = ranks.iter().map(|rank| {
        let own = |all: &Surrogate| all.of_heads(rank.share(all.kv_heads()));
        Ok(work.surrogate.map(own).transpose()?)
    });
    let surrogates = surrogates.collect::<Result<Vec<_>>>()?;
    let bytes = work.bytes.map(|bytes| bytes / ranks.len());
    let parts = models.into_iter().zip(&surrogates);
    let parts = parts.map(|(model, own)| {
        (model, Work { args: work.args, method: work.method, surrogate: own.as_ref(), bytes })
    });
    if ranks[0].device() == Device::Cpu {
        let prepared = parts.map(|(model, work)| {
            let (hooks, room) = (work.hooks(&model)?, work.room_on_cpu(&model));
            let Model { lm, kind, tokenizer, .. } = model;
            Ok(((lm, kind, hooks, room), tokenizer))
        });
        engine(ranks, prepared, |(lm, kind, hooks, room)| CpuExecutor::new(lm, kind, hooks, room))
    } else {
        #[cfg(feature = "cuda")]
        return {
            let prepared = parts.map(|(model, work)| {
                let (hooks, gates) = (work.hooks(&model)?, work.gates(&model)?);
                let room = work.room_on_card(&model, longest)?;
                let Model { lm, tokenizer, .. } = model;
                Ok(((lm, hooks, gates, room), tokenizer))
            });
            engine(ranks, prepared, |(lm, hooks, gates, room)| {
                CardExecutor::new(lm, hooks, gates.as_ref(), room)
            })
        };
        #[cfg(not(feature = "cuda"))]
        unreachable!("no card, {longest} tokens")
    }
}

/// An engine whose machines are each made of what is prepared for its rank, on the rank's thread; and the first's tokenizer.
fn engine<P: Send + 'static, E: Executor + 'static>(
    ranks: Vec<Rank>,
    prepared: impl Iterator<Item = Result<(P, Tokenizer)>>,
    make: impl Fn(P) -> models::Result<E> + Send + Sync + 'static,
) -> Started {
    let (prepared, tokenizers): (Vec<_>, Vec<_>) =
        prepared.collect::<Result<Vec<_>>>()?.into_iter().unzip();
    let prepared = Mutex::new(prepared.into_iter().map(Some).collect::<Vec<_>>());
    let own = move |rank: &Rank| {
        let mut prepared = prepared.lock().unwrap_or_else(PoisonError::into_inner);
        let own = prepared[rank.index()].take().ok_or(Error::EngineStopped)?;
        drop(prepared);
        make(own)
    };
    let engine = Engine::builder().start(move || Ranks::start(ranks, own))?;
    Ok((engine, tokenizers.into_iter().next().context("there is a part")?))
}
