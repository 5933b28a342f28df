use crate::torch::dims;
use crate::{Error, LayerInput, Result, Scorer};
use tch::{Kind, Tensor};

/// Heads that look far keep all, others only the first tokens and the newest (DuoAttention, arXiv
/// 2410.10819), by the KVzip scores of a text seen before (arXiv 2505.23416, the variant that
/// depends on no context).
///
/// A token scores what its head does, and +inf if it is one of the first or the newest. So the rule
/// [`Rule::Model`](crate::Rule::Model) turns as many heads into streaming ones as make up the wanted
/// share, the worst first, the last of them partly. kvpress counts a share of heads instead, which
/// says nothing of how much cache that is.
#[derive(Clone, Debug)]
pub struct DuoAttention {
    heads: Vec<Vec<f32>>,
    sinks: i64,
    recent: i64,
}

impl DuoAttention {
    /// From a score for each layer and kv head. kvpress keeps 128 `sinks` and 256 `recent` tokens.
    pub fn new(heads: Vec<Vec<f32>>, sinks: usize, recent: usize) -> Self {
        Self { heads, sinks: sinks as i64, recent: recent as i64 }
    }

    /// A head's score is the largest of its tokens' in `scores`, `[1, kv_heads, tokens]` for each
    /// layer; infinite ones, which stand for protected tokens, do not count.
    pub fn of(scores: &[Tensor], sinks: usize, recent: usize) -> Result<Self> {
        let most = |scores: &Tensor| -> Result<Vec<f32>> {
            let [batch, ..]: [i64; 3] = dims(scores, "scores", "[1, kv_heads, tokens]")?;
            let finite = scores.f_masked_fill(&scores.f_isinf()?, f64::NEG_INFINITY)?;
            let most = finite.f_amax([2], false)?.f_view([batch, -1])?.f_amax([0], false)?;
            Ok(Vec::try_from(most.f_to_kind(Kind::Float)?)?)
        };
        Ok(Self::new(scores.iter().map(most).collect::<Result<_>>()?, sinks, recent))
    }

    /// Each layer's and kv head's score.
    pub fn heads(&self) -> &[Vec<f32>] {
        &self.heads
    }
}

impl Scorer<Tensor> for DuoAttention {
    fn score(&self, input: LayerInput<'_, Tensor>) -> Result<Tensor> {
        let layer = input.layer;
        let scores =
            self.heads.get(layer).ok_or(Error::Layer { layer, layers: self.heads.len() })?;
        let [batch, heads, tokens, _] =
            dims(input.keys, "keys", "[batch, kv_heads, tokens, head_dim]")?;
        if scores.len() as i64 != heads {
            let (expected, found) = (heads as usize, scores.len());
            return Err(Error::OtherModel { field: "kv heads", expected, found });
        }
        let scores = Tensor::f_from_slice(scores)?.f_to_device(input.keys.device())?;
        let scores = scores.f_view([1, heads, 1])?.f_repeat([batch, 1, tokens])?;
        let (first, last) = (self.sinks.min(tokens), self.recent.min(tokens));
        let _ = scores.f_narrow(2, 0, first)?.f_fill_(f64::INFINITY)?;
        let _ = scores.f_narrow(2, tokens - last, last)?.f_fill_(f64::INFINITY)?;
        Ok(scores)
    }
}
