//! A decode step on a card with cudarc alone: no tensor library. `cargo run -p paged-kernels --features cuda --example cuda`
//!
//! A prompt of 1000 tokens of which each head keeps what it likes, then ten new tokens. Nothing waits for the card but what is printed.

use half::bf16;
use paged_kernels::{
    CacheShape, DeviceBits, DeviceView, DeviceViewMut, Dtype, Error, Mode, Resident, Seats,
};

const HEADS: usize = 8;
const GROUP: usize = 4;
const DIM: usize = 128;
const PROMPT: usize = 1000;
const STEPS: usize = 10;

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
    // The first card and its default stream, and words for what is missing.
    let seats = Seats { texts: 1, tokens: PROMPT + STEPS, pass: 1, mode: Mode::Fast };
    let mut cache = match Resident::new(shape, seats) {
        Err(error @ (Error::NoDriver | Error::NoCard)) => {
            println!("{error}");
            return Ok(());
        }
        cache => cache?,
    };
    let stream = cache.stream().clone();
    let text = cache.allocate()?;

    let noise = |n: usize| (0..n).map(|i| bf16::from_f32((i as f32 * 0.37).sin())).collect();
    let rows: Vec<bf16> = noise(HEADS * PROMPT * DIM);
    let rows = stream.clone_htod(&rows)?;
    let prompt = DeviceView::of(&rows, [HEADS, PROMPT, DIM], &stream)?;
    // Head h keeps one old token in h + 1; a set bit drops.
    let words = (0..HEADS * PROMPT.div_ceil(32)).map(|i| {
        let (head, first) = (i / PROMPT.div_ceil(32), i % PROMPT.div_ceil(32) * 32);
        (0..32).map(|t| u32::from(!(first + t).is_multiple_of(head + 1)) << t).sum()
    });
    let bits = stream.clone_htod(&words.collect::<Vec<u32>>())?;
    let drops = DeviceBits::of(&bits, [HEADS, PROMPT], &stream)?;
    cache.fill(text, 0, prompt, prompt, drops)?;
    println!("rows that each head keeps of {PROMPT}: {:?}", cache.lengths(text)?);

    let rows: Vec<bf16> = noise(HEADS * GROUP * DIM);
    let queries = stream.clone_htod(&rows)?;
    let new = stream.clone_htod(&rows[..HEADS * DIM])?;
    let mut out = stream.alloc_zeros::<bf16>(HEADS * GROUP * DIM)?;
    cache.batch(&[Some(text)])?;
    for _ in 0..STEPS {
        cache.begin_step()?;
        let new = DeviceView::of(&new, [HEADS, 1, DIM], &stream)?;
        cache.append(0, new, new, None)?;
        let queries = DeviceView::of(&queries, [HEADS * GROUP, 1, DIM], &stream)?;
        let out = DeviceViewMut::of(&mut out, [HEADS * GROUP, 1, DIM], &stream)?;
        cache.attend(0, queries, (DIM as f32).powf(-0.5), out, None)?;
    }
    println!("first output of the last step: {:?}", &stream.clone_dtoh(&out)?[..4]);
    Ok(())
}
