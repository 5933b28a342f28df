//! From hidden states on the card to drop bits, by a KVzap surrogate.
//!
//! A surrogate is small and is asked for every token of every layer, so what it costs is launches, rounds through memory
//! and a first GEMM; one launch does it all, from the hidden states to the bits.

use crate::cuda::driver::scores::{self as launch, Call, Held, Kernels};
use crate::cuda::view::{DeviceBits, DeviceBitsMut, DeviceView, DeviceViewMut, check_type};
use crate::error::{Error, Result};
use crate::shape::Dtype;
use crate::view::{check_length, check_shape};
use cudarc::driver::CudaStream;
use half::bf16;
use std::sync::Arc;

/// Heads that the kernels can hold.
pub(super) const MAX_HEADS: usize = 32;

/// What to round on the way to a score.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScorePrecision {
    /// Nothing: sums, hidden units and scores are f32.
    F32,
    /// What torch's bf16 modules round: hidden units before and after GELU, scores, and the threshold, all to bf16.
    MatchTorchBf16,
}

/// Which tokens to drop.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ScoreRule {
    /// Tokens that score less than this are dropped; a NaN is kept.
    pub threshold: f32,
    /// What to round on the way.
    pub precision: ScorePrecision,
}

/// A surrogate's weights as its file has them, rows contiguous. Heads and hidden units are counted by the biases.
#[derive(Debug, Clone, Copy)]
pub enum SurrogateWeights<'a> {
    /// Scores are `W h + b`.
    Linear {
        /// `[heads, dim]`.
        weight: &'a [bf16],
        /// `[heads]`.
        bias: &'a [bf16],
    },
    /// Scores are `W2 gelu(W1 h + b1) + b2`, with the exact GELU.
    Mlp {
        /// `[width, dim]`.
        first: &'a [bf16],
        /// `[width]`.
        first_bias: &'a [bf16],
        /// `[heads, width]`.
        second: &'a [bf16],
        /// `[heads]`.
        second_bias: &'a [bf16],
    },
}

/// One layer's surrogate on the card. Made by [`Scores::surrogate`].
#[derive(Debug)]
pub struct Surrogate {
    pub(super) dim: usize,
    /// Hidden units, 0 of a linear one.
    pub(super) width: usize,
    pub(super) heads: usize,
    /// Elements between rows of `second`.
    pub(super) pitch: usize,
    pub(super) first: Held<bf16>,
    pub(super) first_bias: Held<f32>,
    pub(super) second: Held<bf16>,
    pub(super) second_bias: Held<f32>,
    /// What blocks hand to each other.
    pub(super) parts: Held<f32>,
}

impl Surrogate {
    /// Columns of the hidden states.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Hidden units; none of a linear surrogate.
    pub fn width(&self) -> Option<usize> {
        (self.width > 0).then_some(self.width)
    }

    /// Kv heads that it scores for.
    pub fn heads(&self) -> usize {
        self.heads
    }
}

/// The kernels that score, on a stream of a card of compute capability 8.0 or newer. One serves all layers.
///
/// ```no_run
/// # use half::bf16;
/// # use paged_kernels::cudarc::driver::CudaContext;
/// # use paged_kernels::{
/// #     DeviceBits, DeviceBitsMut, DeviceView, ScorePrecision, ScoreRule, Scores, SurrogateWeights,
/// # };
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let (weight, bias) = (vec![bf16::ONE; 8 * 4096], vec![bf16::ZERO; 8]);
/// let stream = CudaContext::new(0)?.new_stream()?;
/// let scores = Scores::on(stream.clone())?;
/// let layer =
///     scores.surrogate(4096, SurrogateWeights::Linear { weight: &weight, bias: &bias })?;
///
/// let tokens = 100;
/// let hidden = stream.alloc_zeros::<bf16>(tokens * 4096)?;
/// let mut words = stream.alloc_zeros::<u32>(DeviceBits::words([8, tokens]))?;
/// let hidden = DeviceView::of(&hidden, [1, tokens, 4096], &stream)?;
/// let mut bits = DeviceBitsMut::of(&mut words, [8, tokens], &stream)?;
/// let rule = ScoreRule { threshold: -4.0, precision: ScorePrecision::MatchTorchBf16 };
/// scores.score(&layer, hidden, rule, &mut bits, None)?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Scores {
    kernels: Kernels,
}

impl Scores {
    /// Loads the kernels onto the card of `stream`.
    ///
    /// # Errors
    /// [`OldDriver`](Error::OldDriver), [`Card`](Error::Card) where the machine can't; [`Cuda`](Error::Cuda).
    pub fn on(stream: Arc<CudaStream>) -> Result<Self> {
        Ok(Self { kernels: Kernels::load(stream, true)? })
    }

    /// As [`on`](Self::on), but with the kernels that every card runs, whatever the card: to compare with.
    ///
    /// # Errors
    /// Those of [`on`](Self::on).
    pub fn portable(stream: Arc<CudaStream>) -> Result<Self> {
        Ok(Self { kernels: Kernels::load(stream, false)? })
    }

    /// The stream that it works on.
    pub fn stream(&self) -> &Arc<CudaStream> {
        self.kernels.stream()
    }

    /// Copies a layer's weights to the card, for hidden states of `dim` columns.
    ///
    /// # Errors
    /// [`Surrogate`](Error::Surrogate) for sizes that no kernel holds; [`Length`](Error::Length) for weights that do not
    /// go with their biases; [`Cuda`](Error::Cuda).
    pub fn surrogate(&self, dim: usize, weights: SurrogateWeights<'_>) -> Result<Surrogate> {
        let none: &[bf16] = &[];
        let (first, first_bias, second, second_bias) = match weights {
            SurrogateWeights::Linear { weight, bias } => (none, none, weight, bias),
            SurrogateWeights::Mlp { first, first_bias, second, second_bias } => {
                check_size("hidden units", first_bias.len(), self.kernels.most_units())?;
                (first, first_bias, second, second_bias)
            }
        };
        let (width, heads) = (first_bias.len(), second_bias.len());
        check_size("columns", dim, 1 << 24)?;
        check_size("heads", heads, MAX_HEADS)?;
        check_length("first weights", first.len(), width * dim)?;
        let row = if width == 0 { dim } else { width };
        check_length("second weights", second.len(), heads * row)?;

        // Tiles reach past the last unit and the last head, into zeros.
        let pitch = if width == 0 { dim } else { launch::units_of_tiles(width) };
        let mut padded = vec![bf16::ZERO; heads.next_multiple_of(8) * pitch];
        for (to, from) in padded.chunks_exact_mut(pitch).zip(second.chunks_exact(row)) {
            to[..row].copy_from_slice(from);
        }
        let upload = |data: &[bf16]| self.kernels.upload(data);
        let wide = |data: &[bf16]| {
            let data = data.iter().map(|x| x.to_f32()).collect::<Vec<_>>();
            self.kernels.upload(&data)
        };
        let mut units = first_bias.to_vec();
        units.resize(if width == 0 { 0 } else { pitch }, bf16::ZERO);
        let first = upload(first)?;
        Ok(Surrogate {
            dim,
            width,
            heads,
            pitch,
            first,
            first_bias: wide(&units)?,
            second: upload(&padded)?,
            second_bias: wide(second_bias)?,
            parts: self.kernels.zeros(launch::parts(width, heads))?,
        })
    }

    /// Scores bf16 `hidden` `[1, T, dim]` and queues it on the stream; `bits` gets a bit for each head and token, and
    /// `scores`, if given, is f32 `[H, T, 1]`. It allocates nothing and waits for nothing, so a graph can capture it; but
    /// calls must run one after the other, also in graphs.
    ///
    /// Rows that begin at a multiple of 16 bytes take fast kernels if `dim` is a multiple of 64 and hidden units one of
    /// 8, any others a plain one. The same inputs give the same bits in every run; a token's score depends in its last bits on how many it
    /// comes with.
    ///
    /// # Errors
    /// [`Shape`](Error::Shape) unless the arguments go with each other and the surrogate;
    /// [`Type`](Error::Type) for another type;
    /// [`OtherStream`](Error::OtherStream) for another stream's surrogate; [`Cuda`](Error::Cuda).
    pub fn score(
        &self,
        surrogate: &Surrogate,
        hidden: DeviceView<'_>,
        rule: ScoreRule,
        bits: &mut DeviceBitsMut<'_>,
        scores: Option<&mut DeviceViewMut<'_>>,
    ) -> Result<()> {
        let Surrogate { dim, heads, .. } = *surrogate;
        let tokens = hidden.shape()[1];
        check_size("tokens", tokens.max(1), i32::MAX as usize)?;
        check_shape("hidden", hidden.shape(), [1, tokens, dim])?;
        check_type("hidden", hidden.dtype(), Dtype::Bf16)?;
        let bits: DeviceBits<'_> = bits.bits();
        let [bit_heads, bit_tokens] = bits.shape();
        check_shape("bits", [bit_heads, bit_tokens, 1], [heads, tokens, 1])?;
        if let Some(scores) = &scores {
            check_shape("scores", scores.shape(), [heads, tokens, 1])?;
            check_type("scores", scores.dtype(), Dtype::F32)?;
        }
        if surrogate.first.slice.stream() != self.stream() {
            return Err(Error::OtherStream);
        }
        let torch = rule.precision == ScorePrecision::MatchTorchBf16;
        let threshold =
            if torch { bf16::from_f32(rule.threshold).to_f32() } else { rule.threshold };
        let call = Call { surrogate, hidden, bits, scores: scores.as_deref(), threshold, torch };
        if tokens == 0 { Ok(()) } else { self.kernels.score(&call) }
    }
}

fn check_size(field: &'static str, found: usize, most: usize) -> Result<()> {
    if (1..=most).contains(&found) { Ok(()) } else { Err(Error::Surrogate { field, found, most }) }
}
