//! What stands between projections and attention in one launch, held to f64 and to `Reference`.

#![cfg(feature = "cuda")]

mod common;

use common::on_card::own_stream;
use common::{Noise, view};
use half::bf16;
use paged_kernels::cudarc::driver::{CudaSlice, CudaStream};
use paged_kernels::{
    Beside, CacheShape, DeviceView, DeviceViewMut, Dtype, Error, Gate, HeadNorms, Mode,
    PagedAttention, Positions, Projected, Reference, Resident, ScorePrecision, ScoreRule, Seats,
    ViewMut,
};
use std::sync::Arc;

const WIDTH: usize = 72;
const EPSILON: f32 = 1e-6;

fn shape(head_dim: usize, dtype: Dtype) -> CacheShape {
    CacheShape {
        layers: 1,
        kv_heads: 3,
        query_heads: 12,
        head_dim,
        page_size: 16,
        window: 4,
        pages: 256,
        dtype,
    }
}

/// What of the launch a case asks for.
#[derive(Debug, Clone, Copy)]
struct Case {
    head_dim: usize,
    dtype: Dtype,
    norms: bool,
    /// Real positions of each kv head, or integers for all.
    own: bool,
    /// The former read from as many gates and contents, and not given.
    read: usize,
    /// What is read, and the index that stands beside it, are multiplied by.
    beside: Option<[f32; 2]>,
    precision: Option<ScorePrecision>,
    /// Whether the surrogate's units are the scores.
    linear: bool,
    turned: f32,
}

const PLAIN: Case = Case {
    head_dim: 64,
    dtype: Dtype::Bf16,
    norms: false,
    own: false,
    read: 0,
    beside: None,
    precision: None,
    linear: false,
    turned: 1.0,
};

fn narrow(stream: &Arc<CudaStream>, data: &[f32]) -> CudaSlice<bf16> {
    let data = data.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>();
    stream.clone_htod(&data).unwrap()
}

fn wide(stream: &Arc<CudaStream>, data: &CudaSlice<bf16>) -> Vec<f32> {
    stream.clone_dtoh(data).unwrap().iter().map(|x| x.to_f32()).collect()
}

/// A head's row, normed and rotated.
fn rotated(row: &[f32], norm: Option<&[f32]>, position: f32, inverse: &[f32]) -> Vec<f64> {
    let mut row = row.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
    if let Some(norm) = norm {
        let mean = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
        let scale = (mean + f64::from(EPSILON)).sqrt().recip();
        row.iter_mut().zip(norm).for_each(|(x, &weight)| *x *= scale * f64::from(weight));
    }
    let pairs = inverse.len();
    for (i, &inverse) in inverse.iter().enumerate() {
        let (sin, cos) = f64::from(position * inverse).sin_cos();
        let (a, b) = (row[i], row[pairs + i]);
        (row[i], row[pairs + i]) = (a * cos - b * sin, b * cos + a * sin);
    }
    row
}

/// GELU by its series, which converges for the small units here.
fn gelu(x: f64) -> f64 {
    let (mut term, mut sum, mut n) = (x / 2f64.sqrt(), 0.0, 0.0);
    while f64::abs(term) > 1e-18 {
        sum += term / (2.0 * n + 1.0);
        n += 1.0;
        term *= -x * x / 2.0 / n;
    }
    0.5 * x * (1.0 + 2.0 / std::f64::consts::PI.sqrt() * sum)
}

/// Positions of each kv head and place: `last · (silu(gate) · content)`.
fn read(maps: &[f32], last: &[f32], places: usize, kv_heads: usize) -> Vec<f32> {
    let width = last.len() / kv_heads;
    let of = |last: &[f32], maps: &[f32]| -> f32 {
        let (gates, contents) = maps.split_at(width);
        let terms = last.iter().zip(gates).zip(contents).map(|((&last, &gate), &content)| {
            let [last, gate, content] = [last, gate, content].map(f64::from);
            last * gate / (1.0 + (-gate).exp()) * content
        });
        terms.sum::<f64>() as f32
    };
    let heads = last.chunks_exact(width);
    let places = 0..places;
    heads
        .flat_map(|last| places.clone().map(|i| of(last, &maps[2 * width * i..][..2 * width])))
        .collect()
}

fn round(x: f64, precision: ScorePrecision) -> f64 {
    match precision {
        ScorePrecision::F32 => x,
        ScorePrecision::MatchTorchBf16 => f64::from(bf16::from_f64(x).to_f32()),
    }
}

fn close(found: &[f32], right: &[f64], most: f64) {
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let apart = norm(&mut found.iter().zip(right).map(|(&x, y)| f64::from(x) - y));
    let relative = apart / norm(&mut right.iter().copied());
    assert!(relative < most, "off by {relative}");
}

fn run(case: Case) {
    let shape = shape(case.head_dim, case.dtype);
    let CacheShape { kv_heads, query_heads, head_dim, .. } = shape;
    let (group, columns) = (query_heads / kv_heads, (query_heads + 2 * kv_heads) * head_dim);
    let stream = own_stream();
    let seats = Seats { texts: 3, tokens: 500, pass: 1, mode: Mode::Fast };
    let mut cache = Resident::on(stream.clone(), shape.clone(), seats).unwrap();
    let mut reference = Reference::new(shape).unwrap();
    let mut noise = Noise(41);
    let norms = [noise.floats(head_dim), noise.floats(head_dim)];
    let inverse = (0..head_dim / 2).map(|i| 1e4f32.powf(-2.0 * i as f32 / head_dim as f32));
    let inverse = inverse.collect::<Vec<_>>();
    let second = noise.floats(kv_heads * WIDTH);
    let bias = noise.floats(kv_heads);
    let on_card = (
        [narrow(&stream, &norms[0]), narrow(&stream, &norms[1])],
        stream.clone_htod(&inverse).unwrap(),
        [narrow(&stream, &second), narrow(&stream, &bias)],
    );

    let places = 3;
    let texts = [cache.allocate().unwrap(), cache.allocate().unwrap()];
    let twins = [reference.allocate().unwrap(), reference.allocate().unwrap()];
    cache.batch(&[Some(texts[0]), None, Some(texts[1])]).unwrap();
    for step in 0..40 {
        let qkv = noise.floats(places * columns);
        let units = noise.floats(places * WIDTH);
        let heads = if case.own { kv_heads } else { 1 };
        let mut positions = (0..heads * places)
            .map(|i| if case.own { noise.next() * 3000.0 } else { (70_000 * i + step) as f32 })
            .collect::<Vec<_>>();
        let mut exact = |n: usize, scale: f32| -> Vec<f32> {
            let rounded = |x: f32| bf16::from_f32(scale * x).to_f32();
            noise.floats(n).into_iter().map(rounded).collect()
        };
        let (maps, last) = (exact(places * 2 * case.read, 1.0), exact(kv_heads * case.read, 16.0));
        if case.read > 0 {
            positions = read(&maps, &last, places, kv_heads);
        }
        let index = (0..places).map(|i| (9000 * i + step) as f32).collect::<Vec<_>>();
        let index_card = stream.clone_htod(&index).unwrap();
        if let Some([of_read, of_index]) = case.beside {
            for (position, i) in positions.iter_mut().zip((0..places).cycle()) {
                *position = of_read * *position + of_index * index[i];
            }
        }
        let (maps_card, last_card) = (narrow(&stream, &maps), narrow(&stream, &last));
        let tensors = (narrow(&stream, &qkv), narrow(&stream, &units));
        let positions_card = stream.clone_htod(&positions).unwrap();
        let mut rotated_queries = narrow(&stream, &vec![f32::NAN; query_heads * places * head_dim]);
        let mut out = stream.clone_htod(&vec![f32::NAN; query_heads * places * head_dim]).unwrap();
        let seen = |slice, shape| DeviceView::of::<bf16>(slice, shape, &stream).unwrap();
        let rule = |precision| ScoreRule { threshold: 0.1, precision };
        let projected = Projected {
            qkv: seen(&tensors.0, [1, places, columns]),
            norms: case.norms.then(|| HeadNorms {
                query: seen(&on_card.0[0], [1, 1, head_dim]),
                key: seen(&on_card.0[1], [1, 1, head_dim]),
                epsilon: EPSILON,
            }),
            positions: match case.read {
                0 => Positions::Given(
                    DeviceView::of(&positions_card, [heads, places, 1], &stream).unwrap(),
                ),
                width => Positions::Read {
                    units: seen(&maps_card, [1, places, 2 * width]),
                    last: seen(&last_card, [1, kv_heads, width]),
                    beside: case.beside.map(|[of_read, of_index]| Beside {
                        index: DeviceView::of(&index_card, [1, places, 1], &stream).unwrap(),
                        of_index,
                        of_read,
                    }),
                },
            },
            inverse: DeviceView::of(&on_card.1, [1, 1, head_dim / 2], &stream).unwrap(),
            turned: case.turned,
            gate: case.precision.map(|precision| Gate {
                units: match case.linear {
                    true => {
                        DeviceView::strided(&tensors.1, [1, places, kv_heads], [0, WIDTH], &stream)
                            .unwrap()
                    }
                    false => seen(&tensors.1, [1, places, WIDTH]),
                },
                second: (!case.linear).then(|| {
                    [
                        seen(&on_card.2[0], [1, kv_heads, WIDTH]),
                        seen(&on_card.2[1], [1, 1, kv_heads]),
                    ]
                }),
                rule: rule(precision),
            }),
        };
        cache.begin_step().unwrap();
        let rows = [query_heads, places, head_dim];
        let mut view_mut = DeviceViewMut::of(&mut rotated_queries, rows, &stream).unwrap();
        cache.append_fused(0, projected, &mut view_mut).unwrap();
        let queries = DeviceView::of(&rotated_queries, rows, &stream).unwrap();
        let out_view = DeviceViewMut::of(&mut out, rows, &stream).unwrap();
        let scale = common::scale(head_dim);
        cache.attend(0, queries, scale, out_view, None).unwrap();
        let (queries, out) = (wide(&stream, &rotated_queries), stream.clone_dtoh(&out).unwrap());

        for (place, text, twin) in [(0, texts[0], twins[0]), (2, texts[1], twins[1])] {
            let row = |head: usize| &qkv[place * columns + head * head_dim..][..head_dim];
            let position = |kv_head: usize| positions[kv_head % heads * places + place];
            let norm = |i: usize| case.norms.then_some(&norms[i][..]);
            let picked = |data: &[f32], head: usize| {
                data[(head * places + place) * head_dim..][..head_dim].to_vec()
            };
            for head in 0..query_heads {
                let mut right = rotated(row(head), norm(0), position(head / group), &inverse);
                right.iter_mut().for_each(|x| *x *= f64::from(case.turned));
                close(&picked(&queries, head), &right, 4e-3);
            }
            let mut keys = Vec::new();
            for kv_head in 0..kv_heads {
                let mut key =
                    rotated(row(query_heads + kv_head), norm(1), position(kv_head), &inverse);
                key.iter_mut().for_each(|x| *x *= f64::from(case.turned));
                // Rounded once, to what is stored: eight-bit keys are not bf16 on the way.
                let narrow =
                    |x| if case.dtype == Dtype::F8 { x as f32 } else { bf16::from_f64(x).to_f32() };
                keys.extend(key.iter().copied().map(narrow));
            }
            let values = (0..kv_heads).flat_map(|head| row(query_heads + kv_heads + head));
            let values = values.copied().collect::<Vec<_>>();
            let drops = (0..kv_heads).map(|head| {
                let Some(precision) = case.precision else { return false };
                let units = &units[place * WIDTH..][..WIDTH];
                let terms = units.iter().zip(&second[head * WIDTH..]).map(|(&unit, &weight)| {
                    round(gelu(f64::from(unit)), precision) * f64::from(weight)
                });
                let score = match case.linear {
                    true => f64::from(units[head]),
                    false => terms.sum::<f64>() + f64::from(bias[head]),
                };
                round(score, precision) < round(f64::from(0.1f32), precision)
            });
            let drops = drops.collect::<Vec<_>>();
            reference.begin_step(&[(twin, 1)]).unwrap();
            let rows = [kv_heads, 1, head_dim];
            reference.append(0, view(&keys, rows), view(&values, rows), &drops).unwrap();
            let own = (0..query_heads).flat_map(|head| picked(&queries, head)).collect::<Vec<_>>();
            let mut right = vec![0.0; own.len()];
            let one = [query_heads, 1, head_dim];
            let right_view = ViewMut::new(&mut right[..], one).unwrap();
            reference.attend(0, view(&own, one), scale, right_view, None).unwrap();
            for head in 0..query_heads {
                let right = right[head * head_dim..][..head_dim].iter();
                let right = right.map(|&x| f64::from(x)).collect::<Vec<_>>();
                close(&picked(&out, head), &right, 8e-3);
            }
            assert_eq!(cache.lengths(text).unwrap(), reference.lengths(twin).unwrap());
        }
    }
    let lengths = cache.lengths(texts[0]).unwrap();
    // Some tokens went, others stayed: the bits are seen.
    let gated = case.precision.is_some();
    assert_eq!(lengths.iter().all(|&len| (6..40).contains(&len)), gated, "{lengths:?}");
}

#[test]
fn gelu_is_the_exact_one() {
    for (x, y) in [(0.0, 0.0), (1.0, 0.841_344_746_068_543), (-0.5, -0.154_268_769_362_993)] {
        assert!((gelu(x) - y).abs() < 1e-12, "{x}: {}", gelu(x));
    }
}

mod cuda {
    use super::*;

    #[test]
    #[ignore = "needs a CUDA device"]
    fn a_fused_append_is_norm_rotation_rows_and_bits() {
        for head_dim in [64, 80, 128] {
            for (norms, own) in [(false, false), (true, false), (true, true)] {
                for precision in
                    [None, Some(ScorePrecision::F32), Some(ScorePrecision::MatchTorchBf16)]
                {
                    run(Case { head_dim, norms, own, precision, ..PLAIN });
                }
            }
            let precision = Some(ScorePrecision::F32);
            run(Case { head_dim, dtype: Dtype::F8, norms: true, own: true, precision, ..PLAIN });
            run(Case { head_dim, linear: true, precision, ..PLAIN });
        }
        run(Case { norms: true, turned: 1.3, ..PLAIN });
        for read in [6, 72, 256, 512, 600] {
            let precision = (read > 72).then_some(ScorePrecision::F32);
            run(Case { norms: read == 256, own: true, read, precision, ..PLAIN });
        }
        for beside in [[32.0, 1.0], [1.0, 1.0 / 32.0]] {
            run(Case { own: true, read: 72, beside: Some(beside), ..PLAIN });
        }
    }

    #[test]
    #[ignore = "needs a CUDA device"]
    fn wrong_tensors_are_refused() {
        let stream = own_stream();
        let seats = Seats { texts: 1, tokens: 100, pass: 1, mode: Mode::Fast };
        let mut cache = Resident::on(stream.clone(), shape(64, Dtype::Bf16), seats).unwrap();
        let text = cache.allocate().unwrap();
        cache.batch(&[Some(text)]).unwrap();
        cache.begin_step().unwrap();
        let qkv = stream.alloc_zeros::<bf16>(18 * 64).unwrap();
        let numbers = stream.alloc_zeros::<f32>(32).unwrap();
        let mut queries = stream.alloc_zeros::<bf16>(12 * 64).unwrap();
        let mut queries = DeviceViewMut::of(&mut queries, [12, 1, 64], &stream).unwrap();
        let good = Projected {
            qkv: DeviceView::of(&qkv, [1, 1, 18 * 64], &stream).unwrap(),
            norms: None,
            positions: Positions::Given(
                DeviceView::strided(&numbers, [1, 1, 1], [0, 0], &stream).unwrap(),
            ),
            inverse: DeviceView::of(&numbers, [1, 1, 32], &stream).unwrap(),
            turned: 1.0,
            gate: None,
        };
        let short = DeviceView::strided(&qkv, [1, 1, 17 * 64], [0, 0], &stream).unwrap();
        let error = cache.append_fused(0, Projected { qkv: short, ..good }, &mut queries);
        assert!(matches!(error.unwrap_err(), Error::Shape { tensor: "qkv", .. }));
        let halves = DeviceView::strided(&qkv, [1, 1, 32], [0, 0], &stream).unwrap();
        let error = cache.append_fused(0, Projected { inverse: halves, ..good }, &mut queries);
        assert!(matches!(error.unwrap_err(), Error::Type { tensor: "inverse", .. }));
        let units = DeviceView::strided(&qkv, [1, 1, 2 * 9], [0, 0], &stream).unwrap();
        let last = DeviceView::strided(&qkv, [1, 3, 8], [0, 8], &stream).unwrap();
        let read = Positions::Read { units, last, beside: None };
        let error = cache.append_fused(0, Projected { positions: read, ..good }, &mut queries);
        assert!(matches!(error.unwrap_err(), Error::Shape { tensor: "gates and contents", .. }));
        cache.append_fused(0, good, &mut queries).unwrap();
        assert_eq!(
            cache.append_fused(0, good, &mut queries).unwrap_err(),
            Error::AppendedTwice { layer: 0 }
        );
    }
}
