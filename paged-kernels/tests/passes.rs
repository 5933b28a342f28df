//! Passes of several tokens over the cache that keeps its books on the card, held to `Reference` and to the plain kernel.

#![cfg(feature = "cuda")]

mod common;

use common::on_card::{own_stream, pack};
use common::{Noise, scale, view};
use half::{bf16, f16};
use paged_kernels::cudarc::driver::{CudaSlice, CudaStream};
use paged_kernels::{
    CacheShape, DeviceBits, DeviceView, DeviceViewMut, Dtype, Error, Mode, PagedAttention,
    Reference, Resident, Seats, Sequence, ViewMut,
};
use std::sync::Arc;

fn wide() -> CacheShape {
    CacheShape {
        layers: 2,
        kv_heads: 3,
        query_heads: 12,
        head_dim: 128,
        page_size: 16,
        window: 20,
        pages: 2048,
        dtype: Dtype::Bf16,
    }
}

const SEATS: Seats = Seats { texts: 4, tokens: 1500, pass: 400, mode: Mode::Fast };

/// A tensor on the card in the type of the cache.
enum Narrow {
    F32(CudaSlice<f32>),
    Bf16(CudaSlice<bf16>),
    F16(CudaSlice<f16>),
}

impl Narrow {
    fn new(stream: &Arc<CudaStream>, dtype: Dtype, data: &[f32]) -> Self {
        if dtype == Dtype::F32 {
            Self::F32(stream.clone_htod(data).unwrap())
        } else if dtype == Dtype::F16 {
            let data = data.iter().map(|&x| f16::from_f32(x)).collect::<Vec<_>>();
            Self::F16(stream.clone_htod(&data).unwrap())
        } else {
            let data = data.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>();
            Self::Bf16(stream.clone_htod(&data).unwrap())
        }
    }

    fn view(&self, shape: [usize; 3], stream: &Arc<CudaStream>) -> DeviceView<'_> {
        match self {
            Self::F32(slice) => DeviceView::of(slice, shape, stream).unwrap(),
            Self::Bf16(slice) => DeviceView::of(slice, shape, stream).unwrap(),
            Self::F16(slice) => DeviceView::of(slice, shape, stream).unwrap(),
        }
    }
}

/// A cache on the card and the reference, which are told the same.
struct Twins {
    stream: Arc<CudaStream>,
    resident: Resident,
    reference: Reference,
    noise: Noise,
    drop: f64,
}

type Pair = (Sequence, Sequence);

impl Twins {
    fn new(shape: CacheShape, seats: Seats, drop: f64) -> Self {
        let stream = own_stream();
        let resident = Resident::on(stream.clone(), shape.clone(), seats).unwrap();
        let reference = Reference::new(shape).unwrap();
        Self { stream, resident, reference, noise: Noise(77), drop }
    }

    fn text(&mut self) -> Pair {
        (self.resident.allocate().unwrap(), self.reference.allocate().unwrap())
    }

    /// Random keys, values and drop bits of `tokens` tokens in one layer.
    fn rows(&mut self, tokens: usize) -> (Vec<f32>, Vec<f32>, Vec<bool>) {
        let CacheShape { kv_heads, head_dim, .. } = *self.resident.shape();
        let n = kv_heads * tokens;
        let (keys, values) = (self.noise.floats(n * head_dim), self.noise.floats(n * head_dim));
        (keys, values, self.noise.bools(n, self.drop))
    }

    fn prompt(&mut self, tokens: usize) -> Pair {
        let CacheShape { layers, kv_heads, head_dim, dtype, .. } = *self.resident.shape();
        let pair = self.text();
        let shape = [kv_heads, tokens, head_dim];
        for layer in 0..layers {
            let (keys, values, drops) = self.rows(tokens);
            let narrow = [&keys, &values].map(|data| Narrow::new(&self.stream, dtype, data));
            let views = [0, 1].map(|i| narrow[i].view(shape, &self.stream));
            let bits = self.stream.clone_htod(&pack(&drops, kv_heads)).unwrap();
            let bits = DeviceBits::of(&bits, [kv_heads, tokens], &self.stream).unwrap();
            self.resident.fill(pair.0, layer, views[0], views[1], bits).unwrap();
            let (keys, values) = (view(&keys, shape), view(&values, shape));
            self.reference.fill(pair.1, layer, keys, values, &drops).unwrap();
        }
        pair
    }

    /// Appends fresh rows to a layer of both, `n` tokens.
    fn append(&mut self, layer: usize, n: usize) {
        let CacheShape { kv_heads, head_dim, dtype, .. } = *self.resident.shape();
        let shape = [kv_heads, n, head_dim];
        let (keys, values, drops) = self.rows(n);
        let narrow = [&keys, &values].map(|data| Narrow::new(&self.stream, dtype, data));
        let views = [0, 1].map(|i| narrow[i].view(shape, &self.stream));
        let bits = self.stream.clone_htod(&pack(&drops, kv_heads)).unwrap();
        let bits = DeviceBits::of(&bits, [kv_heads, n], &self.stream).unwrap();
        self.resident.append(layer, views[0], views[1], Some(bits)).unwrap();
        self.reference.append(layer, view(&keys, shape), view(&values, shape), &drops).unwrap();
    }

    /// What the card gives for queries in the type of the cache, or as f32, which the fast kernel does not take.
    fn attend(&mut self, layer: usize, queries: &[f32], fast: bool) -> (Vec<f32>, Vec<f32>) {
        let CacheShape { query_heads, head_dim, dtype, .. } = *self.resident.shape();
        let n = queries.len() / query_heads / head_dim;
        let (shape, rows) = ([query_heads, n, head_dim], query_heads * n);
        let narrow = Narrow::new(&self.stream, dtype, queries);
        let wide = self.stream.clone_htod(queries).unwrap();
        let seen = if fast {
            narrow.view(shape, &self.stream)
        } else {
            DeviceView::of(&wide, shape, &self.stream).unwrap()
        };
        let mut sums = self.stream.clone_htod(&vec![f32::NAN; rows]).unwrap();
        let sums_view = DeviceViewMut::of(&mut sums, [query_heads, n, 1], &self.stream).unwrap();
        let scale = scale(head_dim);
        // Every other layer writes in 16 bits.
        let out = if layer.is_multiple_of(2) {
            let mut out = self.stream.clone_htod(&vec![f32::NAN; queries.len()]).unwrap();
            let to = DeviceViewMut::of(&mut out, shape, &self.stream).unwrap();
            self.resident.attend(layer, seen, scale, to, Some(sums_view)).unwrap();
            self.stream.clone_dtoh(&out).unwrap()
        } else {
            let mut out = self.stream.clone_htod(&vec![bf16::NAN; queries.len()]).unwrap();
            let to = DeviceViewMut::of(&mut out, shape, &self.stream).unwrap();
            self.resident.attend(layer, seen, scale, to, Some(sums_view)).unwrap();
            self.stream.clone_dtoh(&out).unwrap().iter().map(|x| x.to_f32()).collect()
        };
        (out, self.stream.clone_dtoh(&sums).unwrap())
    }

    /// A pass, or a step of one token a text the way of steps. Compares what comes out.
    fn pass(&mut self, texts: &[(Pair, usize)], as_step: bool) {
        let CacheShape { layers, query_heads, head_dim, .. } = *self.resident.shape();
        let n = texts.iter().map(|text| text.1).sum();
        if as_step {
            let batch = texts.iter().map(|text| Some(text.0.0)).collect::<Vec<_>>();
            self.resident.batch(&batch).unwrap();
            self.resident.begin_step().unwrap();
        } else {
            let entries = texts.iter().map(|text| (text.0.0, text.1)).collect::<Vec<_>>();
            self.resident.begin_pass(&entries).unwrap();
        }
        let entries = texts.iter().map(|text| (text.0.1, text.1)).collect::<Vec<_>>();
        self.reference.begin_step(&entries).unwrap();
        for layer in 0..layers {
            self.append(layer, n);
            let queries = self.noise.floats(query_heads * n * head_dim);
            let (out, lse) = self.attend(layer, &queries, true);
            let (mut right, mut sums) = (vec![0.0; queries.len()], vec![0.0; query_heads * n]);
            let shape = [query_heads, n, head_dim];
            let right_view = ViewMut::new(&mut right[..], shape).unwrap();
            let seen = view(&queries, shape);
            let scale = scale(head_dim);
            self.reference.attend(layer, seen, scale, right_view, Some(&mut sums)).unwrap();
            close(&out, &right, head_dim, &lse, &sums);
        }
        for ((on_card, expected), _) in texts {
            let lengths = self.reference.lengths(*expected).unwrap();
            assert_eq!(self.resident.lengths(*on_card).unwrap(), lengths);
        }
    }

    fn check_pages(&mut self, texts: &[Pair]) {
        let page_size = self.resident.shape().page_size;
        let mut held = 0;
        for pair in texts {
            let lengths = self.resident.lengths(pair.0).unwrap();
            held += lengths.iter().map(|len| len.div_ceil(page_size)).sum::<usize>();
        }
        let pages = self.resident.shape().pages;
        assert_eq!(self.resident.free_pages().unwrap() + held, pages);
        assert_eq!(self.resident.missing().unwrap(), 0);
    }
}

fn close(out: &[f32], right: &[f32], dim: usize, lse: &[f32], sums: &[f32]) {
    for (i, (found, right)) in out.chunks_exact(dim).zip(right.chunks_exact(dim)).enumerate() {
        let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| x * x).sum::<f32>().sqrt();
        let apart = norm(&mut found.iter().zip(right).map(|(x, y)| x - y));
        let relative = apart / norm(&mut right.iter().copied());
        assert!(relative < 5e-3, "row {i} of {}: off by {relative}", out.len() / dim);
    }
    for (i, (found, right)) in lse.iter().zip(sums).enumerate() {
        assert!((found - right).abs() < 1e-3, "row {i}: log-sum {found} is not {right}");
    }
}

mod cuda {
    use super::*;

    /// A talk: prompts, questions, answers token by token, chunks, bursts; and a text that begins with a chunk.
    #[test]
    #[ignore = "needs a CUDA device"]
    fn passes_and_steps_follow_each_other_as_in_the_reference() {
        let shapes = [
            wide(),
            CacheShape { dtype: Dtype::F16, query_heads: 15, ..wide() },
            CacheShape { head_dim: 80, page_size: 5, window: 7, ..wide() },
            CacheShape { head_dim: 64, window: 0, query_heads: 3, ..wide() },
            CacheShape { page_size: 64, pages: 512, ..wide() },
            CacheShape { page_size: 32, head_dim: 256, query_heads: 3, ..wide() },
            CacheShape { dtype: Dtype::F8, page_size: 32, ..wide() },
        ];
        for (shape, drop) in
            shapes.iter().flat_map(|shape| [0.0, 0.6, 1.0].map(|drop| (shape, drop)))
        {
            for mode in [Mode::Fast, Mode::BatchInvariant] {
                let mut twins = Twins::new(shape.clone(), Seats { mode, ..SEATS }, drop);
                let (a, b, c) = (twins.prompt(150), twins.prompt(3), twins.text());
                twins.pass(&[(a, 40)], false);
                for _ in 0..3 {
                    twins.pass(&[(a, 1), (b, 1)], true);
                }
                twins.pass(&[(b, 33), (c, 90), (a, 7)], false);
                twins.check_pages(&[a, b, c]);
                twins.pass(&[(a, 1), (b, 0), (c, 2)], false);
                twins.pass(&[(c, 1), (b, 1)], true);
                twins.pass(&[(c, 90)], false);
                twins.pass(&[(a, 1), (b, 1), (c, 1)], false);
                twins.pass(&[(a, 1), (b, 1), (c, 1)], true);
                twins.check_pages(&[a, b, c]);
                // Another takes a seat whose ring was in use.
                twins.resident.release(b.0).unwrap();
                twins.reference.release(b.1).unwrap();
                let d = twins.prompt(70);
                twins.pass(&[(d, 5), (a, 5)], false);
                twins.check_pages(&[a, c, d]);
            }
        }
    }

    /// Several questions about one text, and answers: what one of them writes the others never read, and no page is lost.
    #[test]
    #[ignore = "needs a CUDA device"]
    fn forks_go_their_own_ways() {
        for shape in [wide(), CacheShape { dtype: Dtype::F32, page_size: 5, ..wide() }] {
            let pages = shape.pages;
            let mut twins = Twins::new(shape, SEATS, 0.5);
            let text = twins.prompt(203);
            twins.pass(&[(text, 45)], false);
            let mut fork = || {
                let before = twins.resident.free_pages().unwrap();
                let on_card = twins.resident.fork(text.0).unwrap();
                assert_eq!(twins.resident.free_pages().unwrap(), before);
                (on_card, twins.reference.fork(text.1).unwrap())
            };
            let (a, b) = (fork(), fork());
            twins.pass(&[(a, 30), (b, 1), (text, 7)], false);
            for _ in 0..30 {
                twins.pass(&[(a, 1), (text, 1), (b, 1)], true);
            }
            twins.resident.release(text.0).unwrap();
            twins.reference.release(text.1).unwrap();
            let suspended = twins.resident.suspend(a.0).unwrap();
            twins.pass(&[(b, 1)], true);
            let a = (twins.resident.resume(&suspended).unwrap(), a.1);
            twins.pass(&[(a, 12), (b, 25)], false);
            twins.pass(&[(a, 2), (b, 2)], false);
            twins.resident.release(a.0).unwrap();
            twins.resident.release(b.0).unwrap();
            assert_eq!(twins.resident.free_pages().unwrap(), pages);
            assert_eq!(twins.resident.missing().unwrap(), 0);
        }
    }

    /// What a pass has pushed out of the window goes also where the text comes back to a cache that has seen no pass.
    #[test]
    #[ignore = "needs a CUDA device"]
    fn a_text_resumed_elsewhere_after_a_pass_steps_on() {
        let mut twins = Twins::new(wide(), SEATS, 0.7);
        let text = twins.prompt(60);
        twins.pass(&[(text, 90)], false);
        let suspended = twins.resident.suspend(text.0).unwrap();
        twins.resident = Resident::on(twins.stream.clone(), wide(), SEATS).unwrap();
        let text = (twins.resident.resume(&suspended).unwrap(), text.1);
        for _ in 0..3 {
            twins.pass(&[(text, 1)], true);
        }
        twins.check_pages(&[text]);
    }

    #[test]
    #[ignore = "needs a CUDA device"]
    fn every_head_dim_and_group_works() {
        for head_dim in [64, 96, 128, 256] {
            for group in [1, 2, 3, 4, 5, 7, 8, 16, 20] {
                let dtype = [Dtype::F16, Dtype::Bf16, Dtype::F8][group % 3];
                let query_heads = 2 * group;
                let shape =
                    CacheShape { head_dim, dtype, query_heads, kv_heads: 2, layers: 1, ..wide() };
                let mut twins = Twins::new(shape, SEATS, 0.5);
                let (a, b) = (twins.prompt(100), twins.text());
                twins.pass(&[(a, 9)], false);
                twins.pass(&[(b, 35), (a, 2)], false);
            }
        }
    }

    /// Long chunks over long texts, beside the plain kernel; the same bits in every run.
    #[test]
    #[ignore = "needs a CUDA device"]
    fn long_chunks_are_what_the_plain_kernel_gives() {
        for (mode, head_dim, dtype) in [
            (Mode::Fast, 128, Dtype::Bf16),
            (Mode::BatchInvariant, 128, Dtype::Bf16),
            (Mode::Fast, 256, Dtype::Bf16),
            (Mode::Fast, 128, Dtype::F8),
        ] {
            let shape = CacheShape { layers: 1, head_dim, pages: 1 << 14, dtype, ..wide() };
            let seats = Seats { texts: 3, tokens: 12_000, pass: 2048, mode };
            let mut twins = Twins::new(shape, seats, 0.4);
            let texts = [twins.resident.allocate().unwrap(), twins.resident.allocate().unwrap()];
            for tokens in [[2048, 16], [2048, 40], [700, 2048], [16, 0], [1, 300]] {
                let pass = texts.iter().copied().zip(tokens).collect::<Vec<_>>();
                twins.resident.begin_pass(&pass).unwrap();
                let n = tokens.iter().sum();
                let (keys, values, drops) = twins.rows(n);
                let narrow =
                    [&keys, &values].map(|data| Narrow::new(&twins.stream, Dtype::Bf16, data));
                let views = [0, 1].map(|i| narrow[i].view([3, n, head_dim], &twins.stream));
                let bits = twins.stream.clone_htod(&pack(&drops, 3)).unwrap();
                let bits = DeviceBits::of(&bits, [3, n], &twins.stream).unwrap();
                twins.resident.append(0, views[0], views[1], Some(bits)).unwrap();
                let queries = twins.noise.floats(12 * n * head_dim);
                let (fast, fast_sums) = twins.attend(0, &queries, true);
                let (slow, slow_sums) = twins.attend(0, &queries, false);
                close(&fast, &slow, head_dim, &fast_sums, &slow_sums);
                assert!(fast == twins.attend(0, &queries, true).0, "the same bits");
            }
        }
    }

    /// A value that is no number reaches the rows that see it and no others; what lies past a head's end reaches none.
    #[test]
    #[ignore = "needs a CUDA device"]
    fn a_nan_reaches_those_that_see_it() {
        for (tokens, bad, dtype) in [
            (40, 17, Dtype::Bf16),
            (130, 129, Dtype::Bf16),
            (300, 0, Dtype::Bf16),
            (130, 70, Dtype::F8),
        ] {
            let shape = CacheShape { layers: 1, dtype, ..wide() };
            // Eight bits have one scale a row, which says it of all.
            let spreads = if dtype == Dtype::F8 { 128 } else { 1 };
            let mut twins = Twins::new(shape, SEATS, 0.0);
            let stream = twins.stream.clone();
            // Pages full of NaN for others to find.
            let poison = vec![f32::NAN; 3 * 700 * 128];
            let poison = Narrow::new(&stream, Dtype::Bf16, &poison);
            let poison = poison.view([3, 700, 128], &stream);
            let bits = stream.clone_htod(&vec![0; 3 * 22]).unwrap();
            let bits = DeviceBits::of(&bits, [3, 700], &stream).unwrap();
            let poisoned = twins.resident.allocate().unwrap();
            twins.resident.fill(poisoned, 0, poison, poison, bits).unwrap();
            twins.resident.release(poisoned).unwrap();

            let text = twins.prompt(83);
            let (keys, mut values, _) = twins.rows(tokens);
            values[(tokens + bad) * 128 + 77] = f32::NAN;
            twins.resident.begin_pass(&[(text.0, tokens)]).unwrap();
            let narrow = [&keys, &values].map(|data| Narrow::new(&stream, Dtype::Bf16, data));
            let views = [0, 1].map(|i| narrow[i].view([3, tokens, 128], &stream));
            twins.resident.append(0, views[0], views[1], None).unwrap();
            let queries = twins.noise.floats(12 * tokens * 128);
            let (out, _) = twins.attend(0, &queries, true);
            for (i, row) in out.chunks_exact(128).enumerate() {
                let (head, token) = (i / tokens, i % tokens);
                let sees = (4..8).contains(&head) && token >= bad;
                let nans = row.iter().filter(|x| x.is_nan()).count();
                assert_eq!(nans, if sees { spreads } else { 0 }, "head {head}, token {token}");
                assert_eq!(row[77].is_nan(), sees);
            }
        }
    }

    #[test]
    #[ignore = "needs a CUDA device"]
    fn batch_invariant_bits_do_not_depend_on_the_neighbours() {
        let alone = |neighbours: &[usize], mode| {
            let seats = Seats { texts: 4, tokens: 3000, pass: 400, mode };
            let shape = CacheShape { layers: 1, pages: 1 << 13, ..wide() };
            let mut twins = Twins::new(shape, seats, 0.3);
            let others = neighbours.iter().map(|&tokens| twins.prompt(tokens)).collect::<Vec<_>>();
            twins.noise = Noise(5);
            let text = twins.prompt(2500);
            let mut pass = vec![(text.0, 50)];
            pass.extend(others.iter().map(|pair| (pair.0, 30)));
            twins.resident.begin_pass(&pass).unwrap();
            let n = 50 + 30 * others.len();
            // The text's own numbers come first in each head.
            let mut numbers = |heads: usize| {
                let mut noise = Noise(6);
                (0..heads)
                    .flat_map(|_| {
                        let own = noise.floats(50 * 128);
                        [own, twins.noise.floats((n - 50) * 128)].concat()
                    })
                    .collect::<Vec<_>>()
            };
            let (keys, queries) = (numbers(3), numbers(12));
            let keys = Narrow::new(&twins.stream, Dtype::Bf16, &keys);
            let keys = keys.view([3, n, 128], &twins.stream);
            twins.resident.append(0, keys, keys, None).unwrap();
            let (out, _) = twins.attend(0, &queries, true);
            (0..12).flat_map(|head| out[head * n * 128..][..50 * 128].to_vec()).collect::<Vec<_>>()
        };
        for mode in [Mode::BatchInvariant, Mode::Fast] {
            let right = alone(&[], mode);
            let same = [&[900][..], &[2900, 40, 7]].map(|others| alone(others, mode) == right);
            // The fast mode shows that the test can see a difference.
            assert_eq!(same == [true; 2], mode == Mode::BatchInvariant);
        }
    }

    /// Too few pages, or rows of a table: what is missing is counted, and once the texts are gone the pool is whole again.
    #[test]
    #[ignore = "needs a CUDA device"]
    fn a_shortage_is_counted_and_stays_in_bounds() {
        for (pages, tokens) in [(40, 1500), (2048, 64)] {
            let seats = Seats { tokens, ..SEATS };
            let mut twins = Twins::new(CacheShape { pages, ..wide() }, seats, 0.5);
            let text = twins.resident.allocate().unwrap();
            for (n, steps) in [(300, 0), (40, 0), (17, 0), (3, 5), (300, 30)] {
                twins.resident.begin_pass(&[(text, n)]).unwrap();
                let queries = twins.noise.floats(12 * n * 128);
                for layer in 0..2 {
                    let (keys, _, drops) = twins.rows(n);
                    let keys = Narrow::new(&twins.stream, Dtype::Bf16, &keys);
                    let keys = keys.view([3, n, 128], &twins.stream);
                    let bits = twins.stream.clone_htod(&pack(&drops, 3)).unwrap();
                    let bits = DeviceBits::of(&bits, [3, n], &twins.stream).unwrap();
                    twins.resident.append(layer, keys, keys, Some(bits)).unwrap();
                    twins.attend(layer, &queries, true);
                }
                if steps > 0 {
                    twins.resident.batch(&[Some(text)]).unwrap();
                }
                for _ in 0..steps {
                    twins.resident.begin_step().unwrap();
                    let keys = Narrow::new(&twins.stream, Dtype::Bf16, &[0.5; 3 * 128]);
                    let keys = keys.view([3, 1, 128], &twins.stream);
                    for layer in 0..2 {
                        twins.resident.append(layer, keys, keys, None).unwrap();
                    }
                }
            }
            assert!(twins.resident.missing().unwrap() > 0);
            twins.resident.release(text).unwrap();
            assert_eq!(twins.resident.free_pages().unwrap(), pages);
            // The seat serves again.
            let short = twins.prompt(20);
            twins.pass(&[(short, 30)], false);
        }
    }

    #[test]
    #[ignore = "needs a CUDA device"]
    fn wrong_calls_are_refused() {
        let mut twins = Twins::new(wide(), SEATS, 0.5);
        let (a, b) = (twins.prompt(30), twins.text());
        let resident = &mut twins.resident;
        assert_eq!(resident.begin_pass(&[(a.0, 1), (a.0, 2)]).unwrap_err(), Error::SequenceTwice);
        assert_eq!(
            resident.begin_pass(&[(a.0, 401)]).unwrap_err(),
            Error::PassTooLong { found: 401, most: 400 }
        );
        resident.begin_pass(&[(a.0, 2), (b.0, 3)]).unwrap();
        assert_eq!(
            resident.begin_pass(&[(a.0, 2)]).unwrap_err(),
            Error::StepUnfinished { layer: 0 }
        );
        resident.release(b.0).unwrap();
        assert_eq!(resident.begin_step().unwrap_err(), Error::StepUnfinished { layer: 0 });
        resident.release(a.0).unwrap();
        assert_eq!(resident.begin_step().unwrap_err(), Error::NoBatch);
        assert_eq!(resident.begin_pass(&[(a.0, 2)]).unwrap_err(), Error::UnknownSequence);
        let error = Resident::new(wide(), Seats { pass: 8193, ..SEATS }).unwrap_err();
        assert!(matches!(error, Error::CacheShape { field: "pass", found: 8193, .. }));
    }
}
