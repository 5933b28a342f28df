//! Times a surrogate's scores in graph replays and writes the table.
//!
//! `python3 benches/gemm.py > gemm.json` times the first GEMM alone in cuBLAS on the same card; then
//! `bench_scores results.json DATE [gemm.json] [--portable]`.
//!
//! Each case has as many surrogates and hidden states as make a replay read far more than the L2 holds, as the layers of a
//! model do; the median of 40 replays counts. The floor of few tokens and of linear surrogates is reading the weights and the
//! hidden states at 3000 GB/s, that of an MLP on many tokens its products at 989 TFLOP/s: what the card is sold as.

use half::bf16;
use paged_kernels::cudarc::driver::sys::{
    CUevent_flags, CUgraphInstantiate_flags, CUstreamCaptureMode,
};
use paged_kernels::cudarc::driver::{CudaContext, CudaGraph, CudaStream};
use paged_kernels::{
    DeviceBits, DeviceBitsMut, DeviceView, ScorePrecision, ScoreRule, Scores, SurrogateWeights,
};
use std::error::Error;
use std::sync::Arc;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const REPLAYS: usize = 40;
const TOKENS: [usize; 13] = [1, 4, 16, 32, 64, 128, 256, 512, 1024, 4096, 8192, 16384, 32768];
/// Name, columns, hidden units, heads.
const SURROGATES: [(&str, usize, usize, usize); 3] =
    [("mlp 8B", 4096, 512, 8), ("mlp 32B", 5120, 640, 8), ("linear 8B", 4096, 0, 8)];
/// Bytes that a replay reads at least.
const READ: usize = 200 << 20;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1).collect::<Vec<_>>();
    let all = arguments.len();
    arguments.retain(|word| word != "--portable");
    let portable = arguments.len() < all;
    let [results, date, gemm @ ..] = &arguments[..] else {
        return Err("usage: bench_scores results.json DATE [gemm.json] [--portable]".into());
    };
    let gemm = match gemm {
        [path, ..] => serde_json::from_str(&std::fs::read_to_string(path)?)?,
        [] => serde_json::Value::Null,
    };
    let context = CudaContext::new(0)?;
    let stream = context.new_stream()?;
    let card = context.name()?;
    let kernels =
        if portable { Scores::portable(stream.clone())? } else { Scores::on(stream.clone())? };
    println!("{card}{}", if portable { ", portable kernels" } else { "" });
    let mut json = Vec::new();
    for (name, dim, width, heads) in SURROGATES {
        for tokens in TOKENS {
            let us = time(&kernels, dim, width, heads, tokens)?;
            let weights = if width == 0 { heads * dim } else { width * dim };
            let read = ((weights + tokens * dim) * 2) as f64 / 3e6;
            let multiply = (2 * tokens * dim * width) as f64 / 989e6;
            let floor = read.max(multiply);
            let rows = gemm.as_array().map_or(&[][..], Vec::as_slice);
            let same = |row: &&serde_json::Value| {
                row["tokens"] == tokens && row["dim"] == dim && row["width"] == width
            };
            let gemm = rows.iter().find(same).and_then(|row| row["us"].as_f64());
            let ratio = gemm.map(|gemm| format!("  cuBLAS {gemm:.2} µs, {:.2} of it", us / gemm));
            println!(
                "{name:>9} {tokens:>6} tokens  {us:8.2} µs (floor {floor:.2}){}",
                ratio.unwrap_or_default()
            );
            json.push(serde_json::json!({
                "op": "scores", "case": name, "tokens": tokens, "portable": portable,
                "us": round(us), "floor_us": round(floor),
                "best_peer": gemm.map(|_| "cublas, first GEMM alone"),
                "best_peer_us": gemm.map(round), "card": card, "date": date,
            }));
        }
    }
    let lines = json.iter().map(|row| format!("  {row}")).collect::<Vec<_>>();
    Ok(std::fs::write(results, format!("[\n{}\n]\n", lines.join(",\n")))?)
}

fn round(x: f64) -> f64 {
    (x * 100.0).round() / 100.0
}

fn noise(n: usize, seed: u32) -> Vec<bf16> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        bf16::from_f32((state >> 8) as f32 / (1 << 23) as f32 - 1.0)
    };
    (0..n).map(|_| next()).collect()
}

fn time(kernels: &Scores, dim: usize, width: usize, heads: usize, tokens: usize) -> Result<f64> {
    let stream = kernels.stream();
    let row = if width == 0 { dim } else { width };
    let weights = (width * dim + heads * row) * 2;
    let copies = READ.div_ceil(weights + tokens * dim * 2).clamp(2, 64);
    let scaled = |n, seed, scale: f32| {
        noise(n, seed).into_iter().map(|x| bf16::from_f32(x.to_f32() * scale)).collect::<Vec<_>>()
    };
    let first = scaled(width * dim, 1, 3.0 / (dim as f32).sqrt());
    let second = scaled(heads * row, 2, 3.0 / (row as f32).sqrt());
    let (first_bias, second_bias) = (noise(width, 3), noise(heads, 4));
    let weights = if width == 0 {
        SurrogateWeights::Linear { weight: &second, bias: &second_bias }
    } else {
        SurrogateWeights::Mlp {
            first: &first,
            first_bias: &first_bias,
            second: &second,
            second_bias: &second_bias,
        }
    };
    let hidden = noise(tokens * dim, 5);
    let mut layers = Vec::new();
    for _ in 0..copies {
        let words = vec![!0u32; DeviceBits::words([heads, tokens])];
        let hidden = stream.clone_htod(&hidden)?;
        layers.push((kernels.surrogate(dim, weights)?, hidden, stream.clone_htod(&words)?));
    }
    // Made before the capture, into which no slice's events may fall.
    let calls = layers.iter_mut().map(|(surrogate, hidden, words)| -> Result<_> {
        let hidden = DeviceView::of(hidden, [1, tokens, dim], stream)?;
        Ok((surrogate, hidden, DeviceBitsMut::of(words, [heads, tokens], stream)?))
    });
    let calls = calls.collect::<Result<Vec<_>>>()?;
    stream.synchronize()?;
    let rule = ScoreRule { threshold: 0.0, precision: ScorePrecision::MatchTorchBf16 };
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED)?;
    let queue = || -> Result<()> {
        for (surrogate, hidden, mut bits) in calls {
            kernels.score(surrogate, hidden, rule, &mut bits, None)?;
        }
        Ok(())
    };
    let done = queue();
    let graph = stream.end_capture(CUgraphInstantiate_flags(0));
    done?;
    let us = replay(stream, &graph?.ok_or("nothing was captured")?, copies)?;
    let (_, _, words) = &layers[copies - 1];
    let words = stream.clone_dtoh(words)?;
    let share = words.iter().map(|word| word.count_ones() as usize).sum::<usize>() as f64
        / (heads * tokens) as f64;
    if !(0.01..0.99).contains(&share) && tokens > 16 {
        return Err(format!("{tokens} tokens: {share} of the bits are set").into());
    }
    Ok(us)
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
