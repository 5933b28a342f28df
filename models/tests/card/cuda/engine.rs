//! Many texts through the scheduler.

use crate::{ids, load, pruning, random_surrogate, wide};
use anyhow::Result;
use kvzap::TorchSurrogate;
use models::engine::{Admission, Event, Executor, Request, Scheduler, Settings};
use models::{CardExecutor, CardRoom, CausalLm, Dtype, Gates, Random, Sampling, Source, cuda};
use paged_kernels::Mode;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;
use tch::Kind;

pub const ROOM: CardRoom = CardRoom {
    pages: 3000,
    seats: 20,
    batch: 16,
    tokens: 1024,
    question: 64,
    window: 128,
    stored: Dtype::Bf16,
    vocabulary: 500,
    mode: Mode::BatchInvariant,
};

fn machine(folder: &Path, room: CardRoom) -> Result<CardExecutor> {
    let device = cuda()?;
    let model = load(Source::Random(Random::open(folder, 3)?), Kind::BFloat16, device)?;
    let surrogate = random_surrogate(model.config(), 24)?;
    let on_torch = TorchSurrogate::new(&surrogate, Kind::BFloat16, device)?;
    let gates = Gates::new(&on_torch, vec![0.0; model.config().layers]);
    let hooks = pruning(&surrogate, 0.0, Kind::BFloat16, device)?;
    Ok(CardExecutor::new(Box::new(model), hooks, Some(&gates), room)?)
}

/// Requests of all kinds, some with a context in common.
pub fn requests(count: usize) -> Vec<Request> {
    let request = |i: usize| {
        let length = [1, 7, 130, 400, 700, 60][i % 6] + i % 5;
        let context = if i % 7 == 3 { ids(300, 500, 77) } else { ids(length, 500, i) };
        let question = if i % 3 == 1 { ids(1 + i % 40, 500, i + 1) } else { Vec::new() };
        let sampling = Sampling {
            temperature: [0.0, 1.0, 0.0, 0.8][i % 4],
            top_k: [0, 0, 0, 20][i % 4],
            top_p: [1.0, 0.9][i % 2],
            seed: i as u64,
        };
        let limit = 1 + i * 13 % 90;
        Request { question, sampling, limit, stop: vec![17], ..Request::new(context) }
    };
    (0..count).map(request).collect()
}

pub fn at(tick: usize) -> Duration {
    Duration::from_millis(tick as u64)
}

/// Runs requests, a few of which come at each tick, and gives each one's tokens.
pub fn run<E: Executor>(
    scheduler: &mut Scheduler<E>,
    requests: &[Request],
    at_once: usize,
) -> Result<Vec<Vec<u32>>> {
    let (mut tokens, mut order, mut tick) = (BTreeMap::new(), Vec::new(), 0);
    let mut waiting = requests.iter();
    while order.len() < requests.len() || !scheduler.is_idle() {
        for request in waiting.by_ref().take(at_once) {
            order.push(scheduler.submit(request.clone(), at(tick))?);
        }
        tick += 1;
        for event in scheduler.tick(at(tick)) {
            match event {
                (id, Event::Token(token)) => tokens.entry(id).or_insert_with(Vec::new).push(token),
                (_, Event::End(end)) => {
                    end.stop.map_err(|error| anyhow::anyhow!("{error}"))?;
                }
            }
        }
        anyhow::ensure!(tick < 20_000, "no end");
    }
    Ok(order.into_iter().map(|id| tokens.remove(&id).unwrap_or_default()).collect())
}

#[test]
#[ignore = "needs a CUDA device"]
fn each_of_many_texts_gets_what_it_gets_alone() -> Result<()> {
    let folder = tempfile::tempdir()?;
    wide(folder.path())?;
    let requests = requests(64);
    let settings = Settings { admission: Admission::Certain, ..Settings::default() };
    let mut one = Scheduler::new(machine(folder.path(), ROOM)?, settings.clone());
    let alone = requests.iter().map(|request| run(&mut one, std::slice::from_ref(request), 1));
    let alone = alone.collect::<Result<Vec<_>>>()?.concat();
    assert!(alone.iter().map(Vec::len).sum::<usize>() > 1000, "there is something to compare");
    // With room for all, and with so little that texts are moved to host memory and back.
    for pages in [3000, 700] {
        let room = CardRoom { pages, ..ROOM };
        let mut all = Scheduler::new(machine(folder.path(), room)?, settings.clone());
        let found = run(&mut all, &requests, 3)?;
        for (i, (found, alone)) in found.iter().zip(&alone).enumerate() {
            assert_eq!(found, alone, "request {i} with {pages} pages");
        }
        let totals = all.totals();
        println!("{pages} pages: {totals:?}");
        assert!(pages > 700 || totals.preemptions > 0, "{totals:?}");
        // Contexts that are kept for others to come may hold the rest.
        assert!(all.machine().free_pages() <= pages);
    }
    Ok(())
}
