//! Many texts through the scheduler.

use crate::{ids, load, pruning, random_surrogate, wide};
use anyhow::Result;
use kvzap::TorchSurrogate;
use models::engine::{Event, Executor, Request, Scheduler, Settings};
use models::{
    CardExecutor, CardRoom, CausalLm, Dtype, Gates, Random, Sampling, Source, Stop, cuda,
};
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

pub fn machine(folder: &Path, room: CardRoom) -> Result<CardExecutor> {
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

fn at(tick: usize) -> Duration {
    Duration::from_millis(tick as u64)
}

/// Runs requests, a few of which come at each tick, and gives each one's tokens and why it ended.
pub fn run<E: Executor>(
    scheduler: &mut Scheduler<E>,
    requests: &[Request],
    at_once: usize,
) -> Result<Vec<(Vec<u32>, Stop)>> {
    let (mut tokens, mut stops) = (BTreeMap::new(), BTreeMap::new());
    let (mut waiting, mut tick) = (requests.iter(), 0);
    while stops.len() < requests.len() || !scheduler.is_idle() {
        for request in waiting.by_ref().take(at_once) {
            tokens.insert(scheduler.submit(request.clone(), at(tick))?, Vec::new());
        }
        tick += 1;
        for (id, event) in scheduler.tick(|| at(tick)) {
            match event {
                Event::Token(token) => tokens.entry(id).or_default().push(token),
                Event::End(end) => {
                    stops.insert(id, end.stop.map_err(|error| anyhow::anyhow!("{error}"))?);
                }
            }
        }
        anyhow::ensure!(tick < 20_000, "no end");
    }
    // Ids go up as requests come.
    Ok(tokens.into_values().zip(stops.into_values()).collect())
}

/// What each request gets by itself.
pub fn alone<E: Executor>(machine: E, requests: &[Request]) -> Result<Vec<(Vec<u32>, Stop)>> {
    let mut one = Scheduler::new(machine, Settings::default());
    let alone = requests.iter().map(|request| run(&mut one, std::slice::from_ref(request), 1));
    Ok(alone.collect::<Result<Vec<_>>>()?.concat())
}

/// Requests get together what each gets alone, on machines with pages for all, and with so few that texts are moved to host
/// memory and back; and all pages come back, of what is cancelled too.
pub fn same_together<E: Executor>(
    machine: impl Fn(CardRoom) -> Result<E>,
    requests: &[Request],
    [many, few]: [usize; 2],
) -> Result<()> {
    let alone = alone(machine(ROOM)?, requests)?;
    let written = alone.iter().map(|(tokens, _)| tokens.len()).sum::<usize>();
    assert!(written > 15 * requests.len(), "there is something to compare");
    for pages in [many, few] {
        let mut all = Scheduler::new(machine(CardRoom { pages, ..ROOM })?, Settings::default());
        let found = run(&mut all, requests, 3)?;
        for (i, (found, alone)) in found.iter().zip(&alone).enumerate() {
            assert_eq!(found, alone, "request {i} with {pages} pages");
        }
        let totals = all.totals();
        println!("{pages} pages: {totals:?}");
        assert!(pages == many || totals.preemptions > 0, "{totals:?}");
        assert_eq!(all.machine().free_pages(), pages, "all pages come back");
        let long = |request: &Request| Request { limit: 200, stop: vec![], ..request.clone() };
        let ids = requests[..6].iter().map(|request| all.submit(long(request), at(0)));
        let ids = ids.collect::<models::Result<Vec<_>>>()?;
        (1..5).for_each(|tick| drop(all.tick(|| at(tick))));
        assert!(ids.iter().all(|&id| all.cancel(id, at(5))));
        (6..9).for_each(|tick| drop(all.tick(|| at(tick))));
        assert!(all.is_idle());
        assert_eq!(all.machine().free_pages(), pages, "pages of what was cancelled come back");
    }
    Ok(())
}

#[test]
#[ignore = "needs a CUDA device"]
fn each_of_many_texts_gets_what_it_gets_alone() -> Result<()> {
    let folder = tempfile::tempdir()?;
    wide(folder.path())?;
    same_together(|room| machine(folder.path(), room), &requests(64), [3000, 700])
}
