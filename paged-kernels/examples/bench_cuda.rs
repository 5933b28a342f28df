//! Times the kernels of `Cuda` on the lengths that the peers are timed on, in graph replays, and writes the table.
//!
//! `python3 benches/lengths.py > lengths.txt`, then
//! `bench_cuda lengths.txt results.json DATE [peers.json]`: the last is what the peers' script wrote in the same run.
//!
//! Each case is a cache of as many layers as make a replay read far more than the L2 holds, every layer with lengths of its
//! own. One graph attends from each layer in turn; the median of 40 replays counts. Outputs are poisoned with NaN before,
//! and the fast kernel's are compared with the plain one's. Pages lie in the order in which they were taken.

use half::bf16;
use paged_kernels::cudarc::driver::sys::{
    CUevent_flags, CUgraphInstantiate_flags, CUstreamCaptureMode,
};
use paged_kernels::cudarc::driver::{CudaContext, CudaGraph, CudaSlice, CudaStream};
use paged_kernels::{CacheShape, Cuda, DeviceView, DeviceViewMut, Dtype, PagedAttention};
use std::error::Error;
use std::fmt::Write;
use std::sync::Arc;
use std::time::Instant;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const HEADS: usize = 8;
const QUERY_HEADS: usize = 32;
const DIM: usize = 128;
const REPLAYS: usize = 40;

fn main() -> Result<()> {
    let arguments = std::env::args().skip(1).collect::<Vec<_>>();
    let [lengths, results, date, peers @ ..] = &arguments[..] else {
        return Err("usage: bench_cuda lengths.txt results.json DATE [peers.json]".into());
    };
    let peers = match peers {
        [path, ..] => serde_json::from_str(&std::fs::read_to_string(path)?)?,
        [] => serde_json::Value::Null,
    };
    let context = CudaContext::new(0)?;
    let stream = context.new_stream()?;
    let card = context.name()?;
    let copy = copy_bandwidth(&stream)?;
    let read = peers["ceilings"]["read_gbs"].as_f64();
    println!("{card}: copies {copy:.0} GB/s, reads {read:?} GB/s (the peers' reduction)");
    let floor = read.unwrap_or(copy);
    let mut json = Vec::new();
    for case in cases(&std::fs::read_to_string(lengths)?)? {
        let rows = run(&case, &stream)?;
        let bytes = case.lengths.iter().flatten().sum::<usize>() as f64 / case.lengths.len() as f64
            * (DIM * 2 * 2) as f64;
        let (best, best_us) = best_peer(&peers, &case);
        let mut line = format!("{:>7} {:>4} {:>7}", case.name, case.keep, case.dist);
        for (op, us, bytes) in [
            ("attend", rows.attend, bytes),
            ("append", rows.append, rows.append_bytes),
            ("plan (host)", rows.plan, 0.0),
        ] {
            let floor_us = bytes / floor / 1e3;
            write!(line, "  {op} {us:.2} µs (floor {floor_us:.2})")?;
            let peer = (op == "attend").then_some((&best, best_us));
            json.push(serde_json::json!({
                "op": op, "case": case.name, "keep": case.keep, "dist": case.dist,
                "us": round(us), "floor_us": round(floor_us),
                "best_peer": peer.and_then(|(name, _)| name.clone()),
                "best_peer_us": peer.and_then(|(_, us)| us).map(round),
                "card": card, "date": date,
            }));
        }
        println!("{line}  best peer {best:?} {best_us:?}  error {:.1e}", rows.error);
    }
    let lines = json.iter().map(|row| format!("  {row}")).collect::<Vec<_>>();
    Ok(std::fs::write(results, format!("[\n{}\n]\n", lines.join(",\n")))?)
}

fn round(x: f64) -> f64 {
    (x * 100.0).round() / 100.0
}

/// One case of `benches/lengths.py`.
struct Case {
    name: String,
    keep: f64,
    dist: String,
    sequences: usize,
    tokens: usize,
    /// `[layers][sequences * HEADS]`.
    lengths: Vec<Vec<usize>>,
}

fn cases(text: &str) -> Result<Vec<Case>> {
    let mut lines = text.lines();
    let mut cases = Vec::new();
    while let Some(line) = lines.next() {
        let [name, keep, dist, sequences, tokens, layers] = line.split(' ').collect::<Vec<_>>()[..]
        else {
            return Err(format!("cannot read `{line}`").into());
        };
        let mut lengths = Vec::new();
        for _ in 0..layers.parse::<usize>()? {
            let line = lines.next().ok_or("the file ends within a case")?;
            lengths.push(line.split(' ').map(str::parse).collect::<std::result::Result<_, _>>()?);
        }
        cases.push(Case {
            name: name.into(),
            keep: keep.parse()?,
            dist: dist.into(),
            sequences: sequences.parse()?,
            tokens: tokens.parse()?,
            lengths,
        });
    }
    Ok(cases)
}

/// The fastest that the peers' script found in a case, over all of its peers that take such heads.
fn best_peer(peers: &serde_json::Value, case: &Case) -> (Option<String>, Option<f64>) {
    let rows = peers["rows"].as_array().map_or(&[][..], Vec::as_slice);
    let same = rows.iter().filter(|row| {
        row["case"] == *case.name && row["keep"] == case.keep && row["dist"] == *case.dist
    });
    let best = same
        .filter_map(|row| Some((row["peer"].as_str()?.to_string(), row["us"].as_f64()?)))
        .min_by(|a, b| a.1.total_cmp(&b.1));
    best.unzip()
}

struct Rows {
    attend: f64,
    append: f64,
    append_bytes: f64,
    plan: f64,
    error: f64,
}

fn noise(n: usize, seed: u32) -> Vec<bf16> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        bf16::from_f32((state >> 8) as f32 / (1 << 23) as f32 - 1.0)
    };
    (0..n).map(|_| next()).collect()
}

fn run(case: &Case, stream: &Arc<CudaStream>) -> Result<Rows> {
    let (layers, n) = (case.lengths.len(), case.sequences);
    let pages = case.lengths.iter().flatten().map(|len| len.max(&129).div_ceil(16)).sum::<usize>();
    let shape = CacheShape {
        layers,
        kv_heads: HEADS,
        query_heads: QUERY_HEADS,
        head_dim: DIM,
        page_size: 16,
        window: 128,
        pages,
        dtype: Dtype::Bf16,
    };
    let mut cache = Cuda::on(stream.clone(), shape)?;
    // The step adds a token to each head.
    let prompt = case.tokens - 1;
    let rows = stream.clone_htod(&noise(HEADS * prompt * DIM, 1))?;
    let keys = DeviceView::of(&rows, [HEADS, prompt, DIM], stream)?;
    let mut step = Vec::new();
    for sequence in 0..n {
        let text = cache.allocate()?;
        step.push((text, 1));
        for (layer, lengths) in case.lengths.iter().enumerate() {
            let mut drops = vec![true; HEADS * prompt];
            for head in 0..HEADS {
                // A head of 128 rows gets 129: the window and the step's token.
                let kept = lengths[sequence * HEADS + head].saturating_sub(1 + 128);
                drops[head * prompt..][..kept].fill(false);
            }
            cache.fill_on_device(text, layer, keys, keys, &drops)?;
        }
    }
    stream.synchronize()?;
    let start = Instant::now();
    cache.begin_step(&step)?;
    stream.synchronize()?;
    let plan = start.elapsed().as_secs_f64() * 1e6;

    let new = stream.clone_htod(&noise(HEADS * n * DIM, 2))?;
    let new = DeviceView::of(&new, [HEADS, n, DIM], stream)?;
    let append = capture(stream, || {
        for layer in 0..layers {
            cache.append_on_device(layer, new, new, &vec![false; HEADS * n])?;
        }
        Ok(())
    })?;
    let append = replay(stream, &append, layers)?;

    let queries = noise(QUERY_HEADS * n * DIM, 3);
    let wide = stream.clone_htod(&queries.iter().map(|x| x.to_f32()).collect::<Vec<_>>())?;
    let queries = stream.clone_htod(&queries)?;
    let shape = [QUERY_HEADS, n, DIM];
    let poison = vec![bf16::NAN; QUERY_HEADS * n * DIM];
    let calls = layers * 16usize.div_ceil(layers);
    let mut outs = (0..calls)
        .map(|_| stream.clone_htod(&poison))
        .collect::<std::result::Result<Vec<_>, _>>()?;
    // Made before the capture, into which no slice's events may fall.
    let seen = DeviceView::of(&queries, shape, stream)?;
    let views = outs.iter_mut().map(|out| DeviceViewMut::of(out, shape, stream));
    let views = views.collect::<std::result::Result<Vec<_>, _>>()?;
    stream.synchronize()?;
    let graph = capture(stream, || {
        for (i, out) in views.into_iter().enumerate() {
            cache.attend_on_device(i % layers, seen, (DIM as f32).powf(-0.5), out, None)?;
        }
        Ok(())
    })?;
    let attend = replay(stream, &graph, calls)?;
    let mut error: f64 = 0.0;
    for layer in [0, layers - 1] {
        let mut plain = stream.alloc_zeros::<f32>(QUERY_HEADS * n * DIM)?;
        let (queries, out) =
            (DeviceView::of(&wide, shape, stream)?, DeviceViewMut::of(&mut plain, shape, stream)?);
        cache.attend_on_device(layer, queries, (DIM as f32).powf(-0.5), out, None)?;
        let (plain, fast) = (stream.clone_dtoh(&plain)?, stream.clone_dtoh(&outs[layer])?);
        let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
        let apart = norm(&mut fast.iter().zip(&plain).map(|(x, y)| f64::from(x.to_f32() - y)));
        let relative = apart / norm(&mut plain.iter().map(|&x| f64::from(x)));
        // A NaN left over from the poison must not pass.
        error = if relative.is_nan() { f64::NAN } else { error.max(relative) };
    }
    if error.is_nan() || error > 5e-3 {
        return Err(format!("{}: the fast kernel is off by {error}", case.name).into());
    }
    let append_bytes = (HEADS * n * DIM * 2 * 2 * 2) as f64;
    Ok(Rows { attend, append, append_bytes, plan, error })
}

fn capture(stream: &Arc<CudaStream>, work: impl FnOnce() -> Result<()>) -> Result<CudaGraph> {
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED)?;
    let done = work();
    let graph = stream.end_capture(CUgraphInstantiate_flags(0));
    done?;
    graph?.ok_or_else(|| "nothing was captured".into())
}

/// Median microseconds of a call, of which the graph holds `calls`.
fn replay(stream: &Arc<CudaStream>, graph: &CudaGraph, calls: usize) -> Result<f64> {
    let context = stream.context();
    let event = || context.new_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
    let mut times = Vec::new();
    for i in 0..REPLAYS + 3 {
        let (start, end) = (event()?, event()?);
        start.record(stream)?;
        graph.launch()?;
        end.record(stream)?;
        stream.synchronize()?;
        if i >= 3 {
            times.push(f64::from(start.elapsed_ms(&end)?) * 1e3 / calls as f64);
        }
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

/// GB/s of a copy of 2 GiB on the card, bytes read and written.
fn copy_bandwidth(stream: &Arc<CudaStream>) -> Result<f64> {
    const BYTES: usize = 2 << 30;
    let from: CudaSlice<u8> = stream.alloc_zeros(BYTES)?;
    let mut to: CudaSlice<u8> = stream.alloc_zeros(BYTES)?;
    let mut best = f64::INFINITY;
    for _ in 0..10 {
        let event = || stream.context().new_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
        let (start, end) = (event()?, event()?);
        start.record(stream)?;
        stream.memcpy_dtod(&from, &mut to)?;
        end.record(stream)?;
        stream.synchronize()?;
        best = best.min(f64::from(start.elapsed_ms(&end)?));
    }
    Ok(2.0 * BYTES as f64 / best / 1e6)
}
