//! The inner loops: some query rows against some pages. They are plain loops over arrays of lanes, inlined into
//! functions compiled for what the CPU has, where the compiler makes vectors of them.

use super::exp::{exp, mul_add};
use crate::book::StepHead;
use crate::storage::{Element, Page, Storage};
use pulp::{Simd, WithSimd};
use std::ops::Range;

/// Keys that are dotted at once, and values that are summed at once: two AVX2 registers.
pub const LANES: usize = 16;

/// The largest tile of query rows: 4 rows of 2 registers of sums, 2 of keys and 1 of queries fit the 16 of AVX2.
const ROWS: usize = 4;

/// Softmax so far of one query row: `[max, sum, D weighted values]`, sum and values relative to exp(max).
pub struct State;

impl State {
    pub fn width(dim: usize) -> usize {
        dim + 2
    }

    #[inline(always)]
    fn clear(state: &mut [f32]) {
        state.fill(0.0);
        state[0] = f32::NEG_INFINITY;
    }

    /// Adds `part`. Folding into a clear state gives `part` itself, so parts may be folded by anyone, in order.
    #[inline(always)]
    pub fn fold(state: &mut [f32], part: &[f32]) {
        let max = if part[0] > state[0] { part[0] } else { state[0] };
        let weight = |m: f32| if m == f32::NEG_INFINITY { 0.0 } else { (m - max).exp() };
        let (old, new) = (weight(state[0]), weight(part[0]));
        state[1..].iter_mut().zip(&part[1..]).for_each(|(a, &b)| *a = *a * old + b * new);
        state[0] = max;
    }

    /// The mean of the values and the logarithm of the sum; 0 and -inf if nothing was summed.
    pub fn finish(state: &[f32]) -> (impl Iterator<Item = f32>, f32) {
        let (max, sum) = (state[0], state[1]);
        let empty = sum == 0.0;
        let values = state[2..].iter().map(move |x| if empty { 0.0 } else { x / sum });
        (values, if empty { f32::NEG_INFINITY } else { max + sum.ln() })
    }
}

/// Some segments of one head.
pub struct Segments<'a, E> {
    pub storage: &'a Storage<E>,
    pub head: &'a StepHead<'a>,
    /// Pages of a segment.
    pub span: usize,
    pub page_size: usize,
    pub range: Range<usize>,
}

/// Query rows `first..` of a head against some of its segments.
pub struct Run<'a, E, const L: usize> {
    pub segments: Segments<'a, E>,
    /// `[rows, D]`; row `token * group + g`.
    pub queries: &'a [f32],
    pub first: usize,
    pub group: usize,
    pub scale: f32,
    /// `[rows, State::width(D)]`.
    pub states: &'a mut [f32],
}

/// One segment.
struct Segment<'a, E> {
    pages: Vec<Page<'a, E>>,
    page_size: usize,
    dim: usize,
    /// Live rows; the rest of the last page is stale.
    len: usize,
    /// Rows of the step's own tokens, and the first query row that sees each.
    own: Vec<(usize, usize)>,
}

struct Scratch {
    /// `[D, T]`.
    queries: Vec<f32>,
    /// `[T, rows of the segment]`.
    weights: Vec<f32>,
    /// `[T, State::width(D)]`.
    part: Vec<f32>,
}

impl<E: Element, const L: usize> WithSimd for Run<'_, E, L> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Segments { storage, span, page_size, .. } = self.segments;
        let width = State::width(storage.dim);
        // Larger tiles only where they are fast: each is a copy of all the loops.
        let wide = L > 1 && !S::IS_SCALAR;
        let tile = if wide { ROWS } else { 1 };
        let mut scratch = Scratch {
            queries: vec![0.0; tile * storage.dim],
            weights: vec![0.0; tile * span * page_size],
            part: vec![0.0; tile * width],
        };
        self.states.chunks_exact_mut(width).for_each(State::clear);
        for index in self.segments.range.clone() {
            let segment = self.segments.get(index, self.group);
            let queries = self.queries.chunks(tile * storage.dim);
            let states = self.states.chunks_mut(tile * width);
            for (i, (queries, states)) in queries.zip(states).enumerate() {
                let rows = queries.len() / storage.dim;
                let tile = Tile { queries, first: self.first + i * tile, scale: self.scale };
                match rows {
                    4 if wide => tile.run::<S, E, L, 4>(&segment, &mut scratch, states),
                    3 if wide => tile.run::<S, E, L, 3>(&segment, &mut scratch, states),
                    2 if wide => tile.run::<S, E, L, 2>(&segment, &mut scratch, states),
                    _ => tile.run::<S, E, L, 1>(&segment, &mut scratch, states),
                }
            }
        }
    }
}

impl<'a, E: Element> Segments<'a, E> {
    #[inline(always)]
    fn get(&self, index: usize, group: usize) -> Segment<'a, E> {
        let pages = self.head.table.pages();
        let pages = &pages[index * self.span..pages.len().min((index + 1) * self.span)];
        let start = index * self.span * self.page_size;
        let len = (self.head.table.len() - start).min(pages.len() * self.page_size);
        let own = self.head.slots.iter().enumerate().skip(1);
        let own = own.map(|(token, slot)| (slot.index().wrapping_sub(start), token * group));
        Segment {
            pages: pages.iter().map(|&page| self.storage.page(page)).collect(),
            page_size: self.page_size,
            dim: self.storage.dim,
            len,
            own: own.filter(|(row, _)| *row < len).collect(),
        }
    }
}

/// At most [`ROWS`] query rows.
struct Tile<'a> {
    /// `[T, D]`.
    queries: &'a [f32],
    /// Number of the first row in its head.
    first: usize,
    scale: f32,
}

impl Tile<'_> {
    /// Folds one segment into `states`, `[T, State::width(D)]`.
    #[inline(always)]
    fn run<S: Simd, E: Element, const L: usize, const T: usize>(
        &self,
        segment: &Segment<'_, E>,
        scratch: &mut Scratch,
        states: &mut [f32],
    ) {
        let Scratch { queries, weights, part } = scratch;
        let queries = &mut queries.as_chunks_mut::<T>().0[..segment.dim];
        for (d, query) in queries.iter_mut().enumerate() {
            *query = std::array::from_fn(|t| self.queries[t * segment.dim + d]);
        }
        let padded = segment.pages.len() * segment.page_size;
        let weights = &mut weights[..T * padded];
        self.scores::<S, E, L, T>(segment, queries, weights);

        let width = State::width(segment.dim);
        let part = &mut part[..T * width];
        let mut hides = false;
        let rows = weights.chunks_exact_mut(padded).zip(part.chunks_exact_mut(width));
        for (t, (weights, part)) in rows.enumerate() {
            weights[segment.len..].fill(f32::NEG_INFINITY);
            for &(row, first) in &segment.own {
                if self.first + t < first {
                    weights[row] = f32::NEG_INFINITY;
                    hides = true;
                }
            }
            (part[0], part[1]) = softmax::<S, L>(weights);
            if E::SCALED {
                let scales = segment.pages.iter().flat_map(|page| page.value_scales());
                for (weight, scale) in weights[..segment.len].iter_mut().zip(scales) {
                    *weight = if *weight == 0.0 { 0.0 } else { *weight * scale };
                }
            }
            part[2..].fill(0.0);
        }
        if hides {
            self.values::<S, E, L, T, true>(segment, weights, part);
        } else {
            self.values::<S, E, L, T, false>(segment, weights, part);
        }
        let parts = part.chunks_exact(width);
        states
            .chunks_exact_mut(width)
            .zip(parts)
            .for_each(|(state, part)| State::fold(state, part));
    }

    /// Scaled dot products of every query with every key, stale rows among them. The scale meets the product, not the
    /// query: a scaled query would have to be rounded.
    ///
    /// Values are touched in passing: their way from memory then overlaps with the arithmetic here, and two streams come
    /// faster than one.
    #[inline(always)]
    fn scores<S: Simd, E: Element, const L: usize, const T: usize>(
        &self,
        segment: &Segment<'_, E>,
        queries: &[[f32; T]],
        scores: &mut [f32],
    ) {
        let padded = scores.len() / T;
        let len = segment.dim * L;
        let blocks = segment
            .pages
            .iter()
            .flat_map(|page| page.keys.chunks_exact(len).zip(page.values.chunks_exact(len)));
        let mut touched = 0;
        for (block, (keys, values)) in blocks.enumerate() {
            let mut sums = [[0.0f32; L]; T];
            let lanes = keys.as_chunks::<L>().0.iter().zip(values.as_chunks::<L>().0);
            for (query, (keys, values)) in queries.iter().zip(lanes) {
                touched |= values[0].bits();
                let keys = widen_all(keys);
                for t in 0..T {
                    for l in 0..L {
                        sums[t][l] = mul_add::<S>(query[t], keys[l], sums[t][l]);
                    }
                }
            }
            for t in 0..T {
                let scores = &mut scores[t * padded + block * L..][..L];
                scores.copy_from_slice(&sums[t].map(|sum| sum * self.scale));
            }
        }
        std::hint::black_box(touched);
        if E::SCALED {
            for scores in scores.chunks_exact_mut(padded) {
                let scales = segment.pages.iter().flat_map(|page| page.key_scales());
                scores.iter_mut().zip(scales).for_each(|(score, scale)| *score *= scale);
            }
        }
    }

    /// Adds the values of the live rows to `part`. Where the step's own later tokens are among them (`HIDES`), a weight
    /// of 0 skips its value, since 0 times NaN is NaN.
    #[inline(always)]
    fn values<S: Simd, E: Element, const L: usize, const T: usize, const HIDES: bool>(
        &self,
        segment: &Segment<'_, E>,
        weights: &[f32],
        part: &mut [f32],
    ) {
        let (dim, width) = (segment.dim, State::width(segment.dim));
        let padded = weights.len() / T;
        for (page, values) in segment.pages.iter().map(|page| page.values).enumerate() {
            let start = page * segment.page_size;
            let live = segment.page_size.min(segment.len - start);
            let weights: [&[f32]; T] =
                std::array::from_fn(|t| &weights[t * padded + start..][..live]);
            for d in (0..dim).step_by(L) {
                let mut sums = [[0.0f32; L]; T];
                for t in 0..T {
                    sums[t].copy_from_slice(&part[t * width + 2 + d..][..L]);
                }
                for (row, values) in values.chunks_exact(dim).take(live).enumerate() {
                    let Some(values) = values[d..].first_chunk::<L>() else { continue };
                    let values = widen_all(values);
                    for t in 0..T {
                        let weight = weights[t][row];
                        for l in 0..L {
                            let sum = mul_add::<S>(weight, values[l], sums[t][l]);
                            sums[t][l] = if HIDES && weight == 0.0 { sums[t][l] } else { sum };
                        }
                    }
                }
                for t in 0..T {
                    part[t * width + 2 + d..][..L].copy_from_slice(&sums[t]);
                }
            }
        }
    }
}

/// Turns scores into weights relative to their maximum; gives the maximum and the sum of the weights.
#[inline(always)]
fn softmax<S: Simd, const L: usize>(scores: &mut [f32]) -> (f32, f32) {
    let mut max = [f32::NEG_INFINITY; L];
    for scores in scores.as_chunks::<L>().0 {
        for l in 0..L {
            // Passes over NaN, which comes back through the sum.
            max[l] = if scores[l] > max[l] { scores[l] } else { max[l] };
        }
    }
    let max = max.into_iter().fold(f32::NEG_INFINITY, f32::max);
    // Where every score is -inf, `score - max` would be NaN.
    let base = if max == f32::NEG_INFINITY { 0.0 } else { max };
    let mut sums = [0.0f32; L];
    for scores in scores.as_chunks_mut::<L>().0 {
        for l in 0..L {
            scores[l] = exp::<S>(scores[l] - base);
            sums[l] += scores[l];
        }
    }
    (max, sums.into_iter().sum())
}

/// A loop, since the compiler makes no vectors of `map` where widening takes several operations, as it does from f16.
#[inline(always)]
fn widen_all<E: Element, const L: usize>(lanes: &[E; L]) -> [f32; L] {
    let mut wide = [0.0; L];
    for l in 0..L {
        wide[l] = lanes[l].widen();
    }
    wide
}
