//! Scores and drop bits of every kernel, against a reference in f64.

#![cfg(feature = "cuda")]

mod common;

use common::Noise;
use common::on_card::own_stream;
use half::bf16;
use paged_kernels::cudarc::driver::{CudaSlice, CudaStream};
use paged_kernels::{
    DeviceBits, DeviceBitsMut, DeviceView, DeviceViewMut, Error, ScorePrecision, ScoreRule, Scores,
    Surrogate, SurrogateWeights,
};
use std::sync::Arc;

const PRECISIONS: [ScorePrecision; 2] = [ScorePrecision::F32, ScorePrecision::MatchTorchBf16];
const TOKENS: [usize; 14] = [1, 2, 7, 31, 32, 33, 64, 65, 100, 200, 257, 1000, 2100, 4097];
const MOST: usize = 4097;

/// Sizes, with no hidden units for a linear surrogate.
#[derive(Debug, Clone, Copy)]
struct Shape {
    dim: usize,
    width: usize,
    heads: usize,
}

fn shapes() -> Vec<Shape> {
    let shape = |(dim, width, heads)| Shape { dim, width, heads };
    let linear =
        [(576, 0, 1), (1024, 0, 8), (4096, 0, 8), (4096, 0, 3), (1024, 0, 17), (576, 0, 32)];
    let mlp = [
        (576, 72, 1),
        (576, 16, 3),
        (1024, 128, 3),
        (4096, 512, 8),
        (5120, 640, 8),
        (4096, 640, 1),
        (1024, 200, 17),
        (576, 1024, 8),
        (576, 1040, 32),
        (64, 512, 2),
    ];
    linear.into_iter().chain(mlp).map(shape).collect()
}

/// A surrogate on the host and the hidden states that it is asked for.
struct Model {
    shape: Shape,
    first: Vec<bf16>,
    first_bias: Vec<bf16>,
    second: Vec<bf16>,
    second_bias: Vec<bf16>,
    hidden: Vec<bf16>,
}

fn noise(noise: &mut Noise, count: usize, scale: f32) -> Vec<bf16> {
    (0..count).map(|_| bf16::from_f32(noise.next() * scale)).collect()
}

impl Model {
    /// Hidden units and scores are around 1.
    fn new(shape: Shape, tokens: usize) -> Self {
        let Shape { dim, width, heads } = shape;
        let seed = &mut Noise(7 + (dim * 31 + width * 7 + heads) as u64);
        let row = if width == 0 { dim } else { width };
        let scale = |n: usize| 3.0 / (n as f32).sqrt();
        Self {
            shape,
            first: noise(seed, width * dim, scale(dim)),
            first_bias: noise(seed, width, 1.0),
            second: noise(seed, heads * row, scale(row)),
            second_bias: noise(seed, heads, 0.5),
            hidden: noise(seed, tokens * dim, 1.0),
        }
    }

    fn weights(&self) -> SurrogateWeights<'_> {
        let Self { first, first_bias, second, second_bias, .. } = self;
        if self.shape.width == 0 {
            SurrogateWeights::Linear { weight: second, bias: second_bias }
        } else {
            SurrogateWeights::Mlp { first, first_bias, second, second_bias }
        }
    }

    /// Scores of a token by head, in f64 but for what the precision rounds.
    fn scores(&self, token: usize, precision: ScorePrecision) -> Vec<f64> {
        let Shape { dim, width, .. } = self.shape;
        let round = |x: f64| match precision {
            ScorePrecision::F32 => x,
            ScorePrecision::MatchTorchBf16 => f64::from(bf16::from_f64(x).to_f32()),
        };
        let hidden = wide(&self.hidden[token * dim..][..dim]);
        let units = self.first.chunks_exact(dim).zip(&self.first_bias).map(|(row, bias)| {
            let x = round(dot(row, &hidden) + bias.to_f64());
            round(x * 0.5 * (1.0 + erf(x * 0.5f64.sqrt())))
        });
        let inputs = if width == 0 { hidden.clone() } else { units.collect() };
        let heads = self.second.chunks_exact(inputs.len()).zip(&self.second_bias);
        heads.map(|(row, bias)| round(dot(row, &inputs) + bias.to_f64())).collect()
    }
}

fn wide(row: &[bf16]) -> Vec<f64> {
    row.iter().map(|x| x.to_f64()).collect()
}

fn dot(row: &[bf16], x: &[f64]) -> f64 {
    row.iter().zip(x).map(|(w, x)| w.to_f64() * x).sum()
}

/// By the series whose terms are all of one sign.
fn erf(x: f64) -> f64 {
    if x.abs() > 6.0 {
        return x.signum();
    }
    let (mut term, mut sum, mut n) = (x, x, 0.0);
    while term.abs() > 1e-18 {
        n += 1.0;
        term *= 2.0 * x * x / (2.0 * n + 1.0);
        sum += term;
    }
    2.0 / std::f64::consts::PI.sqrt() * (-x * x).exp() * sum
}

#[test]
fn the_reference_knows_erf() {
    for (x, y) in [(0.0, 0.0), (0.5, 0.5204998778130465), (-2.0, -0.9953222650189527)] {
        assert!((erf(x) - y).abs() < 1e-14, "{x}");
    }
    assert!((erf(5.0) - 1.0).abs() < 1e-11);
}

/// A bf16's distance to the next.
fn ulp(x: f64) -> f64 {
    2f64.powi(x.abs().max(1e-30).log2().floor() as i32 - 7)
}

mod cuda {
    use super::*;

    fn first_rows<'a>(
        rows: &'a CudaSlice<bf16>,
        [tokens, dim]: [usize; 2],
        stride: usize,
        stream: &Arc<CudaStream>,
    ) -> DeviceView<'a> {
        DeviceView::strided(rows, [1, tokens, dim], [0, stride], stream).unwrap()
    }

    struct Card {
        stream: Arc<CudaStream>,
        kernels: Scores,
    }

    /// What a call has written.
    #[derive(Debug, PartialEq)]
    struct Written {
        words: Vec<u32>,
        scores: Vec<u32>,
    }

    impl Written {
        fn drops(&self, head: usize, token: usize, tokens: usize) -> bool {
            self.words[head * tokens.div_ceil(32) + token / 32] >> (token % 32) & 1 == 1
        }

        fn score(&self, head: usize, token: usize, tokens: usize) -> f64 {
            f64::from(f32::from_bits(self.scores[head * tokens + token]))
        }
    }

    impl Card {
        fn new() -> Self {
            let stream = own_stream();
            Self { kernels: Scores::on(stream.clone()).unwrap(), stream }
        }

        fn portable() -> Self {
            let stream = own_stream();
            Self { kernels: Scores::portable(stream.clone()).unwrap(), stream }
        }

        /// Rows of `dim` that lie `stride` apart, NaN between them.
        fn rows(&self, hidden: &[bf16], dim: usize, stride: usize) -> CudaSlice<bf16> {
            let mut rows = vec![bf16::NAN; hidden.len() / dim * stride];
            for (to, from) in rows.chunks_exact_mut(stride).zip(hidden.chunks_exact(dim)) {
                to[..dim].copy_from_slice(from);
            }
            self.stream.clone_htod(&rows).unwrap()
        }

        /// The first `tokens` rows, into outputs full of ones and of NaN.
        fn score(
            &self,
            surrogate: &Surrogate,
            rows: &CudaSlice<bf16>,
            stride: usize,
            tokens: usize,
            rule: ScoreRule,
        ) -> Written {
            let (heads, dim) = (surrogate.heads(), surrogate.dim());
            let stream = &self.stream;
            let mut words =
                stream.clone_htod(&vec![!0; DeviceBits::words([heads, tokens])]).unwrap();
            let mut scores = stream.clone_htod(&vec![f32::NAN; heads * tokens]).unwrap();
            let hidden = first_rows(rows, [tokens, dim], stride, stream);
            let mut bits = DeviceBitsMut::of(&mut words, [heads, tokens], stream).unwrap();
            let mut view = DeviceViewMut::of(&mut scores, [heads, tokens, 1], stream).unwrap();
            self.kernels.score(surrogate, hidden, rule, &mut bits, Some(&mut view)).unwrap();
            let mut bare = stream.clone_htod(&vec![!0; words.len()]).unwrap();
            let mut bits = DeviceBitsMut::of(&mut bare, [heads, tokens], stream).unwrap();
            self.kernels.score(surrogate, hidden, rule, &mut bits, None).unwrap();
            let bare = stream.clone_dtoh(&bare).unwrap();
            let words = stream.clone_dtoh(&words).unwrap();
            assert_eq!(bare, words, "bits do not depend on whether scores are wanted");
            let scores = stream.clone_dtoh(&scores).unwrap();
            Written { words, scores: scores.into_iter().map(f32::to_bits).collect() }
        }
    }

    /// Every number of tokens, both precisions: bits against the scores of the same call, scores of some tokens against
    /// the reference, and two runs against each other.
    fn check(card: &Card, shape: Shape, gap: usize) {
        let model = Model::new(shape, MOST);
        let Shape { dim, heads, .. } = shape;
        let surrogate = card.kernels.surrogate(dim, model.weights()).unwrap();
        let rows = card.rows(&model.hidden, dim, dim + gap);
        let seen = |t: &usize| *t < 70 || t.is_multiple_of(149) || *t > MOST - 4;
        let seen = (0..MOST).filter(seen).collect::<Vec<_>>();
        let mut worst = 0f64;
        for precision in PRECISIONS {
            let expected = seen.iter().map(|&t| model.scores(t, precision)).collect::<Vec<_>>();
            let rule = ScoreRule { threshold: 0.1, precision };
            let threshold = match precision {
                ScorePrecision::F32 => 0.1f32,
                ScorePrecision::MatchTorchBf16 => bf16::from_f32(0.1).to_f32(),
            };
            for tokens in TOKENS {
                let case = format!("{shape:?} gap {gap} {precision:?} {tokens} tokens");
                let found = card.score(&surrogate, &rows, dim + gap, tokens, rule);
                let again = card.score(&surrogate, &rows, dim + gap, tokens, rule);
                assert_eq!(found, again, "{case}: the same bits in every run");
                for head in 0..heads {
                    for token in 0..tokens.div_ceil(32) * 32 {
                        let drops = found.drops(head, token, tokens);
                        let expected = token < tokens
                            && found.score(head, token, tokens) < f64::from(threshold);
                        assert_eq!(drops, expected, "{case}: head {head} token {token}");
                    }
                }
                for (&token, expected) in seen.iter().zip(&expected).filter(|(t, _)| **t < tokens) {
                    for (head, &expected) in expected.iter().enumerate() {
                        let score = found.score(head, token, tokens);
                        let room = match precision {
                            ScorePrecision::F32 => 1e-4,
                            // Units may round the other way, and then the score.
                            ScorePrecision::MatchTorchBf16 if shape.width == 0 => ulp(expected),
                            ScorePrecision::MatchTorchBf16 => {
                                ulp(expected) + 0.05 / (shape.width as f64).sqrt()
                            }
                        };
                        let off = (score - expected).abs();
                        assert!(
                            off <= room,
                            "{case}: head {head} token {token}: {score} is not {expected}"
                        );
                        if precision == ScorePrecision::F32 {
                            worst = worst.max(off);
                        }
                        let apart = (expected - f64::from(threshold)).abs();
                        let drops = found.drops(head, token, tokens);
                        assert!(
                            apart <= room || drops == (expected < f64::from(threshold)),
                            "{case}: head {head} token {token}"
                        );
                    }
                }
            }
        }
        eprintln!("{shape:?} gap {gap}: f32 scores off by at most {worst:.1e}");
    }

    #[test]
    #[ignore = "needs a CUDA device"]
    fn fast_kernels_agree_with_the_reference() {
        let card = Card::new();
        for (i, shape) in shapes().into_iter().enumerate() {
            check(&card, shape, i % 2 * 8);
        }
    }

    #[test]
    #[ignore = "needs a CUDA device"]
    fn portable_kernels_agree_with_the_reference() {
        let card = Card::portable();
        for (i, shape) in shapes().into_iter().enumerate() {
            check(&card, shape, (i + 1) % 2 * 8);
        }
    }

    #[test]
    #[ignore = "needs a CUDA device"]
    fn the_plain_kernel_agrees_with_the_reference() {
        let card = Card::new();
        // An odd stride has no fast kernel, nor have these columns.
        for (dim, width, heads, gap) in
            [(576, 72, 3, 1), (100, 33, 8, 0), (1024, 0, 3, 3), (8, 0, 32, 0)]
        {
            check(&card, Shape { dim, width, heads }, gap);
        }
    }

    /// Each kernel by its number of tokens: a row with a NaN is kept and nothing else changes; with infinite thresholds all
    /// or nothing goes.
    #[test]
    #[ignore = "needs a CUDA device"]
    fn a_nan_is_kept_and_thresholds_may_be_infinite() {
        for card in [Card::new(), Card::portable()] {
            for shape in [(1024, 0, 3), (1024, 512, 8), (576, 1040, 3), (100, 20, 3)] {
                let shape = Shape { dim: shape.0, width: shape.1, heads: shape.2 };
                let clean = Model::new(shape, MOST);
                let mut model = Model::new(shape, MOST);
                let surrogate = card.kernels.surrogate(shape.dim, model.weights()).unwrap();
                let sick = [0, 30, 63, 97, 256, 4090];
                for token in sick {
                    model.hidden[token * shape.dim + 5] = bf16::NAN;
                }
                let clean = card.rows(&clean.hidden, shape.dim, shape.dim);
                let rows = card.rows(&model.hidden, shape.dim, shape.dim);
                for precision in PRECISIONS {
                    for tokens in [1, 31, 64, 100, 257, 4097] {
                        let score = |rows, threshold| {
                            let rule = ScoreRule { threshold, precision };
                            card.score(&surrogate, rows, shape.dim, tokens, rule)
                        };
                        let healthy = score(&clean, 0.1);
                        let found = score(&rows, 0.1);
                        let (all, none) =
                            (score(&rows, f32::INFINITY), score(&rows, f32::NEG_INFINITY));
                        assert!(none.words.iter().all(|&word| word == 0));
                        assert_eq!(score(&clean, f32::NAN).words, none.words);
                        for head in 0..shape.heads {
                            for token in 0..tokens {
                                let at = head * tokens + token;
                                let case =
                                    format!("{shape:?} {precision:?} {tokens}: {head} {token}");
                                let ill = sick.contains(&token);
                                let nan = f32::from_bits(found.scores[at]).is_nan();
                                assert_eq!(nan, ill, "{case}");
                                assert_eq!(all.drops(head, token, tokens), !ill, "{case}");
                                if !ill {
                                    assert_eq!(found.scores[at], healthy.scores[at], "{case}");
                                }
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    #[ignore = "needs a CUDA device"]
    fn arguments_that_do_not_go_together_are_refused() {
        let card = Card::new();
        let model = Model::new(Shape { dim: 64, width: 16, heads: 3 }, 5);
        let SurrogateWeights::Mlp { first, first_bias, second, second_bias } = model.weights()
        else {
            panic!("an MLP")
        };
        let make = |dim, weights| card.kernels.surrogate(dim, weights).map(|_| ());
        let short = SurrogateWeights::Mlp { first: &first[1..], first_bias, second, second_bias };
        let expected = Error::Length { argument: "first weights", expected: 1024, found: 1023 };
        assert_eq!(make(64, short), Err(expected));
        let none = SurrogateWeights::Mlp { first: &[], first_bias: &[], second, second_bias };
        assert!(matches!(make(64, none), Err(Error::Surrogate { field: "hidden units", .. })));
        let many = SurrogateWeights::Linear { weight: &[bf16::ONE; 33], bias: &[bf16::ONE; 33] };
        assert!(matches!(make(1, many), Err(Error::Surrogate { field: "heads", found: 33, .. })));

        let surrogate = card.kernels.surrogate(64, model.weights()).unwrap();
        let stream = &card.stream;
        let rows = stream.clone_htod(&model.hidden).unwrap();
        let wide = stream.alloc_zeros::<f32>(5 * 64).unwrap();
        let (mut words, mut other) =
            (stream.alloc_zeros(3).unwrap(), stream.alloc_zeros(6).unwrap());
        let mut narrow = stream.alloc_zeros::<bf16>(15).unwrap();
        let good = DeviceView::of(&rows, [1, 5, 64], stream).unwrap();
        let mut bits = DeviceBitsMut::of(&mut words, [3, 5], stream).unwrap();
        let rule = ScoreRule { threshold: 0.0, precision: ScorePrecision::F32 };
        let score = |hidden, bits: &mut DeviceBitsMut<'_>| {
            card.kernels.score(&surrogate, hidden, rule, bits, None)
        };
        let turned = DeviceView::of(&rows, [5, 1, 64], stream).unwrap();
        assert!(matches!(score(turned, &mut bits), Err(Error::Shape { tensor: "hidden", .. })));
        let wide = DeviceView::of(&wide, [1, 5, 64], stream).unwrap();
        let typed = score(wide, &mut bits).unwrap_err();
        assert!(matches!(typed, Error::Type { tensor: "hidden", .. }));
        let mut many = DeviceBitsMut::of(&mut other, [3, 33], stream).unwrap();
        assert!(matches!(score(good, &mut many), Err(Error::Shape { tensor: "bits", .. })));
        let mut scores = DeviceViewMut::of(&mut narrow, [3, 5, 1], stream).unwrap();
        let typed = card.kernels.score(&surrogate, good, rule, &mut bits, Some(&mut scores));
        assert!(matches!(typed.unwrap_err(), Error::Type { tensor: "scores", .. }));
        assert_eq!(score(good, &mut bits), Ok(()));
        let elsewhere = Card::new().kernels.surrogate(64, model.weights()).unwrap();
        let result = card.kernels.score(&elsewhere, good, rule, &mut bits, None);
        assert_eq!(result, Err(Error::OtherStream));
        let foreign = own_stream();
        let error = DeviceBitsMut::of(&mut words, [3, 5], &foreign).unwrap_err();
        assert_eq!(error, Error::OtherStream);
        assert!(error.to_string().contains("; "));
    }

    /// Calls of different kernels behind each other in a graph, replayed on hidden states that change.
    #[test]
    #[ignore = "needs a CUDA device"]
    fn a_graph_of_calls_replays() {
        use paged_kernels::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
        let card = Card::new();
        let shape = Shape { dim: 1024, width: 512, heads: 8 };
        let model = Model::new(shape, 600);
        let surrogate = card.kernels.surrogate(shape.dim, model.weights()).unwrap();
        let stream = &card.stream;
        let rule = ScoreRule { threshold: 0.1, precision: ScorePrecision::MatchTorchBf16 };
        let mut rows = stream.alloc_zeros::<bf16>(600 * shape.dim).unwrap();
        let sizes = [1, 600, 33, 64, 300];
        let mut outs =
            sizes.map(|tokens| stream.alloc_zeros::<u32>(DeviceBits::words([8, tokens])).unwrap());
        let graph = {
            let calls = outs.iter_mut().zip(sizes).map(|(out, tokens)| {
                let hidden = first_rows(&rows, [tokens, shape.dim], shape.dim, stream);
                (DeviceBitsMut::of(out, [8, tokens], stream).unwrap(), hidden)
            });
            let calls = calls.collect::<Vec<_>>();
            stream.synchronize().unwrap();
            stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).unwrap();
            for (mut bits, hidden) in calls {
                card.kernels.score(&surrogate, hidden, rule, &mut bits, None).unwrap();
            }
            stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().unwrap()
        };
        stream.memcpy_htod(&model.hidden, &mut rows).unwrap();
        for _ in 0..3 {
            graph.launch().unwrap();
        }
        for (out, tokens) in outs.iter().zip(sizes) {
            let expected = card.score(&surrogate, &rows, shape.dim, tokens, rule);
            assert_eq!(stream.clone_dtoh(out).unwrap(), expected.words, "{tokens} tokens");
        }
    }
}
