//! How fast `Cpu` decodes: time of a step's attention over all layers, of the rest of the step, keys and values read a
//! second, and their share of what plain reads of memory reach on as many threads.
//!
//! Other programs can only add time, so each layer counts with its fastest of many calls; the sum of the medians beside
//! it shows how busy the machine was. `cargo run --release -p paged-kernels --example decode_speed`

use paged_kernels::{CacheShape, Cpu, Dtype, PagedAttention, View, ViewMut};
use std::time::{Duration, Instant};

struct Case {
    name: &'static str,
    layers: usize,
    kv_heads: usize,
    group: usize,
    dim: usize,
    context: usize,
    tokens: usize,
    dtype: Dtype,
}

/// Steps that are timed.
const STEPS: usize = 40;

/// Sums over the parts of a step: of the fastest run of each, and of the median.
fn sums(mut runs: Vec<Vec<Duration>>) -> [Duration; 2] {
    runs.iter_mut().for_each(|part| part.sort());
    [runs.iter().map(|part| part[0]).sum(), runs.iter().map(|part| part[part.len() / 2]).sum()]
}

/// Pseudo-random numbers in -1..1.
fn noise(n: usize) -> Vec<f32> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// Bytes a second that `threads` threads read from memory, 16 MiB at a time.
fn read_bandwidth(threads: usize) -> f64 {
    const PART: usize = 4 << 20;
    let data = noise(16 * PART);
    let mut runs = vec![Vec::new(); 16];
    for _ in 0..STEPS {
        for (part, run) in data.chunks_exact(PART).zip(&mut runs) {
            let start = Instant::now();
            std::thread::scope(|scope| {
                let mut shares = part.chunks_exact(PART / threads);
                let own = shares.next();
                for share in shares {
                    scope.spawn(|| read(share));
                }
                own.map(read);
            });
            run.push(start.elapsed());
        }
    }
    (data.len() * 4) as f64 / sums(runs)[0].as_secs_f64()
}

fn read(data: &[f32]) {
    std::hint::black_box(pulp::Arch::new().dispatch(|| sum(data)));
}

#[inline(always)]
fn sum(data: &[f32]) -> f32 {
    let mut sums = [0.0f32; 32];
    for block in data.as_chunks::<32>().0 {
        (0..32).for_each(|l| sums[l] += block[l]);
    }
    sums.into_iter().sum()
}

fn run(case: &Case, threads: usize, bandwidth: f64) -> paged_kernels::Result<()> {
    let &Case { layers, kv_heads, group, dim, context, tokens, dtype, .. } = case;
    let page_size = 16;
    let pages = layers * kv_heads * (context + 200 * tokens).div_ceil(page_size);
    let query_heads = kv_heads * group;
    let window = 128;
    let shape = CacheShape {
        layers,
        kv_heads,
        query_heads,
        head_dim: dim,
        page_size,
        window,
        pages,
        dtype,
    };
    let mut cache = Cpu::with_threads(shape, threads)?;
    let sequence = cache.allocate()?;
    let prompt = noise(kv_heads * context * dim);
    let drops = vec![true; kv_heads * tokens.max(context)];
    for layer in 0..layers {
        let rows = View::new(&prompt[..], [kv_heads, context, dim])?;
        cache.fill(sequence, layer, rows, rows, &vec![false; kv_heads * context])?;
    }
    let queries = noise(query_heads * tokens * dim);
    let mut out = vec![0.0; queries.len()];
    let scale = (dim as f32).powf(-0.5);
    let (mut attention, mut rest) = (vec![Vec::new(); layers], vec![Vec::new(); layers + 1]);
    for _ in 0..STEPS {
        let start = Instant::now();
        cache.begin_step(&[(sequence, tokens)])?;
        rest[layers].push(start.elapsed());
        for layer in 0..layers {
            let start = Instant::now();
            let new = View::new(&prompt[..kv_heads * tokens * dim], [kv_heads, tokens, dim])?;
            cache.append(layer, new, new, &drops[..kv_heads * tokens])?;
            rest[layer].push(start.elapsed());
            let start = Instant::now();
            let queries = View::new(&queries[..], [query_heads, tokens, dim])?;
            let out = ViewMut::new(&mut out[..], [query_heads, tokens, dim])?;
            cache.attend(layer, queries, scale, out, None)?;
            attention[layer].push(start.elapsed());
        }
    }
    let ([fastest, median], [rest, _]) = (sums(attention), sums(rest));
    let rows = cache.stats().rows;
    let bytes = rows * 2 * dim * dtype.bytes();
    let speed = bytes as f64 / fastest.as_secs_f64();
    let operations = (4 * rows * group * tokens * dim) as f64 / fastest.as_secs_f64();
    println!(
        "| {} | {dtype:?} | {threads} | {:.0} | {:.0} | {:.0} | {:.1} | {:.2} | {:.0} |",
        case.name,
        fastest.as_secs_f64() * 1e6,
        median.as_secs_f64() * 1e6,
        rest.as_secs_f64() * 1e6,
        speed / 1e9,
        speed / bandwidth,
        operations / 1e9,
    );
    Ok(())
}

fn main() -> paged_kernels::Result<()> {
    let small = Case {
        name: "SmolLM2-135M, 2k",
        layers: 30,
        kv_heads: 3,
        group: 3,
        dim: 64,
        context: 2048,
        tokens: 1,
        dtype: Dtype::F32,
    };
    let cases = [
        Case { ..small },
        Case { name: "SmolLM2-135M, 2k, 60 % removed", context: 819, ..small },
        Case { name: "SmolLM2-135M, 2k", dtype: Dtype::Bf16, ..small },
        Case { name: "SmolLM2-135M, 2k", dtype: Dtype::F16, ..small },
        Case { name: "20 tokens over 600 rows", context: 600, tokens: 20, ..small },
        Case {
            name: "G 4, D 128, 8k",
            layers: 4,
            kv_heads: 8,
            group: 4,
            dim: 128,
            context: 8192,
            ..small
        },
        Case {
            name: "G 7, D 128, 8k",
            layers: 4,
            kv_heads: 4,
            group: 7,
            dim: 128,
            context: 8192,
            ..small
        },
    ];
    for threads in [1, 2] {
        let bandwidth = read_bandwidth(threads);
        println!("\n{threads} threads read {:.1} GB/s\n", bandwidth / 1e9);
        println!(
            "| case | dtype | threads | attention, µs | median | rest, µs | GB/s | share | GFLOP/s |"
        );
        println!("| --- | --- | --- | --- | --- | --- | --- | --- | --- |");
        for case in &cases {
            run(case, threads, bandwidth)?;
        }
    }
    Ok(())
}
