//! Times the kernels of `Resident` on the lengths that the peers are timed on, in graph replays, and writes the table.
//!
//! `python3 benches/lengths.py > lengths.txt`, then
//! `bench_cuda lengths.txt results.json DATE [peers.json]`: the last is what the peers' script wrote in the same run.
//!
//! Each case is a cache of as many layers as make a replay read far more than the L2 holds, every layer with lengths of its
//! own. One graph attends from each layer in turn; the median of 40 replays counts. Outputs are poisoned with NaN before,
//! and the fast kernel's are compared with the plain one's. Pages lie in the order in which they were taken. The plan of a
//! step is what a graph of plans and appends takes beyond one of appends; a fill is each text's and layer's only one, and
//! the median of three caches' counts.

use half::bf16;
use paged_kernels::cudarc::driver::sys::{
    CUevent_flags, CUgraphInstantiate_flags, CUstreamCaptureMode,
};
use paged_kernels::cudarc::driver::{CudaContext, CudaGraph, CudaSlice, CudaStream};
use paged_kernels::{
    CacheShape, DeviceBits, DeviceView, DeviceViewMut, Dtype, Gate, HeadNorms, Mode, Positions,
    Projected, Resident, ScorePrecision, ScoreRule, Seats,
};
use std::error::Error;
use std::fmt::Write;
use std::sync::Arc;

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
        let rows = run(&case, &stream, Mode::Fast, 16, Dtype::Bf16)?;
        let invariant = run(&case, &stream, Mode::BatchInvariant, 16, Dtype::Bf16)?;
        let large = run(&case, &stream, Mode::Fast, 64, Dtype::Bf16)?;
        let eight = run(&case, &stream, Mode::Fast, 16, Dtype::F8)?;
        let bytes = case.lengths.iter().flatten().sum::<usize>() as f64 / case.lengths.len() as f64
            * (DIM * 2 * 2) as f64;
        let (best, best_us) = best_peer(&peers, &case);
        let mut line = format!("{:>7} {:>4} {:>7}", case.name, case.keep, case.dist);
        for (op, us, bytes) in [
            ("attend", rows.attend, bytes),
            ("attend, batch-invariant", invariant.attend, bytes),
            ("attend, pages of 64", large.attend, bytes),
            ("attend, fp8", eight.attend, bytes * (DIM + 4) as f64 / (DIM * 2) as f64),
            ("append", rows.append, rows.append_bytes),
            ("append, fused", rows.fused, rows.fused_bytes),
            ("plan", rows.plan, 0.0),
            ("fill", rows.fill, rows.fill_bytes),
            ("fill, fp8", eight.fill, eight.fill_bytes),
            ("append, fused, fp8", eight.fused, eight.fused_bytes),
        ] {
            let floor_us = bytes / floor / 1e3;
            write!(line, "  {op} {us:.2} µs (floor {floor_us:.2})")?;
            let peer = op.starts_with("attend").then_some((&best, best_us));
            json.push(serde_json::json!({
                "op": op, "case": case.name, "keep": case.keep, "dist": case.dist,
                "us": round(us), "floor_us": round(floor_us),
                "best_peer": peer.and_then(|(name, _)| name.clone()),
                "best_peer_us": peer.and_then(|(_, us)| us).map(round),
                "card": card, "date": date,
            }));
        }
        println!(
            "{line}  best peer {best:?} {best_us:?}  error {:.1e}",
            rows.error.max(invariant.error).max(large.error).max(eight.error)
        );
        // After each case: a run that is cut off leaves those before.
        let lines = json.iter().map(|row| format!("  {row}")).collect::<Vec<_>>();
        let part = format!("{results}.part");
        std::fs::write(&part, format!("[\n{}\n]\n", lines.join(",\n")))?;
        std::fs::rename(part, results)?;
    }
    Ok(())
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
    fused: f64,
    fused_bytes: f64,
    plan: f64,
    fill: f64,
    fill_bytes: f64,
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

/// Rows that a head may grow by while it is timed: a window, whose tokens go after it.
const GROWTH: usize = 140;
/// Bytes of prompts to read from in turn, more than the L2 holds.
const PROMPTS: usize = 256 << 20;

/// A cache filled as a case says, and the microseconds of a fill.
fn filled(
    case: &Case,
    stream: &Arc<CudaStream>,
    mode: Mode,
    page_size: usize,
    dtype: Dtype,
) -> Result<(Resident, f64)> {
    let pages =
        case.lengths.iter().flatten().map(|len| (len.max(&129) + GROWTH).div_ceil(page_size)).sum();
    let shape = CacheShape {
        layers: case.lengths.len(),
        kv_heads: HEADS,
        query_heads: QUERY_HEADS,
        head_dim: DIM,
        page_size,
        window: 128,
        pages,
        dtype,
    };
    let tokens = case.lengths.iter().flatten().max().unwrap_or(&1) + GROWTH;
    let seats = Seats { texts: case.sequences, tokens, pass: 1, mode };
    let mut cache = Resident::on(stream.clone(), shape, seats)?;
    // The step adds a token to each head.
    let prompt = case.tokens - 1;
    let rows = noise(HEADS * prompt * DIM, 1);
    let copies = (PROMPTS / (2 * rows.len())).max(2);
    let rows = (0..copies).map(|_| stream.clone_htod(&rows));
    let rows = rows.collect::<std::result::Result<Vec<_>, _>>()?;
    let mut bits = Vec::new();
    let texts = |lengths| (0..case.sequences).map(move |text| (lengths, text));
    for (lengths, text) in case.lengths.iter().flat_map(texts) {
        let words = prompt.div_ceil(32);
        let mut drops = vec![u32::MAX; HEADS * words];
        for head in 0..HEADS {
            // A head of 128 rows gets 129: the window and the step's token.
            let kept = lengths[text * HEADS + head].saturating_sub(1 + 128);
            // Spread over the tokens before the window.
            let old = prompt.saturating_sub(128).max(1);
            for token in (0..kept).map(|i| i * old / kept) {
                drops[head * words + token / 32] &= !(1 << (token % 32));
            }
        }
        bits.push(stream.clone_htod(&drops)?);
    }
    let views = rows.iter().map(|rows| DeviceView::of(rows, [HEADS, prompt, DIM], stream));
    let views = views.collect::<paged_kernels::Result<Vec<_>>>()?;
    let bits = bits.iter().map(|bits| DeviceBits::of(bits, [HEADS, prompt], stream));
    let bits = bits.collect::<paged_kernels::Result<Vec<_>>>()?;
    let texts = (0..case.sequences).map(|_| cache.allocate());
    let texts = texts.collect::<paged_kernels::Result<Vec<_>>>()?;
    // The first fill is not timed: it takes memory for a prompt so long.
    stream.synchronize()?;
    let mut calls = 0;
    let mut fill = |cache: &mut Resident, layer: usize, text: usize| -> Result<()> {
        let (keys, values) = (views[calls % copies], views[(calls + 1) % copies]);
        calls += 2;
        Ok(cache.fill(texts[text], layer, keys, values, bits[layer * case.sequences + text])?)
    };
    fill(&mut cache, 0, 0)?;
    stream.synchronize()?;
    let graph = capture(stream, || {
        for layer in 0..case.lengths.len() {
            for text in (0..case.sequences).filter(|&text| (layer, text) != (0, 0)) {
                fill(&mut cache, layer, text)?;
            }
        }
        Ok(())
    })?;
    graph.upload()?;
    let us = timed(stream, &graph)? / (case.lengths.len() * case.sequences - 1) as f64;
    cache.batch(&texts.into_iter().map(Some).collect::<Vec<_>>())?;
    Ok((cache, us))
}

fn run(
    case: &Case,
    stream: &Arc<CudaStream>,
    mode: Mode,
    page_size: usize,
    dtype: Dtype,
) -> Result<Rows> {
    let (layers, n) = (case.lengths.len(), case.sequences);
    let mut fills = Vec::new();
    for _ in 0..2 {
        fills.push(filled(case, stream, mode, page_size, dtype)?.1);
    }
    let (mut cache, fill) = filled(case, stream, mode, page_size, dtype)?;
    fills.push(fill);
    fills.sort_by(f64::total_cmp);
    let kept = case.lengths.iter().flatten().map(|len| len.max(&129) - 1).sum::<usize>();
    // Rows of a key and a value: in as bf16, out as they are stored.
    let stored = if dtype == Dtype::F8 { DIM + 4 } else { DIM * dtype.bytes() };
    let fill_bytes = (kept * 2 * (DIM * 2 + stored)) as f64 / (layers * n) as f64;
    cache.begin_step()?;

    let new = stream.clone_htod(&noise(HEADS * n * DIM, 2))?;
    let new = DeviceView::of(&new, [HEADS, n, DIM], stream)?;
    let drops = stream.clone_htod(&vec![u32::MAX; HEADS * n.div_ceil(32)])?;
    let drops = DeviceBits::of(&drops, [HEADS, n], stream)?;
    stream.synchronize()?;
    let appends = |cache: &mut Resident| -> Result<()> {
        Ok((0..layers).try_for_each(|layer| cache.append(layer, new, new, Some(drops)))?)
    };
    let append = capture(stream, || appends(&mut cache))?;
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
            cache.attend(i % layers, seen, (DIM as f32).powf(-0.5), out, None)?;
        }
        Ok(())
    })?;
    let attend = replay(stream, &graph, calls)?;
    let mut error: f64 = 0.0;
    for layer in [0, layers - 1] {
        let mut plain = stream.alloc_zeros::<f32>(QUERY_HEADS * n * DIM)?;
        let (queries, out) =
            (DeviceView::of(&wide, shape, stream)?, DeviceViewMut::of(&mut plain, shape, stream)?);
        cache.attend(layer, queries, (DIM as f32).powf(-0.5), out, None)?;
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
    let fused = fused(&mut cache, n, stream)?;
    let steps = capture(stream, || {
        for _ in 0..4 {
            cache.begin_step()?;
            appends(&mut cache)?;
        }
        Ok(())
    })?;
    let plan = replay(stream, &steps, 4)? - append * layers as f64;
    if cache.missing()? > 0 {
        return Err(format!("{}: out of pages", case.name).into());
    }
    let append_bytes = (HEADS * n * DIM * 2 * 2 * 2) as f64;
    // Projections in, queries and rows out.
    let fused_bytes = ((QUERY_HEADS + 2 * HEADS) * n * DIM * 2 * 2) as f64;
    Ok(Rows {
        attend,
        append,
        append_bytes,
        fused,
        fused_bytes,
        plan,
        fill: fills[1],
        fill_bytes,
        error,
    })
}

/// Microseconds of an append with head norms, rotation and the second layer of a surrogate of 512 units.
fn fused(cache: &mut Resident, n: usize, stream: &Arc<CudaStream>) -> Result<f64> {
    const UNITS: usize = 512;
    let columns = (QUERY_HEADS + 2 * HEADS) * DIM;
    let qkv = stream.clone_htod(&noise(n * columns, 4))?;
    let units = stream.clone_htod(&noise(n * UNITS, 5))?;
    let weights = stream.clone_htod(&noise(HEADS * UNITS, 6))?;
    let positions = stream.clone_htod(&vec![30_000.0f32; n])?;
    let inverse = stream.clone_htod(&vec![0.01f32; DIM / 2])?;
    let mut queries = stream.alloc_zeros::<bf16>(QUERY_HEADS * n * DIM)?;
    let norm = DeviceView::strided(&weights, [1, 1, DIM], [0, 0], stream)?;
    let rule = ScoreRule { threshold: 0.0, precision: ScorePrecision::MatchTorchBf16 };
    let projected = Projected {
        qkv: DeviceView::of(&qkv, [1, n, columns], stream)?,
        norms: Some(HeadNorms { query: norm, key: norm, epsilon: 1e-6 }),
        positions: Positions::Given(DeviceView::of(&positions, [1, n, 1], stream)?),
        inverse: DeviceView::of(&inverse, [1, 1, DIM / 2], stream)?,
        turned: 1.0,
        gate: Some(Gate {
            units: DeviceView::of(&units, [1, n, UNITS], stream)?,
            second: Some([
                DeviceView::of(&weights, [1, HEADS, UNITS], stream)?,
                DeviceView::strided(&weights, [1, 1, HEADS], [0, 0], stream)?,
            ]),
            rule,
        }),
    };
    let mut queries = DeviceViewMut::of(&mut queries, [QUERY_HEADS, n, DIM], stream)?;
    cache.begin_step()?;
    stream.synchronize()?;
    let layers = cache.shape().layers;
    let graph = capture(stream, || {
        Ok((0..layers).try_for_each(|layer| cache.append_fused(layer, projected, &mut queries))?)
    })?;
    replay(stream, &graph, layers)
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
    let times = (0..REPLAYS + 3).map(|_| timed(stream, graph)).collect::<Result<Vec<_>>>()?;
    let mut times = times[3..].to_vec();
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2] / calls as f64)
}

/// Microseconds of a graph.
fn timed(stream: &Arc<CudaStream>, graph: &CudaGraph) -> Result<f64> {
    let event = || stream.context().new_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
    let (start, end) = (event()?, event()?);
    start.record(stream)?;
    graph.launch()?;
    end.record(stream)?;
    stream.synchronize()?;
    Ok(f64::from(start.elapsed_ms(&end)?) * 1e3)
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
