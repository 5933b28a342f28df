//! What only a card has: its driver, its streams, and sizes that the host's tests can't reach.

#![cfg(feature = "cuda")]

mod common;

use common::on_card::own_stream;
use common::{Noise, Twins, small, view};
use half::{bf16, f16};
use paged_kernels::{CacheShape, Cuda, DeviceView, Dtype, Error, PagedAttention, View, ViewMut};
use std::process::Command;

#[test]
fn without_a_card_there_is_an_error_with_advice() {
    // Where there is a card there is nothing to see.
    if let Err(error) = Cuda::new(small(Dtype::F32)) {
        assert!(matches!(
            error,
            Error::NoDriver | Error::OldDriver { .. } | Error::NoCard | Error::Card { .. }
        ));
        assert!(error.to_string().contains("; "), "{error}");
        println!("{error:?}");
    }
}

/// A library that is a driver by name alone, as some containers have it, and one of an older branch: this test again, in
/// a process that finds that library.
#[test]
fn a_stub_or_an_old_driver_gives_an_error_and_no_panic() {
    let init = "int cuInit(unsigned flags) { return 0; }";
    let version = "int cuDriverGetVersion(int *v) { *v = 12080; return 0; }";
    for (source, found) in [(init.to_string(), 0), (format!("{init}{version}"), 12_080)] {
        let folder = std::env::temp_dir().join(format!("stub-{}-{found}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("stub.c"), source).unwrap();
        let mut compiler = Command::new("cc");
        compiler.current_dir(&folder).args(["-shared", "-o", "libcuda.so.1", "stub.c"]);
        assert!(compiler.status().unwrap().success());
        std::fs::copy(folder.join("libcuda.so.1"), folder.join("libcuda.so")).unwrap();
        let again = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "without_a_card_there_is_an_error_with_advice", "--nocapture"])
            .env("LD_LIBRARY_PATH", &folder)
            .output()
            .unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
        let said = String::from_utf8_lossy(&again.stdout);
        let expected = Error::OldDriver { found, wanted: 13_000 };
        assert!(again.status.success() && said.contains(&format!("{expected:?}")), "{said}");
    }
}

#[test]
fn a_shape_that_no_kernel_holds_is_refused_before_the_driver_is_asked() {
    let shape = CacheShape { head_dim: 513, ..small(Dtype::F32) };
    let error = Cuda::new(shape).unwrap_err();
    assert!(matches!(error, Error::CacheShape { field: "head_dim", found: 513, .. }));
}

mod cuda {
    use super::*;

    /// Pages of 2^20 elements, of which each head uses one: the last of them lie past 2^32 elements.
    #[test]
    #[ignore = "needs a CUDA device"]
    fn pages_beyond_2_to_the_32_elements_are_their_own() {
        let (layers, kv_heads, pages) = (41, 100, 4150);
        let shape = CacheShape {
            layers,
            kv_heads,
            query_heads: kv_heads,
            head_dim: 128,
            page_size: 4096,
            window: 5,
            pages,
            dtype: Dtype::Bf16,
        };
        assert!(layers * kv_heads * shape.page_elements() > 1 << 32);
        let mut twins = Twins::new(Cuda::new(shape).unwrap(), 0.5);
        let text = twins.prompt(3);
        twins.step(&[(text, 1)]).unwrap();
        twins.step(&[(text, 2)]).unwrap();
    }

    #[test]
    #[ignore = "needs a CUDA device"]
    fn more_than_65535_sequences_and_heads_fit_a_step() {
        let (kv_heads, texts) = (64, 1100);
        let shape = CacheShape {
            layers: 1,
            kv_heads,
            query_heads: kv_heads,
            pages: 2 * kv_heads * texts,
            ..small(Dtype::Bf16)
        };
        assert!(kv_heads * texts > 65_535);
        let mut twins = Twins::new(Cuda::new(shape).unwrap(), 0.5);
        let texts = (0..texts).map(|i| (twins.prompt(i % 3), 1)).collect::<Vec<_>>();
        twins.step(&texts).unwrap();
        twins.step(&texts).unwrap();
    }

    /// Outputs and log-sums of a step's queries, which are exact in 16 bits: in the cache's type, which the fast kernel
    /// takes, or as f32, which it does not.
    fn attend(
        cache: &mut Cuda,
        queries: &[f32],
        tokens: usize,
        fast: bool,
    ) -> (Vec<f32>, Vec<f32>) {
        let CacheShape { query_heads, head_dim, dtype, .. } = *cache.shape();
        let shape = [query_heads, tokens, head_dim];
        let (mut out, mut lse) =
            (vec![f32::NAN; queries.len()], vec![f32::NAN; query_heads * tokens]);
        let (as_bf16, as_f16): (Vec<_>, Vec<_>) =
            queries.iter().map(|&x| (bf16::from_f32(x), f16::from_f32(x))).unzip();
        let queries = match dtype {
            Dtype::Bf16 | Dtype::F8 if fast => View::new(&as_bf16[..], shape),
            Dtype::F16 if fast => View::new(&as_f16[..], shape),
            _ => View::new(queries, shape),
        };
        let out_view = ViewMut::new(&mut out[..], shape).unwrap();
        let scale = common::scale(head_dim);
        cache.attend(0, queries.unwrap(), scale, out_view, Some(&mut lse)).unwrap();
        (out, lse)
    }

    fn fast_shape(head_dim: usize, kv_heads: usize, group: usize) -> CacheShape {
        CacheShape {
            layers: 1,
            kv_heads,
            query_heads: kv_heads * group,
            head_dim,
            page_size: 16,
            window: 20,
            pages: 1 << 14,
            dtype: Dtype::Bf16,
        }
    }

    /// Both kernels over the same pages, whose stale rows hold NaN.
    fn compare(shape: CacheShape, lengths: &[usize], drop: f64) {
        let mut twins = Twins::new(Cuda::new(shape.clone()).unwrap(), drop);
        let poison = vec![f32::NAN; shape.kv_heads * 3000 * shape.head_dim];
        let poison = view(&poison, [shape.kv_heads, 3000, shape.head_dim]);
        let poisoned = twins.backend.allocate().unwrap();
        let none = vec![false; shape.kv_heads * 3000];
        twins.backend.fill(poisoned, 0, poison, poison, &none).unwrap();
        twins.backend.release(poisoned).unwrap();
        let texts = lengths.iter().map(|&tokens| twins.prompt(tokens)).collect::<Vec<_>>();
        for step in 0..3 {
            // In the second step every other sequence rests.
            let rests = |i: usize| step == 1 && i % 2 == 1;
            let texts = texts.iter().enumerate().map(|(i, &text)| (text, usize::from(!rests(i))));
            let texts = texts.collect::<Vec<_>>();
            let tokens = texts.iter().map(|(_, tokens)| tokens).sum();
            twins.step(&texts).unwrap();
            let queries = twins.noise.floats(shape.query_heads * tokens * shape.head_dim);
            let (slow, slow_lse) = attend(&mut twins.backend, &queries, tokens, false);
            let (fast, fast_lse) = attend(&mut twins.backend, &queries, tokens, true);
            for (i, (x, y)) in fast_lse.iter().zip(&slow_lse).enumerate() {
                assert!((x - y).abs() < 1e-3, "{shape:?} {lengths:?}: log-sum {i}: {x} is not {y}");
            }
            let rows = fast.chunks_exact(shape.head_dim).zip(slow.chunks_exact(shape.head_dim));
            for (i, (x, y)) in rows.enumerate() {
                let norm =
                    |row: &mut dyn Iterator<Item = f32>| row.map(|x| x * x).sum::<f32>().sqrt();
                let error = norm(&mut x.iter().zip(y).map(|(x, y)| x - y));
                let error = error / norm(&mut y.iter().copied());
                let most = if shape.dtype == Dtype::F16 { 1e-3 } else { 5e-3 };
                assert!(error < most, "{shape:?} {lengths:?}: row {i} is off by {error}");
            }
            assert_eq!(fast, attend(&mut twins.backend, &queries, tokens, true).0, "same bits");
        }
    }

    #[test]
    #[ignore = "needs a CUDA device"]
    fn the_fast_kernel_gives_what_the_plain_one_gives() {
        for head_dim in [64, 96, 128, 256] {
            for group in [1, 2, 3, 4, 5, 7, 8, 16] {
                for dtype in [Dtype::Bf16, Dtype::F16, Dtype::F8] {
                    let shape = CacheShape { dtype, ..fast_shape(head_dim, 2, group) };
                    compare(shape, &[0, 1, 15, 16, 17, 700], 0.5);
                }
            }
        }
        for lengths in [&[0][..], &[31], &[5000], &[4000, 1, 1, 900, 2]] {
            compare(fast_shape(128, 8, 4), lengths, 0.3);
            compare(fast_shape(128, 1, 4), lengths, 0.0);
        }
        // More heads than blocks, so that two share a head that is the second of one of them: its part has an odd number, and of an
        // odd number of rows.
        let lengths = (0..50).map(|i| 100 + i * 37 % 600).collect::<Vec<_>>();
        for (head_dim, group) in [(128, 1), (128, 5), (128, 7), (256, 3)] {
            compare(fast_shape(head_dim, 3, group), &lengths, 0.3);
        }
        for page_size in [32, 64, 128] {
            let shape = CacheShape { page_size, pages: 1 << 11, ..fast_shape(128, 8, 4) };
            compare(shape.clone(), &[4000, 1, 64, 65, 900, 2], 0.3);
            let eight = CacheShape { dtype: Dtype::F8, ..shape.clone() };
            compare(eight, &[4000, 1, 64, 65, 900, 2], 0.3);
            compare(CacheShape { head_dim: 96, query_heads: 80, ..shape }, &[31, 16, 700], 0.5);
        }
        // More heads than blocks, and a page or two each.
        compare(fast_shape(128, 8, 4), &(0..90).map(|i| i % 40).collect::<Vec<_>>(), 0.3);
    }

    /// The fast kernel of a type must not take queries of the other 16 bits for its own.
    #[test]
    #[ignore = "needs a CUDA device"]
    fn queries_of_another_type_take_the_plain_kernel() {
        let mut twins = Twins::new(Cuda::new(fast_shape(128, 2, 4)).unwrap(), 0.5);
        let text = twins.prompt(300);
        twins.step(&[(text, 1)]).unwrap();
        let queries = twins.noise.floats(8 * 128);
        let wide = attend(&mut twins.backend, &queries, 1, false);
        let narrow = queries.iter().map(|&x| f16::from_f32(x)).collect::<Vec<_>>();
        let (mut out, mut lse) = (vec![f32::NAN; 8 * 128], vec![f32::NAN; 8]);
        let out_view = ViewMut::new(&mut out[..], [8, 1, 128]).unwrap();
        let narrow = View::new(&narrow[..], [8, 1, 128]).unwrap();
        twins.backend.attend(0, narrow, common::scale(128), out_view, Some(&mut lse)).unwrap();
        assert_eq!(wide, (out, lse));
    }

    #[test]
    #[ignore = "needs a CUDA device"]
    fn a_nan_stays_in_its_head_in_the_fast_kernel() {
        let mut cache = Cuda::new(fast_shape(128, 2, 4)).unwrap();
        let text = cache.allocate().unwrap();
        let good = Noise(3).floats(2 * 600 * 128);
        let mut bad = good.clone();
        bad[(600 + 333) * 128 + 5] = f32::NAN;
        let shape = [2, 600, 128];
        cache.fill(text, 0, view(&bad, shape), view(&good, shape), &[false; 1200]).unwrap();
        cache.begin_step(&[(text, 1)]).unwrap();
        let row = view(&good[..256], [2, 1, 128]);
        cache.append(0, row, row, &[false; 2]).unwrap();
        let (out, lse) = attend(&mut cache, &good[..8 * 128], 1, true);
        assert!(out[..4 * 128].iter().all(|x| x.is_finite()));
        assert!(out[4 * 128..].iter().all(|x| x.is_nan()));
        assert!(lse[..4].iter().all(|x| x.is_finite()) && lse[4..].iter().all(|x| x.is_nan()));
    }

    #[test]
    #[ignore = "needs a CUDA device"]
    fn views_are_checked() {
        let (stream, other) = (own_stream(), own_stream());
        let slice = stream.alloc_zeros::<f32>(12).unwrap();
        assert!(DeviceView::of(&slice, [1, 3, 4], &stream).is_ok());
        let wrong = DeviceView::of(&slice, [1, 3, 5], &stream).unwrap_err();
        assert!(matches!(wrong, Error::Length { expected: 15, found: 12, .. }));
        let narrow = stream.alloc_zeros::<f16>(12).unwrap();
        assert!(DeviceView::of(&narrow, [1, 3, 4], &stream).is_ok());
        let wrong = DeviceView::of(&slice, [1, 3, 4], &other).unwrap_err();
        assert_eq!(wrong, Error::OtherStream);
    }

    #[test]
    #[ignore = "needs a CUDA device"]
    fn more_pages_than_the_card_holds_are_refused() {
        let shape =
            CacheShape { pages: 1 << 26, page_size: 16, head_dim: 512, ..small(Dtype::F32) };
        assert!(matches!(Cuda::new(shape).unwrap_err(), Error::DeviceMemory { .. }));
    }
}
