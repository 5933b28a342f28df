//! Times passes of several tokens over ragged caches, in graph replays, and writes the table.
//!
//! `bench_passes results.json DATE TFLOPS`: the last is what a large bf16 matrix product reaches on the card, of which the floor
//! of arithmetic is made; `benches/passes.py` measures it, and SDPA beside it.
//!
//! 8 kv heads, 4 query heads each, head dim 128, pages of 16; head h of 8 keeps (h + 1) ninths of a text. As many layers as
//! make a replay read far more than the L2 holds. The median of 20 replays counts; outputs are poisoned with NaN and compared
//! with the plain kernel's.

use half::bf16;
use paged_kernels::cudarc::driver::sys::{
    CUevent_flags, CUgraphInstantiate_flags, CUstreamCaptureMode,
};
use paged_kernels::cudarc::driver::{CudaContext, CudaSlice, CudaStream};
use paged_kernels::{
    CacheShape, DeviceBits, DeviceView, DeviceViewMut, Dtype, Mode, Resident, Seats,
};
use std::error::Error;
use std::sync::Arc;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const HEADS: usize = 8;
const GROUP: usize = 4;
const DIM: usize = 128;
const REPLAYS: usize = 20;
/// Bytes of keys and values that a replay reads at least.
const READ: usize = 200 << 20;

fn main() -> Result<()> {
    let arguments = std::env::args().skip(1).collect::<Vec<_>>();
    let [results, date, tflops] = &arguments[..] else {
        return Err("usage: bench_passes results.json DATE TFLOPS".into());
    };
    let tflops = tflops.parse::<f64>()?;
    let context = CudaContext::new(0)?;
    let stream = context.new_stream()?;
    let (card, copy) = (context.name()?, copy_bandwidth(&stream)?);
    println!("{card}: copies {copy:.0} GB/s, a matrix product {tflops:.0} TFLOP/s");
    println!("type  tokens   kept       µs    floor  ratio  TFLOP/s  begin µs    error");
    let mut json = Vec::new();
    // Bytes of a key or a value.
    for (dtype, width) in [(Dtype::Bf16, 2 * DIM), (Dtype::F8, DIM + 4)] {
        for (kept, tokens) in [2048, 8192, 32_768]
            .into_iter()
            .flat_map(|kept| [1, 4, 16, 40, 128, 512, 2048].map(|tokens| (kept, tokens)))
        {
            let row = run(&stream, dtype, kept, tokens)?;
            let queries = tokens * HEADS * GROUP * DIM * 2;
            let bytes = ((kept + tokens) * HEADS * width * 2 + 2 * queries) as f64;
            let seen = (kept * tokens + tokens * (tokens + 1) / 2) as f64;
            let flops = seen * (HEADS * GROUP * DIM * 4) as f64;
            let floor = (bytes / copy / 1e3).max(flops / tflops / 1e6);
            let rate = flops / row.us / 1e6;
            println!(
                "{dtype:<5?} {tokens:>6} {kept:>6} {:>8.1} {floor:>8.1} {:>6.2} {rate:>8.0} {:>9.0}  {:.1e}",
                row.us,
                row.us / floor,
                row.begin,
                row.error
            );
            json.push(serde_json::json!({
                "op": if dtype == Dtype::F8 { "attend, pass, fp8" } else { "attend, pass" }, "tokens": tokens, "kept": kept, "us": round(row.us),
                "floor_us": round(floor), "tflops": round(rate), "begin_us": round(row.begin),
                "card": card, "date": date,
            }));
        }
    }
    let lines = json.iter().map(|row| format!("  {row}")).collect::<Vec<_>>();
    Ok(std::fs::write(results, format!("[\n{}\n]\n", lines.join(",\n")))?)
}

fn round(x: f64) -> f64 {
    (x * 100.0).round() / 100.0
}

struct Row {
    us: f64,
    /// Of planning, all layers.
    begin: f64,
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

/// A text of whose tokens half are kept, unequally over the heads.
fn run(stream: &Arc<CudaStream>, dtype: Dtype, kept: usize, tokens: usize) -> Result<Row> {
    let layers = READ.div_ceil(kept * HEADS * DIM * 4);
    let text_tokens = 2 * kept;
    let pages = layers * HEADS * (2 * kept + tokens + 200).div_ceil(16);
    let shape = CacheShape {
        layers,
        kv_heads: HEADS,
        query_heads: HEADS * GROUP,
        head_dim: DIM,
        page_size: 16,
        window: 128,
        pages,
        dtype,
    };
    let most = text_tokens + tokens;
    let seats = Seats { texts: 1, tokens: most, pass: tokens, mode: Mode::Fast };
    let mut cache = Resident::on(stream.clone(), shape, seats)?;
    let text = cache.allocate()?;
    let words = text_tokens.div_ceil(32);
    let mut drops = vec![u32::MAX; HEADS * words];
    for head in 0..HEADS {
        for token in (0..text_tokens).filter(|token| token * 5 % 9 <= head) {
            drops[head * words + token / 32] &= !(1 << (token % 32));
        }
    }
    let bits = stream.clone_htod(&drops)?;
    let rows = stream.clone_htod(&noise(HEADS * text_tokens * DIM, 1))?;
    let values = stream.clone_htod(&noise(HEADS * text_tokens * DIM, 2))?;
    for layer in 0..layers {
        let view = |rows| DeviceView::of::<bf16>(rows, [HEADS, text_tokens, DIM], stream);
        let bits = DeviceBits::of(&bits, [HEADS, text_tokens], stream)?;
        cache.fill(text, layer, view(&rows)?, view(&values)?, bits)?;
    }
    let new = stream.clone_htod(&noise(HEADS * tokens * DIM, 3))?;
    let new = DeviceView::of(&new, [HEADS, tokens, DIM], stream)?;
    // Loads the kernels.
    cache.begin_pass(&[(text, 0)])?;
    stream.synchronize()?;
    let begin = timed(stream, || Ok(cache.begin_pass(&[(text, tokens)])?))?;
    (0..layers).try_for_each(|layer| cache.append(layer, new, new, None))?;

    let queries = noise(HEADS * GROUP * tokens * DIM, 4);
    let wide = stream.clone_htod(&queries.iter().map(|x| x.to_f32()).collect::<Vec<_>>())?;
    let queries = stream.clone_htod(&queries)?;
    let shape = [HEADS * GROUP, tokens, DIM];
    let poison = vec![bf16::NAN; HEADS * GROUP * tokens * DIM];
    let outs = (0..layers).map(|_| stream.clone_htod(&poison));
    let mut outs = outs.collect::<std::result::Result<Vec<_>, _>>()?;
    let scale = (DIM as f32).powf(-0.5);
    let (seen, wide) =
        (DeviceView::of(&queries, shape, stream)?, DeviceView::of(&wide, shape, stream)?);
    stream.synchronize()?;
    // Made before the capture, into which no slice's events may fall.
    let views = outs.iter_mut().map(|out| DeviceViewMut::of(out, shape, stream));
    let views = views.collect::<paged_kernels::Result<Vec<_>>>()?;
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED)?;
    let mut layer_views = views.into_iter().enumerate();
    let done = layer_views.try_for_each(|(layer, out)| cache.attend(layer, seen, scale, out, None));
    let graph = stream.end_capture(CUgraphInstantiate_flags(0));
    done?;
    let graph = graph?.ok_or("nothing was captured")?;
    let times = (0..REPLAYS + 2).map(|_| timed(stream, || Ok(graph.launch()?)));
    let mut times = times.collect::<Result<Vec<_>>>()?.split_off(2);
    times.sort_by(f64::total_cmp);
    let mut error = 0.0;
    if kept * tokens <= 8192 * 512 {
        let mut plain = stream.alloc_zeros::<f32>(HEADS * GROUP * tokens * DIM)?;
        let to = DeviceViewMut::of(&mut plain, shape, stream)?;
        cache.attend(layers - 1, wide, scale, to, None)?;
        let (plain, fast) = (stream.clone_dtoh(&plain)?, stream.clone_dtoh(&outs[layers - 1])?);
        let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
        let apart = norm(&mut fast.iter().zip(&plain).map(|(x, y)| f64::from(x.to_f32() - y)));
        error = apart / norm(&mut plain.iter().map(|&x| f64::from(x)));
        // A NaN left over from the poison must not pass.
        if error.is_nan() || error > 5e-3 {
            return Err(format!("{tokens} over {kept}: the fast kernel is off by {error}").into());
        }
    }
    if cache.missing()? > 0 {
        return Err(format!("{tokens} over {kept}: out of pages").into());
    }
    Ok(Row { us: times[times.len() / 2] / layers as f64, begin, error })
}

/// Microseconds of what `work` queues.
fn timed(stream: &Arc<CudaStream>, work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let event = || stream.context().new_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
    let (start, end) = (event()?, event()?);
    start.record(stream)?;
    work()?;
    end.record(stream)?;
    stream.synchronize()?;
    Ok(f64::from(start.elapsed_ms(&end)?) * 1e3)
}

/// GB/s of a copy of 2 GiB on the card, bytes read and written.
fn copy_bandwidth(stream: &Arc<CudaStream>) -> Result<f64> {
    const BYTES: usize = 2 << 30;
    let from: CudaSlice<u8> = stream.alloc_zeros(BYTES)?;
    let mut to: CudaSlice<u8> = stream.alloc_zeros(BYTES)?;
    let times = (0..10).map(|_| timed(stream, || Ok(stream.memcpy_dtod(&from, &mut to)?)));
    let best = times.collect::<Result<Vec<_>>>()?.into_iter().fold(f64::INFINITY, f64::min);
    Ok(2.0 * BYTES as f64 / best / 1e3)
}
