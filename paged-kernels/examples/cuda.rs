//! A decode step on a card with cudarc alone: no tensor library. `cargo run -p paged-kernels --features cuda --example cuda`
//!
//! A prompt of 1000 tokens of which each head keeps what it likes, then ten new tokens, all on the caller's stream.

use half::bf16;
use paged_kernels::cudarc::driver::CudaContext;
use paged_kernels::{CacheShape, Cuda, DeviceView, DeviceViewMut, Dtype, Error, PagedAttention};

const HEADS: usize = 8;
const GROUP: usize = 4;
const DIM: usize = 128;
const PROMPT: usize = 1000;

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let shape = CacheShape {
        layers: 1,
        kv_heads: HEADS,
        query_heads: HEADS * GROUP,
        head_dim: DIM,
        page_size: 16,
        window: 128,
        pages: 4096,
        dtype: Dtype::Bf16,
    };
    // The first card and its default stream would be `Cuda::new(shape)`, which also says in words what is missing.
    if let Err(error @ (Error::NoDriver | Error::NoCard)) = Cuda::new(shape.clone()) {
        println!("{error}");
        return Ok(());
    }
    let stream = CudaContext::new(0)?.new_stream()?;
    let mut cache = Cuda::on(stream.clone(), shape)?;
    let text = cache.allocate()?;

    let noise = |n: usize| (0..n).map(|i| bf16::from_f32((i as f32 * 0.37).sin())).collect();
    let rows: Vec<bf16> = noise(HEADS * PROMPT * DIM);
    let rows = stream.clone_htod(&rows)?;
    let prompt = DeviceView::of(&rows, [HEADS, PROMPT, DIM], &stream)?;
    // Head h keeps one old token in h + 1.
    let drops = (0..HEADS * PROMPT)
        .map(|i| !(i % PROMPT).is_multiple_of(i / PROMPT + 1))
        .collect::<Vec<_>>();
    cache.fill_on_device(text, 0, prompt, prompt, &drops)?;
    println!("rows that each head keeps of {PROMPT}: {:?}", cache.lengths(text)?);

    let rows: Vec<bf16> = noise(HEADS * GROUP * DIM);
    let queries = stream.clone_htod(&rows)?;
    let new = stream.clone_htod(&rows[..HEADS * DIM])?;
    let mut out = stream.alloc_zeros::<bf16>(HEADS * GROUP * DIM)?;
    for _ in 0..10 {
        cache.begin_step(&[(text, 1)])?;
        let new = DeviceView::of(&new, [HEADS, 1, DIM], &stream)?;
        cache.append_on_device(0, new, new, &[false; HEADS])?;
        let queries = DeviceView::of(&queries, [HEADS * GROUP, 1, DIM], &stream)?;
        let out = DeviceViewMut::of(&mut out, [HEADS * GROUP, 1, DIM], &stream)?;
        cache.attend_on_device(0, queries, (DIM as f32).powf(-0.5), out, None)?;
    }
    println!("first output of the last step: {:?}", &stream.clone_dtoh(&out)?[..4]);
    Ok(())
}
