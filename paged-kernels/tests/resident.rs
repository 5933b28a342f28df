//! The cache that keeps its books on the card, held to `Reference`.

#![cfg(feature = "cuda")]

mod common;

use common::on_card::{own_stream, pack};
use common::{Noise, small, view};
use half::bf16;
use paged_kernels::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
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

const SEATS: Seats = Seats { texts: 5, tokens: 700, pass: 1, mode: Mode::Fast };

/// A step's tensors on the card; they keep their addresses.
struct Tensors {
    keys: CudaSlice<bf16>,
    values: CudaSlice<bf16>,
    queries: CudaSlice<bf16>,
    drops: CudaSlice<u32>,
    /// Of each layer.
    outs: Vec<CudaSlice<f32>>,
    lses: Vec<CudaSlice<f32>>,
}

/// The same, seen by the cache.
struct Views<'a> {
    keys: DeviceView<'a>,
    values: DeviceView<'a>,
    queries: DeviceView<'a>,
    drops: DeviceBits<'a>,
    outs: Vec<(DeviceViewMut<'a>, DeviceViewMut<'a>)>,
}

impl Tensors {
    fn views(&mut self, shape: &CacheShape, places: usize, stream: &Arc<CudaStream>) -> Views<'_> {
        let CacheShape { kv_heads, query_heads, head_dim, .. } = *shape;
        let rows = [kv_heads, places, head_dim];
        let queries = [query_heads, places, head_dim];
        let outs = self.outs.iter_mut().zip(&mut self.lses);
        let outs = outs.map(|(out, lse)| {
            let out = DeviceViewMut::of(out, queries, stream).unwrap();
            (out, DeviceViewMut::of(lse, [query_heads, places, 1], stream).unwrap())
        });
        Views {
            keys: DeviceView::of(&self.keys, rows, stream).unwrap(),
            values: DeviceView::of(&self.values, rows, stream).unwrap(),
            queries: DeviceView::of(&self.queries, queries, stream).unwrap(),
            drops: DeviceBits::of(&self.drops, [kv_heads, places], stream).unwrap(),
            outs: outs.collect(),
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

    fn narrow(&self, data: &[f32]) -> CudaSlice<bf16> {
        let data = data.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>();
        self.stream.clone_htod(&data).unwrap()
    }

    fn prompt(&mut self, tokens: usize) -> Pair {
        let CacheShape { layers, kv_heads, head_dim, .. } = *self.resident.shape();
        let pair = (self.resident.allocate().unwrap(), self.reference.allocate().unwrap());
        let shape = [kv_heads, tokens, head_dim];
        for layer in (0..layers).filter(|_| tokens > 0) {
            let keys = self.noise.floats(kv_heads * tokens * head_dim);
            let values = self.noise.floats(kv_heads * tokens * head_dim);
            let drops = self.noise.bools(kv_heads * tokens, self.drop);
            let on_card = (self.narrow(&keys), self.narrow(&values));
            let bits = self.stream.clone_htod(&pack(&drops, kv_heads)).unwrap();
            let (keys_view, values_view) = (
                DeviceView::of(&on_card.0, shape, &self.stream).unwrap(),
                DeviceView::of(&on_card.1, shape, &self.stream).unwrap(),
            );
            let bits = DeviceBits::of(&bits, [kv_heads, tokens], &self.stream).unwrap();
            self.resident.fill(pair.0, layer, keys_view, values_view, bits).unwrap();
            let (keys, values) = (view(&keys, shape), view(&values, shape));
            self.reference.fill(pair.1, layer, keys, values, &drops).unwrap();
        }
        pair
    }

    fn tensors(&self, places: usize) -> Tensors {
        let CacheShape { layers, kv_heads, query_heads, head_dim, .. } = *self.resident.shape();
        let poison = |n: usize| {
            (0..layers).map(|_| self.stream.clone_htod(&vec![f32::NAN; n]).unwrap()).collect()
        };
        let rows = vec![bf16::NAN; kv_heads * places * head_dim];
        let queries = vec![bf16::NAN; query_heads * places * head_dim];
        Tensors {
            keys: self.stream.clone_htod(&rows).unwrap(),
            values: self.stream.clone_htod(&rows).unwrap(),
            queries: self.stream.clone_htod(&queries).unwrap(),
            drops: self.stream.clone_htod(&vec![0; kv_heads * places.div_ceil(32)]).unwrap(),
            outs: poison(queries.len()),
            lses: poison(query_heads * places),
        }
    }

    /// Queues a step of all layers, which all see the same rows and queries.
    fn queue(&mut self, views: Views<'_>) {
        let scale = scale(self.resident.shape().head_dim);
        self.resident.begin_step().unwrap();
        for (layer, (out, lse)) in views.outs.into_iter().enumerate() {
            self.resident.append(layer, views.keys, views.values, Some(views.drops)).unwrap();
            self.resident.attend(layer, views.queries, scale, out, Some(lse)).unwrap();
        }
    }

    fn queue_all(&mut self, tensors: &mut Tensors, places: usize) {
        let (shape, stream) = (self.resident.shape().clone(), self.stream.clone());
        self.queue(tensors.views(&shape, places, &stream));
    }

    /// New numbers into a step's tensors; `run` does the step on the card. Compares what comes out.
    fn step(
        &mut self,
        batch: &[Option<Pair>],
        tensors: &mut Tensors,
        run: impl FnOnce(&mut Self, &mut Tensors),
    ) {
        let CacheShape { layers, kv_heads, query_heads, head_dim, .. } = *self.resident.shape();
        let places = batch.len();
        let keys = self.noise.floats(kv_heads * places * head_dim);
        let values = self.noise.floats(kv_heads * places * head_dim);
        let queries = self.noise.floats(query_heads * places * head_dim);
        let drops = self.noise.bools(kv_heads * places, self.drop);
        for (data, to) in [
            (&keys, &mut tensors.keys),
            (&values, &mut tensors.values),
            (&queries, &mut tensors.queries),
        ] {
            let data = data.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>();
            self.stream.memcpy_htod(&data, to).unwrap();
        }
        self.stream.memcpy_htod(&pack(&drops, kv_heads), &mut tensors.drops).unwrap();
        run(self, tensors);
        let read = |slices: &[CudaSlice<f32>]| -> Vec<Vec<f32>> {
            slices.iter().map(|slice| self.stream.clone_dtoh(slice).unwrap()).collect()
        };
        let (outs, lses) = (read(&tensors.outs), read(&tensors.lses));

        for (place, pair) in batch.iter().enumerate() {
            let Some((on_card, expected)) = pair else { continue };
            let pick = |data: &[f32], heads: usize| -> Vec<f32> {
                let row = |head: usize| &data[(head * places + place) * head_dim..][..head_dim];
                (0..heads).flat_map(row).copied().collect()
            };
            let (keys, values) = (pick(&keys, kv_heads), pick(&values, kv_heads));
            let bits = (0..kv_heads).map(|head| drops[head * places + place]).collect::<Vec<_>>();
            let queries = pick(&queries, query_heads);
            let shape = [query_heads, 1, head_dim];
            let (mut right, mut sums) = (vec![0.0; queries.len()], vec![0.0; query_heads]);
            self.reference.begin_step(&[(*expected, 1)]).unwrap();
            for layer in 0..layers {
                let rows = [kv_heads, 1, head_dim];
                self.reference
                    .append(layer, view(&keys, rows), view(&values, rows), &bits)
                    .unwrap();
                let right_view = ViewMut::new(&mut right[..], shape).unwrap();
                let seen = view(&queries, shape);
                self.reference
                    .attend(layer, seen, scale(head_dim), right_view, Some(&mut sums))
                    .unwrap();
                for head in 0..query_heads {
                    let found = &outs[layer][(head * places + place) * head_dim..][..head_dim];
                    let right = &right[head * head_dim..][..head_dim];
                    let norm =
                        |x: &mut dyn Iterator<Item = f32>| x.map(|x| x * x).sum::<f32>().sqrt();
                    let apart = norm(&mut found.iter().zip(right).map(|(x, y)| x - y));
                    let relative = apart / norm(&mut right.iter().copied());
                    assert!(relative < 5e-3, "place {place}, head {head}: off by {relative}");
                    let apart = (lses[layer][head * places + place] - sums[head]).abs();
                    assert!(apart < 1e-3, "place {place}, head {head}: log-sum off by {apart}");
                }
            }
            let lengths = self.reference.lengths(*expected).unwrap();
            assert_eq!(self.resident.lengths(*on_card).unwrap(), lengths);
        }
    }
}

fn scale(head_dim: usize) -> f32 {
    (head_dim as f32).powf(-0.5)
}

mod cuda {
    use super::*;

    /// Texts come, rest, step and go; after each step all is as in the reference, and no page is lost.
    #[test]
    #[ignore = "needs a CUDA device"]
    fn texts_that_come_and_go_are_as_in_the_reference() {
        let shapes = [
            wide(),
            CacheShape { head_dim: 64, query_heads: 3, window: 0, ..wide() },
            CacheShape { head_dim: 80, page_size: 5, window: 7, ..wide() },
            CacheShape { page_size: 64, pages: 512, ..wide() },
            small(Dtype::F32),
        ];
        for shape in shapes {
            for (drop, mode) in [
                (0.0, Mode::Fast),
                (0.4, Mode::Fast),
                (0.4, Mode::BatchInvariant),
                (1.0, Mode::BatchInvariant),
            ] {
                let pages = shape.pages;
                let mut twins = Twins::new(shape.clone(), Seats { mode, ..SEATS }, drop);
                let mut texts: Vec<Pair> = Vec::new();
                for round in 0..12 {
                    if texts.len() == SEATS.texts || (round % 3 == 2 && !texts.is_empty()) {
                        let gone = twins.noise.bits() as usize % texts.len();
                        let (on_card, expected) = texts.swap_remove(gone);
                        twins.resident.release(on_card).unwrap();
                        twins.reference.release(expected).unwrap();
                    }
                    let tokens = [0, 1, 19, 20, 21, 33, 300, 70][round % 8];
                    texts.push(twins.prompt(tokens));
                    // An empty place, and a text that rests.
                    let rests = round % texts.len();
                    let mut batch = texts.iter().copied().map(Some).collect::<Vec<_>>();
                    if round % 2 == 0 {
                        batch[rests] = None;
                    }
                    let seats =
                        batch.iter().map(|pair| pair.map(|pair| pair.0)).collect::<Vec<_>>();
                    twins.resident.batch(&seats).unwrap();
                    let mut tensors = twins.tensors(batch.len());
                    for _ in 0..5 {
                        twins.step(&batch, &mut tensors, |twins, tensors| {
                            twins.queue_all(tensors, batch.len());
                        });
                    }
                }
                let page_size = twins.resident.shape().page_size;
                let mut held = 0;
                for (on_card, _) in texts.clone() {
                    let lengths = twins.resident.lengths(on_card).unwrap();
                    held += lengths.iter().map(|len| len.div_ceil(page_size)).sum::<usize>();
                }
                assert_eq!(twins.resident.free_pages().unwrap() + held, pages);
                assert_eq!(twins.resident.missing().unwrap(), 0);
                texts.iter().for_each(|pair| twins.resident.release(pair.0).unwrap());
                assert_eq!(twins.resident.free_pages().unwrap(), pages);
            }
        }
    }

    /// Steps of 24 texts, every ninth of which rests.
    fn steps_of_many(
        shape: CacheShape,
        seats: Seats,
        tokens: impl Fn(usize) -> usize,
        steps: usize,
    ) {
        let mut twins = Twins::new(shape, Seats { texts: 24, ..seats }, 0.4);
        let texts = (0..24).map(|text| twins.prompt(tokens(text))).collect::<Vec<_>>();
        let batch = texts.into_iter().enumerate();
        let batch = batch.map(|(i, text)| (i % 9 != 5).then_some(text)).collect::<Vec<_>>();
        let seats = batch.iter().map(|pair| pair.map(|pair| pair.0)).collect::<Vec<_>>();
        twins.resident.batch(&seats).unwrap();
        let mut tensors = twins.tensors(batch.len());
        for _ in 0..steps {
            twins.step(&batch, &mut tensors, |twins, tensors| twins.queue_all(tensors, 24));
        }
        assert_eq!(twins.resident.missing().unwrap(), 0);
    }

    /// So many short heads that a block has several, one of them longer than what is on its way at once.
    #[test]
    #[ignore = "needs a CUDA device"]
    fn texts_among_many_are_as_in_the_reference() {
        let tokens = |text| if text == 7 { 650 } else { text * 5 };
        steps_of_many(CacheShape { pages: 4096, ..wide() }, SEATS, tokens, 40);
    }

    /// Shares of a layer that are longer than what a block has on its way, and has asked for, before its turn.
    #[test]
    #[ignore = "needs a CUDA device"]
    fn long_shares_are_as_in_the_reference() {
        let tokens = |text| if text == 7 { 6_500 } else { 5 + text * 120 };
        for (page_size, mode) in [(16, Mode::Fast), (64, Mode::Fast), (16, Mode::BatchInvariant)] {
            let shape = CacheShape { page_size, pages: 12_000 * 16 / page_size, ..wide() };
            steps_of_many(shape, Seats { tokens: 7_000, mode, ..SEATS }, tokens, 4);
        }
    }

    /// Attention that leaves room for the kernel that follows is cut otherwise, which its last bits tell.
    #[test]
    #[ignore = "needs a CUDA device"]
    fn attention_that_leaves_room_is_as_in_the_reference() {
        for (group, mode) in [
            (1, Mode::Fast),
            (3, Mode::BatchInvariant),
            (4, Mode::Fast),
            (5, Mode::Fast),
            (7, Mode::BatchInvariant),
            (8, Mode::BatchInvariant),
        ] {
            let shape = CacheShape { query_heads: 3 * group, ..wide() };
            let mut twins = Twins::new(shape.clone(), Seats { mode, ..SEATS }, 0.4);
            let texts = [650, 0, 21].map(|tokens| twins.prompt(tokens));
            let batch = [Some(texts[0]), None, Some(texts[1]), Some(texts[2])];
            twins.resident.batch(&batch.map(|pair| pair.map(|pair| pair.0))).unwrap();
            let mut tensors = twins.tensors(batch.len());
            let stream = twins.stream.clone();
            for _ in 0..20 {
                twins.step(&batch, &mut tensors, |twins, tensors| {
                    twins.resident.leave_room(false);
                    twins.queue_all(tensors, batch.len());
                    let bits = |tensors: &Tensors| {
                        let out = stream.clone_dtoh(&tensors.outs[0]).unwrap();
                        out.into_iter().map(f32::to_bits).collect::<Vec<_>>()
                    };
                    let filling = bits(tensors);
                    twins.resident.leave_room(true);
                    let views = tensors.views(&shape, batch.len(), &stream);
                    for (layer, (out, lse)) in views.outs.into_iter().enumerate() {
                        let scale = scale(shape.head_dim);
                        twins.resident.attend(layer, views.queries, scale, out, Some(lse)).unwrap();
                    }
                    assert_ne!(bits(tensors), filling);
                });
            }
        }
    }

    /// A text that leaves for host memory and comes back, into another seat and other pages, in the middle of its window.
    #[test]
    #[ignore = "needs a CUDA device"]
    fn a_suspended_text_goes_on_where_it_was() {
        for shape in [wide(), small(Dtype::F32)] {
            let pages = shape.pages;
            let mut twins = Twins::new(shape, SEATS, 0.5);
            let (mut long, short) = (twins.prompt(130), twins.prompt(3));
            let mut tensors = twins.tensors(2);
            for round in 0..3 {
                twins.resident.batch(&[Some(long.0), Some(short.0)]).unwrap();
                for _ in 0..7 {
                    twins.step(&[Some(long), Some(short)], &mut tensors, |twins, tensors| {
                        twins.queue_all(tensors, 2);
                    });
                }
                let held = twins.resident.free_pages().unwrap();
                let suspended = twins.resident.suspend(long.0).unwrap();
                assert!(twins.resident.free_pages().unwrap() > held);
                assert_eq!(twins.resident.lengths(long.0).unwrap_err(), Error::UnknownSequence);
                // Somebody else takes the seat and the pages.
                let other = twins.prompt(40 + round);
                long.0 = twins.resident.resume(&suspended).unwrap();
                twins.resident.release(other.0).unwrap();
                assert_eq!(twins.resident.free_pages().unwrap(), held);
            }
            let suspended = twins.resident.suspend(long.0).unwrap();
            twins.resident.release(short.0).unwrap();
            assert_eq!(twins.resident.free_pages().unwrap(), pages);
            let narrower = CacheShape { window: 3, ..twins.resident.shape().clone() };
            let mut narrower = Resident::on(twins.stream.clone(), narrower, SEATS).unwrap();
            assert_eq!(narrower.resume(&suspended).unwrap_err(), Error::OtherCache);
            let poorer = CacheShape { pages: 4, ..twins.resident.shape().clone() };
            let mut poorer = Resident::on(twins.stream.clone(), poorer, SEATS).unwrap();
            let error = poorer.resume(&suspended).unwrap_err();
            assert!(matches!(error, Error::OutOfPages { free: 4, .. }));
        }
    }

    /// Outputs of a text's steps, whose numbers are always the same, beside texts of some lengths.
    fn beside(before: &[usize], after: &[usize], mode: Mode) -> Vec<Vec<f32>> {
        let shape = CacheShape { pages: 1 << 14, ..wide() };
        let seats = Seats { texts: 8, tokens: 6000, pass: 1, mode };
        let mut twins = Twins::new(shape.clone(), seats, 0.3);
        let mut texts = before.iter().map(|&tokens| twins.prompt(tokens)).collect::<Vec<_>>();
        twins.noise = Noise(5);
        texts.push(twins.prompt(3000));
        texts.extend(after.iter().map(|&tokens| twins.prompt(tokens)));
        let seats = texts.iter().map(|pair| Some(pair.0)).collect::<Vec<_>>();
        twins.resident.batch(&seats).unwrap();
        let places = texts.len();
        let mut tensors = twins.tensors(places);
        // Every place has the same rows.
        let mut noise = Noise(6);
        for (heads, to) in [
            (shape.kv_heads, &mut tensors.keys),
            (shape.kv_heads, &mut tensors.values),
            (shape.query_heads, &mut tensors.queries),
        ] {
            let rows = (0..heads).flat_map(|_| noise.floats(shape.head_dim).repeat(places));
            let rows = rows.map(bf16::from_f32).collect::<Vec<_>>();
            twins.stream.memcpy_htod(&rows, to).unwrap();
        }
        let mut seen = Vec::new();
        for _ in 0..3 {
            twins.queue_all(&mut tensors, places);
            for out in &tensors.outs {
                let out = twins.stream.clone_dtoh(out).unwrap();
                let row = |head: usize| (head * places + before.len()) * shape.head_dim;
                let rows = (0..shape.query_heads).map(|head| &out[row(head)..][..shape.head_dim]);
                seen.push(rows.collect::<Vec<_>>().concat());
            }
        }
        seen
    }

    #[test]
    #[ignore = "needs a CUDA device"]
    fn batch_invariant_bits_do_not_depend_on_the_neighbours() {
        let neighbours: [(&[usize], &[usize]); 4] =
            [(&[], &[40]), (&[3], &[]), (&[1500, 17], &[4000, 300]), (&[5000; 4], &[5000; 3])];
        for mode in [Mode::BatchInvariant, Mode::Fast] {
            let alone = beside(&[], &[], mode);
            let same = neighbours.map(|(before, after)| beside(before, after, mode) == alone);
            // The fast mode shows that the test can see a difference.
            assert_eq!(same.iter().all(|&same| same), mode == Mode::BatchInvariant);
        }
    }

    /// A step captured once and replayed past the ends of pages and of the window.
    #[test]
    #[ignore = "needs a CUDA device"]
    fn a_captured_step_can_be_replayed() {
        for shape in [wide(), small(Dtype::F32)] {
            let mut twins = Twins::new(shape, SEATS, 0.5);
            let batch = vec![Some(twins.prompt(25)), None, Some(twins.prompt(0))];
            let seats = batch.iter().map(|pair| pair.map(|pair| pair.0)).collect::<Vec<_>>();
            twins.resident.batch(&seats).unwrap();
            let mut tensors = twins.tensors(batch.len());
            let stream = twins.stream.clone();
            let shape = twins.resident.shape().clone();
            // Made before the capture, into which no slice's events may fall.
            let views = tensors.views(&shape, batch.len(), &stream);
            stream.synchronize().unwrap();
            stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).unwrap();
            twins.queue(views);
            let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().unwrap();
            for _ in 0..60 {
                twins.step(&batch, &mut tensors, |_, _| graph.launch().unwrap());
            }
            assert_eq!(twins.resident.missing().unwrap(), 0);
        }
    }

    /// Too few pages: what is missing is counted, and once the texts are gone the pool is whole again.
    #[test]
    #[ignore = "needs a CUDA device"]
    fn a_shortage_is_counted_and_stays_in_bounds() {
        for (pages, tokens) in [(40, 700), (2048, 32)] {
            let seats = Seats { texts: 2, tokens, pass: 1, mode: Mode::Fast };
            let mut twins = Twins::new(CacheShape { pages, ..wide() }, seats, 0.1);
            // The reference would refuse; only the card is told.
            let (one, two) =
                (twins.resident.allocate().unwrap(), twins.resident.allocate().unwrap());
            let shape = [3, 150, 128];
            let rows = twins.noise.floats(3 * 150 * 128);
            let rows = twins.narrow(&rows);
            let bits = twins.stream.clone_htod(&vec![0; 3 * 5]).unwrap();
            for text in [one, two] {
                for layer in 0..2 {
                    let rows = DeviceView::of(&rows, shape, &twins.stream).unwrap();
                    let bits = DeviceBits::of(&bits, [3, 150], &twins.stream).unwrap();
                    twins.resident.fill(text, layer, rows, rows, bits).unwrap();
                }
            }
            twins.resident.batch(&[Some(one), Some(two)]).unwrap();
            let mut tensors = twins.tensors(2);
            for _ in 0..40 {
                twins.queue_all(&mut tensors, 2);
            }
            assert!(twins.resident.missing().unwrap() > 0);
            twins.resident.release(one).unwrap();
            twins.resident.release(two).unwrap();
            assert_eq!(twins.resident.free_pages().unwrap(), pages);
            // The seats serve again.
            let short = twins.prompt(20);
            twins.resident.batch(&[Some(short.0)]).unwrap();
            let mut tensors = twins.tensors(1);
            twins.step(&[Some(short)], &mut tensors, |twins, tensors| twins.queue_all(tensors, 1));
        }
    }

    #[test]
    #[ignore = "needs a CUDA device"]
    fn wrong_calls_are_refused() {
        let mut twins =
            Twins::new(wide(), Seats { texts: 2, tokens: 100, pass: 1, mode: Mode::Fast }, 0.5);
        let (first, second) = (twins.prompt(3), twins.prompt(0));
        assert_eq!(twins.resident.allocate().unwrap_err(), Error::NoSeat { seats: 2 });
        assert_eq!(twins.resident.batch(&[None; 3]).unwrap_err(), Error::NoSeat { seats: 2 });
        assert_eq!(
            twins.resident.batch(&[Some(first.0), Some(first.0)]).unwrap_err(),
            Error::SequenceTwice
        );
        let tensors = twins.tensors(1);
        let rows = DeviceView::of(&tensors.keys, [3, 1, 128], &twins.stream).unwrap();
        twins.resident.batch(&[Some(first.0)]).unwrap();
        assert_eq!(twins.resident.append(0, rows, rows, None).unwrap_err(), Error::NoStep);
        twins.resident.begin_step().unwrap();
        assert_eq!(twins.resident.begin_step().unwrap_err(), Error::StepUnfinished { layer: 0 });
        twins.resident.append(0, rows, rows, None).unwrap();
        assert_eq!(
            twins.resident.append(0, rows, rows, None).unwrap_err(),
            Error::AppendedTwice { layer: 0 }
        );
        let bits = DeviceBits::of(&tensors.drops, [3, 1], &twins.stream).unwrap();
        assert_eq!(
            twins.resident.fill(first.0, 1, rows, rows, bits).unwrap_err(),
            Error::FilledLate
        );
        twins.resident.fill(second.0, 1, rows, rows, bits).unwrap();
        twins.resident.release(first.0).unwrap();
        assert_eq!(
            twins.resident.batch(&[Some(second.0)]).unwrap_err(),
            Error::NotFilled { layer: 0 }
        );
        assert_eq!(twins.resident.release(first.0).unwrap_err(), Error::UnknownSequence);
    }
}
