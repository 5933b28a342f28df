//! What only a card has: its driver, its streams, and sizes that the host's tests can't reach.

#![cfg(feature = "cuda")]

mod common;

use common::{Noise, Twins, small, view};
use paged_kernels::cudarc::driver::{CudaContext, CudaStream};
use paged_kernels::{
    CacheShape, Cuda, DeviceView, DeviceViewMut, Dtype, Error, PagedAttention, Reference, ViewMut,
};
use std::sync::Arc;

#[test]
fn without_a_card_there_is_an_error_with_advice() {
    // Where there is a card there is nothing to see.
    if let Err(error) = Cuda::new(small(Dtype::F32)) {
        assert!(matches!(
            error,
            Error::NoDriver | Error::OldDriver { .. } | Error::NoCard | Error::Card { .. }
        ));
        assert!(error.to_string().contains("; "), "{error}");
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

    fn own_stream() -> Arc<CudaStream> {
        let context = CudaContext::new(0).unwrap();
        context.new_stream().unwrap()
    }

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

    /// The same few tokens through tensors on the card and through `Reference`.
    #[test]
    #[ignore = "needs a CUDA device"]
    fn tensors_on_the_card_give_what_tensors_on_the_host_give() {
        let shape = CacheShape { layers: 1, ..small(Dtype::F32) };
        let stream = own_stream();
        let mut cache = Cuda::on(stream.clone(), shape.clone()).unwrap();
        let mut reference = Reference::new(shape).unwrap();
        let texts = (cache.allocate().unwrap(), reference.allocate().unwrap());
        let mut noise = Noise(11);
        for (i, tokens) in [9, 1, 3, 1, 1, 1, 1].into_iter().enumerate() {
            let (keys, values) = (noise.floats(2 * tokens * 16), noise.floats(2 * tokens * 16));
            let queries = noise.floats(6 * tokens * 16);
            let drops = noise.bools(2 * tokens, 0.5);
            let on_card = [&keys, &values, &queries].map(|data| stream.clone_htod(data).unwrap());
            let (rows, query_rows) = ([2, tokens, 16], [6, tokens, 16]);
            let seen = |i: usize, shape| DeviceView::of(&on_card[i], shape, &stream).unwrap();
            let (host_keys, host_values) = (view(&keys, rows), view(&values, rows));
            if i == 0 {
                cache.fill_on_device(texts.0, 0, seen(0, rows), seen(1, rows), &drops).unwrap();
                reference.fill(texts.1, 0, host_keys, host_values, &drops).unwrap();
                continue;
            }
            cache.begin_step(&[(texts.0, tokens)]).unwrap();
            reference.begin_step(&[(texts.1, tokens)]).unwrap();
            cache.append_on_device(0, seen(0, rows), seen(1, rows), &drops).unwrap();
            reference.append(0, host_keys, host_values, &drops).unwrap();
            let mut out = stream.alloc_zeros::<f32>(queries.len()).unwrap();
            let mut lse = stream.alloc_zeros::<f32>(6 * tokens).unwrap();
            let out_view = DeviceViewMut::of(&mut out, query_rows, &stream).unwrap();
            let lse_view = DeviceViewMut::of(&mut lse, [6, tokens, 1], &stream).unwrap();
            cache.attend_on_device(0, seen(2, query_rows), 0.25, out_view, Some(lse_view)).unwrap();
            let (mut expected, mut sums) = (vec![0.0; queries.len()], vec![0.0; 6 * tokens]);
            let expected_view = ViewMut::new(&mut expected[..], query_rows).unwrap();
            reference
                .attend(0, view(&queries, query_rows), 0.25, expected_view, Some(&mut sums))
                .unwrap();
            let close = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5);
            assert!(close(&stream.clone_dtoh(&out).unwrap(), &expected));
            assert!(close(&stream.clone_dtoh(&lse).unwrap(), &sums));
        }
    }

    #[test]
    #[ignore = "needs a CUDA device"]
    fn views_are_checked() {
        let (stream, other) = (own_stream(), own_stream());
        let slice = stream.alloc_zeros::<f32>(12).unwrap();
        assert!(DeviceView::of(&slice, [1, 3, 4], &stream).is_ok());
        let wrong = DeviceView::of(&slice, [1, 3, 5], &stream).unwrap_err();
        assert!(matches!(wrong, Error::Length { expected: 15, found: 12, .. }));
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
