//! The machine on the CPU, on the tiny models of tests/golden: what texts get together is what each gets alone.

use anyhow::Result;
use kvzap::{LayerInput, Scorer, Threshold};
use models::engine::{
    Admission, CpuExecutor, End, Event, Executor, Request, RequestId, Room, Scheduler, Settings,
};
use models::{
    CausalLm, Cpu, Decoder, Error, Hooks, Paged, Pruning, Sampler, Sampling, Session, Stop,
    Weights, Whose, cache_shape, open,
};
use paged_kernels::PagedAttention;
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Duration;
use tch::{Device, Kind, Tensor};

const WINDOW: usize = 16;
/// Of every architecture, with a norm a head, a norm over all heads, and learned positions.
pub const MODELS: [&str; 4] = ["kvzap/model", "families/qwen3", "families/olmo2", "repo/olmo2"];

pub fn load(name: &str) -> Result<Decoder> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    Ok(Decoder::load(&Weights::new(open(&path)?, Kind::Float, Device::Cpu)?)?)
}

/// Scores each token in each head by an element of its hidden state.
struct ByHidden {
    kv_heads: i64,
}

impl Scorer<Tensor> for ByHidden {
    fn score(&self, input: LayerInput<'_, Tensor>) -> kvzap::Result<Tensor> {
        Ok(input.hidden.f_narrow(2, 0, self.kv_heads)?.f_transpose(1, 2)?)
    }
}

/// About half of all tokens go.
pub fn half(lm: &Decoder, while_decoding: bool) -> Result<Hooks> {
    let scorer = Box::new(ByHidden { kv_heads: lm.config().kv_heads as i64 });
    let policy = Box::new(Threshold::new(0.0)?);
    Ok(Hooks::pruning(Pruning { scorer, policy, while_decoding }))
}

/// A machine with room for `tokens` tokens of which nothing is dropped.
pub fn machine(
    name: &str,
    hooks: &dyn Fn(&Decoder) -> Result<Hooks>,
    tokens: usize,
) -> Result<CpuExecutor> {
    let lm = load(name)?;
    let shape = cache_shape(lm.config(), tokens, WINDOW, Kind::Float)?;
    let bytes = shape.pages * shape.page_bytes();
    let room = Room { window: WINDOW, batch: 5, ..Room::new(lm.config(), bytes) };
    let hooks = hooks(&lm)?;
    Ok(CpuExecutor::new(Box::new(lm), Kind::Float, hooks, room)?)
}

/// What a request gets from a session of its own.
pub fn alone(lm: &Decoder, hooks: Hooks, request: &Request) -> Result<(Vec<u32>, Stop)> {
    let shape = cache_shape(lm.config(), lm.config().max_positions, WINDOW, Kind::Float)?;
    let cache = Paged::new(Cpu::new(shape)?)?;
    let mut session = Session::new(lm, Device::Cpu, cache, hooks);
    session.feed(&request.context)?;
    if !request.question.is_empty() {
        session.feed(&request.question)?;
    }
    let mut sampler = Sampler::new(request.sampling.clone())?;
    let each = &mut |_| ControlFlow::Continue(());
    let found = session.generate(&mut sampler, &request.stop, usize::MAX, request.limit, each)?;
    Ok((found.tokens, found.stop))
}

/// Requests of all kinds, some of which share a context.
pub fn requests(vocabulary: usize, count: usize, longest: usize) -> Vec<Request> {
    let id = |i: usize| (i * 7919 % 104_729 % vocabulary) as u32;
    let text = |from: usize, tokens: usize| (from..from + tokens).map(id).collect::<Vec<_>>();
    let request = |i: usize| Request {
        question: text(31 * i, [0, 1, 7][i % 3]),
        limit: 1 + i * 13 % longest,
        stop: text(i, i % 2),
        sampling: Sampling {
            temperature: [0.0, 0.7, 1.5][i % 3],
            top_k: [0, 0, 5, 1][i % 4],
            top_p: [1.0, 0.9][i % 2],
            seed: i as u64 % 5,
        },
        ..Request::new(text(i % 5 * 100, 1 + i % 5 * longest / 5))
    };
    (0..count).map(request).collect()
}

/// Runs the requests, half of them there from the start, then one arriving each tick, and returns what each wrote and how
/// it ended.
pub fn run(
    scheduler: &mut Scheduler<CpuExecutor>,
    requests: &[Request],
) -> Result<BTreeMap<RequestId, (Vec<u32>, End)>> {
    let (mut tokens, mut ends) = (BTreeMap::<_, Vec<u32>>::new(), BTreeMap::new());
    let mut now = Duration::ZERO;
    let (there, coming) = requests.split_at(requests.len() / 2);
    for request in there {
        scheduler.submit(request.clone(), now)?;
    }
    let mut coming = coming.iter();
    loop {
        let next = coming.next();
        if let Some(request) = next {
            scheduler.submit(request.clone(), now)?;
        } else if scheduler.is_idle() {
            return Ok(ends);
        }
        now += Duration::from_millis(1);
        for (id, event) in scheduler.tick(|| now) {
            match event {
                Event::Token(token) => tokens.entry(id).or_default().push(token),
                Event::End(end) => {
                    ends.insert(id, (tokens.remove(&id).unwrap_or_default(), end));
                }
            }
        }
    }
}

#[test]
fn each_request_gets_what_a_session_of_its_own_gives() -> Result<()> {
    let mut preemptions = 0;
    for name in MODELS {
        for decoding in [None, Some(false), Some(true)] {
            let hooks = |lm: &Decoder| match decoding {
                None => Ok(Hooks::default()),
                Some(while_decoding) => half(lm, while_decoding),
            };
            let lm = load(name)?;
            let longest = 60.min((lm.config().max_positions - 8) * 5 / 9);
            let requests = requests(lm.config().vocab_size, 14, longest);
            let wanted = requests.iter().map(|request| alone(&lm, hooks(&lm)?, request));
            let wanted = wanted.collect::<Result<Vec<_>>>()?;
            // Where pages are short, and where contexts can be kept for each other.
            let mut totals = Vec::new();
            let mut found = BTreeMap::new();
            for room in [130, 2000] {
                let settings = Settings { slice: 16, ..Settings::default() };
                let mut scheduler = Scheduler::new(machine(name, &hooks, room)?, settings);
                found = run(&mut scheduler, &requests)?;
                for ((id, (tokens, end)), (wanted, stop)) in found.iter().zip(&wanted) {
                    assert_eq!(tokens, wanted, "{name}, {decoding:?}, {id:?}");
                    assert_eq!(end.stop.as_ref().ok(), Some(stop));
                }
                assert_eq!(scheduler.machine().backend().stats().pages_used, 0);
                assert_eq!(scheduler.machine().backend().stats().reserved_bytes, 0);
                totals.push(scheduler.totals());
            }
            preemptions += totals[0].preemptions;
            assert_eq!(totals[1].preemptions, 0);
            assert!(totals[1].shared > 0, "{totals:?}");
            assert!(totals[1].stepped > 2 * totals[1].steps, "{totals:?}");
            let removed =
                |end: &End| 1.0 - end.usage.held.rows as f64 / end.usage.held.dense_rows as f64;
            let removed = found.values().map(|(_, end)| removed(end)).fold(0.0, f64::max);
            assert!(if decoding.is_some() { removed > 0.0 } else { removed == 0.0 }, "{removed}");
        }
    }
    assert!(preemptions > 5, "{preemptions}");
    Ok(())
}

/// All that the layers hand to a cache, and the scores, token by token, of a step of several texts. Attention itself is
/// left out: that its neighbours do not change a bit is for paged-kernels to show.
fn step(lm: &Decoder, ids: &[i64], indices: &[usize]) -> Result<Vec<Vec<f32>>> {
    let hooks = half(lm, true)?;
    let mut seen = Vec::new();
    let mut pass = lm.enter(&Tensor::from_slice(ids).unsqueeze(0), indices, Whose::Several)?;
    for layer in 0..lm.config().layers {
        lm.layer(layer, &mut pass, &hooks, WINDOW, &mut |queries, keys, values, drops| {
            let drops = drops.expect("something is judged").unsqueeze(-1).to_kind(Kind::Float);
            for x in [queries, keys, values, &drops] {
                seen.push(x.transpose(1, 2).flatten(2, 3).squeeze_dim(0)); // [tokens, …]
            }
            Ok(queries.shallow_clone())
        })?;
    }
    seen.push(lm.logits(&lm.leave(pass)?)?.squeeze_dim(0));
    let rows = Tensor::cat(&seen, 1);
    (0..ids.len()).map(|i| Ok(Vec::try_from(rows.get(i as i64))?)).collect()
}

#[test]
fn in_a_step_of_several_texts_no_bit_of_one_depends_on_the_others() -> Result<()> {
    for name in MODELS {
        let lm = load(name)?;
        let ids: Vec<i64> = (0..64).map(|i| i * 37 % lm.config().vocab_size as i64).collect();
        let indices: Vec<usize> = (0..64).map(|i| i * 97 % 120).collect();
        let together = step(&lm, &ids, &indices)?;
        for i in 0..64 {
            let alone = step(&lm, &ids[i..=i], &indices[i..=i])?;
            let at = alone[0].iter().zip(&together[i]).position(|(a, b)| a != b);
            assert!(at.is_none(), "{name}, token {i} of 64, {at:?} of {}", alone[0].len());
        }
        for count in [2, 3, 5, 17] {
            assert!(step(&lm, &ids[..count], &indices[..count])? == together[..count]);
        }
        assert!(together[0] != together[1]);
    }
    Ok(())
}

/// In a batch too what is dropped is freed: by the pool's own count, not by what a method says of itself.
#[test]
fn a_batch_holds_the_windows_and_no_more() -> Result<()> {
    let hooks = |lm: &Decoder| {
        let scorer = Box::new(ByHidden { kv_heads: lm.config().kv_heads as i64 });
        let policy = Box::new(Threshold::new(f32::INFINITY)?);
        Ok(Hooks::pruning(Pruning { scorer, policy, while_decoding: true }))
    };
    let mut scheduler = Scheduler::new(machine(MODELS[0], &hooks, 1000)?, Settings::default());
    let request = |first| Request { limit: 30, ..Request::new(vec![first; 300]) };
    for first in [1, 2] {
        scheduler.submit(request(first), Duration::ZERO)?;
    }
    let (mut most, mut ends) = (0, 0);
    while !scheduler.is_idle() {
        let events = scheduler.tick(|| Duration::ZERO);
        let stats = scheduler.machine().backend().stats();
        most = most.max(stats.rows);
        for (_, event) in events {
            let Event::End(end) = event else { continue };
            let heads = 3 * 2;
            assert_eq!(end.usage.held.rows, heads * (WINDOW + 1));
            assert_eq!(end.usage.held.dense_rows, heads * (300 + 29));
            assert_eq!(end.usage.held.pages, heads * 2);
            ends += 1;
        }
    }
    assert_eq!((ends, most), (2, 2 * 3 * 2 * (WINDOW + 1)));
    Ok(())
}

#[test]
fn calls_that_do_not_follow_are_refused_and_change_nothing() -> Result<()> {
    let plain = |_: &Decoder| Ok(Hooks::default());
    let mut machine = machine(MODELS[0], &plain, 100)?;
    let text = machine.begin()?;
    let state = |error: models::Result<()>| match error {
        Err(Error::TextState { call, state, .. }) => (call, state),
        other => panic!("{other:?}"),
    };
    let greedy = Sampling::default();
    assert_eq!(state(machine.advance(text, 1).map(drop)), ("advance", "it has nothing to read"));
    assert_eq!(state(machine.draw(text, &greedy)).0, "draw");
    assert_eq!(state(machine.step(&[text])).0, "step");
    assert!(matches!(machine.read(text, &[]), Err(Error::EmptyPrompt)));
    machine.read(text, &[1; 20])?;
    assert_eq!(state(machine.read(text, &[1])), ("read", "it is reading"));
    assert_eq!(state(machine.fork(text).map(drop)).0, "fork");
    assert_eq!(state(machine.suspend(text).map(drop)), ("suspend", "it is reading"));
    let mut slices = 1;
    while !machine.advance(text, 1)? {
        slices += 1;
    }
    assert_eq!(slices, 3, "a layer at a time");
    machine.draw(text, &greedy)?;
    assert_eq!(state(machine.read(text, &[1])), ("read", "it has drawn tokens"));
    assert_eq!(state(machine.draw(text, &greedy)).0, "draw");
    assert_eq!(state(machine.resume(text)), ("resume", "it is not suspended"));
    machine.suspend(text)?;
    assert_eq!(machine.free_pages(), machine.limits().pages);
    assert_eq!(state(machine.step(&[text])), ("step", "it is suspended"));
    machine.resume(text)?;
    machine.step(&[text])?;
    assert_eq!(machine.drawn(true)?.len(), 2);
    machine.release(text)?;
    for error in [machine.release(text), machine.step(&[text]), machine.resume(text)] {
        assert!(matches!(error, Err(Error::UnknownText { text: 1 })), "{error:?}");
    }
    assert_eq!(machine.free_pages(), machine.limits().pages);
    Ok(())
}

#[test]
fn rooms_that_no_machine_can_have_are_refused() -> Result<()> {
    let lm = load(MODELS[0])?;
    let room = Room::new(lm.config(), 1 << 20);
    let refused = |room| -> Result<String> {
        let error =
            CpuExecutor::new(Box::new(load(MODELS[0])?), Kind::Float, Hooks::default(), room);
        Ok(error.unwrap_err().to_string())
    };
    assert!(refused(Room { batch: 0, ..room })?.contains("batch is 0; give 1 to 64 texts"));
    assert!(refused(Room { batch: 65, ..room })?.contains("batch is 65"));
    assert!(refused(Room { bytes: 100, ..room })?.contains("bytes is 100; give enough for a page"));
    Ok(())
}

#[test]
fn a_text_that_is_pruned_less_than_hoped_ends_with_its_numbers() -> Result<()> {
    let settings = Settings { admission: Admission::Hopeful, ..Settings::default() };
    let plain = |_: &Decoder| Ok(Hooks::default());
    let mut scheduler = Scheduler::new(machine(MODELS[0], &plain, 100)?, settings);
    let long = Request { limit: 200, ..Request::new([1, 2, 3]) };
    let long_context = Request { limit: 1, ..Request::new(vec![1; 200]) };
    let ends = run(&mut scheduler, &[long, long_context])?;
    let ends: Vec<_> = ends.into_values().collect();
    let error = ends[0].1.stop.as_ref().unwrap_err();
    // 7 pages of 16 tokens in each head.
    assert!(matches!(**error, Error::TextOutOfPages { tokens: 112 | 113, free: 0, .. }), "{error}");
    assert_eq!(ends[0].0.len(), 110);
    let error = ends[1].1.stop.as_ref().unwrap_err();
    assert!(matches!(**error, Error::Cache(paged_kernels::Error::OutOfPages { .. })), "{error}");
    assert_eq!(scheduler.machine().backend().stats().pages_used, 0);
    Ok(())
}
