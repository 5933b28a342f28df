//! How fast a card reads and writes, and how much it holds, for `longctx bench`.
//!
//! Weights may be of any model; caches are filled with random rows, of which a random surrogate drops a share: the threshold of a
//! layer is that quantile of its scores for random hidden states. So heads keep unequal shares, and the surrogate costs what a
//! trained one does.

use super::memory;
use super::{CardCache, Gates, Place, Step, Token, resident_for};
use crate::cache::KvCache;
use crate::causal_lm::CausalLm;
use crate::config::Config;
use crate::decoder::Decoder;
use crate::error::Result;
use crate::hooks::{Hooks, Pruning};
use crate::paged::cache_shape;
use crate::ranks::Rank;
use crate::sampling::Sampling;
use kvzap::{Affine, LayerInput, Scorer, Surrogate, Threshold, TorchSurrogate, WINDOW};
use paged_kernels::{CacheShape, Mode, Resident, Seats};
use std::time::Instant;
use tch::{Kind, Tensor};

/// Hidden units of the surrogate, as the published ones for models of this size have.
const WIDTH: usize = 512;
/// Steps before those that count.
const WARM: usize = 8;
/// Tokens for which there is room beyond a prompt, kept as its own are.
const GROWTH: usize = 256;

/// A model, or a part of one, on a card, and what the card can do. Parts are measured side by side, each on its card: they wait
/// for each other, and the slowest counts.
#[derive(Debug)]
pub struct Bench {
    model: Decoder,
    scorer: TorchSurrogate,
    /// Bytes a second of a copy on the card, read and written.
    pub copy_bytes_per_second: f64,
}

/// What steps took.
#[derive(Debug, Clone, PartialEq)]
pub struct Decoded {
    /// Of each step on the card, seconds, in ascending order.
    pub seconds: Vec<f64>,
    /// Of a step as the host sees it, when each is queued as soon as it can be.
    pub wall_seconds: f64,
    /// The time in which weights and kept rows can be copied.
    pub floor_seconds: f64,
    /// Bytes of keys and values, from the cache's own count.
    pub kv_bytes: usize,
    /// Bytes that the card lost to the cache, as the driver counts them: its tables and room for 256 more tokens are among them.
    pub cache_bytes: usize,
    /// Bytes of the card in use, as the driver counts them.
    pub used_bytes: usize,
}

/// What a prompt took.
#[derive(Debug, Clone, PartialEq)]
pub struct Prefilled {
    /// Of each run, scoring and compaction included, in ascending order.
    pub seconds: Vec<f64>,
    /// Bytes of keys and values that were kept.
    pub kv_bytes: usize,
}

impl Bench {
    /// Measures the card of `model`, which lies on it in bf16.
    pub fn new(model: Decoder) -> Result<Self> {
        let device = model.embedding.device();
        let surrogate = random_surrogate(&model.config)?;
        let scorer = TorchSurrogate::new(&surrogate, Kind::BFloat16, device)?;
        Ok(Self { scorer, copy_bytes_per_second: memory::copies(&memory::stream(device)?)?, model })
    }

    /// The card's name.
    pub fn card(&self) -> Result<String> {
        memory::name(&*memory::stream(self.model.embedding.device())?)
    }

    /// Steps of `batch` texts of `tokens` tokens each, of which heads keep a share of `keep` in the mean, their windows among it.
    ///
    /// # Errors
    /// Memory that is not there, and those of [`Step::new`].
    pub fn decode(
        &self,
        batch: usize,
        tokens: usize,
        keep: f64,
        mode: Mode,
        steps: usize,
    ) -> Result<Decoded> {
        let _no_grad = tch::no_grad_guard();
        let config = &self.model.config;
        let stream = memory::stream(self.model.embedding.device())?;
        let synthetic = self.synthetic(tokens, judged_to_stay(tokens, keep))?;
        let before = memory::used(&stream)?;
        let mut cache = self.room(batch, tokens, synthetic.keep()?, mode, None)?;
        let cache_bytes = memory::used(&stream)?.saturating_sub(before);
        let (mut places, mut kv_bytes) = (Vec::new(), 0);
        for text in 0..batch {
            let text = synthetic.fill(&mut cache, text)?;
            kv_bytes += text.usage().bytes;
            let (sequence, token) = (text.sequence(), Token::Known(7));
            let sampling = Sampling::default();
            places.push(Some(Place { sequence, token, position: tokens, sampling }));
        }
        let gates = synthetic.thresholds.clone().map(|of| Gates::new(&self.scorer, of));
        drop(synthetic);
        let mut step = Step::new(&self.model, gates.as_ref(), &cache, config.vocab_size)?;
        step.batch(&mut cache, &places)?;
        let mut seconds = Vec::new();
        for _ in 0..WARM + steps {
            seconds.push(memory::timed(cache.stream(), || step.run(&cache, &[]).map(drop))?);
        }
        seconds.drain(..WARM);
        seconds.sort_by(f64::total_cmp);
        let start = Instant::now();
        for _ in 0..steps {
            step.run(&cache, &[])?;
        }
        memory::wait(cache.stream())?;
        let wall_seconds = start.elapsed().as_secs_f64() / steps as f64;
        if cache.missing()? > 0 {
            let (wanted, free) = (cache.missing()?, cache.free_pages()?);
            return Err(paged_kernels::Error::OutOfPages { wanted, free }.into());
        }
        // Each part reads a share of the head.
        let head = config.vocab_size * config.hidden_size;
        let share = head / self.model.rank.as_ref().map_or(1, Rank::of);
        let bytes = 2 * (config.matrix_elements() - head + share) + kv_bytes;
        let floor_seconds = bytes as f64 / self.copy_bytes_per_second;
        let used_bytes = memory::used(cache.stream())?;
        Ok(Decoded { seconds, wall_seconds, floor_seconds, kv_bytes, cache_bytes, used_bytes })
    }

    /// A prompt of `tokens` through the whole model, `runs` times; with `keep` under 1 scored, judged and compacted, by a
    /// threshold for random hidden states, which is not quite that of the model's: what was kept is in the result.
    pub fn prefill(&self, tokens: usize, keep: f64, runs: usize) -> Result<Prefilled> {
        let _no_grad = tch::no_grad_guard();
        let device = self.model.embedding.device();
        let most = self.model.config.vocab_size as i64;
        let ids: Vec<i64> = (0..tokens as i64).map(|i| i * 7919 % most).collect();
        let ids = Tensor::f_from_slice(&ids)?.f_to_device(device)?.f_unsqueeze(0)?;
        let stay = judged_to_stay(tokens, keep);
        let hooks = match self.synthetic(tokens.min(4096), stay)?.thresholds {
            None => Hooks::default(),
            Some(of_layers) => Hooks::pruning(Pruning {
                scorer: Box::new(self.scorer.shallow_clone()),
                policy: Box::new(Threshold::new(
                    of_layers.iter().sum::<f32>() / of_layers.len() as f32,
                )?),
                while_decoding: true,
            }),
        };
        let (mut seconds, mut kv_bytes) = (Vec::new(), 0);
        for _ in 0..=runs {
            // Random hidden states are not the model's: more may stay than was asked for.
            let mut cache = self.room(1, tokens, 1.0, Mode::Fast, None)?;
            let mut text = CardCache::new(&mut cache)?;
            memory::wait_for_torch(device);
            let start = Instant::now();
            let hidden = self.model.forward(&ids, &mut text, &hooks)?;
            let _ = self.model.logits(&hidden.f_select(1, -1)?)?;
            memory::wait_for_torch(device);
            seconds.push(start.elapsed().as_secs_f64());
            kv_bytes = text.usage().bytes;
        }
        seconds.remove(0);
        seconds.sort_by(f64::total_cmp);
        Ok(Prefilled { seconds, kv_bytes })
    }

    /// Texts of `tokens` tokens that fit `bytes` of the card, weights among them: they are filled until no more does.
    pub fn capacity(&self, tokens: usize, keep: f64, bytes: usize) -> Result<Capacity> {
        let _no_grad = tch::no_grad_guard();
        let synthetic = self.synthetic(tokens, judged_to_stay(tokens, keep))?;
        let stream = memory::stream(self.model.embedding.device())?;
        let used = memory::used(&stream)?;
        // Tables and rings of as many texts as there may be, and what a prompt takes on its way.
        let (texts, aside) = (128, 2 << 30);
        let shape = cache_shape(&self.model.config, 16, WINDOW, Kind::BFloat16)?;
        let pages = bytes.saturating_sub(used + aside) / shape.page_bytes();
        let mut cache = self.room(texts, tokens, keep, Mode::Fast, Some(pages))?;
        let (mut held, mut kv_bytes, mut most) = (0, 0, 0);
        while held < texts && cache.free_pages()? >= most {
            let before = cache.free_pages()?;
            let text = synthetic.fill(&mut cache, held)?;
            let bytes = text.usage().bytes;
            most = before - cache.free_pages()?;
            if cache.missing()? > 0 {
                break;
            }
            (held, kv_bytes) = (held + 1, kv_bytes + bytes);
        }
        let used_bytes = memory::used(cache.stream())?;
        Ok(Capacity { texts: held, kv_bytes, used_bytes })
    }

    /// A cache for `texts` texts of `tokens` tokens, each head with room for `keep` of them in the mean unless `pages` says how much.
    fn room(
        &self,
        texts: usize,
        tokens: usize,
        keep: f64,
        mode: Mode,
        pages: Option<usize>,
    ) -> Result<Resident> {
        let config = &self.model.config;
        let shape = cache_shape(config, 16, WINDOW, Kind::BFloat16)?;
        let rows = (((tokens + GROWTH) as f64 * keep) as usize).max(WINDOW);
        let own = config.layers * config.kv_heads * texts * (rows.div_ceil(shape.page_size) + 1);
        let shape = CacheShape { pages: pages.unwrap_or(own), ..shape };
        let seats = Seats { texts, tokens: tokens + GROWTH, pass: 1, mode };
        resident_for(&self.model, shape, seats)
    }

    /// A prompt of random rows, with what each layer drops of it: all but a share of `stay`.
    fn synthetic(&self, tokens: usize, stay: f64) -> Result<Synthetic> {
        let config = &self.model.config;
        let options = (Kind::BFloat16, self.model.embedding.device());
        let rows = [1, config.kv_heads as i64, tokens as i64, config.head_dim as i64];
        let (keys, values) = (Tensor::f_randn(rows, options)?, Tensor::f_randn(rows, options)?);
        let mut synthetic = Synthetic { keys, values, drops: Vec::new(), thresholds: None };
        if stay >= 1.0 {
            return Ok(synthetic);
        }
        let hidden = Tensor::f_randn([1, tokens as i64, config.hidden_size as i64], options)?;
        let mut thresholds = Vec::new();
        for layer in 0..config.layers {
            let (queries, keys, values) = (&hidden, &hidden, &hidden); // which this scorer does not read
            let input = LayerInput { layer, hidden: &hidden, queries, keys, values };
            let scores = self.scorer.score(input)?;
            let (sorted, _) = scores.f_to_kind(Kind::Float)?.f_reshape([-1])?.f_sort(0, false)?;
            let at = ((sorted.numel() - 1) as f64 * (1.0 - stay)) as i64;
            let threshold = sorted.f_double_value(&[at])?;
            thresholds.push(threshold as f32);
            synthetic.drops.push(scores.f_lt(threshold)?);
        }
        synthetic.thresholds = Some(thresholds);
        Ok(synthetic)
    }
}

/// What share of the tokens that have left the window may stay, so that `keep` of a text of `tokens` does.
fn judged_to_stay(tokens: usize, keep: f64) -> f64 {
    let judged = tokens.saturating_sub(WINDOW) as f64;
    if keep >= 1.0 || judged == 0.0 {
        return 1.0;
    }
    ((tokens as f64 * keep - WINDOW as f64) / judged).max(0.0)
}

/// How many texts fit.
#[derive(Debug, Clone, PartialEq)]
pub struct Capacity {
    /// Texts.
    pub texts: usize,
    /// Bytes of their keys and values.
    pub kv_bytes: usize,
    /// Bytes of the card in use, as the driver counts them.
    pub used_bytes: usize,
}

/// A prompt of random rows.
struct Synthetic {
    keys: Tensor,
    values: Tensor,
    /// Of each layer; none where all stay.
    drops: Vec<Tensor>,
    thresholds: Option<Vec<f32>>,
}

impl Synthetic {
    /// What share stays, windows among it: a little more than was asked for, for many scores are equal in bf16.
    fn keep(&self) -> Result<f64> {
        let tokens = self.keys.size()[2] as usize;
        let judged = tokens.saturating_sub(WINDOW) as f64 / tokens as f64;
        let mut dropped = 0.0;
        for drops in &self.drops {
            dropped += drops.f_mean(Kind::Float)?.f_double_value(&[])? / self.drops.len() as f64;
        }
        Ok(1.0 - dropped * judged)
    }

    /// A text of these rows, of which the `n`th forgets others than the one before.
    fn fill<'a>(&self, cache: &'a mut Resident, n: usize) -> Result<CardCache<&'a mut Resident>> {
        let layers = cache.shape().layers;
        let mut text = CardCache::new(cache)?;
        text.begin(self.keys.size()[2] as usize)?;
        for layer in 0..layers {
            let drops = self.drops.get(layer).map(|drops| drops.f_roll([997 * n as i64], [2]));
            text.store(layer, &self.keys, &self.values, drops.transpose()?.as_ref())?;
        }
        Ok(text)
    }
}

/// An MLP whose scores spread as a trained one's do, wider over heads than over tokens.
fn random_surrogate(config: &Config) -> Result<Surrogate> {
    let mut state = 5u32;
    let mut noise = |count: usize, scale: f32| -> Vec<f32> {
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((state >> 8) as f32 / (1 << 23) as f32 - 1.0) * scale
        };
        (0..count).map(|_| next()).collect()
    };
    let mut layers = Vec::new();
    for _ in 0..config.layers {
        let first = Affine::new(noise(WIDTH * config.hidden_size, 0.03), noise(WIDTH, 0.03))?;
        let second =
            Affine::new(noise(config.kv_heads * WIDTH, 0.06), noise(config.kv_heads, 0.3))?;
        layers.push([first, second]);
    }
    Ok(Surrogate::mlp(layers)?)
}
