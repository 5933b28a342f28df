//! A cache beside a naive twin that forgets nothing: every step is compared with masked dense attention in f64.

#![allow(dead_code, unused_imports, unused_macros)]

#[cfg(feature = "cuda")]
pub mod on_card;

use half::bf16;
use paged_kernels::{CacheShape, Dtype, PagedAttention, Result, Sequence, View, ViewMut};
use std::collections::BTreeMap;

/// A small shape that has a head of each kind of trouble: two layers, two kv heads, a window of 5.
pub fn small(dtype: Dtype) -> CacheShape {
    CacheShape {
        layers: 2,
        kv_heads: 2,
        query_heads: 6,
        head_dim: 16,
        page_size: 4,
        window: 5,
        pages: 4096,
        dtype,
    }
}

/// One layer with two kv heads of one query head each.
pub fn plain(dtype: Dtype) -> CacheShape {
    CacheShape { layers: 1, query_heads: 2, page_size: 16, ..small(dtype) }
}

pub const DTYPES: [Dtype; 4] = [Dtype::F32, Dtype::Bf16, Dtype::F16, Dtype::F8];

/// Those that views have.
pub const VIEWED: [Dtype; 3] = [Dtype::F32, Dtype::Bf16, Dtype::F16];

/// Builds a backend.
pub type New<B> = dyn Fn(CacheShape) -> Result<B>;

/// Runs a body for every backend in every dtype.
macro_rules! on_every_backend {
    ($($name:ident => $body:path;)*) => {$(
        mod $name {
            use super::*;

            #[test]
            fn reference() {
                common::DTYPES.iter().for_each(|&dtype| $body(&paged_kernels::Reference::new, dtype));
            }

            #[test]
            fn cpu() {
                common::DTYPES.iter().for_each(|&dtype| $body(&paged_kernels::Cpu::new, dtype));
            }

            #[cfg(feature = "cuda")]
            #[test]
            #[ignore = "needs a CUDA device"]
            fn cuda() {
                common::DTYPES.iter().for_each(|&dtype| $body(&paged_kernels::Cuda::new, dtype));
            }
        }
    )*};
}
pub(crate) use on_every_backend;

/// Runs the same bodies for `Resident`, in a module whose name says that they want a card.
macro_rules! on_resident {
    ($($name:ident => $body:path;)*) => {
        #[cfg(feature = "cuda")]
        mod cuda_resident {
            use super::*;

            $(
                #[test]
                #[ignore = "needs a CUDA device"]
                fn $name() {
                    common::DTYPES.iter().for_each(|&dtype| $body(&common::on_card::OnCard::new, dtype));
                }
            )*
        }
    };
}
pub(crate) use on_resident;

/// Pseudo-random numbers, the same in every run.
#[derive(Debug, Clone)]
pub struct Noise(pub u64);

impl Noise {
    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// In -1..1, a multiple of 2^-23: exact in f32 alone.
    pub fn fine(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    /// In -1..1, exact in bf16 and, being a multiple of 2^-23 still, in f16, so that every dtype stores it as it is.
    pub fn next(&mut self) -> f32 {
        bf16::from_f32(self.fine()).to_f32()
    }

    pub fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.next()).collect()
    }

    pub fn bools(&mut self, n: usize, share: f64) -> Vec<bool> {
        (0..n).map(|_| ((self.bits() >> 11) as f64) < share * (1u64 << 53) as f64).collect()
    }
}

/// All tokens of one text in one head: key, value, and whether it goes once it has left the window.
type Head = Vec<(Vec<f32>, Vec<f32>, bool)>;

/// A backend and its naive twin.
pub struct Twins<B> {
    pub backend: B,
    pub noise: Noise,
    /// Share of tokens that are dropped.
    pub drop: f64,
    /// Tokens are keys and values of each head, `[layers * H]`.
    pub texts: BTreeMap<Sequence, Vec<Head>>,
    /// The largest difference of an output seen.
    pub largest: f64,
    /// Whether texts may share pages.
    pub forked: bool,
}

/// Outputs and log-sums of a step, by layer.
pub type Outputs = Vec<(Vec<f32>, Vec<f32>)>;

impl<B: PagedAttention> Twins<B> {
    pub fn new(backend: B, drop: f64) -> Self {
        Self {
            backend,
            noise: Noise(0x9e37_79b9),
            drop,
            texts: BTreeMap::new(),
            largest: 0.0,
            forked: false,
        }
    }

    pub fn allocate(&mut self) -> Sequence {
        let CacheShape { layers, kv_heads, .. } = *self.backend.shape();
        let sequence = self.backend.allocate().expect("allocates");
        self.texts.insert(sequence, vec![Head::new(); layers * kv_heads]);
        sequence
    }

    /// A second text that goes on from where `sequence` is.
    pub fn fork(&mut self, sequence: Sequence) -> Sequence {
        let fork = self.backend.fork(sequence).expect("forks");
        self.texts.insert(fork, self.texts[&sequence].clone());
        self.forked = true;
        fork
    }

    /// A text whose prompt of `tokens` tokens is filled.
    pub fn prompt(&mut self, tokens: usize) -> Sequence {
        let sequence = self.allocate();
        self.fill(sequence, tokens).expect("fills");
        sequence
    }

    pub fn fill(&mut self, sequence: Sequence, tokens: usize) -> Result<()> {
        let CacheShape { layers, kv_heads, head_dim, .. } = *self.backend.shape();
        for layer in 0..layers {
            let shape = [kv_heads, tokens, head_dim];
            let keys = self.noise.floats(kv_heads * tokens * head_dim);
            let values = self.noise.floats(kv_heads * tokens * head_dim);
            let drops = self.noise.bools(kv_heads * tokens, self.drop);
            let views = (View::new(&keys[..], shape)?, View::new(&values[..], shape)?);
            self.backend.fill(sequence, layer, views.0, views.1, &drops)?;
            self.remember(sequence, layer, 0..tokens, tokens, &keys, &values, &drops);
        }
        Ok(())
    }

    #[allow(clippy::too_many_arguments)]
    fn remember(
        &mut self,
        sequence: Sequence,
        layer: usize,
        range: std::ops::Range<usize>,
        tokens: usize,
        keys: &[f32],
        values: &[f32],
        drops: &[bool],
    ) {
        let CacheShape { kv_heads, head_dim, dtype, .. } = *self.backend.shape();
        for head in 0..kv_heads {
            for i in range.clone().map(|token| head * tokens + token) {
                let stored = |rows: &[f32]| {
                    let mut row = rows[i * head_dim..][..head_dim].to_vec();
                    dtype.round(&mut row);
                    row
                };
                let token = (stored(keys), stored(values), drops[i]);
                self.texts.get_mut(&sequence).expect("lives")[layer * kv_heads + head].push(token);
            }
        }
    }

    /// Takes a step and compares every output with the twin's.
    pub fn step(&mut self, step: &[(Sequence, usize)]) -> Result<Outputs> {
        self.backend.begin_step(step)?;
        let CacheShape { layers, kv_heads, query_heads, head_dim, .. } = *self.backend.shape();
        let total = step.iter().map(|(_, tokens)| tokens).sum();
        let mut outputs = Vec::new();
        for layer in 0..layers {
            let shape = [kv_heads, total, head_dim];
            let keys = self.noise.floats(kv_heads * total * head_dim);
            let values = self.noise.floats(kv_heads * total * head_dim);
            let drops = self.noise.bools(kv_heads * total, self.drop);
            let views = (View::new(&keys[..], shape)?, View::new(&values[..], shape)?);
            self.backend.append(layer, views.0, views.1, &drops)?;
            let mut start = 0;
            for &(sequence, tokens) in step {
                let range = start..start + tokens;
                self.remember(sequence, layer, range, total, &keys, &values, &drops);
                start += tokens;
            }
            let queries = self.noise.floats(query_heads * total * head_dim);
            let output = self.attend(layer, total, &queries)?;
            self.compare(step, layer, &queries, &output);
            outputs.push(output);
        }
        self.check_lengths(step);
        Ok(outputs)
    }

    /// Outputs and log-sums of `queries`, `[Hq, tokens, D]`.
    pub fn attend(
        &mut self,
        layer: usize,
        tokens: usize,
        queries: &[f32],
    ) -> Result<(Vec<f32>, Vec<f32>)> {
        let CacheShape { query_heads, head_dim, .. } = *self.backend.shape();
        let shape = [query_heads, tokens, head_dim];
        let (mut out, mut lse) =
            (vec![f32::NAN; queries.len()], vec![f32::NAN; query_heads * tokens]);
        let views = (View::new(queries, shape)?, ViewMut::new(&mut out[..], shape)?);
        self.backend.attend(layer, views.0, scale(head_dim), views.1, Some(&mut lse))?;
        Ok((out, lse))
    }

    fn compare(
        &mut self,
        step: &[(Sequence, usize)],
        layer: usize,
        queries: &[f32],
        (out, lse): &(Vec<f32>, Vec<f32>),
    ) {
        let CacheShape { kv_heads, query_heads, head_dim, window, .. } = *self.backend.shape();
        let total: usize = step.iter().map(|(_, tokens)| tokens).sum();
        let mut start = 0;
        for &(sequence, tokens) in step {
            for (i, query_head) in (0..tokens).flat_map(|i| (0..query_heads).map(move |q| (i, q))) {
                let head = query_head / (query_heads / kv_heads);
                let head = &self.texts[&sequence][layer * kv_heads + head];
                let row = query_head * total + start + i;
                let query = &queries[row * head_dim..][..head_dim];
                let newest = head.len() - tokens + i;
                let live = live(head, tokens, window).filter(|&token| token <= newest);
                let (expected, log_sum) = attend(head, live, query);
                assert!(
                    (f64::from(lse[row]) - log_sum).abs() < 1e-5 || f64::from(lse[row]) == log_sum
                );
                for (x, y) in out[row * head_dim..][..head_dim].iter().zip(expected) {
                    let difference = (f64::from(*x) - y).abs();
                    self.largest = self.largest.max(difference);
                    assert!(
                        difference < 1e-5,
                        "query head {query_head}, token {i}: {x} is not {y}"
                    );
                }
            }
            start += tokens;
        }
    }

    fn check_lengths(&self, step: &[(Sequence, usize)]) {
        let window = self.backend.shape().window;
        for &(sequence, tokens) in step {
            let lengths = self.backend.lengths(sequence).expect("lives");
            let expected =
                self.texts[&sequence].iter().map(|head| live(head, tokens, window).count());
            assert_eq!(lengths, expected.collect::<Vec<_>>());
        }
    }

    /// What statistics must say, from the lengths.
    pub fn check_stats(&self) {
        let shape = self.backend.shape();
        let lengths =
            self.texts.keys().flat_map(|&text| self.backend.lengths(text).expect("lives"));
        let lengths = lengths.collect::<Vec<_>>();
        let pages = lengths.iter().map(|len| len.div_ceil(shape.page_size)).sum::<usize>();
        let stats = self.backend.stats();
        assert_eq!(stats.rows, lengths.iter().sum::<usize>());
        let used = stats.pages_used;
        assert!(used == pages || (self.forked && used < pages), "{used} of {pages}");
        assert_eq!(stats.pages_free, shape.pages - used);
        assert_eq!(stats.bytes, used * shape.page_bytes());
        assert!(stats.peak_bytes >= stats.bytes && stats.reserved_bytes >= stats.bytes);
    }

    pub fn release(&mut self, sequence: Sequence) {
        self.backend.release(sequence).expect("releases");
        self.texts.remove(&sequence);
    }
}

pub fn view(data: &[f32], shape: [usize; 3]) -> View<'_> {
    View::new(data, shape).expect("is of that shape")
}

pub fn scale(dim: usize) -> f32 {
    (dim as f32).powf(-0.5)
}

/// Tokens that are live after a step of `tokens` tokens.
fn live(head: &Head, tokens: usize, window: usize) -> impl Iterator<Item = usize> {
    let old = head.len().saturating_sub(tokens + window);
    (0..head.len()).filter(move |&i| i >= old || !head[i].2)
}

/// Dense attention in f64.
fn attend(head: &Head, live: impl Iterator<Item = usize>, query: &[f32]) -> (Vec<f64>, f64) {
    let dot = |key: &[f32]| {
        key.iter().zip(query).map(|(k, q)| f64::from(*k) * f64::from(*q)).sum::<f64>()
    };
    let rows = live.map(|i| (dot(&head[i].0) * f64::from(scale(query.len())), &head[i].1));
    let rows = rows.collect::<Vec<_>>();
    let max = rows.iter().map(|row| row.0).fold(f64::NEG_INFINITY, f64::max);
    let sum = rows.iter().map(|row| (row.0 - max).exp()).sum::<f64>();
    let mut out = vec![0.0; query.len()];
    for (score, value) in rows {
        let weight = (score - max).exp() / sum;
        out.iter_mut().zip(value).for_each(|(x, v)| *x += weight * f64::from(*v));
    }
    (out, max + sum.ln())
}
