//! Parts of a model are the model: in host memory, where anyone can see it. tests/card has the same on cards.

mod common;

use anyhow::Result;
use common::{assert_close, difference, golden};
use kvzap::{Affine, Surrogate, Threshold, TorchSurrogate};
use models::engine::{
    CpuExecutor, Drawn, End, Event, Executor, Held, Limits, Request, Room, Scheduler, Settings,
    TextId,
};
use models::ranks::{Rank, Ranks, on_each};
use models::{
    CausalLm, Config, Cpu, Decoder, Error, Hooks, Paged, Pruning, Random, Sampling, Source,
    Weights, cache_shape, open,
};
use paged_kernels::PagedAttention;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tch::{Device, Kind, Tensor};

const WINDOW: usize = 16;
/// Llama and Qwen3; of a file whose rows lie interleaved, and of one in half precision.
const MODELS: [&str; 4] =
    ["kvzap/model", "families/qwen3", "gguf/gqa2_llama31.gguf", "llama/gqa8_sharded"];

fn weights(name: &str) -> Result<Weights> {
    Ok(Weights::new(open(&golden(name))?, Kind::Float, Device::Cpu)?)
}

fn ids(count: usize, vocabulary: usize, seed: usize) -> Vec<u32> {
    (0..count).map(|i| ((i + seed) * 7919 % 10_007 % vocabulary) as u32).collect()
}

/// A surrogate whose scores spread.
fn surrogate(config: &Config, width: usize) -> Result<Surrogate> {
    let mut state = 5u32;
    let mut noise = |count: usize, scale: f32| -> Vec<f32> {
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((state >> 8) as f32 / (1 << 23) as f32 - 1.0) * scale
        };
        (0..count).map(|_| next()).collect()
    };
    let mut layers = Vec::new();
    for _ in 0..config.layers {
        let first = Affine::new(noise(width * config.hidden_size, 0.3), noise(width, 0.1))?;
        let second = Affine::new(noise(config.kv_heads * width, 0.5), noise(config.kv_heads, 0.1))?;
        layers.push([first, second]);
    }
    Ok(Surrogate::mlp(layers)?)
}

fn pruning(surrogate: &Surrogate) -> models::Result<Hooks> {
    Ok(Hooks::pruning(Pruning {
        scorer: Box::new(TorchSurrogate::new(surrogate, Kind::Float, Device::Cpu)?),
        policy: Box::new(Threshold::new(0.0)?),
        while_decoding: true,
    }))
}

/// Scores after each of `passes`, `[passes, vocabulary]`, and the rows that are kept of each layer's heads.
fn read(lm: &Decoder, hooks: &Hooks, passes: &[Vec<u32>]) -> models::Result<(Tensor, Vec<usize>)> {
    let shape = cache_shape(lm.config(), 512, WINDOW, Kind::Float)?;
    let mut cache = Paged::new(Cpu::new(shape)?)?;
    let mut scores = Vec::new();
    for pass in passes {
        let ids: Vec<_> = pass.iter().map(|&id| i64::from(id)).collect();
        let ids = Tensor::from_slice(&ids).unsqueeze(0);
        let hidden = lm.forward(&ids, &mut cache, hooks)?;
        scores.push(lm.logits(&hidden.select(1, -1))?.squeeze());
    }
    let lengths = cache.backend().lengths(cache.sequence())?;
    Ok((Tensor::stack(&scores, 0), lengths))
}

#[test]
fn parts_add_up_to_the_model_and_keep_what_it_keeps() -> Result<()> {
    for name in MODELS {
        let weights = weights(name)?;
        let whole = Decoder::load(&weights)?;
        let config = whole.config();
        let surrogate = surrogate(config, 24)?;
        // A context, a question, and steps.
        let mut passes = vec![ids(150, config.vocab_size, 1), ids(9, config.vocab_size, 2)];
        passes.extend((0..20).map(|i| ids(1, config.vocab_size, 3 + i)));
        for pruned in [false, true] {
            let hooks = if pruned { pruning(&surrogate)? } else { Hooks::default() };
            let (wanted, lengths) = read(&whole, &hooks, &passes)?;
            let found = on_each(&Rank::on_host(2), |rank| {
                let lm = Decoder::load_part(&weights, rank)?;
                let own = surrogate.of_heads(rank.share(surrogate.kv_heads()))?;
                read(&lm, &if pruned { pruning(&own)? } else { Hooks::default() }, &passes)
            })?;
            let [(first, kept), (second, others)] = &found[..] else { unreachable!("two") };
            assert_eq!(first, second, "{name}: both get the same bits");
            assert_close(first, &wanted, 2e-5, name);
            let apart = difference(first, &wanted);
            // Heads of a layer: the first rank's, then the second's.
            let own = config.kv_heads / 2;
            let joined = kept.chunks(own).zip(others.chunks(own));
            let joined: Vec<_> = joined.flat_map(|(a, b)| [a, b].concat()).collect();
            assert_eq!(joined, lengths, "{name}");
            assert!(!pruned || lengths.iter().any(|rows| *rows != lengths[0]), "{lengths:?}");
            println!("{name}, pruned {pruned}: scores {apart:.1e} apart");
        }
    }
    Ok(())
}

/// A machine for `tokens` tokens of which nothing is dropped, whole or in parts.
fn room(config: &Config, tokens: usize) -> models::Result<Room> {
    let shape = cache_shape(config, tokens, WINDOW, Kind::Float)?;
    let bytes = shape.pages * shape.page_bytes();
    Ok(Room { window: WINDOW, batch: 5, ..Room::new(config, bytes) })
}

fn whole(name: &str, tokens: usize) -> Result<CpuExecutor> {
    let lm = Decoder::load(&weights(name)?)?;
    let (room, hooks) = (room(lm.config(), tokens)?, pruning(&surrogate(lm.config(), 24)?)?);
    Ok(CpuExecutor::new(Box::new(lm), Kind::Float, hooks, room)?)
}

fn parts(name: &str, tokens: usize) -> Result<Ranks<CpuExecutor>> {
    let weights = Arc::new(weights(name)?);
    let surrogate = surrogate(weights.config(), 24)?;
    Ok(Ranks::start(Rank::on_host(2), move |rank| {
        let lm = Decoder::load_part(&weights, rank)?;
        let room = room(lm.config(), tokens)?;
        let own = surrogate.of_heads(rank.share(surrogate.kv_heads()))?;
        CpuExecutor::new(Box::new(lm), Kind::Float, pruning(&own)?, room)
    })?)
}

fn requests(vocabulary: usize, count: usize) -> Vec<Request> {
    let request = |i: usize| Request {
        question: ids([0, 1, 7][i % 3], vocabulary, 31 * i),
        limit: 30 + i * 13 % 20,
        sampling: Sampling {
            temperature: [0.0, 0.7, 0.0][i % 3],
            top_k: [0, 0, 5, 1][i % 4],
            seed: i as u64,
            ..Sampling::default()
        },
        ..Request::new(ids(1 + i % 5 * 12, vocabulary, i % 5 * 100))
    };
    (0..count).map(request).collect()
}

/// Half of the requests are there at the start, one comes each tick, and the fourth is cancelled on the way.
fn run<E: Executor>(
    scheduler: &mut Scheduler<E>,
    requests: &[Request],
) -> Result<Vec<(Vec<u32>, Option<End>)>> {
    let (mut now, mut order) = (Duration::ZERO, Vec::new());
    let (mut tokens, mut ends) = (BTreeMap::<_, Vec<u32>>::new(), BTreeMap::new());
    let (there, coming) = requests.split_at(requests.len() / 2);
    for request in there {
        order.push(scheduler.submit(request.clone(), now)?);
    }
    let mut coming = coming.iter();
    while coming.len() > 0 || !scheduler.is_idle() {
        if let Some(request) = coming.next() {
            order.push(scheduler.submit(request.clone(), now)?);
        }
        now += Duration::from_millis(1);
        if now == Duration::from_millis(9) {
            scheduler.cancel(order[3], now);
        }
        for (id, event) in scheduler.tick(|| now) {
            match event {
                Event::Token(token) => tokens.entry(id).or_default().push(token),
                Event::End(end) => drop(ends.insert(id, end)),
            }
        }
    }
    Ok(order
        .into_iter()
        .map(|id| (tokens.remove(&id).unwrap_or_default(), ends.remove(&id)))
        .collect())
}

#[test]
fn an_engine_over_parts_writes_what_one_over_the_whole_writes() -> Result<()> {
    // Where pages are short, and where contexts can be kept for each other.
    for (name, tokens, short) in [("kvzap/model", 110, true), ("families/qwen3", 2000, false)] {
        let requests = requests(weights(name)?.config().vocab_size, 9);
        let settings = Settings { slice: 16, ..Settings::default() };
        let mut one = Scheduler::new(whole(name, tokens)?, settings.clone());
        let wanted = run(&mut one, &requests)?;
        let mut two = Scheduler::new(parts(name, tokens)?, settings);
        let found = run(&mut two, &requests)?;
        for (i, ((found, end), (wanted, whole))) in found.iter().zip(&wanted).enumerate() {
            // What is cancelled has come as far as there was time for.
            let both = if i == 3 { found.len().min(wanted.len()) } else { wanted.len() };
            assert_eq!(found[..both], wanted[..both], "{name}, request {i}");
            let (Some(end), Some(whole)) = (end, whole) else { continue };
            assert!(i == 3 || end.stop.is_ok(), "{:?}", end.stop);
            assert!(i == 3 || end.usage.held == whole.usage.held, "{name}, request {i}");
        }
        let (pages, totals) = (two.machine().limits().pages, two.totals());
        println!("{name}: {totals:?}");
        assert!(!short || totals.preemptions > 0, "{totals:?}");
        assert!(short || two.machine().free_pages() <= pages);
    }
    Ok(())
}

#[test]
fn pages_are_counted_where_least_are_left() -> Result<()> {
    let mut machine = parts("kvzap/model", 200)?;
    let all = machine.free_pages();
    assert_eq!(all, machine.limits().pages);
    let text = machine.begin()?;
    machine.read(text, &ids(150, 128, 1))?;
    assert_eq!(machine.pages_to_read(text), machine.most_pages(150));
    while !machine.advance(text, 50)? {}
    let taken = all - machine.free_pages();
    assert_eq!(machine.pages(text), taken, "of the rank that keeps most");
    let held = machine.held(text)?;
    assert!(held.pages < 2 * taken, "the other keeps less: {held:?}, {taken}");
    assert!(held.pages > taken);
    // More than there is: refused before any rank has begun, so that none waits for another.
    let long = machine.begin()?;
    machine.read(long, &ids(200, 128, 1))?;
    let refused = machine.advance(long, 1);
    assert!(
        matches!(refused, Err(Error::Cache(paged_kernels::Error::OutOfPages { .. }))),
        "{refused:?}"
    );
    machine.release(long)?;
    machine.draw(text, &Sampling::default())?;
    machine.step(&[text])?;
    assert_eq!(machine.drawn(true)?.len(), 2);
    let bytes = machine.suspend(text)?;
    assert!(bytes > 0 && machine.free_pages() == all);
    machine.resume(text)?;
    assert_eq!(machine.free_pages(), all - machine.pages(text));
    machine.release(text)?;
    assert_eq!(machine.free_pages(), all);
    Ok(())
}

#[test]
fn random_parts_are_of_one_model_with_its_biases_however_many_are_drawn_at_once() -> Result<()> {
    // With biases everywhere: what is added to a sum must be added once.
    let folder = tempfile::tempdir()?;
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 48, "intermediate_size": 40,
        "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16,
        "vocab_size": 96, "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
        "tie_word_embeddings": false, "attention_bias": true, "mlp_bias": true,
    });
    std::fs::write(folder.path().join("config.json"), config.to_string())?;
    let source = Source::Random(Random::open(folder.path(), 7)?);
    let weights = Weights::new(source, Kind::Float, Device::Cpu)?;
    let whole = Decoder::load(&weights)?;
    let passes = [ids(40, 96, 1)];
    let (wanted, _) = read(&whole, &Hooks::default(), &passes)?;
    for parts in [2, 4, 2, 4] {
        let found = on_each(&Rank::on_host(parts), |rank| {
            read(&Decoder::load_part(&weights, rank)?, &Hooks::default(), &passes)
        })?;
        assert_close(&found[0].0, &wanted, 2e-5, "random parts, drawn side by side");
    }
    Ok(())
}

#[test]
fn what_does_not_divide_is_refused_with_numbers() -> Result<()> {
    let refused = |name: &str, parts: usize| -> Result<String> {
        let rank = &Rank::on_host(parts)[0];
        Ok(Decoder::load_part(&weights(name)?, rank).unwrap_err().to_string())
    };
    let heads = refused("llama/gqa3_tied", 2)?;
    assert!(heads.starts_with("kv heads (3) cannot be cut into 2 equal parts; "), "{heads}");
    assert!(refused("families/olmo2", 2)?.starts_with("a norm over all heads (4)"));
    assert!(refused("repo/olmo2", 2)?.contains("on one device"));
    let surrogate = surrogate(weights("kvzap/model")?.config(), 8)?;
    assert!(surrogate.of_heads(1..3).is_err());
    Ok(())
}

/// A machine of which one rank cannot read on.
struct Failing {
    machine: CpuExecutor,
    fails: bool,
}

impl Executor for Failing {
    fn advance(&mut self, text: TextId, budget: usize) -> models::Result<bool> {
        if self.fails {
            return Err(Error::NoLogits);
        }
        self.machine.advance(text, budget)
    }

    fn limits(&self) -> Limits {
        self.machine.limits()
    }
    fn free_pages(&self) -> usize {
        self.machine.free_pages()
    }
    fn most_pages(&self, tokens: usize) -> usize {
        self.machine.most_pages(tokens)
    }
    fn pages_to_read(&self, text: TextId) -> usize {
        self.machine.pages_to_read(text)
    }
    fn pages_to_step(&self, text: TextId) -> usize {
        self.machine.pages_to_step(text)
    }
    fn pages(&self, text: TextId) -> usize {
        self.machine.pages(text)
    }
    fn begin(&mut self) -> models::Result<TextId> {
        self.machine.begin()
    }
    fn read(&mut self, text: TextId, tokens: &[u32]) -> models::Result<()> {
        self.machine.read(text, tokens)
    }
    fn draw(&mut self, text: TextId, sampling: &Sampling) -> models::Result<()> {
        self.machine.draw(text, sampling)
    }
    fn step(&mut self, batch: &[TextId]) -> models::Result<()> {
        self.machine.step(batch)
    }
    fn drawn(&mut self, wait: bool) -> models::Result<Vec<Drawn>> {
        self.machine.drawn(wait)
    }
    fn fork(&mut self, text: TextId) -> models::Result<TextId> {
        self.machine.fork(text)
    }
    fn suspend(&mut self, text: TextId) -> models::Result<usize> {
        self.machine.suspend(text)
    }
    fn resume(&mut self, text: TextId) -> models::Result<()> {
        self.machine.resume(text)
    }
    fn release(&mut self, text: TextId) -> models::Result<()> {
        self.machine.release(text)
    }
    fn held(&mut self, text: TextId) -> models::Result<Held> {
        self.machine.held(text)
    }
}

#[test]
fn a_rank_that_fails_lets_the_others_go_and_loses_the_machine() -> Result<()> {
    let weights = Arc::new(weights("kvzap/model")?);
    let mut machine = Ranks::start(Rank::on_host(2), move |rank| {
        let lm = Decoder::load_part(&weights, rank)?;
        let room = room(lm.config(), 100)?;
        let machine = CpuExecutor::new(Box::new(lm), Kind::Float, Hooks::default(), room)?;
        Ok(Failing { machine, fails: rank.index() == 1 })
    })?;
    let text = machine.begin()?;
    // An error on all ranks alike, of a call in which none waits, costs nothing.
    assert!(matches!(machine.read(text, &[]), Err(Error::EmptyPrompt)));
    machine.read(text, &[1, 2, 3])?;
    // Rank 0 waits for the sum of its first layer.
    let error = machine.advance(text, 1).unwrap_err();
    assert!(matches!(error, Error::NoLogits), "the cause, and not that the other was let go");
    for error in [machine.step(&[text]), machine.release(text)] {
        assert!(matches!(error, Err(Error::RankLost { rank: 1, .. })), "{error:?}");
    }
    // And one that cannot start says why.
    let none = Ranks::<CpuExecutor>::start(Rank::on_host(2), |_| Err(Error::EmptyPrompt));
    assert!(matches!(none, Err(Error::EmptyPrompt)));
    Ok(())
}
