//! What is stored in every type, and views of every type, on every backend.

mod common;

use common::{DTYPES, New, Noise, VIEWED, on_every_backend, plain};
use half::{bf16, f16};
use paged_kernels::{CacheShape, Dtype, PagedAttention, Reference, View, ViewMut};

on_every_backend! {
    views_may_be_strided_and_narrow => check_views;
    views_of_mixed_types_are_stored_right => check_mixed_views;
    values_beyond_a_types_range_become_infinities => check_range;
    a_type_loses_no_more_than_it_rounds => check_rounding;
}

#[test]
fn a_type_takes_its_own_bytes() {
    assert_eq!(DTYPES.map(Dtype::bytes), [4, 2, 2, 1]);
    let shape = |dtype| CacheShape { head_dim: 128, ..plain(dtype) };
    assert_eq!(shape(Dtype::F8).page_bytes(), 2 * 16 * (128 + 4));
    assert_eq!(shape(Dtype::Bf16).page_bytes(), 2 * 16 * 256);
}

/// The same numbers in every type.
struct Typed {
    wide: Vec<f32>,
    bf16: Vec<bf16>,
    f16: Vec<f16>,
}

impl Typed {
    fn new(wide: Vec<f32>) -> Self {
        let bf16 = wide.iter().map(|&x| bf16::from_f32(x)).collect();
        let f16 = wide.iter().map(|&x| f16::from_f32(x)).collect();
        Self { wide, bf16, f16 }
    }

    fn strided(&self, dtype: Dtype, shape: [usize; 3], strides: [usize; 2]) -> View<'_> {
        match dtype {
            Dtype::F32 => View::strided(&self.wide[..], shape, strides),
            Dtype::Bf16 => View::strided(&self.bf16[..], shape, strides),
            Dtype::F16 => View::strided(&self.f16[..], shape, strides),
            Dtype::F8 => unreachable!("views have no such type"),
        }
        .unwrap()
    }

    fn view(&self, dtype: Dtype, shape: [usize; 3]) -> View<'_> {
        self.strided(dtype, shape, [shape[1] * shape[2], shape[2]])
    }
}

fn rounded(dtype: Dtype, x: f32) -> f32 {
    let mut row = [x];
    dtype.round(&mut row);
    row[0]
}

/// A new text whose keys and values are `rows`, all in one step.
fn append<B: PagedAttention>(cache: &mut B, keys: View<'_>, values: View<'_>) {
    let [heads, tokens, _] = keys.shape();
    let text = cache.allocate().unwrap();
    cache.begin_step(&[(text, tokens)]).unwrap();
    cache.append(0, keys, values, &vec![false; heads * tokens]).unwrap();
}

/// Outputs written as `dtype`, and log-sums.
fn attend<B: PagedAttention>(
    cache: &mut B,
    queries: View<'_>,
    dtype: Dtype,
) -> (Vec<f32>, Vec<f32>) {
    let shape = queries.shape();
    let mut lse = vec![f32::NAN; shape[0] * shape[1]];
    let mut out = Typed::new(vec![f32::NAN; shape.iter().product()]);
    let view = match dtype {
        Dtype::F32 => ViewMut::new(&mut out.wide[..], shape),
        Dtype::Bf16 => ViewMut::new(&mut out.bf16[..], shape),
        Dtype::F16 => ViewMut::new(&mut out.f16[..], shape),
        Dtype::F8 => unreachable!("views have no such type"),
    };
    cache.attend(0, queries, 0.25, view.unwrap(), Some(&mut lse)).unwrap();
    let out = match dtype {
        Dtype::F32 => out.wide,
        Dtype::Bf16 => out.bf16.iter().map(|x| x.to_f32()).collect(),
        Dtype::F16 => out.f16.iter().map(|x| x.to_f32()).collect(),
        Dtype::F8 => unreachable!("views have no such type"),
    };
    (out, lse)
}

/// `[tokens, heads, dim]` seen as `[heads, tokens, dim]`, in every type, against contiguous f32.
fn check_views<B: PagedAttention>(new: &New<B>, dtype: Dtype) {
    let tokens = 9;
    let source = Typed::new(Noise(3).floats(tokens * 2 * 16));
    let mut copy = vec![0.0; source.wide.len()];
    for (i, x) in source.wide.iter().enumerate() {
        let (token, head, d) = (i / 32, i / 16 % 2, i % 16);
        copy[(head * tokens + token) * 16 + d] = *x;
    }
    let contiguous = View::new(&copy[..], [2, tokens, 16]).unwrap();
    let mut cache = new(plain(dtype)).unwrap();
    append(&mut cache, contiguous, contiguous);
    let (expected, _) = attend(&mut cache, contiguous, Dtype::F32);
    for of in VIEWED {
        let strided = source.strided(of, [2, tokens, 16], [16, 32]);
        append(&mut cache, strided, strided);
        let (found, _) = attend(&mut cache, strided, of);
        assert_eq!(found, expected.iter().map(|&x| rounded(of, x)).collect::<Vec<_>>());
    }
}

/// Keys, values and queries each in a type of their own, of numbers that all types hold: nothing is lost on the way.
fn check_mixed_views<B: PagedAttention>(new: &New<B>, dtype: Dtype) {
    let (tokens, shape) = (5, [2, 5, 16]);
    let mut noise = Noise(11);
    let mut rows = || Typed::new(noise.floats(2 * tokens * 16));
    let (keys, values, queries) = (rows(), rows(), rows());
    let mut cache = new(plain(dtype)).unwrap();
    append(&mut cache, keys.view(Dtype::F32, shape), values.view(Dtype::F32, shape));
    let expected = attend(&mut cache, queries.view(Dtype::F32, shape), Dtype::F32);
    for of_keys in VIEWED {
        for of_values in VIEWED {
            append(&mut cache, keys.view(of_keys, shape), values.view(of_values, shape));
            for of_queries in VIEWED {
                let found = attend(&mut cache, queries.view(of_queries, shape), Dtype::F32);
                assert_eq!(found, expected, "{of_keys:?}, {of_values:?}, {of_queries:?}");
            }
        }
    }
}

/// One token, so that its value comes out as it was stored.
fn check_range<B: PagedAttention>(new: &New<B>, dtype: Dtype) {
    const SHAPE: [usize; 3] = [2, 1, 16];
    if dtype == Dtype::F8 {
        return check_scaled_range(new);
    }
    let values = [
        65_504.0,
        65_519.996, // the last that f16 rounds to 65504
        65_520.0,
        1e5,
        -65_519.996,
        -65_520.0,
        f32::MAX, // beyond bf16 too
        f32::MIN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        0.0,
        2f32.powi(-24), // f16's least
        2f32.powi(-25), // halfway to 0, which is even
        -3e-8,
        2f32.powi(-14) * 0.75,
        1e-30,
    ];
    let values = Typed::new(values.repeat(2));
    let zeros = Typed::new(vec![0.0; 32]);
    let mut cache = new(plain(dtype)).unwrap();
    let zero = zeros.view(Dtype::F32, SHAPE);
    for of in VIEWED {
        append(&mut cache, zero, values.view(of, SHAPE));
        for out in VIEWED {
            let expected =
                values.wide.iter().map(|&x| rounded(out, rounded(dtype, rounded(of, x))));
            let (found, lse) = attend(&mut cache, zero, out);
            assert_eq!(found, expected.collect::<Vec<_>>(), "from {of:?} to {out:?}");
            assert_eq!(lse, [0.0; 2]);
        }
    }
    // A key that becomes minus infinity is not seen.
    let mut keys = vec![0.0; 32];
    (keys[3], keys[16 + 3]) = (-1e5, -65_504.0);
    let ones = Typed::new(vec![1.0; 32]);
    append(&mut cache, Typed::new(keys).view(Dtype::F32, SHAPE), ones.view(Dtype::F32, SHAPE));
    let (found, lse) = attend(&mut cache, ones.view(Dtype::F32, SHAPE), Dtype::F32);
    let expected = [-1e5, -65_504.0].map(|key| 0.25 * rounded(dtype, key));
    assert_eq!(lse, expected);
    let seen = |head: usize| if expected[head].is_finite() { 1.0 } else { 0.0 };
    assert_eq!(found, [[seen(0); 16], [seen(1); 16]].concat());
}

/// Rows of any size keep their shape, a row of zeros is zero, and one with an infinity is no number.
fn check_scaled_range<B: PagedAttention>(new: &New<B>) {
    const SHAPE: [usize; 3] = [2, 1, 16];
    let zeros = [0.0; 32];
    let mut cache = new(plain(Dtype::F8)).unwrap();
    for size in [0.0, 1e-30, 3e-3, 1.0, 1e5, 1e30] {
        let values: Vec<_> = (0..32).map(|i| size * (i as f32 - 15.5)).collect();
        let mut expected = values.clone();
        expected.chunks_mut(16).for_each(|row| Dtype::F8.round(row));
        append(&mut cache, common::view(&zeros, SHAPE), common::view(&values, SHAPE));
        let (found, _) = attend(&mut cache, common::view(&zeros, SHAPE), Dtype::F32);
        assert_eq!(found, expected);
        let near = |(x, y): (&f32, &f32)| (x - y).abs() <= x.abs() / 16.0 + size / 32.0;
        assert!(values.iter().zip(&found).all(near), "{values:?} became {found:?}");
    }
    let mut values = [1.0; 32];
    values[3] = f32::INFINITY;
    append(&mut cache, common::view(&zeros, SHAPE), common::view(&values, SHAPE));
    let (found, _) = attend(&mut cache, common::view(&zeros, SHAPE), Dtype::F32);
    assert!(found[..16].iter().all(|x| x.is_nan()) && found[16..] == [1.0; 16], "{found:?}");
}

/// Numbers that 16 bits do not hold, against what f64 makes of all their bits.
fn check_rounding<B: PagedAttention>(new: &New<B>, dtype: Dtype) {
    let tolerance = match dtype {
        Dtype::F32 => 5e-6,
        Dtype::Bf16 => 8e-3,
        Dtype::F16 => 1e-3,
        Dtype::F8 => 6e-2,
    };
    for (head_dim, page_size) in [(128, 16), (80, 16), (7, 3)] {
        let shape = CacheShape { head_dim, page_size, ..plain(dtype) };
        let mut exact = Reference::new(CacheShape { dtype: Dtype::F32, ..shape.clone() }).unwrap();
        let mut cache = new(shape).unwrap();
        let shape = [2, 300, head_dim];
        let mut noise = Noise(5);
        let mut rows = || (0..600 * head_dim).map(|_| noise.fine()).collect::<Vec<_>>();
        let (keys, values, queries) = (rows(), rows(), rows());
        let [keys, values, queries] =
            [&keys, &values, &queries].map(|rows| common::view(rows, shape));
        append(&mut exact, keys, values);
        append(&mut cache, keys, values);
        let (expected, _) = attend(&mut exact, queries, Dtype::F32);
        let (found, _) = attend(&mut cache, queries, Dtype::F32);
        let mut largest = 0.0f64;
        for (found, expected) in found.chunks(head_dim).zip(expected.chunks(head_dim)) {
            let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
            let both = found.iter().zip(expected);
            let error = norm(&mut both.map(|(&x, &y)| f64::from(x) - f64::from(y)));
            largest = largest.max(error / norm(&mut expected.iter().map(|&y| f64::from(y))));
        }
        println!("{dtype:?}, head dim {head_dim}: off by {largest:.1e} of the norm");
        assert!(largest < tolerance, "{dtype:?}, head dim {head_dim}: off by {largest}");
    }
}
