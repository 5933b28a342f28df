//! Every case on every backend, against masked dense attention in f64.

mod common;

use common::{New, Noise, Twins, on_every_backend, on_resident, plain, small};
use paged_kernels::{CacheShape, Dtype, PagedAttention, View, ViewMut};

macro_rules! cases {
    ($run:ident) => {
        $run! {
            attention_equals_masked_dense_attention => check;
            every_head_dim_and_group_works => check_dims_and_groups;
            page_and_window_borders_hold => check_borders;
            keeping_all_is_plain_causal_attention => check_keep_all;
            a_prompt_may_come_as_a_step => check_prompt_as_step;
            a_nan_stays_in_its_head => check_nan;
            stale_rows_never_leak => check_stale_rows;
            large_negative_scores_are_no_mask => check_large_negative;
            an_empty_head_gives_zero => check_empty_head;
            a_step_is_causal_from_the_bottom_right => check_step_is_causal;
            huge_scores_do_not_overflow => check_huge_scores;
            removed_tokens_hold_no_bytes => check_bytes;
        }
    };
}
cases!(on_every_backend);
cases!(on_resident);

fn check<B: PagedAttention>(new: &New<B>, dtype: Dtype) {
    for (drop, page_size) in [(0.0, 4), (0.5, 4), (0.9, 16), (1.0, 16)] {
        let shape = CacheShape { page_size, ..small(dtype) };
        let mut twins = Twins::new(new(shape).unwrap(), drop);
        let (a, b) = (twins.prompt(23), twins.prompt(3));
        for step in [[(a, 1), (b, 1)], [(b, 1), (a, 7)], [(a, 2), (b, 11)], [(a, 1), (b, 0)]] {
            twins.step(&step).unwrap();
            twins.check_stats();
        }
        for _ in 0..12 {
            twins.step(&[(a, 1), (b, 1)]).unwrap();
        }
        twins.check_stats();
        println!("{dtype:?}, {drop} dropped: largest difference {:.1e}", twins.largest);
    }
}

fn check_dims_and_groups<B: PagedAttention>(new: &New<B>, dtype: Dtype) {
    for (head_dim, page_size) in
        [(64, 16), (80, 16), (96, 32), (128, 16), (256, 64), (24, 16), (7, 3)]
    {
        for group in [1, 2, 3, 4, 5, 7, 8, 16] {
            let query_heads = 2 * group;
            let shape = CacheShape { head_dim, page_size, query_heads, layers: 1, ..small(dtype) };
            let mut twins = Twins::new(new(shape).unwrap(), 0.5);
            let text = twins.prompt(40);
            twins.step(&[(text, 1)]).unwrap();
            twins.step(&[(text, 3)]).unwrap();
        }
    }
}

fn check_borders<B: PagedAttention>(new: &New<B>, dtype: Dtype) {
    // A segment of `Cpu` is 256 rows.
    for tokens in [0, 1, 15, 16, 17, 127, 128, 129, 130, 255, 256, 257, 600] {
        let shape = CacheShape { page_size: 16, window: 128, layers: 1, ..small(dtype) };
        let mut twins = Twins::new(new(shape).unwrap(), 0.6);
        let text = twins.prompt(tokens);
        for step in [1, 1, 4, 1, 30, 1] {
            twins.step(&[(text, step)]).unwrap();
        }
        twins.check_stats();
    }
}

fn check_keep_all<B: PagedAttention>(new: &New<B>, dtype: Dtype) {
    // The twin masks by window and drop bit; with the bits set but the window longer than the text nothing may go.
    for (drop, window) in [(0.0, 2), (1.0, 1000)] {
        let mut twins = Twins::new(new(CacheShape { window, ..small(dtype) }).unwrap(), drop);
        let text = twins.prompt(30);
        for tokens in [1, 5, 1, 1] {
            twins.step(&[(text, tokens)]).unwrap();
        }
        assert!(twins.backend.lengths(text).unwrap().iter().all(|&len| len == 38));
    }
}

fn check_prompt_as_step<B: PagedAttention>(new: &New<B>, dtype: Dtype) {
    let mut twins = Twins::new(new(small(dtype)).unwrap(), 0.8);
    let text = twins.allocate();
    for tokens in [50, 1, 1, 20, 3] {
        twins.step(&[(text, tokens)]).unwrap();
        twins.check_stats();
    }
}

fn check_nan<B: PagedAttention>(new: &New<B>, dtype: Dtype) {
    let ones = [1.0; 2 * 3 * 16];
    const SHAPE: [usize; 3] = [2, 3, 16];
    fn view(data: &[f32]) -> View<'_> {
        common::view(data, SHAPE)
    }
    for in_keys in [true, false] {
        let mut cache = new(plain(dtype)).unwrap();
        let text = cache.allocate().unwrap();
        cache.fill(text, 0, view(&ones), view(&ones), &[false; 6]).unwrap();
        cache.begin_step(&[(text, 3)]).unwrap();
        // The second of the step's tokens, in head 1.
        let mut bad = ones;
        bad[(3 + 1) * 16 + 5] = f32::NAN;
        let (keys, values) = if in_keys { (&bad, &ones) } else { (&ones, &bad) };
        cache.append(0, view(keys), view(values), &[false; 6]).unwrap();
        let (mut out, mut lse) = ([0.0; 96], [0.0; 6]);
        let out_view = ViewMut::new(&mut out[..], [2, 3, 16]).unwrap();
        cache.attend(0, view(&ones), 1.0, out_view, Some(&mut lse)).unwrap();
        let rows =
            out.chunks_exact(16).map(|row| row.iter().any(|x| x.is_nan())).collect::<Vec<_>>();
        assert_eq!(rows, [false, false, false, false, true, true]);
        assert_eq!(lse.map(f32::is_nan), [false, false, false, false, in_keys, in_keys]);
    }
}

fn check_stale_rows<B: PagedAttention>(new: &New<B>, dtype: Dtype) {
    for page_size in [4, 16] {
        let shape = CacheShape { page_size, ..small(dtype) };
        let mut twins = Twins::new(new(shape).unwrap(), 0.3);
        let neighbour = twins.prompt(9);
        let poison = vec![f32::NAN; 2 * 400 * 16];
        let poison = common::view(&poison, [2, 400, 16]);
        let poisoned = twins.backend.allocate().unwrap();
        for layer in 0..2 {
            twins.backend.fill(poisoned, layer, poison, poison, &[false; 800]).unwrap();
        }
        twins.backend.release(poisoned).unwrap();
        // The pages it leaves to the next text hold NaN everywhere: the neighbour keeps their memory alive.
        let text = twins.prompt(6);
        for tokens in [1, 5, 1, 2, 1] {
            twins.step(&[(text, tokens), (neighbour, 1)]).unwrap();
        }
    }
}

fn check_large_negative<B: PagedAttention>(new: &New<B>, dtype: Dtype) {
    let shape =
        CacheShape { head_dim: 128, kv_heads: 1, query_heads: 1, page_size: 16, ..plain(dtype) };
    let mut cache = new(shape).unwrap();
    let text = cache.allocate().unwrap();
    let (keys, mut values) = (vec![-800.0f32; 64 * 128], Noise(7).floats(64 * 128));
    values.chunks_mut(128).for_each(|row| dtype.round(row));
    fn view(data: &[f32], tokens: usize) -> View<'_> {
        common::view(data, [1, tokens, 128])
    }
    cache
        .fill(text, 0, view(&keys[..63 * 128], 63), view(&values[..63 * 128], 63), &[false; 63])
        .unwrap();
    cache.begin_step(&[(text, 1)]).unwrap();
    let last = (&keys[63 * 128..], &values[63 * 128..]);
    cache.append(0, view(last.0, 1), view(last.1, 1), &[false]).unwrap();
    let (mut out, mut lse) = (vec![0.0; 128], [0.0]);
    let out_view = ViewMut::new(&mut out[..], [1, 1, 128]).unwrap();
    cache.attend(0, view(&[1.0; 128], 1), common::scale(128), out_view, Some(&mut lse)).unwrap();
    assert!((lse[0] + 9046.808).abs() < 2e-3, "{}", lse[0]);
    for (d, x) in out.iter().enumerate() {
        let mean = values.iter().skip(d).step_by(128).sum::<f32>() / 64.0;
        assert!((x - mean).abs() < 1e-5);
    }
}

fn check_empty_head<B: PagedAttention>(new: &New<B>, dtype: Dtype) {
    if dtype == Dtype::F8 {
        return; // which has no infinities
    }
    let mut cache = new(plain(dtype)).unwrap();
    let text = cache.allocate().unwrap();
    cache.begin_step(&[(text, 1)]).unwrap();
    // A key of -inf against a query of 1 scores -inf: nothing is seen.
    let keys = [f32::NEG_INFINITY; 32];
    const SHAPE: [usize; 3] = [2, 1, 16];
    fn view(data: &[f32]) -> View<'_> {
        common::view(data, SHAPE)
    }
    cache.append(0, view(&keys), view(&[1.0; 32]), &[false; 2]).unwrap();
    let (mut out, mut lse) = ([1.0; 32], [0.0; 2]);
    let out_view = ViewMut::new(&mut out[..], [2, 1, 16]).unwrap();
    cache.attend(0, view(&[1.0; 32]), 1.0, out_view, Some(&mut lse)).unwrap();
    assert_eq!((out, lse), ([0.0; 32], [f32::NEG_INFINITY; 2]));
}

fn check_step_is_causal<B: PagedAttention>(new: &New<B>, dtype: Dtype) {
    let shape = CacheShape { kv_heads: 1, query_heads: 1, ..plain(dtype) };
    let mut cache = new(shape).unwrap();
    let text = cache.allocate().unwrap();
    let one_hot = (0..7 * 16).map(|i| f32::from(i / 16 == i % 16)).collect::<Vec<_>>();
    let (old, newer) = one_hot.split_at(5 * 16);
    fn view(data: &[f32], tokens: usize) -> View<'_> {
        common::view(data, [1, tokens, 16])
    }
    cache.fill(text, 0, view(old, 5), view(old, 5), &[false; 5]).unwrap();
    cache.begin_step(&[(text, 2)]).unwrap();
    cache.append(0, view(newer, 2), view(newer, 2), &[false; 2]).unwrap();
    let mut out = [0.0f32; 32];
    let out_view = ViewMut::new(&mut out[..], [1, 2, 16]).unwrap();
    cache.attend(0, view(&[0.0; 32], 2), 1.0, out_view, None).unwrap();
    for (row, keys) in [(&out[..16], 6), (&out[16..], 7)] {
        for (d, x) in row.iter().enumerate() {
            let expected = if d < keys { 1.0 / keys as f32 } else { 0.0 };
            assert!((x - expected).abs() < 1e-6, "{row:?}");
        }
    }
}

fn check_huge_scores<B: PagedAttention>(new: &New<B>, dtype: Dtype) {
    let mut cache = new(CacheShape { kv_heads: 1, query_heads: 1, ..plain(dtype) }).unwrap();
    let text = cache.allocate().unwrap();
    cache.begin_step(&[(text, 3)]).unwrap();
    let mut keys = [0.0f32; 48];
    (keys[0], keys[16], keys[32]) = (-128.0, 128.0, 64.0);
    let values = (0..48).map(|i| (i / 16) as f32).collect::<Vec<_>>();
    const SHAPE: [usize; 3] = [1, 3, 16];
    fn view(data: &[f32]) -> View<'_> {
        common::view(data, SHAPE)
    }
    cache.append(0, view(&keys), view(&values), &[false; 3]).unwrap();
    let (mut out, mut lse) = ([0.0; 48], [0.0; 3]);
    let out_view = ViewMut::new(&mut out[..], [1, 3, 16]).unwrap();
    cache.attend(0, view(&[128.0; 48]), 1.0, out_view, Some(&mut lse)).unwrap();
    assert_eq!(lse, [-16384.0, 16384.0, 16384.0]);
    assert_eq!([out[0], out[16], out[32]], [0.0, 1.0, 1.0]);
}

/// SmolLM2-135M's cache: two texts of 300 tokens, all dropped but the newest 128.
fn check_bytes<B: PagedAttention>(new: &New<B>, dtype: Dtype) {
    let shape = CacheShape {
        layers: 30,
        kv_heads: 3,
        query_heads: 9,
        head_dim: 64,
        page_size: 16,
        window: 128,
        pages: 30 * 3 * 16,
        dtype,
    };
    let each = 30 * 3 * 128 / 16 * shape.page_bytes();
    let mut cache = new(shape).unwrap();
    let rows = vec![1.0f32; 3 * 300 * 64];
    let rows = View::new(&rows[..], [3, 300, 64]).unwrap();
    // A card's memory is taken at once; the host's grows.
    let taken = cache.stats().reserved_bytes;
    let texts = [1, 2].map(|texts| {
        let text = cache.allocate().unwrap();
        for layer in 0..30 {
            cache.fill(text, layer, rows, rows, &[true; 900]).unwrap();
        }
        let stats = cache.stats();
        assert_eq!((stats.bytes, stats.rows), (texts * each, texts * 90 * 128));
        assert!(stats.reserved_bytes < stats.bytes.max(taken) + (1 << 20) + 1);
        text
    });
    texts.iter().for_each(|&text| cache.release(text).unwrap());
    let stats = cache.stats();
    assert_eq!((stats.bytes, stats.reserved_bytes, stats.peak_bytes), (0, taken, 2 * each));
}
