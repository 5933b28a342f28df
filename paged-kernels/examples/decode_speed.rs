//! How fast `Cpu` decodes: time of a step's attention over all layers, of the rest of the step, keys and values read a
//! second, and their share of what plain reads of memory reach on as many threads. Fastest of several steps, since
//! other programs can only add time; the median beside it shows whether they did. `cargo run --release -p paged-kernels --example decode_speed`

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

/// Fastest and median.
fn times<E>(mut run: impl FnMut() -> Result<Duration, E>) -> Result<[Duration; 2], E> {
    let mut times = (0..40).map(|_| run()).collect::<Result<Vec<_>, E>>()?;
    times.sort();
    Ok([times[0], times[times.len() / 2]])
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

/// Bytes a second that `threads` threads read from memory, the fastest of several passes over `bytes` bytes.
fn read_bandwidth(threads: usize, bytes: usize) -> f64 {
    let data = noise(bytes / 4);
    let part = data.len() / threads;
    let read = || {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for data in data.chunks_exact(part) {
                scope.spawn(|| std::hint::black_box(pulp::Arch::new().dispatch(|| sum(data))));
            }
        });
        Ok::<_, std::convert::Infallible>(start.elapsed())
    };
    let Ok([fastest, _]) = times(read);
    (part * threads * 4) as f64 / fastest.as_secs_f64()
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
    let mut step = |attend: bool| -> paged_kernels::Result<Duration> {
        let start = Instant::now();
        cache.begin_step(&[(sequence, tokens)])?;
        for layer in 0..layers {
            let new = View::new(&prompt[..kv_heads * tokens * dim], [kv_heads, tokens, dim])?;
            cache.append(layer, new, new, &drops[..kv_heads * tokens])?;
        }
        let rest = start.elapsed();
        let start = Instant::now();
        for layer in (0..layers).filter(|_| attend) {
            let queries = View::new(&queries[..], [query_heads, tokens, dim])?;
            let out = ViewMut::new(&mut out[..], [query_heads, tokens, dim])?;
            cache.attend(layer, queries, scale, out, None)?;
        }
        Ok(if attend { start.elapsed() } else { rest })
    };
    let [fastest, median] = times(|| step(true))?;
    let [rest, _] = times(|| step(false))?;
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
        let bandwidth = read_bandwidth(threads, 512 << 20);
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
