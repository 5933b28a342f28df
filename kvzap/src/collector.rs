use crate::random::mix;
use crate::torch::dims;
use crate::{Error, LayerInput, Result, Ridge, Scorer, Spans, kvzip_plus};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tch::{Kind, Tensor};

/// Makes a plain forward pass a training pass: a [`Scorer`] that adds each layer's hidden states
/// and [`kvzip_plus`] scores to a [`Ridge`], and returns +inf, so that nothing is forgotten.
///
/// Clones share what they gather: give one to the model, and keep one to call
/// [`begin`](Self::begin) before each text and [`take`](Self::take) after the last.
#[derive(Clone, Debug)]
pub struct Collector(Arc<Mutex<Inner>>);

#[derive(Debug)]
struct Inner {
    output_projections: Vec<Tensor>,
    ridge: Ridge,
    rows: usize,
    text: Option<(Spans, Vec<i64>)>, // and which tokens of the original to learn from
}

impl Collector {
    /// For a model with these `output_projections`, one `[hidden, query_heads * head_dim]` for each
    /// layer, and `kv_heads`. Of each text it learns from `rows` tokens, or from all if there are
    /// fewer.
    pub fn new(output_projections: Vec<Tensor>, kv_heads: usize, rows: usize) -> Result<Self> {
        let hidden = match output_projections.first() {
            Some(first) => {
                dims::<2>(first, "output_projections", "[hidden, query_heads * head_dim]")?[0]
                    as usize
            }
            None => return Err(Error::Layer { layer: 0, layers: 0 }),
        };
        let ridge = Ridge::new(output_projections.len(), hidden, kv_heads);
        Ok(Self(Arc::new(Mutex::new(Inner { output_projections, ridge, rows, text: None }))))
    }

    /// Announces the next forward pass: one sequence, whole, with its text at `spans`. `seed`
    /// chooses the tokens to learn from, the same in all layers.
    pub fn begin(&self, spans: Spans, seed: u64) {
        let mut inner = self.inner();
        let tokens = choose(spans.original.len(), inner.rows, seed);
        inner.text = Some((spans, tokens));
    }

    /// What was gathered since the last call, leaving an empty fit: so held-out texts can follow.
    pub fn take(&self) -> Ridge {
        let ridge = &mut self.inner().ridge;
        let empty = ridge.empty();
        std::mem::replace(ridge, empty)
    }

    /// Nothing is half-done when a holder panics: what a layer adds is added last.
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Scorer<Tensor> for Collector {
    fn score(&self, input: LayerInput<'_, Tensor>) -> Result<Tensor> {
        let inner = &mut *self.inner();
        let (spans, tokens) = inner.text.as_ref().ok_or(Error::NoText)?;
        let (layer, layers) = (input.layer, inner.output_projections.len());
        let projection =
            inner.output_projections.get(layer).ok_or(Error::Layer { layer, layers })?;
        let scores = kvzip_plus(input, projection, spans)?; // [1, kv_heads, original]
        let tokens = Tensor::f_from_slice(tokens)?.f_to_device(scores.device())?;
        let targets = scores.f_squeeze_dim(0)?.f_transpose(0, 1)?.f_index_select(0, &tokens)?;
        let rows = tokens.f_add_scalar(spans.original.start as i64)?;
        let hidden = input.hidden.f_squeeze_dim(0)?.f_index_select(0, &rows)?;
        inner.ridge.add_tensors(layer, &hidden, &targets)?;
        let [batch, heads, total, _] =
            dims(input.keys, "keys", "[batch, kv_heads, tokens, head_dim]")?;
        Ok(Tensor::f_full([batch, heads, total], f64::INFINITY, (Kind::Float, scores.device()))?)
    }
}

/// `rows` of `0..tokens` without repetition, in order.
fn choose(tokens: usize, rows: usize, seed: u64) -> Vec<i64> {
    let mut order: Vec<i64> = (0..tokens as i64).collect();
    order.sort_by_key(|&token| mix(mix(seed) ^ token as u64));
    order.truncate(rows);
    order.sort_unstable();
    order
}
