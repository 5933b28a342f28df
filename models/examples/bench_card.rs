//! Times the card's decode step and prefill for a model of random weights.
//!
//! `bench_card FOLDER RESULTS CASE…`, where a case is `decode:BxT:keep` or `prefill:T:keep` and FOLDER holds a config.json.
//!
//! Decode: caches are filled with random rows, of which a random surrogate drops a share, the threshold being the quantile of
//! its scores for random hidden states; the same surrogate judges the tokens of the steps. A step is a graph's replay
//! between two events. The floor is the weights and the kept rows over the bandwidth of a copy in the same run.

use kvzap::{Affine, LayerInput, Scorer, Surrogate, Threshold, TorchSurrogate};
use models::{
    CardCache, CausalLm, Config, Decoder, Gates, Hooks, KvCache, Place, Pruning, Random, Sampling,
    Source, Step, Token, Weights, cache_shape, cuda, resident,
};
use paged_kernels::cudarc::driver::{CudaContext, CudaStream, sys::CUevent_flags};
use paged_kernels::{CacheShape, Mode, Resident, Seats};
use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;
use tch::{Device, Kind, Tensor};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const STEPS: usize = 48;
const WIDTH: usize = 512;

fn main() -> Result<()> {
    let arguments = std::env::args().skip(1).collect::<Vec<_>>();
    let [folder, results, cases @ ..] = &arguments[..] else {
        return Err("usage: bench_card FOLDER RESULTS CASE…".into());
    };
    let device = cuda()?;
    let context = CudaContext::new(0)?;
    let stream = context.new_stream()?;
    let start = Instant::now();
    let _no_grad = tch::no_grad_guard();
    let source = Source::Random(Random::open(Path::new(folder), 1)?);
    let model = Decoder::load(&Weights::new(source, Kind::BFloat16, device)?)?;
    let config = model.config().clone();
    let surrogate = surrogate(&config)?;
    let scorer = TorchSurrogate::new(&surrogate, Kind::BFloat16, device)?;
    let copy = copy_bandwidth(&stream)?;
    let card = context.name()?;
    println!("{card}, copies {copy:.0} GB/s, model made in {:.1} s", start.elapsed().as_secs_f64());
    let mut rows = Vec::new();
    for case in cases {
        let parts = case.split(':').collect::<Vec<_>>();
        let keep: f64 = parts[2].parse()?;
        let row = match parts[0] {
            "decode" => {
                let (batch, tokens) = parts[1].split_once('x').ok_or("BxT")?;
                let mode = if parts.get(3) == Some(&"invariant") {
                    Mode::BatchInvariant
                } else {
                    Mode::Fast
                };
                decode(&model, &scorer, device, batch.parse()?, tokens.parse()?, keep, copy, mode)
            }
            _ => prefill(&model, &surrogate, &scorer, device, parts[1].parse()?, keep),
        };
        match row {
            Ok(mut row) => {
                println!("{case}: {row}");
                row["case"] = case.as_str().into();
                row["card"] = card.as_str().into();
                row["copy_gbs"] = copy.into();
                rows.push(row);
            }
            Err(error) => println!("{case}: {error}"),
        }
    }
    Ok(std::fs::write(results, serde_json::to_string_pretty(&rows)?)?)
}

fn surrogate(config: &Config) -> Result<Surrogate> {
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
        let first = Affine::new(noise(WIDTH * config.hidden_size, 0.03), noise(WIDTH, 0.03))?;
        let second =
            Affine::new(noise(config.kv_heads * WIDTH, 0.06), noise(config.kv_heads, 0.3))?;
        layers.push([first, second]);
    }
    Ok(Surrogate::mlp(layers)?)
}

/// The score under which all but `keep` of a layer's tokens are.
fn quantile(scores: &Tensor, keep: f64) -> Result<f32> {
    let (sorted, _) = scores.to_kind(Kind::Float).flatten(0, -1).sort(0, false);
    let at = ((sorted.numel() - 1) as f64 * (1.0 - keep)) as i64;
    Ok(sorted.double_value(&[at]) as f32)
}

fn scores(scorer: &TorchSurrogate, layer: usize, hidden: &Tensor) -> Result<Tensor> {
    let none = Tensor::new();
    Ok(scorer.score(LayerInput { layer, hidden, queries: &none, keys: &none, values: &none })?)
}

fn room(
    config: &Config,
    device: Device,
    texts: usize,
    rows: usize,
    tokens: usize,
    mode: Mode,
) -> Result<Resident> {
    let shape = cache_shape(config, 16, 128, Kind::BFloat16)?;
    let pages = config.layers * config.kv_heads * texts * (rows.div_ceil(16) + 2);
    let shape = CacheShape { pages, ..shape };
    Ok(resident(device, shape, Seats { texts, tokens: tokens + 256, pass: 1, mode })?)
}

#[allow(clippy::too_many_arguments)]
fn decode(
    model: &Decoder,
    scorer: &TorchSurrogate,
    device: Device,
    batch: usize,
    tokens: usize,
    keep: f64,
    copy: f64,
    mode: Mode,
) -> Result<serde_json::Value> {
    let config = model.config();
    let kept = ((tokens - tokens.min(128)) as f64 * keep) as usize + tokens.min(128) + 256;
    let mut cache = room(config, device, batch, kept, tokens, mode)?;
    let shape = [1, config.kv_heads as i64, tokens as i64, config.head_dim as i64];
    let [keys, values] = [0; 2].map(|_| Tensor::randn(shape, (Kind::BFloat16, device)));
    let queries = Tensor::zeros([1, 1, 1, config.head_dim as i64], (Kind::BFloat16, device));
    let hidden =
        Tensor::randn([1, tokens as i64, config.hidden_size as i64], (Kind::BFloat16, device));
    let mut thresholds = vec![f32::NEG_INFINITY; config.layers];
    let mut drops = Vec::new();
    for (layer, threshold) in thresholds.iter_mut().enumerate().filter(|_| keep < 1.0) {
        let scores = scores(scorer, layer, &hidden)?;
        *threshold = quantile(&scores, keep)?;
        drops.push(scores.lt(f64::from(*threshold)));
    }
    let mut places = Vec::new();
    let mut bytes = 0;
    for text in 0..batch {
        let mut filling = CardCache::new(&mut cache)?;
        filling.begin(tokens)?;
        for layer in 0..config.layers {
            // Another text keeps other tokens.
            let drops = drops.get(layer).map(|drops| drops.roll([(text * 997) as i64], [2]));
            filling.store(layer, &keys, &values, drops.as_ref())?;
        }
        bytes += filling.usage().bytes;
        let (sequence, token) = (filling.sequence(), Token::Known(7));
        places.push(Some(Place {
            sequence,
            token,
            position: tokens,
            sampling: Sampling::default(),
        }));
    }
    drop((keys, values, queries, hidden, drops));
    let gates = (keep < 1.0).then(|| Gates::new(scorer, thresholds)).transpose()?;
    let mut step = Step::new(model, gates.as_ref(), &cache, config.vocab_size)?;
    step.batch(&mut cache, &places)?;
    let stream = cache.stream().clone();
    let mut times = (0..STEPS + 8)
        .map(|_| timed(&stream, || Ok(step.run(&cache, &[]).map(|_| ())?)))
        .collect::<Result<Vec<_>>>()?;
    let wall = Instant::now();
    for _ in 0..STEPS {
        step.run(&cache, &[])?;
    }
    stream.synchronize()?;
    let wall = wall.elapsed().as_secs_f64() * 1e3 / STEPS as f64;
    times.drain(..8);
    times.sort_by(f64::total_cmp);
    if cache.missing()? > 0 {
        return Err("out of pages".into());
    }
    let weights = weight_bytes(config);
    let floor = (weights + bytes) as f64 / copy / 1e6;
    let (free, total) = stream.context().mem_get_info()?;
    Ok(serde_json::json!({
        "ms": times[STEPS / 2], "min": times[0], "p90": times[STEPS * 9 / 10], "wall": wall,
        "floor": floor, "over": times[STEPS / 2] / floor, "kv_gb": bytes as f64 / 1e9,
        "used_gb": (total - free) as f64 / 1e9,
    }))
}

fn weight_bytes(config: &Config) -> usize {
    let attention =
        config.hidden_size * config.head_dim * 2 * (config.query_heads + config.kv_heads);
    let mlp = 3 * config.hidden_size * config.intermediate_size;
    2 * (config.layers * (attention + mlp) + config.vocab_size * config.hidden_size)
}

fn prefill(
    model: &Decoder,
    surrogate: &Surrogate,
    scorer: &TorchSurrogate,
    device: Device,
    tokens: usize,
    keep: f64,
) -> Result<serde_json::Value> {
    let config = model.config();
    let _ = scorer;
    let kept = ((tokens - tokens.min(128)) as f64 * keep.max(0.3)) as usize + tokens.min(128) + 512;
    let ids = (0..tokens as i64).map(|i| i * 7919 % 150_000).collect::<Vec<_>>();
    let ids = Tensor::from_slice(&ids).to_device(device).unsqueeze(0);
    let mut times = Vec::new();
    let mut bytes = 0;
    for _ in 0..4 {
        let mut cache = room(
            config,
            device,
            1,
            if keep < 1.0 { tokens } else { kept.max(tokens) },
            tokens,
            Mode::Fast,
        )?;
        let hooks = if keep < 1.0 {
            Hooks::pruning(Pruning {
                scorer: Box::new(TorchSurrogate::new(surrogate, Kind::BFloat16, device)?),
                policy: Box::new(Threshold::new(0.5)?),
                while_decoding: true,
            })
        } else {
            Hooks::default()
        };
        let mut text = CardCache::new(&mut cache)?;
        tch::Cuda::synchronize(0);
        let start = Instant::now();
        let hidden = model.forward(&ids, &mut text, &hooks)?;
        let _ = model.logits(&hidden.select(1, -1))?;
        tch::Cuda::synchronize(0);
        times.push(start.elapsed().as_secs_f64() * 1e3);
        bytes = text.usage().bytes;
    }
    times.drain(..1);
    times.sort_by(f64::total_cmp);
    Ok(serde_json::json!({ "ms": times[1], "min": times[0], "kv_gb": bytes as f64 / 1e9 }))
}

/// Milliseconds between two events.
fn timed(stream: &Arc<CudaStream>, work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let event = || stream.context().new_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
    let (start, end) = (event()?, event()?);
    start.record(stream)?;
    work()?;
    end.record(stream)?;
    stream.synchronize()?;
    Ok(f64::from(start.elapsed_ms(&end)?))
}

/// GB/s of a copy of 2 GiB, bytes read and written.
fn copy_bandwidth(stream: &Arc<CudaStream>) -> Result<f64> {
    const BYTES: usize = 2 << 30;
    let from = stream.alloc_zeros::<u8>(BYTES)?;
    let mut to = stream.alloc_zeros::<u8>(BYTES)?;
    let mut best = f64::INFINITY;
    for _ in 0..10 {
        best = best.min(timed(stream, || Ok(stream.memcpy_dtod(&from, &mut to)?))?);
    }
    Ok(2.0 * BYTES as f64 / best / 1e6)
}
